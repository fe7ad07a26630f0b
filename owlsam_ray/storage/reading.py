"""Read whole files and byte ranges, and check what exists."""

import errno
import io
import os
from typing import IO, Any

from owlsam_ray.storage.answers import Body, Wanted, check_end, time_option
from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.requests import file_size, list_page
from owlsam_ray.storage.requests import read as read_once
from owlsam_ray.storage.retrying import ask, is_local, open_url
from owlsam_ray.storage.secrets import masked_url

_CHUNK = 64 * 2**20
"""Larger files are read in pieces of this many bytes, each retried separately."""
_READ_AHEAD = 2**18


def exists(url: str) -> bool:
    """Whether a file or directory exists."""
    client, path = open_url(url)
    if client.kind == "other":
        return _entry_type(client, url, path) is not None
    try:
        ask(client, url, lambda: file_size(client, path))
    except FileNotFoundError:
        return is_directory(url)
    return True


def is_directory(url: str) -> bool:
    """Whether a directory exists; on an object store, a bucket or a key prefix that ends in a slash."""
    client, path = open_url(url)
    if client.kind == "http":
        return False
    if client.kind == "other":
        return _entry_type(client, url, path) == "directory"
    bucket, key, _ = client.filesystem.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    try:
        page = ask(client, url, lambda: list_page(client, bucket, prefix, deep=True, token=None, limit=1))
    except FileNotFoundError:
        return False
    return bool(page.files or not prefix)


def _entry_type(client: Client, url: str, path: str) -> str | None:
    """`file` or `directory`; None when there is nothing. fsspec's own `exists` also returns False for any error."""
    filesystem = client.filesystem
    if is_local(filesystem):
        return "directory" if os.path.isdir(path) else "file" if os.path.exists(path) else None
    try:
        return str(ask(client, url, lambda: filesystem.info(path)["type"]))
    except (FileNotFoundError, NotADirectoryError):
        return None


def num_bytes(url: str) -> int:
    """Size of a file in bytes.

    Raises:
        FileNotFoundError, OSError: it does not exist; the size cannot be requested.
    """
    client, path = open_url(url)
    return ask(client, url, lambda: file_size(client, path))


def read_bytes(url: str) -> bytes:
    """Content of a whole file.

    Raises:
        FileNotFoundError, OSError: it does not exist; it cannot be read.
    """
    client, path = open_url(url)
    if is_local(client.filesystem):
        return bytes(client.filesystem.cat_file(path))
    if client.kind == "other":
        return ask(client, url, lambda: _read_foreign_file(client, path))
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == _CHUNK:
        pieces.append(read_range(url, len(pieces) * _CHUNK, _CHUNK))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _read_foreign_file(client: Client, path: str) -> bytes:
    data = bytes(client.filesystem.cat_file(path, **time_option(client, 2**30)))
    check_end(client, path, len(data))
    return data


def read_whole(url: str, *, limit: int, listed: int | None = None) -> Body:
    """Content of a whole file of limited size, and its size where storage states it. One request.

    Args:
        url: path or URL of the file.
        limit: maximum size in bytes; a larger file is not read.
        listed: size of the file from a listing of the storage, if there was one.

    Raises:
        TooLargeError: the file is larger.
        FileNotFoundError, OSError: it does not exist; it cannot be read, or only a part of it arrives.
    """
    client, path = open_url(url)
    wanted = Wanted(0, limit + 1, is_whole=True)
    if is_local(client.filesystem):
        with open(path, "rb") as file:
            wanted.check_size(os.fstat(file.fileno()).st_size)
            data = file.read(limit + 1)
        wanted.check_size(len(data))
        return Body(data, len(data))
    try:
        return ask(client, url, lambda: read_once(client, path, wanted, listed=listed))
    except OSError as error:
        if _is_beyond(client, error):
            return Body(b"", 0)
        raise


def _is_beyond(client: Client, error: OSError) -> bool:
    """Whether the file ends before the requested range."""
    return error.errno == errno.EINVAL and client.kind != "other"


def read_range(url: str, start: int, length: int) -> bytes:
    """Bytes `start` … `start + length` of a file; fewer or none if the file ends earlier. One request.

    Raises:
        FileNotFoundError, OSError: it does not exist; it cannot be read, or only a part of the range arrives.
    """
    client, path = open_url(url)
    if is_local(client.filesystem):
        return bytes(client.filesystem.cat_file(path, start=start, end=start + length)) if length > 0 else b""
    try:
        data = ask(client, url, lambda: read_once(client, path, Wanted(start, length))).data
    except OSError as error:
        if _is_beyond(client, error):
            return b""
        raise
    if len(data) > length:
        raise OSError(errno.EIO, f"asked for {length} bytes and got {len(data)} ({masked_url(url)})")
    return data


def open_input(url: str) -> IO[bytes]:
    """Open a seekable file, as Parquet and tar readers need it. Every read of a remote file is retried.

    Raises:
        FileNotFoundError, OSError: it does not exist; it cannot be read.
    """
    client, path = open_url(url)
    if is_local(client.filesystem):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(url, num_bytes(url)), _READ_AHEAD)


class _Ranges(io.RawIOBase):
    """A remote file, read in ranges."""

    def __init__(self, url: str, size: int) -> None:
        self._url, self._size, self._position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._size - self._position))
        data = read_range(self._url, self._position, wanted) if wanted else b""
        if len(data) != wanted:
            raise OSError(
                errno.EIO, f"{masked_url(self._url)} became shorter than {self._size} bytes while it was read"
            )
        buffer[:wanted] = data
        self._position += wanted
        return wanted
