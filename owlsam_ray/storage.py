"""Files that exist whole or not at all, on a disk or any fsspec URL.

On a local file system a file is written under a temporary name, synced and renamed; on an object store it is one PUT,
which is atomic there. Nothing is renamed on an object store: a rename there is a copy and a delete, and a crash between
the two loses data.
"""

import contextlib
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from owlsam_ray.errors import InputError

TEMPORARY_PREFIX = ".tmp-"


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it.

    Raises:
        InputError: the scheme is unknown, or its package is not installed.
    """
    if "://" not in url:
        # Not by `url_to_fs`: it takes `::` in the name of a file for a chain of file systems.
        return LocalFileSystem(), LocalFileSystem._strip_protocol(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise InputError(f"cannot open {url!r}: {error}") from None
    return filesystem, str(path)


def is_local(filesystem: Any) -> bool:
    """Whether files can be synced and renamed."""
    return isinstance(filesystem, LocalFileSystem)


def join(root: str, *names: str) -> str:
    """A path or URL below another."""
    return "/".join([root.rstrip("/") or "/", *names]) if root != "/" else "/" + "/".join(names)


def exists(url: str) -> bool:
    """Whether a file or directory is there."""
    filesystem, path = open_filesystem(url)
    return bool(filesystem.exists(path))


def read_bytes(url: str) -> bytes:
    """A whole file.

    Raises:
        FileNotFoundError, OSError: as the file system gives them.
    """
    filesystem, path = open_filesystem(url)
    return bytes(filesystem.cat_file(path))


def list_names(url: str) -> list[str]:
    """Sorted base names of the files in a directory; none when it does not exist. Temporary files are left out."""
    filesystem, path = open_filesystem(url)
    filesystem.invalidate_cache(path)
    try:
        entries = filesystem.ls(path, detail=False)
    except FileNotFoundError:
        return []
    names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(name for name in names if name and not name.startswith(TEMPORARY_PREFIX))


def make_directory(url: str) -> None:
    """Make a directory and its parents where the file system has such a thing."""
    filesystem, path = open_filesystem(url)
    filesystem.makedirs(path, exist_ok=True)


def try_writing(url: str) -> None:
    """Make a directory, and write and delete a file in it.

    Raises:
        OSError: that does not work.
    """
    probe = join(url, f"{TEMPORARY_PREFIX}probe")
    make_directory(url)
    write_atomic(probe, b"owlsam")
    remove(probe)


def remove(url: str) -> None:
    """Delete a file; nothing happens when it is not there."""
    filesystem, path = open_filesystem(url)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)


def write_atomic(url: str, data: bytes | memoryview) -> None:
    """Write a file so that it exists whole or not at all. Replaces an existing one.

    Raises:
        OSError: no space, no permission, …; nothing is left behind under any name.
    """
    filesystem, path = open_filesystem(url)
    if is_local(filesystem):
        with open_atomic(url) as file:
            file.write(data)
    else:
        filesystem.pipe_file(path, bytes(data))


@contextlib.contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """A binary file for streaming output that gets its name only when the block ends without an error.

    For an object store the bytes are spooled to a local temporary file first.
    """
    filesystem, path = open_filesystem(url)
    if not is_local(filesystem):
        with tempfile.NamedTemporaryFile(prefix="owlsam-") as spool:
            yield spool
            spool.flush()
            filesystem.put_file(spool.name, path)
        return
    directory, name = os.path.split(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(directory)


def _sync_directory(directory: str) -> None:
    """Make a rename survive a power cut; some network file systems refuse, and then their own rules hold."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_stale_temporaries(url: str, *, older_than_s: float = 3600.0) -> int:
    """Delete temporary files that a killed writer left in a local directory; returns how many.

    Young ones are left alone: another attempt may be writing them.
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
    """Free space of a local directory; None on an object store."""
    filesystem, path = open_filesystem(url)
    return shutil.disk_usage(path).free if is_local(filesystem) else None
