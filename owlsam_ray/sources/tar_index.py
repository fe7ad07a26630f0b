"""Indexes the images of a plain tar file: reads its headers once, and skips its data.

Nothing is extracted. Headers are not trusted: no header read exceeds `_MAX_HEADER`, and each header must follow the
previous one, so indexing ends whatever a file claims.
"""

import errno
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.errors import shown
from owlsam_ray.schema import Container
from owlsam_ray.sources.files import ending_of
from owlsam_ray.sources.listing import BATCH_ROWS, file_name_error, listing_table
from owlsam_ray.sources.row_names import distinct_name, quoted_name

_MAX_HEADER = 2**20
"""Maximum bytes of a long name or a pax header."""
_MAX_TAIL = 2**20
"""Maximum bytes of zeros after an end marker; more suggest a file that was allocated but never filled."""
_FIRST_READ = 16 * 2**10
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class TarFile:
    """A tar file to index."""

    url: str
    name: str
    """Relative to the common folder of all tar files; the file names of its images begin with it."""
    suffixes: tuple[str, ...]
    """File endings of image members, in lower case."""


@dataclass(slots=True)
class TarIndex:
    """Contents of a tar file."""

    file: TarFile
    tables: list[pa.Table] = field(default_factory=list)
    """`LISTING_SCHEMA`, its complete image members in their order."""
    images: int = 0
    members: int = 0
    """Number of complete members of any kind."""
    others: int = 0
    """Number of members that are hidden, or not images by their ending."""
    endings: Counter[str] = field(default_factory=Counter)
    """Number of members that are not images, by ending."""
    odd: Counter[str] = field(default_factory=Counter)
    """Number of members that store no bytes themselves, by kind (link, device, sparse file)."""
    unmarked: bool = False
    """No end marker follows the last member."""
    refusal: str | None = None
    """Why no part of the file can be used, and what to do about it."""
    damage: str | None = None
    """Where the file is truncated or damaged; the members before that are complete."""


def index_tar(file: TarFile) -> TarIndex:
    """Find the images of one tar file.

    Returns:
        The index, which also states what is wrong with the file.

    Raises:
        OSError: storage failed; that says nothing about the file.
    """
    index = TarIndex(file)
    try:
        with ExitStack() as stack:
            headers = _open(file.url, stack)
            index.refusal = _compression(headers)
            if index.refusal is None:
                _walk(headers, index)
    except (FileNotFoundError, NotADirectoryError):
        index.refusal = "does not exist; fix data.files, or copy the file"
    except IsADirectoryError:
        index.refusal = "is a folder; name the tar files in it, as in folder/*.tar"
    except PermissionError as error:
        index.refusal = f"cannot be read ({error.strerror or error})"
    return index


class _Headers:
    """A file object for `tarfile` that reads headers and skips data.

    After a short skip it reads through the gap, in blocks that double in size up to `most`; after a skip of more than
    `gap` bytes it restarts with a small block. Small members thus cost one request per block, and a large member costs
    one small request.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int, *, gap: int, most: int) -> None:
        self.size = size
        self._fetch, self._gap, self._most = fetch, gap, most
        self._start, self._data, self._position = 0, b"", 0
        self._block = _FIRST_READ

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        self._position = position

    def read(self, length: int) -> bytes:
        if not 0 <= length <= _MAX_HEADER or self._position < 0:
            raise tarfile.ReadError(f"a header claims {length} bytes")
        begin = self._position - self._start
        if begin < 0 or begin + length > len(self._data):
            self._refill(length)
            begin = self._position - self._start
        piece = self._data[begin : begin + length]
        self._position += len(piece)
        return piece

    def _refill(self, length: int) -> None:
        near = 0 <= self._position - self._start <= len(self._data) + self._gap
        self._block = min(self._block * 2, self._most) if near else _FIRST_READ
        wanted = max(0, min(max(length, self._block), self.size - self._position))
        data = self._fetch(self._position, wanted) if wanted else b""
        if len(data) != wanted:
            raise OSError(errno.EIO, f"the tar file became shorter than {self.size} bytes while it was read")
        self._start, self._data = self._position, data


def _open(url: str, stack: ExitStack) -> _Headers:
    filesystem, _ = storage.open_filesystem(url)
    if storage.is_local(filesystem):
        file = stack.enter_context(storage.open_input(url))

        def fetch(start: int, length: int) -> bytes:
            file.seek(start)
            return file.read(length)

        return _Headers(fetch, file.seek(0, 2), gap=2**15, most=2**18)
    # A request takes as long as reading a few MB.
    return _Headers(
        lambda start, length: storage.read_range(url, start, length), storage.num_bytes(url), gap=2**20, most=2**22
    )


def _compression(headers: _Headers) -> str | None:
    begin = headers.read(min(8, headers.size))
    headers.seek(0)
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            return compressed(kind)
    return None


def compressed(kind: str) -> str:
    """Why a compressed tar file is refused."""
    return f"is compressed ({kind}): images are read by byte range, so unpack it to a plain .tar"


def _walk(headers: _Headers, index: TarIndex) -> None:
    """Fill the index, up to the end of the file or its first damage."""
    if headers.size == 0:
        index.damage = "is empty (0 bytes)"
        return
    rows: list[tuple[str, int, int]] = []
    end = 0  # of the last complete member, with its padding
    try:
        for member, next_header in _members(headers):
            index.damage = _damage(member, next_header, headers.size, end)
            if index.damage is not None:
                break
            end = next_header
            index.members += 1
            name = _image_name(member, index)
            if name is None:
                continue
            rows.append((name, member.offset_data, member.size))
            if len(rows) == BATCH_ROWS:
                _add_table(index, rows)
        else:
            _check_end(headers, end, index)
    # Raised by `tarfile` for invalid headers; not all of these are its own errors.
    except (tarfile.TarError, ValueError, IndexError, OverflowError, RecursionError) as error:
        if end == 0:
            index.refusal = (
                f"is not a tar file, or its first header is damaged ({error}); leave it out, or copy it again"
            )
        else:
            index.damage = f"is truncated or damaged at byte {end} ({error})"
    _add_table(index, rows)


def _members(headers: _Headers) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Yield the members in order, each with the position after it; stop where no further header can be read."""
    readable: Any = headers
    with tarfile.open(fileobj=readable, mode="r:", encoding="utf-8", errors="surrogateescape") as opened:
        tar: Any = opened
        while (member := tar.next()) is not None:
            tar.members.clear()  # it would keep all members
            yield member, tar.offset
            if tar.offset >= headers.size:
                return


