"""Whole files, parts of them, and whether they are there."""

import errno
import io
from typing import IO, Any

from owlsam_ray.storage.asking import ask, is_local, open_url
from owlsam_ray.storage.operations import file_size, list_page
from owlsam_ray.storage.operations import read_range as read_once
from owlsam_ray.storage.secrets import masked_url

_CHUNK = 64 * 2**20
"""Larger files are read in pieces of so many bytes, each tried again by itself."""
_READ_AHEAD = 2**18


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    client, path = open_url(url)
    if client.kind == "other":
        return bool(ask(client, url, lambda: client.filesystem.exists(path)))
    try:
        ask(client, url, lambda: file_size(client, path))
    except FileNotFoundError:
        return is_directory(url)
    return True


def is_directory(url: str) -> bool:
    """Whether a directory is there; on an object store, a bucket or a prefix of keys that ends in a slash."""
    client, path = open_url(url)
    if client.kind == "http":
        return False
    if client.kind == "other":
        return bool(ask(client, url, lambda: client.filesystem.isdir(path)))
    bucket, key, _ = client.filesystem.split_path(path)
    prefix = f"{key.rstrip('/')}/" if key.rstrip("/") else ""
    try:
        page = ask(client, url, lambda: list_page(client, bucket, prefix, deep=True, token=None, limit=1))
    except FileNotFoundError:
        return False
    return bool(page.files or not prefix)


def num_bytes(url: str) -> int:
    """Size of a file.

    Raises:
        FileNotFoundError, OSError: there is none; it cannot be asked.
    """
    client, path = open_url(url)
    return ask(client, url, lambda: file_size(client, path))


def read_bytes(url: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError, OSError: there is none; it cannot be read.
    """
    client, path = open_url(url)
    if client.kind == "other":
        return bytes(ask(client, url, lambda: client.filesystem.cat_file(path)))
    pieces: list[bytes] = []
    while not pieces or len(pieces[-1]) == _CHUNK:
        pieces.append(read_range(url, len(pieces) * _CHUNK, _CHUNK))
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def read_range(url: str, start: int, length: int) -> bytes:
    """Bytes `start` … `start + length` of a file; fewer, or none, where it ends before. One request.

    Raises:
        FileNotFoundError, OSError: there is none; it cannot be read.
    """
    client, path = open_url(url)
    try:
        data = ask(client, url, lambda: read_once(client, path, start, length))
    except OSError as error:
        if error.errno == errno.EINVAL and client.kind != "other":
            return b""  # it ends before `start`
        raise
    if len(data) > length:
        raise OSError(errno.EIO, f"asked for {length} bytes and got {len(data)} ({masked_url(url)})")
    return data


def open_input(url: str) -> IO[bytes]:
    """A file for reading with seeks, as Parquet and tar readers want it. Every read of a remote one is tried again.

    Raises:
        FileNotFoundError, OSError: there is none; it cannot be read.
    """
    client, path = open_url(url)
    if is_local(client.filesystem):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(url, num_bytes(url)), _READ_AHEAD)


class _Ranges(io.RawIOBase):
    """A remote file as ranges of it."""

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
