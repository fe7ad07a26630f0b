"""Images of a shard from files, web servers, tar and Parquet files, and what becomes of those that cannot be read."""

import contextlib
import functools
import io
import itertools
import os
import random
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, ImageError, StorageSetupError
from owlsam_ray.fetch import deadline_pool as pool
from owlsam_ray.fetch import packed
from owlsam_ray.fetch.deadline_pool import DeadlinePool
from owlsam_ray.fetch.images import FETCHED_SCHEMA, fetch_rows, fetch_shard, to_images
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.records import EncodedImage
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.sources.listing import ImageRecord, listing_table, tables_of
from owlsam_ray.storage import StoragePolicy
from tests.drawn_images import draw_image
from tests.faulty_s3 import Faults, faulty_s3, in_environment

ENV = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
PERMANENT, TRANSIENT = FailureClass.PERMANENT, FailureClass.TRANSIENT


@pytest.fixture(autouse=True)
def quick_policy() -> Iterator[None]:
    storage.configure(StoragePolicy(retries=2, backoff_s=0.01, max_backoff_s=0.02, timeout_s=2, concurrency=16))
    yield
    storage.configure(StoragePolicy())


def plan(run: Path, images: str, *names: str) -> Manifest:
    records = [ImageRecord(image_id=number, file_name=name, height=3, width=4) for number, name in enumerate(names)]
    return write_parts(str(run), tables_of(records, images), ShardLayout(shard_size=100), source={})


def fetch(manifest: Manifest) -> list[EncodedImage]:
    table = fetch_shard(manifest, 0, threads=4, max_file_mb=1)
    assert table.schema.equals(FETCHED_SCHEMA)
    assert set(table["shard_rows"].to_pylist()) == {table.num_rows}
    return to_images(table)


def fetch_urls(*uris: str, max_bytes: int = 10**6) -> list[Any]:
    """Bytes, or (reason, class)."""
    return _plain(fetch_rows(rows_of(*uris), threads=4, max_bytes=max_bytes))


def rows_of(*uris: str) -> list[dict[str, Any]]:
    """Of images that are files of their own."""
    return [{"uri": uri, "container": None, "member": None, "offset": None, "length": None} for uri in uris]


def _plain(outcomes: list[Any]) -> list[Any]:
    return [(o.reason, o.failure_class) if isinstance(o, ImageError) else o for o in outcomes]


def test_bytes_come_in_manifest_order(tmp_path: Path) -> None:
    for name, data in (("b.jpg", b"one"), ("a/ü.jpg", b""), ("c.jpg", b"x" * 999_999)):
        (tmp_path / "i" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "i" / name).write_bytes(data)
    images = fetch(plan(tmp_path / "run", str(tmp_path / "i"), "b.jpg", "a/ü.jpg", "c.jpg"))
    assert [bytes(image.data or b"") for image in images] == [b"one", b"", b"x" * 999_999]
    assert [image.image_id for image in images] == [0, 1, 2]
    assert {image.stated_hw for image in images} == {(3, 4)}
    assert {image.failure for image in images} == {None}


def test_what_cannot_be_read_becomes_a_reason(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(b"x" * 1_000_001)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "loop").symlink_to("loop")
    images = fetch(plan(tmp_path / "run", str(tmp_path), "gone", "file/below", "folder", "large", "loop", "file"))
    assert [image.failure for image in images[:5]] == [
        ("missing", PERMANENT),
        ("missing", PERMANENT),
        ("not_a_file", PERMANENT),
        ("too_large: more than 1 MB", PERMANENT),
        ("missing", PERMANENT),
    ]
    assert images[5].failure is None


def test_hostile_names(tmp_path: Path) -> None:
    """What other code takes for a chain of file systems, a pattern, a home directory, a pipe."""
    names = [
        "a::b.jpg",
        "zip::a.jpg",
        "[x]*.jpg",
        "~root.jpg",
        "%2e%2e.jpg",
        "a b\n.jpg",
        "-rf.jpg",
        "$(id).jpg",
        "#?.jpg",
    ]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    os.mkfifo(tmp_path / "pipe.jpg")
    images = fetch(plan(tmp_path / "run", str(tmp_path), *names, "pipe.jpg"))
    assert [bytes(image.data or b"").decode() for image in images[:-1]] == names
    assert images[-1].failure == ("not_a_file", PERMANENT)


