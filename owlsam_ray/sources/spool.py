"""Stores a listing on local disk: filters it, finds repeats, and reads the rows back in order.

In memory an image costs 16 bytes for the digest of its name and 8 for its id; the rest is in a temporary file.
"""

import contextlib
import errno
import hashlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.errors import IncompleteError
from owlsam_ray.schema import LISTING_SCHEMA, Container, encoded_bytes
from owlsam_ray.sources.listing import Listing

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MOST_SPLITS = 1000
_DIGEST_BYTES = 16
"""Long enough that two of 10⁸ names share a digest with a probability below 10⁻²²."""


@dataclass(frozen=True, slots=True)
class Selection:
    """Which rows of a listing are kept on disk."""

    limit: int | None = None
    """Maximum number of rows; the first ones that pass the filters are kept."""
    splits: tuple[str, ...] = ()
    """The source's own splits, or first folders of the names; empty: all."""
    image_ids: NDArray[np.int64] | None = None
    """In ascending order; None: all."""


@dataclass(slots=True)
class Spool:
    """N rows of a listing that passed the filters, in the listing's order."""

    path: Path
    starts: NDArray[np.int64]
    """First row of each batch of the file, then N."""
    digests: NDArray[np.bytes_]
    """(N,) 16-byte digests of the file names."""
    ids: NDArray[np.int64] | None
    """(N,) ids; None when the source gives none."""
    mean_bytes: float
    """Mean size of an encoded image, estimated where the listing does not state it."""
    splits: set[str]
    """Splits in the listing, at most a thousand; collected only when the selection names some."""
    num_listed: int
    """Rows before the filters; if reading stopped at the limit, the rows read until then."""
    bad: NDArray[np.bool_]
    """(N,) rows through which no image can be read."""
    quoted: NDArray[np.bool_]
    """(N,) rows whose name differs from the source's name."""
    has_other: NDArray[np.bool_]
    """(N,) rows with an alternative name that is not in use yet."""
    took_other: NDArray[np.bool_]
    """(N,) rows that use their alternative name."""
    name_setting: str | None = None
    """See `Listing.name_setting`."""

    def __len__(self) -> int:
        return len(self.digests)

    def tables(self, wanted: NDArray[np.bool_]) -> Iterator[pa.Table]:
        """Yield the wanted rows as tables of `LISTING_SCHEMA`, in order; `wanted` is an (N,) mask."""
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file) as reader:
            for batch in range(reader.num_record_batches):
                mask = wanted[self.starts[batch] : self.starts[batch + 1]]
                if mask.any():
                    table = pa.Table.from_batches([reader.get_batch(batch)]).filter(pa.array(mask))
                    yield self._named(table, self.took_other[self.starts[batch] : self.starts[batch + 1]][mask])

    def rows_at(self, positions: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Read a few rows, given by position, as plain values."""
        rows = []
        with pa.OSFile(str(self.path)) as file, pa.ipc.open_file(file) as reader:
            for position in positions.tolist():
                batch = int(np.searchsorted(self.starts, position, side="right")) - 1
                row = reader.get_batch(batch).slice(position - int(self.starts[batch]), 1)
                rows += self._named(pa.Table.from_batches([row]), self.took_other[position : position + 1]).to_pylist()
        return rows

    def take_other_names(self, mask: NDArray[np.bool_]) -> None:
        """Switch rows to their alternative name; (N,) mask of rows that have one."""
        self.took_other |= mask
        self.has_other &= ~mask
        if mask.any():
            self.digests[mask] = np.concatenate([digests_of(table["file_name"]) for table in self.tables(mask)])

    @staticmethod
    def _named(table: pa.Table, other: NDArray[np.bool_]) -> pa.Table:
        if not other.any():
            return table
        names = pc.if_else(pa.array(other), table["other_name"], table["file_name"])
        place = table.schema.get_field_index("file_name")
        return table.set_column(place, table.schema.field(place), names)


def spool_listing(
    listing: Listing,
    path: Path,
    selection: Selection,
    *,
    stop_at_limit: bool,
    show: Callable[[int, int | None], None] = lambda done, total: None,
) -> Spool:
    """Read a listing to its end or to the limit, and store the rows that pass the filters.

    Args:
        listing: is consumed.
        path: path of the temporary file.
        selection: its splits and ids are applied here; its limit only when reading may stop there.
        stop_at_limit: stop reading once `selection.limit` rows have passed.
        show: called with the rows read so far and the total, if known.

    Raises:
        InputError: the source is invalid.
        OSError: the temporary file cannot be written.
    """
    starts, digests, ids, listed, kept, encoded = [0], [], [], 0, 0, 0
    marks: list[NDArray[np.bool_]] = [np.empty((3, 0), np.bool_)]
    splits: set[str] = set()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    limit = selection.limit if stop_at_limit else None
    with (
        _closing(listing.tables) as tables,
        _room(path.parent),
        pa.OSFile(str(path), "wb") as file,
        pa.ipc.new_file(file, LISTING_SCHEMA, options=options) as writer,
    ):
        for table in tables:
            listed += table.num_rows
            table = _filtered(table, selection, splits)
            if limit is not None:
                table = table.slice(0, limit - kept)
            if table.num_rows:
                batch = table.combine_chunks().to_batches()[0]
                writer.write_batch(batch)
                kept += batch.num_rows
                starts.append(kept)
                encoded += int(encoded_bytes(table).sum())
                digests.append(digests_of(batch.column("file_name")))
                marks.append(_marks(batch))
                if listing.has_ids:
                    ids.append(batch.column("image_id").to_numpy())
            show(listed, listing.total)
            if kept == limit:
                break
    bad, quoted, has_other = np.concatenate(marks, axis=1)
    return Spool(
        path=path,
        starts=np.array(starts, np.int64),
        digests=np.concatenate([*digests, np.empty(0, f"S{_DIGEST_BYTES}")]),
        ids=np.concatenate([*ids, np.empty(0, np.int64)]) if listing.has_ids else None,
        splits=splits,
        mean_bytes=encoded / max(kept, 1),
        num_listed=listed,
        bad=bad,
        quoted=quoted,
        has_other=has_other,
        took_other=np.zeros(kept, np.bool_),
        name_setting=listing.name_setting,
    )


def _marks(batch: pa.RecordBatch) -> NDArray[np.bool_]:
    """(3, N) whether a row is bad, is quoted, has an alternative name."""
    columns = (
        pc.fill_null(pc.equal(batch.column("container"), str(Container.BAD)), False),
        pc.is_valid(batch.column("quoted")),
        pc.is_valid(batch.column("other_name")),
    )
    return np.stack([column.to_numpy(zero_copy_only=False) for column in columns])


@contextlib.contextmanager
def _closing(tables: Iterator[pa.Table]) -> Iterator[Iterator[pa.Table]]:
    """Close a partly read generator, with its files and processes, now instead of at some later time."""
    try:
        yield tables
    finally:
        if isinstance(tables, Generator):
            tables.close()


@contextlib.contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Report which disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, FileNotFoundError):
            raise IncompleteError(
                f"no room for the listing in the temporary directory {folder.parent} ({error.strerror or error}): free "
                "some, or set TMPDIR to a larger disk, and call the same command again"
            ) from None
        raise


def digests_of(names: pa.Array) -> NDArray[np.bytes_]:
    """(N,) 16-byte digests of N names."""
    blake2b = hashlib.blake2b
    joined = b"".join(blake2b(name.encode(), digest_size=_DIGEST_BYTES).digest() for name in names.to_pylist())
    return np.frombuffer(joined, f"S{_DIGEST_BYTES}")


def sample_mask(digests: NDArray[np.bytes_], count: int, seed: int) -> NDArray[np.bool_]:
    """(N,) mask of the images in a random sample.

    An image's rank depends only on its name and the seed, and the lowest ranks are taken (bottom-k sampling). Samples
    with one seed are therefore nested, and new images change the choice among the old ones as little as possible.

    Args:
        digests: (N,) digests of the names, distinct.
        count: size of the sample; all images are taken when there are no more than that.
        seed: another seed gives another sample.
    """
    if count >= len(digests):
        return np.ones(len(digests), np.bool_)
    words = np.frombuffer(digests.tobytes(), np.uint64).reshape(-1, 2)
    # Mix in the seed with the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    ranks = words[:, 0] ^ np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    with np.errstate(over="ignore"):
        ranks = (ranks ^ (ranks >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        ranks = (ranks ^ (ranks >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    ranks ^= ranks >> np.uint64(31)
    mask = np.zeros(len(digests), np.bool_)
    mask[np.argpartition(ranks, count)[:count]] = True
    return mask


def _filtered(table: pa.Table, selection: Selection, seen: set[str]) -> pa.Table:
    if selection.splits:
        folder = pc.struct_field(pc.extract_regex(table["file_name"], r"^(?P<first>[^/]+)/"), "first")
        wanted = pa.array(selection.splits, pa.string())
        for values in (table["split"], folder):
            if len(seen) < _MOST_SPLITS:
                seen.update(pc.unique(values).drop_null().to_pylist()[:_MOST_SPLITS])
        table = table.filter(pc.or_(pc.is_in(table["split"], value_set=wanted), pc.is_in(folder, value_set=wanted)))
    if selection.image_ids is not None:
        table = table.filter(pc.is_in(table["image_id"], value_set=pa.array(selection.image_ids)))
    return table
