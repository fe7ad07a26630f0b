"""Run directories with shards of made-up rows, for tests that need neither pictures nor models."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import FailureClass
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.record import RunRecord, canonical_hash, save_record
from owlsam_ray.run.run import StoredRun
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of

K = 5
SIZE = (6, 8)
CATEGORIES = (Category(id=7, name="Katze"), Category(id=3, name="dog"))
NUMERICS = {"device": "cpu"}
EMBEDDINGS = b"of the queries"
PARTS = {"query_embeddings": hashlib.sha256(EMBEDDINGS).hexdigest()}
_MASK = np.zeros(SIZE, np.bool_)
_MASK[1:3, 2:5] = True
_SEGMENT = Segment(encode_rle(_MASK), 6, (2, 1, 5, 3), predicted_iou=0.9, stability=0.5)


@dataclass(frozen=True)
class ShardRun(StoredRun):
    """A planned run, and what its shards must carry."""

    def write(self, shard: int, rows: pa.Table, **marks: str) -> None:
        """Write a shard."""
        given = {"fingerprint": self.record.fingerprint or "", "numerics": self.record.numerics_id} | marks
        write_shard(self.url, shard, rows, **given, stage_s={"decode": 0.5})

    def rows(self, shard: int) -> pa.Table:
        """Rows as every shard of this run has them: the fourth, eighth, … image of the run failed, the others did not.

        Reasons by image id: 4 and 12 `truncated`, 8 `fetch_failed: slow`, 16 `killed_process: SIGSEGV`, and so on.
        """
        return predictions_to_table([row_of(each) for each in self.manifest.read_shard(shard)["image_id"].to_pylist()])

    def write_all(self, shards: Iterable[int] | None = None) -> None:
        """Write these shards; default: all."""
        for shard in self.manifest.iter_shards() if shards is None else shards:
            self.write(shard, self.rows(shard))


def row_of(image_id: int) -> Prediction:
    """One image: failed when its id is a multiple of four, else with 0 to 2 detections."""
    if image_id % 16 == 0:
        return Prediction(image_id, failure=("killed_process: SIGSEGV", FailureClass.QUARANTINED))
    if image_id % 8 == 0:
        return Prediction(image_id, failure=("fetch_failed: slow", FailureClass.TRANSIENT))
    if image_id % 4 == 0:
        return Prediction(image_id, failure=("truncated", FailureClass.PERMANENT))
    count = image_id % 4 - 1
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    found = Detections(
        boxes_xyxy=np.tile(np.array([0.1, 1, 5.3, 4], np.float32), (count, 1)),
        scores=scores,
        raw_scores=scores,
        labels=np.arange(count) % 2,
        prompt_ids=np.arange(count) % 2,
        num_merged=np.ones(count, np.int64),
    )
    return Prediction(image_id, size_hw=SIZE, detections=found, segments=(_SEGMENT,) * count)


def make_shard_run(url: str, *, num_images: int, shard_size: int, config: dict[str, Any] | None = None) -> ShardRun:
    """Plan images 1…`num_images`, and write all but the shards."""
    images: Sequence[ImageRecord] = [ImageRecord(number, f"{number:06d}.jpg") for number in range(1, num_images + 1)]
    source: dict[str, Any] = {"info": {}, "licenses": [], "categories": []}
    manifest = write_parts(url, tables_of(images, "/i"), ShardLayout(shard_size=shard_size), source=source)
    storage.write_atomic(storage.join(url, QUERY_FILE), EMBEDDINGS)
    record = RunRecord(
        owlsam_version="0",
        config=config or {},
        categories=CATEGORIES,
        queries=(),
        ids_per_image=K,
        layout_hash=manifest.layout_hash,
        num_parts=len(manifest.parts),
        fingerprint=canonical_hash(PARTS),
        fingerprint_parts=PARTS,
        numerics=({"device": "tpu"}, NUMERICS),
    )
    save_record(url, record)
    return ShardRun(record, manifest)
