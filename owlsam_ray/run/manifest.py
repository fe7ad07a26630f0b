"""Read a run's manifest: which images, in which order, in which shards. Append-only.

A part is `manifest/part-0000.parquet`, with one row group per shard, and a small `part-0000.json` beside it. The JSON
file is written last, makes the part valid and holds its hash. Ordinals are 1-based positions in the manifest.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass as validated_dataclass

from owlsam_ray import storage
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.errors import GuardError, one_line, shown
from owlsam_ray.run.moved_data import Move
from owlsam_ray.run.paths import MANIFEST
from owlsam_ray.schema import MANIFEST_SCHEMA
from owlsam_ray.storage.arrow_types import misfit_of

_PART_NAME = re.compile(r"part-[0-9]{4,}")
"""Name of both files of a part, without their extensions."""


@validated_dataclass(frozen=True, slots=True)
class ManifestPart:
    """One part of the manifest."""

    file: str
    sha256: str
    """SHA-256 of the Parquet file's bytes."""
    num_rows: int
    first_ordinal: int
    first_shard: int
    num_shards: int
    shard_size: int
    max_shard_bytes: int
    """Encoded bytes of the largest shard; estimated where the listing gives no sizes."""
    source: dict[str, Any]
    """What the output carries over (info, licenses, categories); set in the first part of a plan, empty in others."""
    counts_fetched_only: bool = False
    """Whether `max_shard_bytes` leaves out images that are too large to be fetched; False in parts of old versions."""

    def fetched_bytes(self, max_file_mb: int) -> int:
        """Encoded bytes fetched for the largest shard.

        Parts of old versions also counted images that are too large to be fetched; for them the result is capped at
        `max_file_mb`.
        """
        return self.max_shard_bytes if self.counts_fetched_only else min(self.max_shard_bytes, max_file_mb * MEGABYTE)


