"""What a directory holds. Never from a cache."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.requests import folder_page, list_page, walk_disk
from owlsam_ray.storage.retrying import ask, is_local, open_url

TEMPORARY_PREFIX = ".tmp-"


def _pages(client: Client, url: str, bucket: str, prefix: str, *, deep: bool) -> Iterator[Any]:
    """Pages of a listing, each tried again by itself."""
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
    """Sorted base names of what a directory holds; none when it does not exist. Temporary files are left out."""
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
    """Sorted paths or URLs of the files that a pattern of fsspec's (`*`, `?`, `[0-9]`, `**`) matches.

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
    """Every file below a directory: path relative to it, and size in bytes where that is known.

    Names that begin with a dot are left out, files and directories; linked directories are not entered, linked files
    are taken. In no order on a disk; on an object store in the order of the keys' bytes, a page a request.

    Raises:
        OSError: the directory, or one below it, cannot be listed; nothing is left out for that.
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
    """Relative path and size of every file of a file system with real directories; each is tried again by itself."""
    client.filesystem.invalidate_cache(root)
    waiting = [""]
    while waiting:
        below = waiting.pop()
        folder = f"{root.rstrip('/')}/{below}".rstrip("/") or "/"
        folders, files = ask(client, url, partial(folder_page, client.filesystem, folder))
        waiting += [f"{below}{name}/" for name in folders]
        for name, size in files.items():
            yield below + name, size