def test_a_url_that_cannot_be_opened_is_a_reason() -> None:
    for uri in ("nosuch://b.jpg", "a::nosuch://b.jpg", "http://[bad/x.jpg", "/a\0b"):
        reason, failure_class = fetch_urls(uri)[0]
        assert reason.startswith("bad_uri: cannot open")
        assert failure_class is PERMANENT


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_permanent(tmp_path: Path) -> None:
    (tmp_path / "locked").write_bytes(b"x")
    (tmp_path / "locked").chmod(0)
    assert fetch_urls(str(tmp_path / "locked")) == [("forbidden: Permission denied", PERMANENT)]


def test_urls(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/a.jpg", b"abc")
    images = fetch(plan(tmp_path, "memory://set", "a.jpg", "b.jpg", "a::nosuch://b.jpg"))
    assert bytes(images[0].data or b"") == b"abc"
    assert images[1].failure == images[2].failure == ("missing", PERMANENT)


def test_storage_that_gives_up_is_transient(monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*arguments: Any, **named: Any) -> bytes:
        raise TimeoutError("slow down")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", give_up)
    reason, failure_class = fetch_urls("memory://set/a.jpg")[0]
    assert reason == "fetch_failed: TimeoutError: slow down (memory://set/a.jpg, 3 tries)"
    assert failure_class is TRANSIENT


def test_one_bad_key_on_s3_fails_alone() -> None:
    with faulty_s3() as server:
        for number in range(12):
            storage.write_atomic(f"s3://labels/{number:02d}.jpg", bytes([number]) * 1000)
        server.faults = Faults(
            seed=1, rate=0.3, most_in_a_row=2, kinds=("500", "503", "cut"), always={"/05": "503", "/07": "cut"}
        )
        outcomes = fetch_urls(*(f"s3://labels/{number:02d}.jpg" for number in range(13)))
    assert outcomes[12] == ("missing", PERMANENT)
    for number, word in ((5, "503 SlowDown: injected"), (7, "ClientPayloadError")):
        reason, failure_class = outcomes[number]
        assert reason.startswith(f"fetch_failed: {word}")
        assert reason.endswith("3 tries)")
        assert failure_class is TRANSIENT
    for number in set(range(12)) - {5, 7}:
        assert outcomes[number] == bytes([number]) * 1000


def test_missing_credentials_stop_the_shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are no property of an image: no row may say that an image failed for good."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with (
        in_environment({"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}),
        pytest.raises(StorageSetupError, match="AWS_SECRET_ACCESS_KEY"),
    ):
        fetch_urls("s3://labels/x.jpg")


# Tar and Parquet


def listed(**columns: list[Any]) -> pa.Table:
    return listing_table(columns)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_mixed_rows_come_in_manifest_order(tmp_path: Path, where: str) -> None:
    """Plain files, two tar files and a table in one shard, shuffled."""
    chance = random.Random(5)
    content = {f"{number:03d}.jpg": chance.randbytes(chance.randint(1, 3000)) for number in range(60)}
    names = list(content)
    files: dict[str, bytes] = {name: content[name] for name in names[:15]}
    rows: list[dict[str, Any]] = [{"uri": name} for name in names[:15]]
    for tar_name, part in (("a.tar", names[15:35]), ("b.tar", names[35:45])):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for name in part:
                entry = tarfile.TarInfo(name)
                entry.size = len(content[name])
                tar.addfile(entry, io.BytesIO(content[name]))
        files[tar_name] = buffer.getvalue()
        with tarfile.open(fileobj=io.BytesIO(buffer.getvalue())) as tar:
            rows += [
                {"uri": tar_name, "container": "tar", "member": e.name, "offset": e.offset_data, "length": e.size}
                for e in tar
            ]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [content[name] for name in names[45:]]}), buffer, row_group_size=4)
    files["t.parquet"] = buffer.getvalue()
    rows += [{"uri": "t.parquet", "container": "parquet", "member": "image", "offset": n} for n in range(15)]

    with faulty_s3() if where == "s3" else contextlib.nullcontext() as server:
        root = "s3://labels" if server is not None else str(tmp_path / "images")
        for name, data in files.items():
            storage.write_atomic(storage.join(root, name), data)
        order = list(range(60))
        chance.shuffle(order)
        table = listed(
            image_id=order,
            file_name=[names[n] for n in order],
            uri=[storage.join(root, rows[n]["uri"]) for n in order],
            **{key: [rows[n].get(key) for n in order] for key in ("container", "member", "offset", "length")},
        )
        manifest = write_parts(str(tmp_path / "run"), [table], ShardLayout(shard_size=100), source={})
        if server is not None:
            server.faults = Faults(seed=2, rate=0.3, most_in_a_row=2, kinds=("500", "503", "cut"))
        images = fetch(manifest)
        assert [bytes(image.data or b"") for image in images] == [content[names[n]] for n in order]
        assert [image.image_id for image in images] == order
        if server is not None:
            failed = sum(server.faults.counts[f"GET {kind}"] for kind in server.faults.kinds)
            # Of the table a HEAD and the footer, and as often for each of its four row groups.
            assert server.faults.counts["GET"] - failed <= 15 + 2 + 1 + 2 * 4


