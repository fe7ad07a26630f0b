"""Which shards are done: their files, and nothing else (law 2).

A shard's name depends only on the manifest, its file exists whole or not at all, and its existence is the done mark. So
resume is one listing, and two attempts that overlap write the same rows to the same names.
"""

import json
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass as validated_dataclass

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.schema import PREDICTION_SCHEMA, ROW_GROUP_IMAGES, SCHEMA_VERSION

PREDICTIONS = "predictions"
FOOTER_KEY = b"owlsam"


@validated_dataclass(frozen=True, slots=True)
class ShardFooter:
    """What a shard file says about itself."""

    schema_version: int
    shard: int
    num_rows: int
    fingerprint: str
    numerics: str
    counts: dict[str, int]
    """Rows by status: ok, empty, failed."""
    transient: int
    """Failed rows that are worth another try."""
    num_detections: int
    num_masks: int
    stage_s: dict[str, float]
    """Busy seconds of each stage: the only content that may differ between attempts."""


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"shard-{shard:08d}.parquet"


def shard_url(run_url: str, shard: int) -> str:
    """Path or URL of a shard file."""
    return storage.join(run_url, PREDICTIONS, shard_name(shard))


def done_shards(run_url: str) -> set[int]:
    """The shards whose file exists: one listing."""
    names = storage.list_names(storage.join(run_url, PREDICTIONS))
    return {
        int(name[6:-8])
        for name in names
        if name.startswith("shard-") and name.endswith(".parquet") and name[6:-8].isdigit()
    }


def write_shard(
    run_url: str, shard: int, rows: pa.Table, *, fingerprint: str, numerics: str, stage_s: dict[str, float]
) -> None:
    """Write the rows of a whole shard, whole or not at all.

    Args:
        run_url: the run directory.
        shard: its number.
        rows: `PREDICTION_SCHEMA`, one row per image of the shard, in manifest order.
        fingerprint: the label fingerprint.
        numerics: the numerics id.
        stage_s: busy seconds of each stage.

    Raises:
        OSError: storage refused; nothing is left behind.
    """
    failed = pc.equal(rows["status"], "failed")
    footer = {
        "schema_version": SCHEMA_VERSION,
        "shard": shard,
        "num_rows": rows.num_rows,
        "fingerprint": fingerprint,
        "numerics": numerics,
        "counts": {
            status: pc.sum(pc.equal(rows["status"], status)).as_py() or 0 for status in ("ok", "empty", "failed")
        },
        "transient": pc.sum(
            pc.and_(failed, pc.fill_null(pc.equal(rows["status_class"], str(FailureClass.TRANSIENT)), False))
        ).as_py()
        or 0,
        "num_detections": pc.sum(pc.list_value_length(rows["label"])).as_py() or 0,
        "num_masks": pc.count(pc.list_flatten(rows["mask_area"])).as_py(),
        "stage_s": {stage: round(seconds, 4) for stage, seconds in stage_s.items()},
    }
    table = rows.cast(PREDICTION_SCHEMA).replace_schema_metadata({FOOTER_KEY: json.dumps(footer).encode()})
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd", row_group_size=ROW_GROUP_IMAGES)
    storage.write_atomic(shard_url(run_url, shard), memoryview(buffer.getvalue()))


def read_footer(run_url: str, shard: int) -> ShardFooter:
    """What a finished shard says about itself, without reading its rows.

    Raises:
        IncompleteError: the file is damaged or foreign; names it and how to redo it.
        OSError: storage gave up, which says nothing about the file.
    """
    url = shard_url(run_url, shard)
    try:
        with storage.open_input(url) as file:
            metadata = pq.read_metadata(file)
        footer = ShardFooter(**json.loads((metadata.metadata or {})[FOOTER_KEY]))
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # Arrow's own have no number
            raise
        raise corrupt_shard(url, f"{type(error).__name__}: {error}") from None
    if footer.shard != shard or footer.num_rows != metadata.num_rows:
        raise corrupt_shard(
            url, f"it says shard {footer.shard} with {footer.num_rows} rows, and has {metadata.num_rows}"
        )
    return footer


def corrupt_shard(url: str, what: str) -> IncompleteError:
    """The error of a shard file that cannot be trusted."""
    return IncompleteError(
        f"{url} is not a whole shard of this run ({what}). Delete or move that one file and call `owlsam annotate` "
        "again: only its images are labelled anew."
    )


@dataclass(slots=True)
class Tally:
    """Counts over finished shards, each read once however often one looks."""

    run_url: str
    num_images: int
    num_shards: int
    fingerprint: str | None
    done: set[int] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    stage_s: dict[str, float] = field(default_factory=dict)
    transient_shards: set[int] = field(default_factory=set)

    def refresh(self) -> "Tally":
        """Look at the listing and read what is new.

        Raises:
            IncompleteError: a shard file is damaged, foreign, or of another fingerprint.
        """
        self.add(sorted(done_shards(self.run_url) - self.done))
        return self

    def add(self, shards: Iterable[int]) -> None:
        """Read the footers of these shards."""
        new = list(shards)
        if not new:
            return
        with ThreadPoolExecutor(min(32, len(new))) as pool:
            footers = list(pool.map(lambda shard: read_footer(self.run_url, shard), new))
        for footer in footers:
            if footer.shard >= self.num_shards:
                raise corrupt_shard(shard_url(self.run_url, footer.shard), f"the run has {self.num_shards} shards")
            if self.fingerprint is not None and footer.fingerprint != self.fingerprint:
                raise corrupt_shard(shard_url(self.run_url, footer.shard), "it has another label fingerprint")
            self.done.add(footer.shard)
            self.counts.update(footer.counts)
            self.counts.update(detections=footer.num_detections, masks=footer.num_masks)
            for stage, seconds in footer.stage_s.items():
                self.stage_s[stage] = self.stage_s.get(stage, 0.0) + seconds
            if footer.transient:
                self.transient_shards.add(footer.shard)

    @property
    def images_done(self) -> int:
        """Rows in finished shards."""
        return self.counts["ok"] + self.counts["empty"] + self.counts["failed"]

    def summary(self) -> dict[str, Any]:
        """Counts for people and machines."""
        return {
            "images": self.num_images,
            "done": self.images_done,
            "ok": self.counts["ok"],
            "empty": self.counts["empty"],
            "failed": self.counts["failed"],
            "left": self.num_images - self.images_done,
            "detections": self.counts["detections"],
            "masks": self.counts["masks"],
            "shards": self.num_shards,
            "shards_done": len(self.done),
        }
