"""How far a run is: which shards have a file, and what their footers count.

Small in memory, however many images there are: a few numbers for each shard.
"""

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.errors import OwlsamError
from owlsam_ray.run.manifest import Manifest, num_shards_behind
from owlsam_ray.run.shards import ShardFooter, corrupt_shard, done_shards, read_footer, shard_url

_COUNTED = ("ok", "empty", "failed", "transient", "detections", "masks")
_CHUNK = 256
"""Footers that are read in one go, so that nobody waits long for the thread that reads them."""


class RunCounts:
    """Counts over the finished shards of a run, or of a slice of it; several threads may use one.

    Which shards have a file comes from listings alone. Their footers are read apart from that, each once however often
    one looks: counts by status lag behind the listing as long as `unread` is not 0.
    """

    def __init__(self, run_url: str, manifest: Manifest, fingerprint: str | None, *, shards: range | None = None):
        """Count nothing yet.

        Args:
            run_url: the run directory.
            manifest: of the run.
            fingerprint: that every shard must carry; None: any.
            shards: rising, those of the slice; None: all of the run.
        """
        self.run_url = run_url
        self._fingerprint = fingerprint
        self._in_run, self._num_parts = manifest.num_shards, len(manifest.parts)
        self._shards = range(manifest.num_shards) if shards is None else shards
        self._images = _images_of_shards(manifest)[self._shards.start : self._shards.stop : self._shards.step]
        n = len(self._images)
        self._listed = np.zeros(n, np.bool_)
        self._first_listed: NDArray[np.bool_] | None = None
        self._read = np.zeros(n, np.bool_)
        self._counts = np.zeros((n, len(_COUNTED)), np.int64)
        self._stage_s: dict[str, NDArray[np.float64]] = {}
        self._lock = threading.Lock()  # of the arrays; held for moments
        self._listing = threading.Lock()  # held for a listing, so that none replaces a later one
        self._reading = threading.Lock()  # held for a chunk of footers

    @property
    def num_shards(self) -> int:
        """Shards of the slice."""
        return len(self._images)

    @property
    def num_images(self) -> int:
        """Images of the slice."""
        return int(self._images.sum())

    @property
    def done(self) -> set[int]:
        """The shards that have a file."""
        return self._numbers(self._listed)

    @property
    def unread(self) -> int:
        """Number of shards that have a file whose footer was not read."""
        return int(np.count_nonzero(self._listed & ~self._read))

    @property
    def images_done(self) -> int:
        """Images of the shards that have a file."""
        return int(self._images[self._listed].sum())

    @property
    def images_fresh(self) -> int:
        """Images of the shards that have a file, and had none when one looked first."""
        return 0 if self._first_listed is None else int(self._images[self._listed & ~self._first_listed].sum())

    @property
    def counts(self) -> dict[str, int]:
        """Of the footers that were read: rows `ok`, `empty`, `failed`, of these `transient`; `detections`, `masks`."""
        with self._lock:
            return dict(zip(_COUNTED, self._counts[self._read].sum(axis=0).tolist(), strict=True))

    @property
    def stage_s(self) -> dict[str, float]:
        """Busy seconds by stage, of all footers that were read."""
        with self._lock:
            return {stage: float(seconds[self._read].sum()) for stage, seconds in self._stage_s.items()}

    @property
    def failed_shards(self) -> set[int]:
        """Shards whose footer was read and tells of failed rows."""
        return self._numbers(self._read & (self._counts[:, _COUNTED.index("failed")] > 0))

    @property
    def transient_shards(self) -> set[int]:
        """Shards whose footer was read and tells of failed rows that are worth another try."""
        return self._numbers(self._read & (self._counts[:, _COUNTED.index("transient")] > 0))

    def pending(self) -> list[int]:
        """The shards without a file, rising."""
        return [self._shards[place] for place in np.flatnonzero(~self._listed)]

    def refresh_listing(self) -> set[int]:
        """Look at the listing, and at no footer.

        Returns:
            The shards of the slice that have a file.

        Raises:
            IncompleteError: there is a file of a shard that the run does not have.
            OSError: storage gave up.
        """
        with self._listing:
            found = done_shards(self.run_url)
            foreign = [shard for shard in found if shard >= self._in_run]
            # Others may label parts that were added since.
            if foreign and max(foreign) >= self._in_run + num_shards_behind(self.run_url, self._num_parts):
                raise corrupt_shard(shard_url(self.run_url, max(foreign)), f"the run has {self._in_run} shards")
            found.intersection_update(self._shards)
            listed = np.zeros_like(self._listed)
            listed[[self._shards.index(shard) for shard in found]] = True
            with self._lock:
                self._listed = listed
                self._read &= listed  # a file that was taken away is read again when it is back
                if self._first_listed is None:
                    self._first_listed = listed
        return found

    def refresh(self, limit: int | None = None) -> Self:
        """Look at the listing, and read footers that were not read yet.

        Args:
            limit: so many at most; None: all.

        Raises:
            IncompleteError: a shard file is damaged, foreign, or of another fingerprint; the others are counted.
            OSError: storage gave up.
        """
        self.refresh_listing()
        self.read_footers(limit)
        return self

    def read_footers(self, limit: int | None = None) -> None:
        """Read footers of files that the last listing had; arguments and errors as of `refresh`."""
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
        """Read and count; what is wrong with single files comes back."""
        errors: list[OwlsamError | OSError] = []

        def read(place: int) -> ShardFooter | OwlsamError | OSError | None:
            try:
                return self._checked(place)
            except FileNotFoundError:  # taken away since; the next listing tells
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
            what = f"it has {footer.num_rows} rows, and the manifest {self._images[place]} images for it"
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
        """Count these as not read: their files were rewritten."""
        with self._reading, self._lock:
            self._read[[self._shards.index(shard) for shard in shards]] = False

    def summary(self) -> dict[str, Any]:
        """Counts for people and machines. Rows by status, detections and masks are of the footers that were read."""
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
    """(num_shards,) images of each shard."""
    sizes = [np.zeros(0, np.int64)]
    for part in manifest.parts:
        starts = np.arange(part.num_shards) * part.shard_size
        sizes.append(np.minimum(part.shard_size, part.num_rows - starts))
    return np.concatenate(sizes)
