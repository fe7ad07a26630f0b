"""Failed rows that are tried again: the right ones, one shard at a time, whole or not at all."""

import errno
from pathlib import Path

import pyarrow as pa
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.records import Prediction
from owlsam_ray.run.retry import ALL, FailedRows, Retry, find_failed, replace_rows
from owlsam_ray.run.shards import load_shard, read_footer, shard_url, write_shard
from owlsam_ray.schema import predictions_to_table
from tests.run.test_shards import prediction

FAILURES = [
    ("truncated", FailureClass.PERMANENT),
    ("fetch_failed: timeout (s3://b/k, 7 tries)", FailureClass.TRANSIENT),
    ("killed_process: SIGSEGV", FailureClass.QUARANTINED),
    ("missing", FailureClass.PERMANENT),
]


@pytest.fixture
def run(tmp_path: Path) -> str:
    """One shard: two images with labels, one without any, four that failed."""
    rows = [prediction(10, 2), prediction(11, 0)]
    rows += [Prediction(image_id=20 + number, failure=failure) for number, failure in enumerate(FAILURES)]
    rows.append(prediction(30, 3))
    table = predictions_to_table(rows)
    write_shard(str(tmp_path), 4, table, fingerprint="f", numerics="n", stage_s={"decode": 1.0, "detect": 2.0})
    return str(tmp_path)


@pytest.mark.parametrize(
    ("what", "plain", "quarantined"),
    [
        ("transient", (3,), ()),
        ("permanent", (2, 5), ()),
        ("quarantined", (), (4,)),
        ("truncated", (2,), ()),
        ("fetch_failed", (3,), ()),
        ("killed_process", (), (4,)),
        ("no_such_reason", (), ()),
        (ALL, (2, 3, 5), ()),
    ],
)
def test_which_rows(run: str, what: str, plain: tuple[int, ...], quarantined: tuple[int, ...]) -> None:
    assert find_failed(run, 4, Retry(what)) == FailedRows(plain, quarantined)


def test_what_was_tried_already_is_left_out(run: str) -> None:
    assert find_failed(run, 4, Retry("transient", but="fetch_failed")) == FailedRows((), ())
    assert find_failed(run, 4, Retry("transient", but="truncated")) == FailedRows((3,), ())


def test_new_rows_take_the_place_of_old_ones(run: str) -> None:
    before = load_shard(run, 4)[1].to_pylist()
    fixed = [prediction(23, 1), Prediction(image_id=20, failure=("empty_file", FailureClass.PERMANENT))]
    replace_rows(run, 4, predictions_to_table(fixed), stage_s={"decode": 0.5, "segment": 4.0})
    after = load_shard(run, 4)[1].to_pylist()
    assert [row["image_id"] for row in after] == [row["image_id"] for row in before]
    assert [row for row in after if row["image_id"] not in (20, 23)] == [
        row for row in before if row["image_id"] not in (20, 23)
    ]
    assert after[2]["reason"] == "empty_file"
    assert (after[5]["status"], after[5]["label"]) == ("ok", [0])
    footer = read_footer(run, 4)
    assert footer.counts == {"ok": 3, "empty": 1, "failed": 3}
    assert (footer.transient, footer.fingerprint, footer.numerics) == (1, "f", "n")
    assert footer.stage_s == {"decode": 1.5, "detect": 2.0, "segment": 4.0}


def test_an_image_of_another_shard_is_refused(run: str) -> None:
    before = storage.read_bytes(shard_url(run, 4))
    with pytest.raises(ValueError, match="1 images that are not in shard 4"):
        replace_rows(run, 4, predictions_to_table([prediction(99, 1)]), stage_s={})
    assert storage.read_bytes(shard_url(run, 4)) == before


def test_a_full_disk_leaves_the_file_as_it_was(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = storage.read_bytes(shard_url(run, 4))

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OSError, match="no space"):
        replace_rows(run, 4, predictions_to_table([prediction(20, 1)]), stage_s={})
    assert storage.read_bytes(shard_url(run, 4)) == before


def test_a_damaged_file_is_named(run: str) -> None:
    storage.write_atomic(shard_url(run, 4), b"PAR1 and no more")
    with pytest.raises(IncompleteError, match="shard-00000004"):
        find_failed(run, 4, Retry("transient"))
    with pytest.raises(IncompleteError, match="shard-00000004"):
        replace_rows(run, 4, pa.table({}), stage_s={})
