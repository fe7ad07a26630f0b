"""Shard files: whole or not at all, and honest about themselves."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.ledger import Tally, done_shards, read_footer, shard_url, write_shard
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table

SEGMENT = Segment(rle_counts=b"04", area=4, box_xyxy=(0, 0, 2, 2), predicted_iou=0.5, stability=0.75)


def prediction(image_id: int, num_detections: int) -> Prediction:
    found = Detections(
        boxes_xyxy=np.tile(np.array([0, 0, 2, 2], np.float32), (num_detections, 1)),
        scores=np.full(num_detections, 0.5, np.float32),
        raw_scores=np.full(num_detections, 0.5, np.float32),
        labels=np.zeros(num_detections, np.int64),
        prompt_ids=np.zeros(num_detections, np.int64),
        num_merged=np.ones(num_detections, np.int64),
    )
    # The last box of each image has no mask, as if its score were under the mask floor.
    segments = tuple(SEGMENT if index < num_detections - 1 else None for index in range(num_detections))
    return Prediction(image_id=image_id, size_hw=(2, 2), detections=found, segments=segments)


PREDICTIONS = [
    prediction(1, 3),
    prediction(2, 0),
    Prediction(image_id=3, failure=("truncated", FailureClass.PERMANENT)),
    Prediction(image_id=4, failure=("fetch_failed: timeout", FailureClass.TRANSIENT)),
]


def write(run: str, shard: int, **values: Any) -> None:
    settings: dict[str, Any] = {"fingerprint": "f", "numerics": "n", "stage_s": {"decode": 0.12345}} | values
    write_shard(run, shard, predictions_to_table(PREDICTIONS), **settings)


@pytest.mark.parametrize("remote", [False, True])
def test_round_trip(tmp_path: Path, remote: bool) -> None:
    run = "memory://ledger-round-trip" if remote else str(tmp_path)
    assert done_shards(run) == set()
    write(run, 7)
    assert done_shards(run) == {7}
    footer = read_footer(run, 7)
    assert footer.counts == {"ok": 1, "empty": 1, "failed": 2}
    assert (footer.transient, footer.num_detections, footer.num_masks, footer.num_rows) == (1, 3, 2, 4)
    assert footer.stage_s == {"decode": 0.1235}


def test_rows_as_stored(tmp_path: Path) -> None:
    write(str(tmp_path), 0)
    rows = pq.read_table(shard_url(str(tmp_path), 0))
    assert rows.schema.equals(PREDICTION_SCHEMA)
    first, second, third, _ = rows.to_pylist()
    assert first["rle_counts"] == [b"04", b"04", None]
    assert first["det_index"] == [0, 1, 2]
    assert second["status"] == "empty"
    assert second["label"] == []
    assert (third["status"], third["reason"], third["status_class"]) == ("failed", "truncated", "permanent")
    assert third["label"] is None


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(str(tmp_path / name), 3)
    one, other = (Path(shard_url(str(tmp_path / name), 3)).read_bytes() for name in ("a", "b"))
    assert one == other


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write(str(tmp_path), 0)
    assert list((tmp_path / "predictions").iterdir()) == []


@pytest.mark.parametrize("damage", ["truncated", "foreign", "renamed", "empty"])
def test_corrupt_shard_says_which_and_how_to_redo(tmp_path: Path, damage: str) -> None:
    write(str(tmp_path), 5)
    path = Path(shard_url(str(tmp_path), 5))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "foreign":
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    elif damage == "renamed":
        write(str(tmp_path), 4)
        os.replace(shard_url(str(tmp_path), 4), path)
    else:
        path.write_bytes(b"")
    with pytest.raises(IncompleteError) as caught:
        Tally(str(tmp_path), num_images=100, num_shards=25, fingerprint="f").refresh()
    assert str(path) in str(caught.value)
    assert "owlsam annotate" in str(caught.value)


def test_tally_reads_each_footer_once(tmp_path: Path) -> None:
    tally = Tally(str(tmp_path), num_images=12, num_shards=3, fingerprint="f")
    write(str(tmp_path), 0)
    assert tally.refresh().images_done == 4
    Path(shard_url(str(tmp_path), 0)).write_bytes(b"not looked at again")
    write(str(tmp_path), 2)
    assert tally.refresh().images_done == 8
    assert tally.summary() == {
        "images": 12,
        "done": 8,
        "ok": 2,
        "empty": 2,
        "failed": 4,
        "left": 4,
        "detections": 6,
        "masks": 4,
        "shards": 3,
        "shards_done": 2,
    }
    assert tally.transient_shards == {0, 2}


@pytest.mark.parametrize(("num_shards", "fingerprint", "words"), [(1, "f", "the run has 1"), (9, "g", "fingerprint")])
def test_tally_refuses_shards_of_another_run(tmp_path: Path, num_shards: int, fingerprint: str, words: str) -> None:
    write(str(tmp_path), 1)
    with pytest.raises(IncompleteError, match=words):
        Tally(str(tmp_path), num_images=8, num_shards=num_shards, fingerprint=fingerprint).refresh()
