"""Count a run's finished shards, and the rows, detections and masks in their footers.

Memory use is a few numbers per shard, independent of the number of images.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.errors import OwlsamError
from owlsam_ray.run.manifest import Manifest, num_shards_behind
from owlsam_ray.run.run import StoredRun
from owlsam_ray.run.shards import ShardFooter, corrupt_shard, done_shards, read_footer, shard_url

_COUNTED = ("ok", "empty", "failed", "transient", "detections", "masks")
_CHUNK = 256
"""Footers read per chunk; small enough that no other thread waits long for the reading lock."""


class RunCounts:
    """Counts over the finished shards of a run or of a slice of it; thread-safe.

    Listings alone determine which shards have a file. Footers are read separately, each once however often the counts
    are refreshed, so counts by status lag behind the listing while `unread` is not 0.
    """

    def __init__(self, run: StoredRun, *, shards: range | None = None) -> None:
        """Start with nothing counted.

        Args:
            run: the run. Every shard must have its label fingerprint; a run without one accepts any.
            shards: the slice's shards, ascending; None means all shards of the run.
        """
        manifest = run.manifest
        self.run_url = run.url
        self._fingerprint = run.record.fingerprint
        self._in_run, self._num_parts = manifest.num_shards, len(manifest.parts)
        self._shards = range(manifest.num_shards) if shards is None else shards
        self._images = _images_of_shards(manifest)[self._shards.start : self._shards.stop : self._shards.step]
        n = len(self._images)
        self._listed = np.zeros(n, np.bool_)
        self._first_listed: NDArray[np.bool_] | None = None
        self._read = np.zeros(n, np.bool_)
        self._counts = np.zeros((n, len(_COUNTED)), np.int64)
        self._stage_s: dict[str, NDArray[np.float64]] = {}
        self._lock = threading.Lock()  # guards the arrays; held briefly
        self._listing = threading.Lock()  # held during a listing, so that an older one never replaces a newer one
        self._reading = threading.Lock()  # held while a chunk of footers is read

    @property
    def num_shards(self) -> int:
        """Number of shards in the slice."""
        return len(self._images)

    @property
    def num_images(self) -> int:
        """Number of images in the slice."""
        return int(self._images.sum())

    @property
    def done(self) -> set[int]:
        """Shards that have a file."""
        return self._numbers(self._listed)

    @property
    def unread(self) -> int:
        """Number of shards that have a file but whose footer has not been read."""
        return int(np.count_nonzero(self._listed & ~self._read))

    @property
    def images_done(self) -> int:
        """Number of images in shards that have a file."""
        return int(self._images[self._listed].sum())

    @property
    def images_fresh(self) -> int:
        """Number of images in shards that have a file now but had none at the first listing."""
        return 0 if self._first_listed is None else int(self._images[self._listed & ~self._first_listed].sum())

    @property
    def counts(self) -> dict[str, int]:
        """Totals over the footers read so far.

        Rows `ok`, `empty` and `failed`; `transient` ones among the failed; `detections` and `masks`.
        """
        with self._lock:
            return dict(zip(_COUNTED, self._counts[self._read].sum(axis=0).tolist(), strict=True))

    @property
    def stage_s(self) -> dict[str, float]:
        """Busy seconds by stage, over the footers read so far."""
        with self._lock:
            return {stage: float(seconds[self._read].sum()) for stage, seconds in self._stage_s.items()}

    @property
    def failed_shards(self) -> set[int]:
        """Shards whose footer has been read and counts failed rows."""
        return self._numbers(self._read & (self._counts[:, _COUNTED.index("failed")] > 0))

    @property
    def transient_shards(self) -> set[int]:
        """Shards whose footer has been read and counts transient failures: failed rows that are worth a retry."""
        return self._numbers(self._read & (self._counts[:, _COUNTED.index("transient")] > 0))

    def pending(self) -> list[int]:
        """Shards without a file, ascending."""
        return [self._shards[place] for place in np.flatnonzero(~self._listed)]

    def refresh_listing(self) -> set[int]:
        """List the shard files without reading footers.

        Returns:
            The slice's shards that have a file.

        Raises:
            IncompleteError: there is a file for a shard that the run does not have.
            OSError: storage failed.
        """
        with self._listing:
            found = done_shards(self.run_url)
            foreign = [shard for shard in found if shard >= self._in_run]
            # Other attempts may be labelling parts that were added to the manifest since.
            if foreign and max(foreign) >= self._in_run + num_shards_behind(self.run_url, self._num_parts):
                raise corrupt_shard(shard_url(self.run_url, max(foreign)), f"the run has {self._in_run} shards")
            found.intersection_update(self._shards)
            listed = np.zeros_like(self._listed)
            listed[[self._shards.index(shard) for shard in found]] = True
            with self._lock:
                self._listed = listed
                self._read &= listed  # a file that was removed is read again when it is back
                if self._first_listed is None:
                    self._first_listed = listed
        return found

    def refresh(self, limit: int | None = None) -> Self:
        """List the shard files and read the footers that have not been read yet.

        Args:
            limit: maximum number of footers to read; None reads all.

        Raises:
            IncompleteError: a shard file is damaged, foreign, or has another fingerprint; the others are counted.
            OSError: storage failed.
        """
        self.refresh_listing()
        self.read_footers(limit)
        return self

    def read_footers(self, limit: int | None = None) -> None:
        """Read footers of the files in the last listing; arguments and errors are the same as for `refresh`."""
        tried: set[int] = set()
        errors: list[OwlsamError | OSError] = []
        while limit is None or len(tried) < limit:
            with self._reading:
                places = [p for p in np.flatnonzero(self._listed & ~self._read).tolist() if p not in tried]
                places = places[: _CHUNK if limit is None else min(_CHUNK, limit - len(tried))]
                if not places:
                    break
                tried.update(places)
                errors += self._read_chunk(places)
        if errors:
            raise errors[0]

    def _read_chunk(self, places: list[int]) -> list[OwlsamError | OSError]:
        """Read and count footers; return the errors of single files instead of raising them."""
        errors: list[OwlsamError | OSError] = []

        def read(place: int) -> ShardFooter | OwlsamError | OSError | None:
            try:
                return self._checked(place)
            except FileNotFoundError:  # removed since; the next listing shows that
                return None
            except (OwlsamError, OSError) as error:
                return error

        with ThreadPoolExecutor(min(32, len(places))) as pool:
            footers = list(pool.map(read, places))
        with self._lock:
            for place, footer in zip(places, footers, strict=True):
                if isinstance(footer, ShardFooter):
                    self._count(place, footer)
                elif footer is not None:
                    errors.append(footer)
        return errors

    def _checked(self, place: int) -> ShardFooter:
        shard = self._shards[place]
        footer = read_footer(self.run_url, shard)
        if self._fingerprint is not None and footer.fingerprint != self._fingerprint:
            raise corrupt_shard(shard_url(self.run_url, shard), "it has another label fingerprint")
        if footer.num_rows != self._images[place]:
            what = f"it has {footer.num_rows} rows, but the manifest lists {self._images[place]} images for it"
            raise corrupt_shard(shard_url(self.run_url, shard), what)
        return footer

    def _count(self, place: int, footer: ShardFooter) -> None:
        values = footer.counts | {
            "transient": footer.transient,
            "detections": footer.num_detections,
            "masks": footer.num_masks,
        }
        self._counts[place] = [values.get(name, 0) for name in _COUNTED]
        for stage in footer.stage_s.keys() - self._stage_s.keys():
            self._stage_s[stage] = np.zeros(len(self._images))
        for stage, seconds in self._stage_s.items():
            seconds[place] = footer.stage_s.get(stage, 0.0)
        self._read[place] = True

    def forget(self, shards: Iterable[int]) -> None:
        """Mark shards as unread because their files were rewritten."""
        with self._reading, self._lock:
            self._read[[self._shards.index(shard) for shard in shards]] = False

    def summary(self) -> dict[str, Any]:
        """Counts for display and JSON; rows by status, detections and masks cover only the footers read so far."""
        counts = self.counts
        return {
            "images": self.num_images,
            "done": self.images_done,
            "ok": counts["ok"],
            "empty": counts["empty"],
            "failed": counts["failed"],
            "left": self.num_images - self.images_done,
            "detections": counts["detections"],
            "masks": counts["masks"],
            "shards": self.num_shards,
            "shards_done": int(np.count_nonzero(self._listed)),
        }

    def _numbers(self, chosen: NDArray[np.bool_]) -> set[int]:
        return {self._shards[place] for place in np.flatnonzero(chosen)}


def _images_of_shards(manifest: Manifest) -> NDArray[np.int64]:
    """(num_shards,) number of images in each shard."""
    sizes = [np.zeros(0, np.int64)]
    for part in manifest.parts:
        starts = np.arange(part.num_shards) * part.shard_size
        sizes.append(np.minimum(part.shard_size, part.num_rows - starts))
    return np.concatenate(sizes)
