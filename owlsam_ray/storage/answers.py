"""Receive the answer to one read: stream it, give up when it is too slow, refuse it when it is truncated.

An answer is truncated if it is shorter than its own `Content-Range` or `Content-Length` states. If an answer was
decompressed on the way (`Content-Encoding`, or the decompressive transcoding of GCS), these headers count other bytes.
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
"""Bytes taken from a connection at once."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The part of a file to read: `length` bytes from byte `start` on."""

    start: int
    length: int
    is_whole: bool = False
    """The file is wanted only if it ends before `length` bytes."""

    @property
    def range_header(self) -> str:
        """Value of the HTTP header `Range`."""
        return f"bytes={self.start}-{self.start + self.length - 1}"

    def check_size(self, size: int) -> None:
        """Refuse a file that is too large, before it is read.

        Raises:
            TooLargeError: the whole file is wanted, and it has `length` bytes or more.
        """
        if self.is_whole and size >= self.length:
            raise TooLargeError(errno.EFBIG, f"{size} bytes, and {self.length - 1} are the most")


@dataclass(frozen=True, slots=True)
class Body:
    """The bytes that were received."""

    data: bytes
    size: int | None
    """Size of the whole file in bytes as stored; None where the answer does not state it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status, headers with lower-case names, and the body in chunks."""

    status: int
    headers: Mapping[str, str]
    chunks: AsyncIterator[bytes]
    unpacks: bool
    """Whether the client decompresses a body with a `Content-Encoding`."""

    @property
    def is_unpacked(self) -> bool:
        """Whether the body was decompressed, so that the headers do not count the bytes of the chunks."""
        coded = [self.headers.get("x-goog-stored-content-encoding", "identity")]
        if self.unpacks:
            coded.append(self.headers.get("content-encoding", "identity"))
        changed = self.headers.get("x-guploader-response-body-transformations", "")
        return "gunzipped" in changed or any(each.strip().lower() not in ("", "identity") for each in coded)

    @property
    def content_range(self) -> tuple[int, int, int | None] | None:
        """(first byte, byte after the last, bytes of the file) of a partial answer; None: whole, or not stated."""
        match = re.fullmatch(r"\s*bytes\s+(\d+)-(\d+)/(\d+|\*)\s*", self.headers.get("content-range", ""))
        if self.status != 206 or match is None:
            return None
        return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])

    @property
    def content_length(self) -> int | None:
        """Bytes of the body; None when not stated."""
        length = self.headers.get("content-length", "")
        return int(length) if length.isascii() and length.isdigit() else None


class Pace:
    """The time limit of an answer, which grows with every byte received.

    A server that sends one byte per second is given up as soon as one that sends nothing, whatever size it promised.
    """

    def __init__(self, client: Client, timer: asyncio.Timeout, begin: float) -> None:
        self._client, self._timer, self._begin = client, timer, begin
        self._received = 0
        self.expected: int | None = None
        """Number of bytes that the answer states; None when it states none."""

    def came(self, num_bytes: int) -> None:
        """Count received bytes, and move the deadline accordingly."""
        self._received += num_bytes
        self._timer.reschedule(self._begin + self._client.deadline_s(self._received))

    def describe(self) -> str:
        """Bytes received and the time allowed, for a message."""
        seconds = self._client.deadline_s(self._received)
        whole = "" if self.expected is None else f" of {self.expected}"
        return f"{self._received}{whole} bytes in {seconds:.3g} s"


