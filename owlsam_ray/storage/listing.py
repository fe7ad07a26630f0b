"""List directories, never from a cache."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.requests import folder_page, list_page, walk_disk
from owlsam_ray.storage.retrying import ask, is_local, open_url

TEMPORARY_PREFIX = ".tmp-"


def _pages(client: Client, url: str, bucket: str, prefix: str, *, deep: bool) -> Iterator[Any]:
    """Pages of a listing, each retried separately."""
    token = None
    while True:
        page = ask(client, url, partial(list_page, client, bucket, prefix, deep=deep, token=token))
        yield page
        token = page.next_token
        if token is None:
            return


def _bucket_and_prefix(client: Client, path: str) -> tuple[str, str]:
    bucket, key, _ = client.filesystem.split_path(path)
    return bucket, f"{key.rstrip('/')}/" if key.rstrip("/") else ""


def list_names(url: str) -> list[str]:
    """Sorted base names of a directory's entries; none when it does not exist. Temporary files are left out."""
    client, path = open_url(url)
    found: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        if client.kind in ("s3", "gs"):
            bucket, prefix = _bucket_and_prefix(client, path)
            for page in _pages(client, url, bucket, prefix, deep=False):
                found += [key for key, _ in page.files if key != prefix] + page.folders
        else:
            found += ask(client, url, partial(_fresh_names, client.filesystem, path))
    names = {str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in found}
    return sorted(name for name in names if name and not name.startswith(TEMPORARY_PREFIX))


def _fresh_names(filesystem: Any, path: str) -> list[Any]:
    filesystem.invalidate_cache(path)
    return list(filesystem.ls(path, detail=False))


def glob_files(pattern: str) -> list[str]:
    """Sorted paths or URLs of the files that match an fsspec pattern (`*`, `?`, `[0-9]`, `**`).

    Raises:
        OSError: a directory cannot be listed.
    """
    client, path = open_url(pattern)
    filesystem = client.filesystem
    filesystem.invalidate_cache()
    try:
        found = ask(client, pattern, lambda: filesystem.glob(path, detail=True))
    except FileNotFoundError:
        return []
    names = (name for name, entry in found.items() if entry["type"] != "directory")
    if is_local(filesystem):
        scheme = "file://" if pattern.startswith("file://") else ""
        return sorted(scheme + name for name in names)
    return sorted(str(filesystem.unstrip_protocol(name)) for name in names)


def walk_files(url: str) -> Iterator[tuple[str, int | None]]:
    """Every file below a directory: its relative path, and its size in bytes where known.

    Files and directories whose names begin with a dot are left out; linked directories are not entered, linked files
    are included. On a disk in no particular order; on an object store in byte order of the keys, one page per request.

    Raises:
        OSError: the directory, or one below it, cannot be listed; it is never skipped.
    """
    client, path = open_url(url)
    if client.kind not in ("s3", "gs"):
        yield from walk_disk(path) if is_local(client.filesystem) else _walk_foreign(client, url, path)
        return
    bucket, prefix = _bucket_and_prefix(client, path)
    for page in _pages(client, url, bucket, prefix, deep=True):
        for key, size in page.files:
            name = key[len(prefix) :]
            if name and not name.endswith("/") and not name.startswith(".") and "/." not in name:
                yield name, size


def _walk_foreign(client: Client, url: str, root: str) -> Iterator[tuple[str, int | None]]:
    """Relative path and size of every file in a file system with real directories; each folder is retried alone."""
    client.filesystem.invalidate_cache(root)
    waiting = [""]
    while waiting:
        below = waiting.pop()
        folder = f"{root.rstrip('/')}/{below}".rstrip("/") or "/"
        folders, files = ask(client, url, partial(folder_page, client.filesystem, folder))
        waiting += [f"{below}{name}/" for name in folders]
        for name, size in files.items():
            yield below + name, size
