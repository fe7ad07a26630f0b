"""A web server whose answers are written down, one after the other; S3 and GCS clients take it for theirs."""

import contextlib
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.faulty_s3 import AWS, in_environment


@dataclass
class Reply:
    """An answer as it goes over the wire: nothing is corrected, nothing is added."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    """`Content-Length` is the body's unless it stands here; an empty text leaves a header out."""
    pause_s: float = 0.0
    """Before every piece."""
    piece: int = 2**20
    """Bytes that are sent at once."""


def part_of(data: bytes, *, sent: int | None = None, start: int = 0, end: int | None = None) -> Reply:
    """A 206 for bytes `start` … `end` of a file, of which only the first `sent` are in its body."""
    end = len(data) if end is None else end
    told = {"Content-Range": f"bytes {start}-{end - 1}/{len(data)}"}
    return Reply(data[start:end][:sent], 206, told)


class ScriptedServer:
    """Answers by the last part of the path; the last one of each stays."""

    def __init__(self) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.seen: dict[str, list[str]] = defaultdict(list)
        """Range header of every request, by name."""
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def do_HEAD(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
                """Quiet."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.partition("?")[0].rpartition("/")[2].rpartition("%2F")[2]
        with self._lock:
            self.seen[name].append(str(request.headers.get("Range", "")))
            waiting = self.replies.get(name, [Reply(status=404)])
            reply = waiting.pop(0) if len(waiting) > 1 else waiting[0]
        request.send_response(reply.status)
        for key, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
            if value:
                request.send_header(key, value)
        told = reply.headers.get("Content-Length")
        request.close_connection = told is not None and told != str(len(reply.body))
        if request.close_connection:
            request.send_header("Connection", "close")
        with contextlib.suppress(OSError):
            request.end_headers()
            for start in range(0, len(reply.body), reply.piece):
                time.sleep(reply.pause_s)
                request.wfile.write(reply.body[start : start + reply.piece])
                request.wfile.flush()


@contextlib.contextmanager
def scripted_server() -> Iterator[ScriptedServer]:
    """A server that S3 and GCS clients of this process find in their environment."""
    server = ScriptedServer()
    thread = threading.Thread(target=server._server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    gcs = {"STORAGE_EMULATOR_HOST": server.url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    try:
        with in_environment(AWS | gcs | {"AWS_ENDPOINT_URL": server.url}):
            yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
        thread.join()
