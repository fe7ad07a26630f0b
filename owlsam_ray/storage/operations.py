"""Single requests, where fsspec's common interface needs several, goes by a cache, or hides an error."""

import errno
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from owlsam_ray.storage.clients import Client

_log = logging.getLogger(__name__)


def read_range(client: Client, path: str, start: int, length: int) -> bytes:
    """At most `length` bytes from `start`; fewer where the file ends. One request."""
    if length <= 0:
        return b""
    deadline = client.deadline_s(length)
    if client.kind == "gs":
        wanted = {"Range": f"bytes={start}-{start + length - 1}"}
        headers, data = client.filesystem.call("GET", client.filesystem.url(path), headers=wanted, timeout=deadline)
        # Stored compressed, files are sent whole and unpacked.
        return bytes(data) if "Content-Range" in headers else bytes(data[start : start + length])
    if client.kind == "http":
        return fsspec.asyn.sync(
            client.filesystem.loop, _read_web, client.filesystem, path, start, length, timeout=deadline
        )
    options = {"timeout": deadline} if client.kind == "s3" else {}
    return bytes(client.filesystem.cat_file(path, start=start, end=start + length, **options))


_PAGE_BYTES = 2**20
"""A page of a listing is no larger, about."""
_SKIPPED_AT_MOST = 16 * 2**20


async def _read_web(filesystem: Any, url: str, start: int, length: int) -> bytes:
    """A range is only asked for where it does not begin the file: not every server knows ranges."""
    session = await filesystem.set_session()
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-{start + length - 1}"
    async with session.get(_encoded(url), headers=headers) as response:
        response.raise_for_status()
        skip = start if response.status != 206 else 0
        if skip > _SKIPPED_AT_MOST:
            raise OSError(errno.EOPNOTSUPP, "the server sends whole files only, no ranges")
        data = bytearray()
        async for chunk in response.content.iter_chunked(2**18):
            data += chunk[skip:]
            skip = max(0, skip - len(chunk))
            if len(data) >= length:
                break
        return bytes(data[:length])


def _encoded(url: str) -> Any:
    """A URL as aiohttp takes it. One that needs no quoting goes out as it is: it may be signed."""
    import yarl

    return yarl.URL(url, encoded=re.search(r"""[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]""", url) is None)


def file_size(client: Client, path: str) -> int:
    """Bytes of a file; one request.

    Raises:
        FileNotFoundError: there is none; a directory is none.
    """
    filesystem = client.filesystem
    if client.kind == "http":
        return fsspec.asyn.sync(filesystem.loop, _web_size, filesystem, path, timeout=client.deadline_s(_PAGE_BYTES))
    if client.kind == "other":
        entry = filesystem.info(path)
        if entry["type"] != "file":
            raise FileNotFoundError(path)
        return int(entry["size"])
    bucket, key, _ = filesystem.split_path(path)
    if not key:
        raise FileNotFoundError(path)
    deadline = client.deadline_s()
    if client.kind == "s3":
        return int(filesystem.call_s3("head_object", Bucket=bucket, Key=key, timeout=deadline)["ContentLength"])
    return int(filesystem.call("GET", "b/{}/o/{}", bucket, key, json_out=True, timeout=deadline).get("size", 0))


async def _web_size(filesystem: Any, url: str) -> int:
    session = await filesystem.set_session()
    headers = {"Accept-Encoding": "identity"}
    async with session.head(_encoded(url), headers=headers, allow_redirects=True) as response:
        if response.status < 400 and "Content-Length" in response.headers:
            return int(response.headers["Content-Length"])
    # Some servers answer GET only.
    async with session.get(_encoded(url), headers=headers) as response:
        response.raise_for_status()
        if response.content_length is not None:
            return int(response.content_length)
        return len(await response.read())


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a listing, as an object store gives it."""

    files: list[tuple[str, int]]
    """Keys in the bucket, and bytes."""
    folders: list[str]
    """Prefixes in the bucket that end in a slash."""
    next_token: str | None


def list_page(client: Client, bucket: str, prefix: str, *, deep: bool, token: str | None, limit: int = 1000) -> Page:
    """One page of the keys that begin with a prefix, `deep` or only up to the next slash; one request."""
    deadline = client.deadline_s(_PAGE_BYTES)
    if client.kind == "s3":
        options: dict[str, Any] = client.filesystem.req_kw | ({} if deep else {"Delimiter": "/"})
        if token is not None:
            options["ContinuationToken"] = token
        answer = client.filesystem.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=limit, timeout=deadline, **options
        )
        return Page(
            [(entry["Key"], int(entry["Size"])) for entry in answer.get("Contents", [])],
            [entry["Prefix"] for entry in answer.get("CommonPrefixes", [])],
            answer.get("NextContinuationToken") if answer.get("IsTruncated") else None,
        )
    answer = client.filesystem.call(
        "GET",
        "b/{}/o",
        bucket,
        prefix=prefix or None,
        delimiter=None if deep else "/",
        maxResults=limit,
        pageToken=token,
        json_out=True,
        timeout=deadline,
    )
    return Page(
        [(entry["name"], int(entry.get("size", 0))) for entry in answer.get("items", [])],
        list(answer.get("prefixes", [])),
        answer.get("nextPageToken"),
    )


def walk_disk(root: str) -> Iterator[tuple[str, int | None]]:
    """Relative path and size of every file below a directory of this machine; see `walk_files`."""
    waiting, links = [""], list[str]()
    while waiting:
        below = waiting.pop()
        with os.scandir(os.path.join(root, below)) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                is_folder, size = _look_at(entry)
                if is_folder:
                    (links if entry.is_symlink() else waiting).append(f"{below}{entry.name}/")
                else:
                    yield below + entry.name, size
    if links:
        _log.warning("%d linked folders below %s are not entered, the first: %s", len(links), root, links[0])


def _look_at(entry: "os.DirEntry[str]") -> tuple[bool, int | None]:
    """Whether an entry is a directory, or leads to one, and its size; None of a link that leads nowhere.

    Raises:
        OSError: it cannot be asked for, and is no link. A link fails by its target: one that is gone, one below a file,
            in a loop, with a name that is too long, or in a place that may not be read. It is listed all the same, and
            reading it tells.
    """
    try:
        return entry.is_dir(), entry.stat().st_size
    except FileNotFoundError:
        return False, None
    except OSError:
        if not entry.is_symlink():
            raise
        return False, None


def walk_other(filesystem: Any, root: str) -> Iterator[tuple[str, int | None]]:
    """The same for a file system with real directories that fsspec knows."""
    prefix = root.rstrip("/") + "/"
    for folder, folders, files in filesystem.walk(root, detail=True, on_error="raise"):
        for name in [name for name in folders if name.startswith(".")]:
            del folders[name]
        below = f"{folder.rstrip('/')}/"[len(prefix) :]
        for name, entry in files.items():
            if not name.startswith("."):
                yield below + name, entry.get("size")
