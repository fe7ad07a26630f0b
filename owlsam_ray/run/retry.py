"""Retry failed rows of finished shards: select them, and rewrite their shards.

Only the failed images are fetched and labelled again, and each shard is rewritten atomically.
"""

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

from owlsam_ray.errors import FailureClass
from owlsam_ray.run.shards import load_shard, write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA

ALL = "failed"
"""Selects all failed rows except quarantined ones, which would kill a process again and must be requested by name."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Selection of failed rows."""

    what: str
    """`failed`, a class (`transient`, `permanent`, `quarantined`), or a reason up to its colon (`truncated`, …)."""
    but: str | None = None
    """Reason, up to its colon, that is excluded."""

    def selects(self, reason: str, status_class: str) -> bool:
        """Whether a failed row is to be retried."""
        if reason.split(":")[0] == self.but:
            return False
        if self.what == ALL:
            return status_class != FailureClass.QUARANTINED
        return self.what in (status_class, reason.split(":")[0])

    @property
    def only_transient(self) -> bool:
        """Whether only transient failures are selected, so that shards without any can be skipped."""
        return self.what == FailureClass.TRANSIENT


@dataclass(frozen=True, slots=True)
class FailedRows:
    """Positions of failed rows in a shard, ascending."""

    plain: tuple[int, ...]
    """Rows that an actor may label."""
    quarantined: tuple[int, ...]
    """Rows whose images killed a process; they are labelled in isolation only."""


def find_failed(run_url: str, shard: int, retry: Retry) -> FailedRows:
    """Find the rows of a finished shard that are to be retried.

    Raises:
        IncompleteError: the file is damaged.
        OSError: storage failed.
    """
    _, table = load_shard(run_url, shard)
    plain: list[int] = []
    quarantined: list[int] = []
    for position, row in enumerate(table.select(["status", "reason", "status_class"]).to_pylist()):
        if row["status"] == "failed" and retry.selects(row["reason"] or "", row["status_class"] or ""):
            (quarantined if row["status_class"] == FailureClass.QUARANTINED else plain).append(position)
    return FailedRows(tuple(plain), tuple(quarantined))


def replace_rows(run_url: str, shard: int, rows: pa.Table, *, stage_s: dict[str, float]) -> None:
    """Rewrite a finished shard with new rows for some of its images.

    The file keeps the numerics id of its first attempt, which computed most of its rows.

    Args:
        run_url: the run directory.
        shard: the shard's number.
        rows: new rows as `PREDICTION_SCHEMA`, for images of this shard, in any order, each image once.
        stage_s: busy seconds that the new rows took; added to those of the shard.

    Raises:
        IncompleteError: the file is damaged.
        ValueError: an image is not in this shard.
        OSError: storage failed; the file is unchanged.
    """
    footer, before = load_shard(run_url, shard)
    both = pa.concat_tables([before, rows.select(PREDICTION_SCHEMA.names).cast(PREDICTION_SCHEMA)])
    places = {image_id: place for place, image_id in enumerate(both["image_id"].to_pylist())}  # the last entry wins
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
