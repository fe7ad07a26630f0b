"""Failed rows of finished shards, tried again.

Only these images are fetched and labelled, and each shard is rewritten whole or not at all.
"""

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

from owlsam_ray.errors import FailureClass
from owlsam_ray.run.shards import load_shard, write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA

ALL = "failed"
"""Every failed row but the quarantined ones, which would kill a process again: they are to be asked for by name."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Which failed rows."""

    what: str
    """`failed`, a class (`transient`, `permanent`, `quarantined`), or the first word of a reason (`truncated`, …)."""
    but: str | None = None
    """The first word of reasons that are left out."""

    def selects(self, reason: str, status_class: str) -> bool:
        """Whether a failed row is to be tried again."""
        if reason.split(":")[0] == self.but:
            return False
        if self.what == ALL:
            return status_class != FailureClass.QUARANTINED
        return self.what in (status_class, reason.split(":")[0])

    @property
    def only_transient(self) -> bool:
        """Whether a shard without transient failures holds no such row."""
        return self.what == FailureClass.TRANSIENT


@dataclass(frozen=True, slots=True)
class FailedRows:
    """Positions in a shard, rising."""

    plain: tuple[int, ...]
    """Rows that an actor may do."""
    quarantined: tuple[int, ...]
    """Rows whose images killed a process: to be done in isolation only."""


def find_failed(run_url: str, shard: int, retry: Retry) -> FailedRows:
    """The rows of a finished shard that are to be tried again.

    Raises:
        IncompleteError: the file is damaged.
        OSError: storage gave up.
    """
    _, table = load_shard(run_url, shard)
    plain: list[int] = []
    quarantined: list[int] = []
    for position, row in enumerate(table.select(["status", "reason", "status_class"]).to_pylist()):
        if row["status"] == "failed" and retry.selects(row["reason"] or "", row["status_class"] or ""):
            (quarantined if row["status_class"] == FailureClass.QUARANTINED else plain).append(position)
    return FailedRows(tuple(plain), tuple(quarantined))


def replace_rows(run_url: str, shard: int, rows: pa.Table, *, stage_s: dict[str, float]) -> None:
    """Write a finished shard again, with other rows for some of its images.

    The file goes on naming the numerics of its first attempt, which most of its rows are of.

    Args:
        run_url: the run directory.
        shard: its number.
        rows: `PREDICTION_SCHEMA`, of images of this shard; in any order, each once.
        stage_s: busy seconds that they took, added to those of the shard.

    Raises:
        IncompleteError: the file is damaged.
        ValueError: an image is not of this shard.
        OSError: storage gave up; the file is as it was.
    """
    footer, before = load_shard(run_url, shard)
    both = pa.concat_tables([before, rows.select(PREDICTION_SCHEMA.names).cast(PREDICTION_SCHEMA)])
    places = {image_id: place for place, image_id in enumerate(both["image_id"].to_pylist())}  # the later one wins
    image_ids: Collection[int] = before["image_id"].to_pylist()
    if len(places) != len(image_ids):
        raise ValueError(f"rows of {len(places) - len(image_ids)} images that are not in shard {shard}")
    write_shard(
        run_url,
        shard,
        both.take(pa.array([places[image_id] for image_id in image_ids], pa.int64())),
        fingerprint=footer.fingerprint,
        numerics=footer.numerics,
        stage_s={
            stage: footer.stage_s.get(stage, 0.0) + stage_s.get(stage, 0.0) for stage in {**footer.stage_s, **stage_s}
        },
    )
