"""Object stores on this machine for tests: moto's S3 server, which fails on request, and a GCS emulator.

Faults come from a seed, the request and how often it was made, so the order in which threads ask does not matter.
"""

import contextlib
import os
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import boto3
from gcp_storage_emulator.server import create_server
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from owlsam_ray import storage

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

KINDS = ("500", "503", "stall", "cut")
_BODY = "<?xml version='1.0' encoding='UTF-8'?>\n<Error><Code>{code}</Code><Message>injected</Message></Error>"


@dataclass
class Faults:
    """What goes wrong."""

    seed: int = 0
    rate: float = 0.0
    """Share of the requests that fail."""
    most_in_a_row: int = 3
    """The same request works at the latest after so many failures."""
    stall_s: float = 1.0
    kinds: tuple[str, ...] = KINDS
    always: dict[str, str] = field(default_factory=dict)
    """Part of `METHOD path` → kind of the fault of every such request."""
    spared: tuple[str, ...] = ("PUT /labels?",)
    """Requests that begin so always work: making a bucket."""
    counts: Counter[str] = field(default_factory=Counter)
    """Requests by method, and `METHOD kind` of those that failed."""

    def draw(self, method: str, target: str, nth: int) -> str | None:
        """The fault of the nth request (from 0) of this kind."""
        for part, kind in self.always.items():
            if part in f"{method} {target}":
                return kind
        if nth % (self.most_in_a_row + 1) == self.most_in_a_row or f"{method} {target}".startswith(self.spared):
            return None
        chance = random.Random(f"{self.seed} {method} {target} {nth}")
        return chance.choice(self.kinds) if chance.random() < self.rate else None


class FaultyS3:
    """A server with faults that can be set while it runs."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._inner: Application = DomainDispatcherApplication(create_backend_app)
        self._seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_QuietHandler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> "FaultyS3":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        target = f"{path}?{environ['QUERY_STRING']} {environ.get('HTTP_RANGE', '')}"
        faults = self.faults
        with self._lock:
            kind = faults.draw(method, target, self._seen[f"{method} {target}"])
            self._seen[f"{method} {target}"] += 1
            listing = "LIST" if "list-type" in environ["QUERY_STRING"] else method
            faults.counts[listing] += 1
            if kind is not None:
                faults.counts[f"{listing} {kind}"] += 1
        if kind is None:
            return self._inner(environ, start_response)
        if kind == "cut":
            return self._cut(environ, start_response)
        if kind == "half":
            return self._half(environ, start_response)
        _drain(environ)
        if kind == "stall":
            time.sleep(faults.stall_s)
        status, code = (
            ("503 Slow Down", "SlowDown") if kind == "503" else ("500 Internal Server Error", "InternalError")
        )
        body = b"" if method == "HEAD" else _BODY.format(code=code).encode()
        start_response(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [body]

    def _half(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """The right answer with half its body and the length of that, as of a proxy; its Content-Range stays."""
        told: list[Any] = []

        def keep(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], None]:
            told[:] = [status, headers]
            return lambda data: None

        body = b"".join(self._inner(environ, keep))
        is_part = environ["REQUEST_METHOD"] == "GET" and told[0].startswith("206")
        body = body[: len(body) // 2] if is_part else body
        kept = [(name, value) for name, value in told[1] if not is_part or name.lower() != "content-length"]
        start_response(told[0], [*kept, ("Content-Length", str(len(body)))] if is_part else kept)
        return [body]

    def _cut(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Half of the right answer under the right length; without a body, nothing at all."""
        told: list[Any] = []

        def keep(status: str, headers: list[tuple[str, str]], *_: Any) -> Callable[[bytes], None]:
            told[:] = [status, headers]
            return lambda data: None

        body = b"".join(self._inner(environ, keep))
        connection = environ["werkzeug.socket"]
        if len(body) < 2:
            connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionAbortedError
        headers = [(name, value) for name, value in told[1] if name.lower() != "content-length"]
        start_response(told[0], [*headers, ("Content-Length", str(len(body)))])

        def half() -> Iterator[bytes]:
            yield body[: len(body) // 2]
            connection.shutdown(socket.SHUT_RDWR)

        return half()


def _drain(environ: dict[str, Any]) -> None:
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


class _QuietHandler(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 (werkzeug's name)
        """Injected faults are no news."""


AWS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def faulty_s3(bucket: str = "labels") -> Iterator[FaultyS3]:
    """A server with one empty bucket, which this process and its children find in their environment."""
    with FaultyS3() as server, in_environment(AWS | {"AWS_ENDPOINT_URL": server.url}):
        client = boto3.client("s3", endpoint_url=server.url)  # the storage's own may have a test's short deadlines
        client.create_bucket(Bucket=bucket)
        for entry in client.list_objects_v2(Bucket=bucket).get("Contents", []):
            client.delete_object(Bucket=bucket, Key=entry["Key"])
        client.close()
        yield server


@contextlib.contextmanager
def gcs_emulator(bucket: str = "labels") -> Iterator[str]:
    """An emulator with one empty bucket, which this process and its children find in their environment; its URL."""
    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    url = f"http://127.0.0.1:{server._api._httpd.server_address[1]}"
    try:
        with in_environment({"STORAGE_EMULATOR_HOST": url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}):
            yield url
    finally:
        server.stop()


@contextlib.contextmanager
def in_environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for the time of a block; clients are opened anew before and after."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    storage.forget_clients()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
        storage.forget_clients()
