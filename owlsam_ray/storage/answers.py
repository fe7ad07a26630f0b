"""The answer to one read: taken as it comes, given up when it trickles, refused when it is cut.

An answer is cut when it holds less than its own `Content-Range` or `Content-Length` says. Of an answer that was
unpacked on the way (`Content-Encoding`, or the decompressive transcoding of GCS) these headers count other bytes.
"""

import asyncio
import contextlib
import errno
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.faults import CutError, TooLargeError, TrickleTimeoutError, understand

CHUNK = 2**18
"""Bytes that are taken from a connection at once."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is read of a file."""

    start: int
    length: int
    is_whole: bool = False
    """The file is wanted only if it ends before `length` bytes."""

    @property
    def range_header(self) -> str:
        """As HTTP asks for it."""
        return f"bytes={self.start}-{self.start + self.length - 1}"

    def check_size(self, size: int) -> None:
        """Refuse a file that is too large, before it is read.

        Raises:
            TooLargeError: it is.
        """
        if self.is_whole and size >= self.length:
            raise TooLargeError(errno.EFBIG, f"{size} bytes, and {self.length - 1} are the most")


@dataclass(frozen=True, slots=True)
class Body:
    """What came."""

    data: bytes
    size: int | None
    """Bytes of the whole file as it is stored, where the answer tells them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers with names in lower case, and the body in chunks."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    unpacks: bool
    """Whether the client unpacks a body with a `Content-Encoding`."""

    @property
    def is_unpacked(self) -> bool:
        """Whether the headers count other bytes than those of the chunks."""
        coded = [self.headers.get("x-goog-stored-content-encoding", "identity")]
        if self.unpacks:
            coded.append(self.headers.get("content-encoding", "identity"))
        changed = self.headers.get("x-guploader-response-body-transformations", "")
        return "gunzipped" in changed or any(each.strip().lower() not in ("", "identity") for each in coded)

    @property
    def content_range(self) -> tuple[int, int, int | None] | None:
        """(first byte, byte behind the last one, bytes of the file) of a part; None when it is none, or not told."""
        match = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+|\*)\s*", self.headers.get("content-range", ""))
        if self.status != 206 or match is None:
            return None
        return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])

    @property
    def content_length(self) -> int | None:
        """Bytes of the body; None when not told."""
        told = self.headers.get("content-length", "")
        return int(told) if told.isascii() and told.isdigit() else None


class Pace:
    """How long an answer may take: a while, and more with every byte that has come.

    So a server that sends a byte a second is given up as soon as one that sends nothing, whatever size it promised.
    """

    def __init__(self, client: Client, timer: asyncio.Timeout, begin: float) -> None:
        self._client, self._timer, self._begin = client, timer, begin
        self._received = 0
        self.expected: int | None = None
        """Bytes, where the answer tells them."""

    def came(self, num_bytes: int) -> None:
        """So many more."""
        self._received += num_bytes
        self._timer.reschedule(self._begin + self._client.deadline_s(self._received))

    def describe(self) -> str:
        """What came in which time."""
        seconds = self._client.deadline_s(self._received)
        whole = "" if self.expected is None else f" of {self.expected}"
        return f"{self._received}{whole} bytes in {seconds:.3g} s"


@contextlib.asynccontextmanager
async def paced(client: Client) -> AsyncIterator[Pace]:
    """Time for one request.

    Raises:
        TrickleTimeoutError: it took longer.
    """
    begin = asyncio.get_running_loop().time()
    timer = asyncio.timeout_at(begin + client.deadline_s())
    pace = Pace(client, timer, begin)
    try:
        async with timer:
            yield pace
    except TimeoutError:
        if not timer.expired():
            raise
        raise TrickleTimeoutError(pace.describe()) from None


async def receive(answer: Answer, wanted: Wanted, pace: Pace, *, most_skipped: int | None = None) -> Body:
    """Take the body of an answer.

    Args:
        answer: with a good status.
        wanted: what was asked for; a server may send the whole file instead.
        pace: of the request.
        most_skipped: bytes before the start that are read for nothing, at most.

    Raises:
        CutError: it holds less than it says, or another part than was asked for.
        TooLargeError: the file is larger than wanted.
        OSError: (EOPNOTSUPP) the server sends whole files only.
    """
    part = None if answer.is_unpacked else answer.content_range
    expected, size = _told(answer, part)
    if size is not None:
        wanted.check_size(size)
    pace.expected = expected
    _check_part(part, wanted)
    skip = 0 if answer.status == 206 else wanted.start
    if most_skipped is not None and skip > most_skipped:
        raise OSError(errno.EOPNOTSUPP, "the server sends whole files only, no ranges")
    data, received, is_whole = bytearray(), 0, True
    async for chunk in answer.chunks:
        pace.came(len(chunk))
        received += len(chunk)
        data += chunk[skip:]
        skip = max(0, skip - len(chunk))
        # A part is read to its end, where checksums are compared, unless it is longer than it may be.
        if len(data) > wanted.length or (len(data) == wanted.length and answer.status != 206):
            is_whole = received == expected
            break
    if is_whole and expected is not None and received < expected:
        raise CutError(f"storage sent {received} of {expected} bytes")
    wanted.check_size(len(data))
    if size is None and is_whole and answer.status != 206 and not answer.is_unpacked:
        size = received
    return Body(bytes(data[: wanted.length] if answer.status != 206 else data), size)


def _told(answer: Answer, part: tuple[int, int, int | None] | None) -> tuple[int | None, int | None]:
    """Bytes of the body, and of the file, as the headers say."""
    if answer.is_unpacked:
        return None, None
    if part is not None:
        return part[1] - part[0], part[2]
    return answer.content_length, answer.content_length if answer.status != 206 else None


def _check_part(part: tuple[int, int, int | None] | None, wanted: Wanted) -> None:
    """Refuse a part of the file that is not the one that was asked for."""
    if part is None:
        return
    start, end, size = part
    wanted_end = wanted.start + wanted.length
    if start != wanted.start or (size is not None and end < min(wanted_end, size)):
        raise CutError(f"storage sent bytes {start} to {end} instead of {wanted.start} to {wanted_end}")


def read_foreign(client: Client, path: str, wanted: Wanted, *, listed: int | None = None) -> Body:
    """The same of a file system that shows no answers: what it says about the file's size takes their place.

    Args:
        client: of the file system.
        path: inside it.
        wanted: what is read.
        listed: size in a listing, as far as that is known; where it is right, the size is not asked for.

    Raises:
        CutError: there came less than the file system says that there is.
        TooLargeError: the file is larger than wanted.
    """
    filesystem = client.filesystem
    size = listed if wanted.is_whole else None
    if wanted.is_whole and (size is None or size >= wanted.length):
        size = told_size(client, path)
        if size is not None:
            wanted.check_size(size)
    options = {"start": wanted.start, "end": wanted.start + wanted.length} | time_option(client, size or wanted.length)
    data = bytes(filesystem.cat_file(path, **options))
    wanted.check_size(len(data))
    if len(data) >= wanted.length:
        return Body(data, None)
    return Body(data, check_end(client, path, wanted.start + len(data), told=size))


def check_end(client: Client, path: str, end: int, *, told: int | None = None) -> int | None:
    """Refuse a read that stopped before the end of the file.

    Args:
        client: of a file system that shows no answers.
        path: inside it.
        end: where the read stopped.
        told: what is thought to be the size of the file.

    Returns:
        Size of the file, where the file system tells it.

    Raises:
        CutError: the file goes on there.
    """
    if told == end:
        return end
    size = told_size(client, path)
    if size is not None and end < size:
        client.filesystem.invalidate_cache()  # what it says may be old
        size = told_size(client, path)
        if size is not None and end < size:
            raise CutError(f"storage sent {end} of {size} bytes")
    return size


def told_size(client: Client, path: str) -> int | None:
    """Size of a file, where its file system tells it.

    Raises:
        Exception: it may tell the size in a while.
    """
    try:
        size = client.filesystem.info(path).get("size")
    except Exception as error:  # of any class; the read itself decides
        if understand(error, is_foreign=True).is_worth_a_retry:
            raise
        return None
    return int(size) if isinstance(size, int) else None


def time_option(client: Client, num_bytes: int) -> dict[str, Any]:
    """As fsspec's asynchronous file systems take the time of a whole request; others know none."""
    filesystem = client.filesystem
    is_asynchronous = isinstance(filesystem, AsyncFileSystem) and filesystem.async_impl
    is_mirrored = is_asynchronous and type(filesystem).cat_file is AbstractFileSystem.cat_file
    return {"timeout": client.deadline_s(num_bytes)} if is_mirrored else {}