@dataclass(frozen=True, slots=True)
class Manifest:
    """All parts of a run's manifest. Small in memory: rows are read shard by shard."""

    run_url: str
    parts: tuple[ManifestPart, ...]
    moves: tuple[Move, ...] = ()
    """Roots whose files have moved since the plan; rows are returned with URIs under the new roots."""

    def with_moves(self, moves: Iterable[Move]) -> "Manifest":
        """Copy of the manifest with these moves in place of its own."""
        return replace(self, moves=tuple(moves))

    @property
    def num_images(self) -> int:
        """Number of images in all parts."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_shards(self) -> int:
        """Number of shards in all parts."""
        return sum(part.num_shards for part in self.parts)

    def max_shard_bytes(self, *, max_file_mb: int) -> int:
        """Estimate of the encoded bytes fetched for the largest shard.

        Args:
            max_file_mb: size limit in megabytes; larger images are not fetched. Plans of earlier versions counted them
                anyway and keep no sizes to recount: a larger shard is assumed to hold such an image.
        """
        return max(part.fetched_bytes(max_file_mb) for part in self.parts)

    @property
    def layout_hash(self) -> str:
        """Hash of which images are in which shard: a hash chain over the parts, so that parts can be appended."""
        chain = ""
        for part in self.parts:
            link = f"{chain}\n{part.sha256}\n{part.num_rows}\n{part.shard_size}"
            chain = hashlib.sha256(link.encode()).hexdigest()
        return chain

    def images_digest(self, number: int | None = None) -> str:
        """Digest of the first `number` images (default: all), independent of how they are sharded.

        It consists of their number and a hash of the id and file name of the first and the last image.
        """
        number = self.num_images if number is None else number
        ends = []
        for ordinal in (1, number):
            shard = int(self.shard_of(np.array([ordinal]))[0])
            rows = self.read_shard(shard).select(["image_id", "file_name"])
            ends.append(rows.slice(ordinal - self.shard_span(shard)[0], 1).to_pylist())
        return f"{number}-{hashlib.sha256(json.dumps(ends).encode()).hexdigest()[:32]}"

    def begins_with(self, image_list: object) -> bool:
        """Whether `image_list` is the digest of this manifest's images, now or before an extension."""
        number = str(image_list).partition("-")[0]
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= self.num_images:
            return False
        return self.images_digest(int(number)) == image_list

    def iter_shards(self) -> Iterator[int]:
        """Shard numbers in manifest order."""
        return iter(range(self.num_shards))

    def shard_span(self, shard: int) -> tuple[int, int]:
        """Ordinal of a shard's first image, and the number of its images."""
        part = self._part_of(shard)
        start = (shard - part.first_shard) * part.shard_size
        return part.first_ordinal + start, min(part.shard_size, part.num_rows - start)

    def shard_of(self, ordinals: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,) shard numbers of images, from their (N,) ordinals."""
        shards = np.zeros(len(ordinals), np.int64)
        for part in self.parts:
            inside = (ordinals >= part.first_ordinal) & (ordinals < part.first_ordinal + part.num_rows)
            shards[inside] = part.first_shard + (ordinals[inside] - part.first_ordinal) // part.shard_size
        return shards

    def read_shard(self, shard: int) -> pa.Table:
        """Read the rows of one shard (one row group), in order, as `MANIFEST_SCHEMA`.

        Raises:
            GuardError: the part's columns do not match the schema.
        """
        part = self._part_of(shard)
        url = storage.join(self.run_url, MANIFEST, part.file)
        with storage.open_input(url) as file:
            reader = pq.ParquetFile(file, metadata=_footer(url, part.sha256))
            table = reader.read_row_group(shard - part.first_shard)
        return moved_uris(_with_container(table).select(MANIFEST_SCHEMA.names), self.moves)

    def uri_bounds(self) -> Iterator[tuple[int, tuple[str, str]]]:
        """Iterate over (shard, (smallest URI, largest URI)) in string order, reading only the footers."""
        for part in self.parts:
            footer = _footer(storage.join(self.run_url, MANIFEST, part.file), part.sha256)
            names = [footer.schema.column(number).path for number in range(footer.num_columns)]
            for group in range(footer.num_row_groups):
                found = footer.row_group(group).column(names.index("uri")).statistics
                if found is not None and found.has_min_max:
                    first, last = (moved_uri(uri, self.moves) for uri in (found.min, found.max))
                    yield part.first_shard + group, (first, last)

    def iter_names(self) -> Iterator[pa.Table]:
        """Iterate over batches of `image_id` and `file_name` of all images, in order."""
        for part in self.parts:
            for batch in self._batches(part, ["image_id", "file_name"]):
                yield pa.Table.from_batches([batch])

    def iter_images(self) -> Iterator[pa.Table]:
        """Iterate over batches of `MANIFEST_SCHEMA` rows without `extra`, for all images in order."""
        names = [name for name in MANIFEST_SCHEMA.names if name != "extra"]
        for part in self.parts:
            for batch in self._batches(part, names):
                yield _with_container(pa.Table.from_batches([batch])).select(names)

    def _batches(self, part: ManifestPart, columns: list[str]) -> Iterator[pa.RecordBatch]:
        url = storage.join(self.run_url, MANIFEST, part.file)
        with storage.open_input(url) as file:
            yield from pq.ParquetFile(file, metadata=_footer(url, part.sha256)).iter_batches(65536, columns=columns)

    def _part_of(self, shard: int) -> ManifestPart:
        for part in self.parts:
            if part.first_shard <= shard < part.first_shard + part.num_shards:
                return part
        raise IndexError(f"shard {shard} of {self.num_shards}")


def moved_uri(uri: str, moves: Sequence[Move]) -> str:
    """Map a URI to its new root.

    Only the innermost matching move is applied, because a new root may be the old root of another move.
    """
    inner = sorted(moves, key=lambda move: -len(move.old))
    return next((new for move in inner if (new := move.apply(uri)) != uri), uri)


def moved_uris(table: pa.Table, moves: Sequence[Move]) -> pa.Table:
    """Map the URIs in rows of a manifest or listing to their new roots."""
    if not moves:
        return table
    uris = [moved_uri(uri, moves) for uri in table["uri"].to_pylist()]
    at = table.schema.get_field_index("uri")
    return table.set_column(at, table.schema.field(at), pa.array(uris, pa.string()))


def _with_container(table: pa.Table) -> pa.Table:
    """Add a null column `container` if it is missing: in older manifests every image is a separate file."""
    if "container" in table.column_names:
        return table
    return table.append_column("container", pa.nulls(table.num_rows, pa.string()))


@lru_cache(maxsize=64)
def _footer(url: str, sha256: str) -> Any:
    """Parquet metadata of a part, cached per process: a few megabytes for 10 million images."""
    return _read_footer(url)


def _read_footer(url: str) -> Any:
    """Read the Parquet metadata of a part and check its columns.

    Raises:
        GuardError: the file is not a Parquet file, or its columns are not those of a manifest. No value is read before
            this check: an untrusted run directory may have hashes that match.
    """
    with storage.open_input(url) as file:
        try:
            footer = pq.read_metadata(file)
            wrong = misfit_of(footer.schema.to_arrow_schema(), MANIFEST_SCHEMA, may_lack=("container",))
        except pa.ArrowException as error:
            wrong = one_line(error)
    if wrong is not None:
        raise GuardError(f"{url} is not a manifest ({wrong}): restore it, or plan again in another directory")
    return footer


def load_manifest(run_url: str, *, verify: bool, num_parts: int | None = None) -> Manifest | None:
    """Load the manifest of a run directory; None if there is none, or only a half-written one.

    Args:
        run_url: the run directory.
        verify: compare each part's bytes with its hash.
        num_parts: number of parts to read; any further ones belong to an unfinished extension. Parts are then opened by
            name, because a listing may be stale. None reads the parts that are listed.

    Raises:
        GuardError: a part is missing, damaged, changed or not a manifest; the message names it.
    """
    if num_parts is None:
        names = [name for name in storage.list_names(storage.join(run_url, MANIFEST)) if name.endswith(".json")]
    else:
        names = [f"{part_name(number)}.json" for number in range(num_parts)]
    parts: list[ManifestPart] = []
    for name in names:
        url = storage.join(run_url, MANIFEST, name)
        try:
            part = _read_sidecar(url, after=parts)
        except FileNotFoundError:
            if not parts and not storage.exists(storage.join(run_url, MANIFEST)):
                return None
            raise GuardError(f"{url} is missing: restore it, or plan again in another directory") from None
        if verify:
            _verify(run_url, part)
        parts.append(part)
    return Manifest(run_url, tuple(parts)) if parts else None


def num_shards_behind(run_url: str, num_parts: int) -> int:
    """Number of shards in the parts after the first `num_parts`; parts are opened by name, not listed.

    Raises:
        GuardError: a part is damaged.
    """
    count = 0
    with contextlib.suppress(FileNotFoundError):
        for number in itertools.count(num_parts):
            count += _read_sidecar(storage.join(run_url, MANIFEST, f"{part_name(number)}.json")).num_shards
    return count


def _read_sidecar(url: str, *, after: Sequence[ManifestPart] | None = None) -> ManifestPart:
    """Read the JSON sidecar of a part.

    Args:
        url: URL of the sidecar.
        after: the preceding parts, which this one must continue; None skips that check.

    Raises:
        FileNotFoundError, OSError: the sidecar does not exist or cannot be read.
        GuardError: it is damaged, names a file other than its part, or does not continue the preceding parts.
    """
    data = storage.read_bytes(url)
    try:
        part = ManifestPart(**json.loads(data))
        wrong = _wrong_with(part, url.rpartition("/")[2], after)
    except (ValueError, TypeError, RecursionError) as error:
        wrong = one_line(error)
    if wrong is not None:
        raise GuardError(f"{url} is damaged ({wrong}): restore it, or plan again in another directory")
    return part


def _wrong_with(part: ManifestPart, sidecar: str, after: Sequence[ManifestPart] | None) -> str | None:
    """Why `write_parts` cannot have written this part; None if it can. A run directory may be untrusted."""
    name = sidecar.removesuffix(".json")
    if not _PART_NAME.fullmatch(name) or part.file != f"{name}.parquet":
        return f"it names the file {shown(part.file)}, not the part-NNNN.parquet beside it"
    num_shards = -(-part.num_rows // part.shard_size) if part.shard_size > 0 else 0
    if part.num_rows < 1 or part.num_shards != num_shards or part.max_shard_bytes < 0:
        return f"{part.num_rows} images are not {part.num_shards} shards of {part.shard_size}"
    if after is not None:
        begin = 1 + sum(each.num_rows for each in after), sum(each.num_shards for each in after)
        if (part.first_ordinal, part.first_shard) != begin:
            return f"it begins at image {part.first_ordinal}, shard {part.first_shard}, not at {begin[0]}, {begin[1]}"
    return None


def part_name(number: int) -> str:
    """Name of both files of a part, without their extensions."""
    return f"part-{number:04d}"


def _verify(run_url: str, part: ManifestPart) -> None:
    url = storage.join(run_url, MANIFEST, part.file)
    try:
        found = file_sha256(url)
    except FileNotFoundError:
        raise GuardError(f"{url} is missing: restore it, or plan again in another directory") from None
    if found != part.sha256:
        raise GuardError(
            f"{url} is not the file that was planned (sha256 {found[:16]}… instead of {part.sha256[:16]}…): restore "
            "it, or plan again in another directory"
        )
    _read_footer(url)


def file_sha256(url: str) -> str:
    """Hex SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with storage.open_input(url) as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()