def _damage(member: tarfile.TarInfo, next_header: int, size: int, end: int) -> str | None:
    """What is wrong with a member; `end`: end of the previous member."""
    if member.size < 0 or not end <= member.offset < next_header:
        return _bad_header(end)
    own = member.isreg() and not member.issparse()
    # The padding of the last member may be missing.
    if (member.offset_data + member.size if own else next_header) > size:
        return f"is truncated at byte {size}, inside member {shown(member.name)}"
    return None


def _bad_header(position: int) -> str:
    return f"has a damaged header at byte {position}"


def _image_name(member: tarfile.TarInfo, index: TarIndex) -> str | None:
    """Name of an image member; other members are counted, and give None."""
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        index.odd["sparse" if member.issparse() else "link" if member.islnk() or member.issym() else "device"] += 1
        return None
    name = member.name
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    hidden = any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))
    if hidden or not name.lower().endswith(index.file.suffixes):
        index.others += 1
        if not hidden:
            index.endings[ending_of(name)] += 1
        return None
    return name


def _check_end(headers: _Headers, end: int, index: TarIndex) -> None:
    """Check what follows the last member: an end marker of zeros, nothing, or damage."""
    headers.seek(end)
    rest = headers.size - end
    tail = headers.read(min(rest, _MAX_TAIL)) if rest > 0 else b""
    first = tail[: tarfile.BLOCKSIZE]
    if first.strip(b"\0"):
        is_cut = len(first) < tarfile.BLOCKSIZE
        index.damage = f"is truncated at byte {headers.size}, inside a header" if is_cut else _bad_header(end)
    elif len(first) < tarfile.BLOCKSIZE:
        index.unmarked = True
    elif tail.strip(b"\0"):
        index.damage = f"continues after its end marker at byte {end} (were several tar files concatenated?)"
    elif rest > _MAX_TAIL:
        index.damage = f"holds only zeros from byte {end} to byte {headers.size}"


def _add_table(index: TarIndex, rows: list[tuple[str, int, int]]) -> None:
    """Move rows into a table under safe names; a member is read by its bytes, so its name does not matter."""
    if not rows:
        return
    names, offsets, lengths = zip(*rows, strict=True)
    whole = [f"{index.file.name}/{name}" for name in names]
    safe = [quoted_name(name) for name in whole]
    odd = [now != before for now, before in zip(safe, whole, strict=True)]
    index.tables.append(
        listing_table(
            {
                "file_name": safe,
                "uri": pa.repeat(index.file.url, len(rows)),
                "container": pa.repeat(Container.TAR.value, len(rows)),
                "member": [quoted_name(name) for name in names],
                "offset": list(offsets),
                "length": list(lengths),
                "num_bytes": list(lengths),
                "split": pa.repeat(quoted_name(index.file.name), len(rows)),
                "other_name": [
                    distinct_name(now, before) if is_odd else None
                    for now, before, is_odd in zip(safe, whole, odd, strict=True)
                ],
                "quoted": [
                    f"{shown(before)}: {file_name_error(before)}" if is_odd else None
                    for before, is_odd in zip(whole, odd, strict=True)
                ],
            }
        )
    )
    index.images += len(rows)
    rows.clear()
