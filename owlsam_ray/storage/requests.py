"""Make single requests where fsspec's common interface needs several, uses a cache, or hides an error."""

import errno
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import fsspec

from owlsam_ray.storage.answers import CHUNK, Answer, Body, Wanted, paced, read_foreign, receive
from owlsam_ray.storage.clients import Client

_log = logging.getLogger(__name__)
_SKIPPED_AT_MOST = 16 * 2**20


def read(client: Client, path: str, wanted: Wanted, *, listed: int | None = None) -> Body:
    """Read a part of a file; less if the file ends earlier. One request, except for file systems that hide answers.

    Raises:
        CutError, TrickleTimeoutError: worth a retry.
        TooLargeError: the file is larger than wanted.
    """
    if wanted.length <= 0:
        return Body(b"", None)
    filesystem = client.filesystem
    if client.kind == "other":
        return read_foreign(client, path, wanted, listed=listed)
    reader = {"s3": _read_s3, "gs": _read_gs, "http": _read_web}[client.kind]
    # This deadline is for an event loop that hangs: the pace of an answer is watched inside.
    deadline = client.deadline_s(wanted.length)
    body: Body = fsspec.asyn.sync(filesystem.loop, reader, client, path, wanted, timeout=deadline)
    return body


async def _read_s3(client: Client, path: str, wanted: Wanted) -> Body:
    """Request a range even for a whole file: the answer then states the file's size, even if a proxy truncated it."""
    filesystem = client.filesystem
    bucket, key, version = filesystem.split_path(path)
    options = {"VersionId": version} if version else {}
    await filesystem.set_session()
    await filesystem.get_s3(bucket)  # the first call loads a lot
    async with paced(client) as pace:
        response = await filesystem._call_s3("get_object", Bucket=bucket, Key=key, Range=wanted.range_header, **options)
        body, facts = response["Body"], response["ResponseMetadata"]
        headers = {name.lower(): str(value) for name, value in facts["HTTPHeaders"].items()}
        try:
            answer = Answer(facts["HTTPStatusCode"], headers, body.iter_chunks(CHUNK), unpacks=False)
            return await receive(answer, wanted, pace)
        finally:
            body.close()


async def _read_gs(client: Client, path: str, wanted: Wanted) -> Body:
    """Request a file as gcsfs does, but stream it. Files stored compressed are sent whole and decompressed."""
    from gcsfs.retry import validate_response

    filesystem = client.filesystem
    await filesystem._set_session()
    options = {
        "params": filesystem._get_params({}),
        "headers": filesystem._get_headers({"Range": wanted.range_header}),
        "timeout": filesystem.requests_timeout,
    }
    async with paced(client) as pace, filesystem.session.get(filesystem.url(path), **options) as response:
        if response.status >= 400:
            validate_response(response.status, await response.read(), path)
        return await receive(_web_answer(response), wanted, pace)


async def _read_web(client: Client, url: str, wanted: Wanted) -> Body:
    """Request a range only if it does not start at byte 0: not every server supports ranges."""
    session = await client.filesystem.set_session()
    headers = {"Accept-Encoding": "identity"}
    if wanted.start:
        headers["Range"] = wanted.range_header
    async with paced(client) as pace, session.get(_encoded(url), headers=headers) as response:
        response.raise_for_status()
        return await receive(_web_answer(response), wanted, pace, most_skipped=_SKIPPED_AT_MOST)


def _web_answer(response: Any) -> Answer:
    """An answer from aiohttp's response."""
    headers = {name.lower(): str(value) for name, value in response.headers.items()}
    return Answer(response.status, headers, response.content.iter_chunked(CHUNK), unpacks=True)


_PAGE_BYTES = 2**20
"""Approximate maximum size of a page of a listing."""


def _encoded(url: str) -> Any:
    """A URL as aiohttp takes it. A URL that needs no quoting is sent unchanged: it may be signed."""
    import yarl

    return yarl.URL(url, encoded=re.search(r"""[^!#$%&'()*+,\-./0-9:;=?@A-Z\[\]_a-z~]""", url) is None)


def file_size(client: Client, path: str) -> int:
    """Size of a file in bytes; one request, or two for web servers that give no size for HEAD.

    Raises:
        FileNotFoundError: there is no file; a directory does not count as one.
    """
    filesystem = client.filesystem
    if client.kind == "http":
        return fsspec.asyn.sync(filesystem.loop, _web_size, filesystem, path, timeout=client.deadline_s(_PAGE_BYTES))
    if client.kind == "other":
        entry = filesystem.info(path)
        if entry["type"] != "file":
            raise FileNotFoundError(path)
        if entry.get("size") is None:
            raise OSError(errno.EOPNOTSUPP, "this storage does not report file sizes")
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
    # Some servers answer only GET.
    async with session.get(_encoded(url), headers=headers) as response:
        response.raise_for_status()
        if response.content_length is not None:
            return int(response.content_length)
        return len(await response.read())


@dataclass(frozen=True, slots=True)
class Page:
    """One page of an object store's listing."""

    files: list[tuple[str, int]]
    """(key in the bucket, size in bytes)."""
    folders: list[str]
    """Key prefixes in the bucket that end in a slash."""
    next_token: str | None


def list_page(client: Client, bucket: str, prefix: str, *, deep: bool, token: str | None, limit: int = 1000) -> Page:
    """One page of the keys that begin with a prefix, all of them (`deep`) or only up to the next slash; one request."""
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
    """Relative path and size of every file below a local directory; see `walk_files`."""
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
    """Whether an entry is a directory or a link to one, and its size; None for a broken link.

    Raises:
        OSError: its status cannot be read, and it is not a link. A link fails because of its target: a missing one, one
            below a file, in a loop, with a name that is too long, or in a place that may not be read. Such a link is
            listed nevertheless, and reading it reports the error.
    """
    try:
        return entry.is_dir(), entry.stat().st_size
    except FileNotFoundError:
        return False, None
    except OSError:
        if not entry.is_symlink():
            raise
        return False, None


def folder_page(filesystem: Any, folder: str) -> tuple[list[str], dict[str, int | None]]:
    """Names of the folders, and names and sizes of the files, in a folder of any fsspec file system."""
    folders: list[str] = []
    files: dict[str, int | None] = {}
    for entry in filesystem.ls(folder, detail=True):
        path = str(entry["name"]).rstrip("/")
        name = path.rsplit("/", 1)[-1]
        if name.startswith(".") or path == folder.rstrip("/"):
            continue
        if entry["type"] == "directory":
            folders.append(name)
        else:
            files[name] = entry.get("size")
    return folders, files
