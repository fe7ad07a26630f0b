"""The plan: which images, in which order, in which shards. Written once, then only appended to.

A part is `manifest/part-0000.parquet` with one row group per shard, and a small `part-0000.json` beside it that is
written afterwards: it makes the part, and holds its hash. Ordinals are 1-based positions in the manifest.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass as validated_dataclass

from owlsam_ray import storage
from owlsam_ray.datasets import ImageRecord, Source
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.schema import MANIFEST_SCHEMA
from owlsam_ray.settings import DataConfig

MANIFEST = "manifest"
_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS_WANTED = 8, 1024, 64
_BYTES_PER_PIXEL = 0.5
"""Encoded size of a photograph where only its pixels are known: on the safe side of JPEG's usual 0.2 to 0.4."""
_UNKNOWN_BYTES = 200_000


@validated_dataclass(frozen=True, slots=True)
class ManifestPart:
    """One part of the manifest."""

    file: str
    sha256: str
    """Of the Parquet file's bytes."""
    num_rows: int
    first_ordinal: int
    first_shard: int
    num_shards: int
    shard_size: int
    max_shard_bytes: int
    """Encoded bytes of the largest shard, estimated where the listing does not tell."""
    source: dict[str, Any]
    """What the output carries over: info, licenses, categories."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All parts of a run's manifest. Small: rows are read shard by shard."""

    run_url: str
    parts: tuple[ManifestPart, ...]

    @property
    def num_images(self) -> int:
        """Images in all parts."""
        return sum(part.num_rows for part in self.parts)

    @property
    def num_shards(self) -> int:
        """Shards in all parts."""
        return sum(part.num_shards for part in self.parts)

    @property
    def max_shard_bytes(self) -> int:
        """Encoded bytes of the largest shard, estimated."""
        return max(part.max_shard_bytes for part in self.parts)

    @property
    def layout_hash(self) -> str:
        """Hash of which images stand in which shard: a chain over the parts, so that a part can be appended."""
        chain = ""
        for part in self.parts:
            link = f"{chain}\n{part.sha256}\n{part.num_rows}\n{part.shard_size}"
            chain = hashlib.sha256(link.encode()).hexdigest()
        return chain

    def iter_shards(self) -> Iterator[int]:
        """Shard numbers in manifest order."""
        return iter(range(self.num_shards))

    def shard_span(self, shard: int) -> tuple[int, int]:
        """(ordinal of the first image, number of images) of a shard."""
        part = self._part_of(shard)
        start = (shard - part.first_shard) * part.shard_size
        return part.first_ordinal + start, min(part.shard_size, part.num_rows - start)

    def read_shard(self, shard: int) -> pa.Table:
        """Rows of `MANIFEST_SCHEMA` of one shard, in order: one row group."""
        part = self._part_of(shard)
        url = storage.join(self.run_url, MANIFEST, part.file)
        filesystem, path = storage.open_filesystem(url)
        with filesystem.open(path, "rb") as file:
            reader = pq.ParquetFile(file, metadata=_footer(url, part.sha256))
            return reader.read_row_group(shard - part.first_shard)

    def _part_of(self, shard: int) -> ManifestPart:
        for part in self.parts:
            if part.first_shard <= shard < part.first_shard + part.num_shards:
                return part
        raise IndexError(f"shard {shard} of {self.num_shards}")


@lru_cache(maxsize=64)
def _footer(url: str, sha256: str) -> Any:
    """Parquet metadata of a part, read once per process: at 10 million images it is some megabytes."""
    filesystem, path = storage.open_filesystem(url)
    with filesystem.open(path, "rb") as file:
        return pq.read_metadata(file)


