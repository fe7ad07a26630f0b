"""Shard files: whole or not at all, and honest about themselves."""

import errno
import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.run.shards import (
    FOOTER_KEY,
    done_shards,
    load_shard,
    read_footer,
    shard_name,
    shard_of,
    shard_url,
    write_shard,
)
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
    assert footer.failures == {"permanent truncated": 1, "transient fetch_failed": 1}
    assert footer.stage_s == {"decode": 0.1235}


@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("shard-00000017.parquet", 17),
        ("shard-123456789.parquet", 123456789),
        ("shard-17.parquet", None),
        ("shard-000000017.parquet", None),
        ("shard-0000001².parquet", None),
        ("shard-00000017.parquet.gz", None),
        ("shard-00000017.parquet\n", None),
    ],
)
def test_only_names_that_are_written_are_shards(name: str, shard: int | None) -> None:
    assert shard_of(name) == shard
    assert shard is None or shard_name(shard) == name


def test_checksums_are_of_the_bytes(tmp_path: Path) -> None:
    write(str(tmp_path), 5)
    data = Path(shard_url(str(tmp_path), 5)).read_bytes()
    footer, table = load_shard(str(tmp_path), 5)
    assert footer == read_footer(str(tmp_path), 5)
    assert table.schema.metadata is None
    assert table.equals(predictions_to_table(PREDICTIONS))
    begin = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    assert footer.data_sha256 == hashlib.sha256(data[:begin]).hexdigest()
    assert footer.footer_sha256 is not None
    assert data.count(footer.footer_sha256.encode()) == 1
    zeroed = data[begin:].replace(footer.footer_sha256.encode(), b"0" * 64)
    assert footer.footer_sha256 == hashlib.sha256(zeroed).hexdigest()


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """In each byte of the footer, and in some of the data."""
    write(str(tmp_path), 5)
    path = Path(shard_url(str(tmp_path), 5))
    whole = path.read_bytes()
    begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    places = [*range(begin, len(whole)), *choose.sample(range(begin), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(IncompleteError, match="is not a whole shard of this run"):
            load_shard(str(tmp_path), 5)
        if place >= begin:
            with pytest.raises(IncompleteError):
                read_footer(str(tmp_path), 5)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    """As 0.1 wrote them: the footer stands among the schema's metadata."""
    write(str(tmp_path), 5)
    path = Path(shard_url(str(tmp_path), 5))
    fields = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    del fields["data_sha256"], fields["footer_sha256"], fields["failures"]
    table = pq.read_table(path).replace_schema_metadata({FOOTER_KEY: json.dumps(fields).encode()})
    pq.write_table(table, path, compression="zstd", row_group_size=64)
    footer, rows = load_shard(str(tmp_path), 5)
    assert (footer.data_sha256, footer.footer_sha256, footer.failures, footer.num_detections) == (None, None, None, 3)
    assert rows.equals(predictions_to_table(PREDICTIONS))


@pytest.mark.parametrize("remote", [False, True])
def test_a_long_footer_is_read_whole(tmp_path: Path, remote: bool) -> None:
    """Row groups of 64 images each add to it; here it is longer than what is read at first."""
    run = "memory://ledger-long-footer" if remote else str(tmp_path)
    rows = pa.concat_tables([predictions_to_table(PREDICTIONS)] * 800)
    write_shard(run, 1, rows, fingerprint="f", numerics="n", stage_s={})
    assert read_footer(run, 1) == load_shard(run, 1)[0]
    assert read_footer(run, 1).num_rows == 3200


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
        read_footer(str(tmp_path), 5)
    assert str(path) in str(caught.value)
    assert "owlsam annotate" in str(caught.value)
