"""Write files of any size to an object store, without a local copy where the store is S3.

S3 takes an object in parts, and shows it only once the upload is completed. An upload that is killed leaves parts that
no listing shows (a lifecycle rule of the bucket removes them); one that fails deletes its parts. For other stores the
file is spooled to the disk first.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import IO, Any, cast

from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.reading import num_bytes
from owlsam_ray.storage.retrying import ask, open_url
from owlsam_ray.storage.writing import open_atomic, write_atomic

_PART = 32 * 2**20
_GROWS_EVERY = 1000
"""Number of parts after which the part size grows: S3 allows 10,000 parts, which then hold 1.7 TB."""


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[IO[bytes]]:
    """Open a binary file for output of any size; it gets its name only when the block ends without an error.

    Like `open_atomic`, but for S3 it holds at most one part in memory and nothing on the disk; it cannot seek.

    Raises:
        OSError: storage refused; nothing appears under the name.
    """
    client, path = open_url(url)
    if client.kind != "s3":
        with open_atomic(url) as file:
            yield file
        return
    upload = _Upload(client, url, path)
    try:
        yield cast(IO[bytes], upload)
        upload.finish()
    except BaseException:
        upload.abort()
        raise


class _Upload(io.BufferedIOBase):
    """An upload to S3, sent part by part."""

    def __init__(self, client: Client, url: str, path: str) -> None:
        self._client, self._url = client, url
        bucket, key, _ = client.filesystem.split_path(path)
        self._place = {"Bucket": bucket, "Key": key}
        self._buffer = bytearray()
        self._id: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._sent = 0

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: Any) -> int:
        """Append bytes; a part is sent once it is full."""
        view = memoryview(data).cast("B")
        position = 0
        while position < len(view):
            room = self._part_bytes() - len(self._buffer)
            self._buffer += view[position : position + room]
            position += room
            if len(self._buffer) >= self._part_bytes():
                self._send()
        return len(view)

    def finish(self) -> None:
        """Send the remaining bytes, and complete the upload so that the object appears."""
        if self._id is None:
            write_atomic(self._url, bytes(self._buffer))
            return
        if self._buffer:
            self._send()
        try:
            self._call("complete_multipart_upload", UploadId=self._id, MultipartUpload={"Parts": self._parts})
        except FileNotFoundError:  # no such upload: an earlier try may have succeeded and its answer got lost
            if num_bytes(self._url) != self._sent:
                raise

    def abort(self) -> None:
        """Delete the parts sent so far, if storage still answers."""
        if self._id is not None:
            with contextlib.suppress(OSError):
                self._call("abort_multipart_upload", UploadId=self._id)

    def _part_bytes(self) -> int:
        return _PART * (1 + len(self._parts) // _GROWS_EVERY)

    def _send(self) -> None:
        if self._id is None:
            self._id = self._call("create_multipart_upload")["UploadId"]
        number = len(self._parts) + 1
        answer = self._call("upload_part", UploadId=self._id, PartNumber=number, Body=bytes(self._buffer))
        self._parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        self._sent += len(self._buffer)
        self._buffer.clear()

    def _call(self, method: str, **arguments: Any) -> Any:
        filesystem = self._client.filesystem
        return ask(self._client, self._url, lambda: filesystem.call_s3(method, **self._place, **arguments))