def shard_size(num_images: int, setting: int | str, *, mean_bytes: float | None = None, shard_max_mb: int = 256) -> int:
    """Images in a shard.

    Args:
        num_images: of the part.
        setting: a number, or `auto`: images / 64, clamped to 8…1024, and no more than `shard_max_mb`.
        mean_bytes: of an encoded image, where known.
        shard_max_mb: megabytes of a shard.
    """
    if not isinstance(setting, str):
        return setting
    size = min(max(num_images // _SHARDS_WANTED, _SMALLEST_SHARD), _LARGEST_SHARD)
    if mean_bytes:
        size = min(size, int(shard_max_mb * 10**6 / mean_bytes))
    return max(1, size)


def write_part(
    run_url: str, source: Source, data: DataConfig, *, shard_size_setting: int | str, shard_max_mb: int
) -> Manifest:
    """Freeze a listing as the first part of a manifest.

    Args:
        run_url: the run directory; a half-written part of an earlier try is replaced.
        source: the listing.
        data: where the files lie.
        shard_size_setting: see `shard_size`.
        shard_max_mb: see `shard_size`.

    Raises:
        InputError: the listing is empty.
        GuardError: the run has a manifest already.
        OSError: storage refused.
    """
    if load_manifest(run_url, verify=False) is not None:
        raise GuardError(f"{run_url} has a manifest already")
    records = source.records
    if not records:
        raise InputError("there is no image to plan")
    sizes = [_num_bytes(record) for record in records]
    size = shard_size(len(records), shard_size_setting, mean_bytes=sum(sizes) / len(sizes), shard_max_mb=shard_max_mb)
    url = storage.join(run_url, MANIFEST, "part-0000.parquet")
    with storage.open_atomic(url) as file, pq.ParquetWriter(file, MANIFEST_SCHEMA, compression="zstd") as writer:
        for shard, start in enumerate(range(0, len(records), size)):
            writer.write_table(_rows(records[start : start + size], shard, data.images), row_group_size=size)
    part = ManifestPart(
        file="part-0000.parquet",
        sha256=_sha256(url),
        num_rows=len(records),
        first_ordinal=1,
        first_shard=0,
        num_shards=-(-len(records) // size),
        shard_size=size,
        max_shard_bytes=max(sum(sizes[start : start + size]) for start in range(0, len(sizes), size)),
        source={"info": source.info, "licenses": source.licenses, "categories": source.categories},
    )
    sidecar = json.dumps(asdict(part), indent=1).encode()
    storage.write_atomic(storage.join(run_url, MANIFEST, "part-0000.json"), sidecar)
    return Manifest(run_url, (part,))


def load_manifest(run_url: str, *, verify: bool) -> Manifest | None:
    """The manifest of a run directory; None when it has none, or only a half-written one.

    Args:
        run_url: the run directory.
        verify: compare each part's bytes with its hash.

    Raises:
        GuardError: a part is missing, damaged or changed; names it.
    """
    parts = []
    for name in storage.list_names(storage.join(run_url, MANIFEST)):
        if not name.endswith(".json"):
            continue
        url = storage.join(run_url, MANIFEST, name)
        try:
            part = ManifestPart(**json.loads(storage.read_bytes(url)))
        except (ValueError, TypeError) as error:
            raise GuardError(f"{url} is damaged ({error}): restore it, or plan again in another directory") from None
        if verify:
            _verify(run_url, part)
        parts.append(part)
    return Manifest(run_url, tuple(parts)) if parts else None


def _verify(run_url: str, part: ManifestPart) -> None:
    url = storage.join(run_url, MANIFEST, part.file)
    try:
        found = _sha256(url)
    except FileNotFoundError:
        raise GuardError(f"{url} is missing: restore it, or plan again in another directory") from None
    if found != part.sha256:
        raise GuardError(
            f"{url} is not the file that was planned (sha256 {found[:16]}… instead of {part.sha256[:16]}…): restore "
            "it, or plan again in another directory"
        )


def _sha256(url: str) -> str:
    filesystem, path = storage.open_filesystem(url)
    digest = hashlib.sha256()
    with filesystem.open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _num_bytes(record: ImageRecord) -> int:
    """Encoded size of an image: known, or estimated from its pixels, or a usual one."""
    if record.num_bytes is not None:
        return record.num_bytes
    if record.height is not None and record.width is not None:
        return int(record.height * record.width * _BYTES_PER_PIXEL)
    return _UNKNOWN_BYTES


def _rows(records: Any, shard: int, root: str) -> pa.Table:
    columns: dict[str, list[Any]] = {
        "image_id": [record.image_id for record in records],
        "file_name": [record.file_name for record in records],
        "uri": [storage.join(root, record.file_name) for record in records],
        "member": [None] * len(records),
        "offset": [None] * len(records),
        "length": [None] * len(records),
        "shard": [shard] * len(records),
        "height": [record.height for record in records],
        "width": [record.width for record in records],
        "extra": [json.dumps(record.extra) if record.extra else None for record in records],
    }
    return pa.table(columns, schema=MANIFEST_SCHEMA)