# Web servers


class Site(BaseHTTPRequestHandler):
    """Pages by path; `ranges` and others change how it answers."""

    protocol_version = "HTTP/1.1"
    pages: dict[str, bytes] = {}  # noqa: RUF012
    ranges = True
    seen: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
        status = {"/500": 500, "/403": 403, "/401": 401, "/410": 410, "/429": 429, "/400": 400}.get(path)
        if path.startswith("/to/"):
            self._send(302, b"", {"Location": path[3:]})
        elif path == "/elsewhere":
            port = int(str(self.headers["Host"]).rpartition(":")[2])
            self._send(301, b"", {"Location": f"http://localhost:{port}/a.jpg"})
        elif path == "/loop":
            self._send(302, b"", {"Location": "/loop"})
        elif status is not None:
            self._send(status, b"no")
        elif path == "/short":
            self._send(200, b"x" * 50, {"Content-Length": "100", "Connection": "close"})
            self.close_connection = True
        elif path not in self.pages:
            self._send(404, b"<html>nothing here</html>")
        elif self.ranges and (wanted := self.headers.get("Range")) is not None:
            start, end = (int(part) for part in wanted.removeprefix("bytes=").split("-"))
            data = self.pages[path]
            if start >= len(data):
                self._send(416, b"")
            else:
                told = {"Content-Range": f"bytes {start}-{min(end, len(data) - 1)}/{len(data)}"}
                self._send(206, data[start : end + 1], told)
        else:
            self._send(200, self.pages[path])

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(b"" if self.command == "HEAD" else body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Quiet."""


@pytest.fixture(params=[True, False], ids=["ranges", "no-ranges"])
def site(request: pytest.FixtureRequest) -> Iterator[str]:
    Site.pages, Site.ranges, Site.seen = {}, request.param, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    storage.forget_clients()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    storage.forget_clients()
    server.shutdown()
    server.server_close()
    thread.join()


def test_images_of_a_web_server(site: str) -> None:
    Site.pages = {"/a.jpg": b"abc", "/empty.jpg": b"", "/large": b"x" * 1_000_001, "/most": b"y" * 10**6}
    assert fetch_urls(f"{site}/a.jpg", f"{site}/empty.jpg", f"{site}/most", f"{site}/large", f"{site}/gone") == [
        b"abc",
        b"",
        b"y" * 10**6,
        ("too_large: more than 1 MB", PERMANENT),
        ("missing", PERMANENT),
    ]
    assert len(Site.seen) == 5


def test_redirects_are_followed(site: str) -> None:
    Site.pages = {"/a.jpg": b"abc"}
    outcomes = fetch_urls(f"{site}/to/a.jpg", f"{site}/to/to/a.jpg", f"{site}/elsewhere", f"{site}/to/gone")
    assert outcomes == [b"abc", b"abc", b"abc", ("missing", PERMANENT)]
    reason, failure_class = fetch_urls(f"{site}/loop")[0]
    assert reason.startswith("fetch_failed: too many redirects")
    assert failure_class is TRANSIENT


def test_answers_that_are_no_image(site: str) -> None:
    outcomes = fetch_urls(*(f"{site}/{name}" for name in ("500", "429", "401", "400", "short", "403", "410")))
    for (reason, failure_class), words in zip(
        outcomes[:5], ("500: Internal", "429: Too Many", "401: Unauth", "400: Bad", "ClientPayloadError"), strict=True
    ):
        assert reason.startswith(f"fetch_failed: {words}")
        assert failure_class is TRANSIENT
    assert outcomes[5][0].startswith("forbidden: 403")
    assert outcomes[5][1] is PERMANENT
    assert outcomes[6] == ("missing", PERMANENT)
    assert [Site.seen.count(f"GET /{name}") for name in ("500", "429", "short", "401", "400", "403")] == [
        3,
        3,
        3,
        1,
        1,
        1,
    ]


def test_a_page_instead_of_an_image_fails_when_decoded(site: str) -> None:
    Site.pages = {"/a.jpg": b"<!doctype html><html><body>Please log in</body></html>"}
    (data,) = fetch_urls(f"{site}/a.jpg")
    with pytest.raises(ImageError, match="not_an_image"):
        decode_image(data, stated_hw=None, max_pixels=10**6)


def test_urls_go_out_as_they_stand(site: str) -> None:
    """A signature in a URL must not be quoted again; a name with spaces must be."""
    signed = "/a.jpg?X-Sig=a%2Fb%3D+c&k=%7E~"
    Site.pages = {"/a.jpg": b"abc", "/b%20%C3%BC.jpg": b"def"}
    assert fetch_urls(f"{site}{signed}", f"{site}/b ü.jpg") == [b"abc", b"def"]
    assert f"GET {signed}" in Site.seen


def test_members_and_cells_of_a_web_server(site: str) -> None:
    """Also where the server sends whole files only."""
    images = [random.Random(n).randbytes(2000) for n in range(4)]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": images}), buffer, row_group_size=2)
    Site.pages = {"/t.parquet": buffer.getvalue(), "/a.tar": bytes(512) + b"".join(images)}
    rows = [
        {"uri": f"{site}/a.tar", "container": "tar", "member": "x", "offset": 512 + 2000 * n, "length": 2000}
        for n in (2, 0, 3)
    ]
    rows.append({"uri": f"{site}/a.tar", "container": "tar", "member": "x", "offset": 512 + 7000, "length": 2000})
    rows.append({"uri": f"{site}/a.tar", "container": "tar", "member": "x", "offset": 10**6, "length": 2000})
    rows += [
        {"uri": f"{site}/t.parquet", "container": "parquet", "member": "image", "offset": n, "length": None}
        for n in (3, 1)
    ]
    outcomes = _plain(fetch_rows(rows, threads=3, max_bytes=10**6))
    assert outcomes[:3] == [images[2], images[0], images[3]]
    assert [reason.split(":")[0] for reason, _ in outcomes[3:5]] == ["truncated", "truncated"]
    assert outcomes[5:] == [images[3], images[1]]


def test_storage_functions_on_a_web_server(site: str) -> None:
    Site.pages = {"/a.jpg": b"abcdef"}
    assert storage.exists(f"{site}/a.jpg")
    assert not storage.exists(f"{site}/gone")
    assert storage.num_bytes(f"{site}/a.jpg") == 6
    assert storage.read_range(f"{site}/a.jpg", 2, 3) == b"cde"
    assert storage.read_range(f"{site}/a.jpg", 9, 3) == b""
    assert storage.read_bytes(f"{site}/a.jpg") == b"abcdef"
    with storage.open_input(f"{site}/a.jpg") as file:
        file.seek(4)
        assert file.read() == b"ef"
    with pytest.raises(OSError, match=r"500.*3 tries"):
        storage.exists(f"{site}/500")
    with pytest.raises(Exception, match=r"http\(s\) storage is read-only"):
        storage.write_atomic(f"{site}/new", b"")


def test_an_image_of_a_web_server_is_decoded(site: str) -> None:
    buffer = io.BytesIO()
    draw_image(1).save(buffer, "png")
    Site.pages = {"/a.png": buffer.getvalue()}
    (data,) = fetch_urls(f"{site}/a.png")
    assert decode_image(data, stated_hw=None, max_pixels=10**6).pixels.shape[:2] == draw_image(1).size[::-1]


# Reads that hang


@contextlib.contextmanager
def hanging_reads(monkeypatch: pytest.MonkeyPatch, word: str) -> Iterator[threading.Event]:
    """Reads of URLs with this word in them hang until the event is set."""
    go_on, original = threading.Event(), storage.read_whole

    def read(url: str, **options: Any) -> storage.Body:
        if word in url:
            go_on.wait()
        return original(url, **options)

    monkeypatch.setattr(storage, "read_whole", read)
    yield go_on
    go_on.set()


def test_what_is_still_out_after_the_deadline_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that came is kept, also what came late but after a sign of life."""
    names = [f"{number:02d}{'-stuck' if number in (3, 17) else ''}.jpg" for number in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    manifest = plan(tmp_path / "run", str(tmp_path), *names)
    with hanging_reads(monkeypatch, "stuck"):
        table = fetch_shard(manifest, 0, threads=4, max_file_mb=1, deadline_s=0.5)
        few = fetch_shard(manifest, 0, threads=4, max_file_mb=1, deadline_s=0.25, positions=[20, 17, 1])
    for number, image in enumerate(to_images(table)):
        if number in (3, 17):
            assert image.failure == ("fetch_timeout: no answer within 0.5 s", TRANSIENT)
        else:
            assert bytes(image.data or b"") == names[number].encode()
    assert few["image_id"].to_pylist() == [20, 17, 1]
    assert few["shard_rows"].to_pylist() == [3, 3, 3]
    assert few["reason"].to_pylist() == [None, "fetch_timeout: no answer within 0.25 s", None]
    assert few["status_class"].to_pylist() == [None, "transient", None]


def test_slow_images_are_waited_for_as_long_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(url: str, **_: Any) -> storage.Body:
        time.sleep(0.1)
        return storage.Body(url.encode(), None)

    monkeypatch.setattr(storage, "read_whole", read)
    uris = [f"memory://slow/{number}" for number in range(24)]
    assert fetch_rows(rows_of(*uris), threads=2, max_bytes=100, deadline_s=0.6) == [uri.encode() for uri in uris]


def test_a_slow_row_group_shows_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its last row is wanted: the rows before it are as good as an answer."""
    data = [random.Random(row).randbytes(50_000) for row in range(2000)]
    pq.write_table(pa.table({"image": data}), tmp_path / "t.parquet", compression="none", use_dictionary=False)
    original, began = packed._leaf, time.monotonic()

    def leaf(values: pa.Array) -> pa.Array:
        time.sleep(0.05)
        return original(values)

    monkeypatch.setattr(packed, "_leaf", leaf)
    row = {
        "uri": str(tmp_path / "t.parquet"),
        "container": "parquet",
        "member": "image",
        "offset": 1999,
        "length": None,
    }
    assert fetch_rows([row], threads=1, max_bytes=10**6, deadline_s=1.0) == [data[1999]]
    assert time.monotonic() - began > 2.0


def test_threads_that_hang_are_bounded_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the bound, a call is no slower and no faster than one that hangs; after the fault all is well again."""
    monkeypatch.setattr(pool, "_thread_slots", threading.BoundedSemaphore(10))
    before = threading.active_count()
    storage.write_atomic("memory://stuck/x", b"abc")
    timeout = ("fetch_timeout: no answer within 0.1 s", TRANSIENT)
    with hanging_reads(monkeypatch, "stuck") as go_on:
        for _ in range(6):
            began = time.monotonic()
            rows = rows_of(*["memory://stuck/x"] * 20)
            assert _plain(fetch_rows(rows, threads=4, max_bytes=100, deadline_s=0.1)) == [timeout] * 20
            assert 0.1 <= time.monotonic() - began < 5
            assert threading.active_count() <= before + 10
        threading.Timer(0.1, go_on.set).start()
        assert fetch_rows(rows, threads=4, max_bytes=100, deadline_s=30) == [b"abc"] * 20
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_footer_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    go_on, original = threading.Event(), storage.open_input
    monkeypatch.setattr(storage, "open_input", lambda url: go_on.wait() and original(url))
    rows = rows_of(str(tmp_path / "a.jpg"))
    rows += [
        {"uri": "t.parquet", "container": "parquet", "member": "image", "offset": n, "length": None} for n in (1, 2)
    ]
    timeout = ("fetch_timeout: no answer within 0.3 s", TRANSIENT)
    assert _plain(fetch_rows(rows, threads=1, max_bytes=100, deadline_s=0.3)) == [b"abc", timeout, timeout]
    go_on.set()


_ENDS = """
import socket, sys, threading, time
from pathlib import Path
from owlsam_ray import storage
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.storage import StoragePolicy

def rows(*uris):
    return [{"uri": u, "container": None, "member": None, "offset": None, "length": None} for u in uris]

def show(rows):
    for each in fetch_rows(rows, threads=8, max_bytes=100, deadline_s=0.5):
        print(each if isinstance(each, bytes) else f"{each.reason} ({each.failure_class})")
"""


@pytest.mark.parametrize("what", ["event", "fifo", "server"])
def test_a_process_ends_whatever_hangs(tmp_path: Path, what: str) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    hang = {
        "event": "stuck = ['/stuck.jpg']\nblock = threading.Event().wait\n",
        # A read that no signal handler of Python's can end, as on a dead network file system.
        "fifo": "import os\nos.mkfifo('pipe')\nstuck = ['/stuck.jpg']\nblock = lambda: open('pipe', 'rb')\n",
        "server": (
            "server = socket.create_server(('127.0.0.1', 0))\n"
            "stuck = [f'http://127.0.0.1:{server.getsockname()[1]}/{n}.jpg' for n in range(3)]\n"
            "storage.configure(StoragePolicy(retries=2, timeout_s=10_000))\n"
        ),
    }[what]
    if what != "server":
        hang += (
            "original = storage.read_whole\n"
            "storage.read_whole = lambda url, **rest: block() if 'stuck' in url else original(url, **rest)\n"
        )
    code = f"{_ENDS}{hang}show(rows('a.jpg', *stuck))\nshow(rows('a.jpg'))\n"
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False, env=ENV
    )
    assert (done.returncode, done.stderr) == (0, "")
    stuck = 3 if what == "server" else 1
    timeout = "fetch_timeout: no answer within 0.5 s (transient)"
    assert done.stdout.splitlines() == ["b'abc'", *[timeout] * stuck, "b'abc'"]
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("seed", range(5))
def test_a_crew_keeps_its_bounds(seed: int) -> None:
    """Tasks of random length that hand over others: each is done once, by so many threads at most."""
    print(f"seed {seed}")
    chance = random.Random(seed)
    threads = chance.randint(1, 6)
    hands: DeadlinePool[int] = DeadlinePool(threads, deadline_s=30)
    lock, busy, most = threading.Lock(), 0, 0

    def work(number: int, depth: int) -> Iterator[int]:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        time.sleep(chance.random() * 0.003)
        yield number
        for child in range(2 if depth else 0):
            hands.add(functools.partial(work, 10 * number + child, depth - 1))
        with lock:
            busy -= 1

    for number in range(1, 10):
        hands.add(functools.partial(work, number, 3))
    expected = [int(f"{n}{tail}") for n in range(1, 10) for d in range(4) for tail in _tails(d)]
    assert sorted(hands.results()) == sorted(expected)
    assert most <= threads


def _tails(digits: int) -> list[str]:
    return ["".join(each) for each in itertools.product("01", repeat=digits)]


def test_what_a_task_raises_reaches_the_caller() -> None:
    hands: DeadlinePool[int] = DeadlinePool(2, deadline_s=None)

    def fail() -> list[int]:
        raise KeyError("x")

    hands.add(fail)
    with pytest.raises(KeyError, match="x"):
        list(hands.results())
    hands.add(fail)  # nobody waits for it
    assert list(DeadlinePool[int](2, deadline_s=1).results()) == []