@contextlib.asynccontextmanager
async def paced(client: Client) -> AsyncIterator[Pace]:
    """Limit the time of one request.

    Raises:
        TrickleTimeoutError: the answer was too slow.
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
    """Receive the body of an answer.

    Args:
        answer: an answer with a success status.
        wanted: what was requested; a server may send the whole file instead.
        pace: the request's time limit.
        most_skipped: maximum number of bytes before the start that may be read and discarded; None: no limit.

    Raises:
        CutError: the body is shorter than the answer states, or is another part than requested.
        TooLargeError: the file is larger than wanted.
        OSError: (EOPNOTSUPP) the server sends whole files only.
    """
    part = None if answer.is_unpacked else answer.content_range
    expected, size = _stated_sizes(answer, part)
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
        # A part is read to its end, where checksums are compared, unless it is longer than wanted.
        if len(data) > wanted.length or (len(data) == wanted.length and answer.status != 206):
            is_whole = received == expected
            break
    if is_whole and expected is not None and received < expected:
        raise CutError(f"storage sent {received} of {expected} bytes")
    wanted.check_size(len(data))
    if size is None and is_whole and answer.status != 206 and not answer.is_unpacked:
        size = received
    return Body(bytes(data[: wanted.length] if answer.status != 206 else data), size)


def _stated_sizes(answer: Answer, part: tuple[int, int, int | None] | None) -> tuple[int | None, int | None]:
    """Bytes of the body and of the file, as stated by the headers; None where they do not say."""
    if answer.is_unpacked:
        return None, None
    if part is not None:
        return part[1] - part[0], part[2]
    return answer.content_length, answer.content_length if answer.status != 206 else None


def _check_part(part: tuple[int, int, int | None] | None, wanted: Wanted) -> None:
    """Refuse a part of the file that is not the one requested."""
    if part is None:
        return
    start, end, size = part
    wanted_end = wanted.start + wanted.length
    if start != wanted.start or (size is not None and end < min(wanted_end, size)):
        raise CutError(f"storage sent bytes {start} to {end} instead of {wanted.start} to {wanted_end}")


def read_foreign(client: Client, path: str, wanted: Wanted, *, listed: int | None = None) -> Body:
    """Read from a file system that does not expose its answers: its statement of the file's size replaces the headers.

    Args:
        client: client of the file system.
        path: path inside the file system.
        wanted: the part to read.
        listed: size from a listing, if known; if it is right, the size is not requested again.

    Raises:
        CutError: fewer bytes arrived than the file system states.
        TooLargeError: the file is larger than wanted.
    """
    filesystem = client.filesystem
    size = listed if wanted.is_whole else None
    if wanted.is_whole and (size is None or size >= wanted.length):
        size = stated_size(client, path)
        if size is not None:
            wanted.check_size(size)
    options = {"start": wanted.start, "end": wanted.start + wanted.length} | time_option(client, size or wanted.length)
    data = bytes(filesystem.cat_file(path, **options))
    wanted.check_size(len(data))
    if len(data) >= wanted.length:
        return Body(data, None)
    return Body(data, check_end(client, path, wanted.start + len(data), presumed=size))


def check_end(client: Client, path: str, end: int, *, presumed: int | None = None) -> int | None:
    """Refuse a read that stopped before the end of the file.

    Args:
        client: client of a file system that does not expose its answers.
        path: path inside the file system.
        end: position at which the read stopped.
        presumed: presumed size of the file.

    Returns:
        Size of the file; None where the file system does not state it.

    Raises:
        CutError: the file continues there.
    """
    if presumed == end:
        return end
    size = stated_size(client, path)
    if size is not None and end < size:
        client.filesystem.invalidate_cache()  # the size may come from a stale cache
        size = stated_size(client, path)
        if size is not None and end < size:
            raise CutError(f"storage sent {end} of {size} bytes")
    return size


def stated_size(client: Client, path: str) -> int | None:
    """Size of a file; None where its file system does not state it.

    Raises:
        Exception: the request may succeed later.
    """
    try:
        size = client.filesystem.info(path).get("size")
    except Exception as error:  # of any class; the read itself decides
        if understand(error, is_foreign=True).is_worth_a_retry:
            raise
        return None
    return int(size) if isinstance(size, int) else None


def time_option(client: Client, num_bytes: int) -> dict[str, Any]:
    """The argument for a request's total time in fsspec's asynchronous file systems; others do not have it."""
    filesystem = client.filesystem
    is_asynchronous = isinstance(filesystem, AsyncFileSystem) and filesystem.async_impl
    is_mirrored = is_asynchronous and type(filesystem).cat_file is AbstractFileSystem.cat_file
    return {"timeout": client.deadline_s(num_bytes)} if is_mirrored else {}
