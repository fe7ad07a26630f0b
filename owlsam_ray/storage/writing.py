"""Write files atomically: a file gets its name only when it is complete.

On a local file system a file is written under a temporary name, synced and renamed; on an object store it is one PUT,
which is atomic there. Nothing is renamed on an object store: a rename there is a copy and a delete, and a crash between
the two loses data.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import IO

from owlsam_ray.errors import InputError
from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.listing import TEMPORARY_PREFIX
from owlsam_ray.storage.reading import exists, read_bytes
from owlsam_ray.storage.retrying import ask, is_local, join, open_filesystem, open_url
from owlsam_ray.storage.secrets import masked_url

_LARGE = 50 * 2**20
"""Bytes from which gcsfs uploads in parts; s3fs does from twice as much."""


def make_directory(url: str) -> None:
    """Make a directory and its parents where the file system has directories; on an object store, do nothing.

    A bucket is never created: it would be in the wrong place, or have a misspelled name.
    """
    client, path = open_url(url)
    if client.kind == "other":
        ask(client, url, lambda: client.filesystem.makedirs(path, exist_ok=True))


def try_writing(url: str) -> None:
    """Make a directory, and write and delete a file in it.

    Raises:
        OSError: that fails.
    """
    probe = join(url, f"{TEMPORARY_PREFIX}probe")
    make_directory(url)
    write_atomic(probe, b"owlsam")
    remove(probe)


def remove(url: str) -> None:
    """Delete a file, if it exists."""
    client, path = open_url(url)
    with contextlib.suppress(FileNotFoundError):
        ask(client, url, lambda: client.filesystem.rm_file(path, **_deadline(client)))


def move(url: str, to: str) -> None:
    """Rename a file within one storage. On an object store it is copied first: a crash leaves both.

    Raises:
        FileExistsError: a file of the new name exists; it is not changed.
        FileNotFoundError, OSError: there is no file at `url`; it cannot be moved.
    """
    if exists(to):
        raise FileExistsError(errno.EEXIST, "a file of this name already exists", to)
    client, path = open_url(url)
    if not is_local(client.filesystem):
        write_atomic(to, read_bytes(url))
        remove(url)
        return
    _, new_path = open_url(to)
    os.makedirs(os.path.dirname(new_path), exist_ok=True)
    os.rename(path, new_path)
    for name in (path, new_path):
        _sync_directory(os.path.dirname(name))


def write_atomic(url: str, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write a file so that it exists whole or not at all. Replaces an existing one.

    Args:
        url: the file.
        data: its whole content.
        durable: whether a local file must survive a power cut; False does not wait for the disk.

    Raises:
        OSError: no space, no permission, …; nothing is left behind under any name.
    """
    client, path = _open_for(url, num_bytes=len(data))
    if is_local(client.filesystem):
        with open_atomic(url, durable=durable) as file:
            file.write(data)
    else:
        ask(client, url, lambda: client.filesystem.pipe_file(path, bytes(data), **_deadline(client, len(data))))


def _deadline(client: Client, num_bytes: int = 0) -> dict[str, float]:
    """The request's time limit as an argument for fsspec's network file systems."""
    return {} if client.kind == "other" else {"timeout": client.deadline_s(num_bytes)}


def _open_for(url: str, *, num_bytes: int) -> tuple[Client, str]:
    client, path = open_url(url, in_parts=num_bytes >= _LARGE)
    if client.kind == "http":
        raise InputError(f"cannot write to {masked_url(url)}: http(s) storage is read-only")
    return client, path


@contextlib.contextmanager
def open_atomic(url: str, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """Open a binary file for streaming output; it gets its name only when the block ends without an error.

    `durable`: see `write_atomic`. For an object store the bytes are spooled to a local temporary file first.
    """
    client, path = _open_for(url, num_bytes=0)
    if not is_local(client.filesystem):
        with tempfile.NamedTemporaryFile(prefix="owlsam-") as spool:
            yield spool
            spool.flush()
            size = os.path.getsize(spool.name)
            client, path = _open_for(url, num_bytes=size)
            ask(client, url, lambda: client.filesystem.put_file(spool.name, path, **_deadline(client, size)))
        return
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    """Make a rename survive a power cut. Some network file systems refuse; then their own guarantees apply."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_files(url: str) -> list[str]:
    """Sorted names of the temporary files in a local directory, of an active writer or left by a killed one."""
    filesystem, path = open_filesystem(url)
    if not is_local(filesystem) or not os.path.isdir(path):
        return []
    return sorted(name for name in os.listdir(path) if name.startswith(TEMPORARY_PREFIX))


def remove_stale_temporaries(url: str, *, older_than_s: float = 3600.0) -> int:
    """Delete temporary files that a killed writer left in a local directory; return how many.

    Recent ones are kept: another attempt may be writing them.
    """
    filesystem, path = open_filesystem(url)
    if not is_local(filesystem) or not os.path.isdir(path):
        return 0
    removed = 0
    for entry in os.scandir(path):
        with contextlib.suppress(FileNotFoundError):
            if entry.name.startswith(TEMPORARY_PREFIX) and time.time() - entry.stat().st_mtime > older_than_s:
                os.unlink(entry.path)
                removed += 1
    return removed


def free_bytes(url: str) -> int | None:
    """Free space where a local directory is, or would be; None on an object store."""
    filesystem, path = open_filesystem(url)
    if not is_local(filesystem):
        return None
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free
