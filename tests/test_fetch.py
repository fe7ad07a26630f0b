"""Images of a shard from files, web servers, tar and Parquet files, and what becomes of those that cannot be read."""

import contextlib
import io
import os
import random
import tarfile
import threading
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
from owlsam_ray.datasets.source import ImageRecord, listing_table, tables_of
from owlsam_ray.errors import FailureClass, ImageError, StorageSetupError
from owlsam_ray.fetch import FETCHED_SCHEMA, fetch_rows, fetch_shard, to_images
from owlsam_ray.manifest import Layout, Manifest, write_parts
from owlsam_ray.records import EncodedImage
from owlsam_ray.stages.decode import decode_image
from owlsam_ray.storage import StoragePolicy
from tests.drawn_images import draw_image
from tests.faulty_s3 import Faults, faulty_s3, in_environment

PERMANENT, TRANSIENT = FailureClass.PERMANENT, FailureClass.TRANSIENT


@pytest.fixture(autouse=True)
def quick_policy() -> Iterator[None]:
    storage.configure(StoragePolicy(retries=2, backoff_s=0.01, max_backoff_s=0.02, timeout_s=2, concurrency=16))
    yield
    storage.configure(StoragePolicy())


def plan(run: Path, images: str, *names: str) -> Manifest:
    records = [ImageRecord(image_id=number, file_name=name, height=3, width=4) for number, name in enumerate(names)]
    return write_parts(str(run), tables_of(records, images), Layout(shard_size=100), source={})


def fetch(manifest: Manifest) -> list[EncodedImage]:
    table = fetch_shard(manifest, 0, threads=4, max_file_mb=1)
    assert table.schema.equals(FETCHED_SCHEMA)
    assert set(table["shard_rows"].to_pylist()) == {table.num_rows}
    return to_images(table)


def fetch_urls(*uris: str, max_bytes: int = 10**6) -> list[Any]:
    """Bytes, or (reason, class)."""
    rows = [{"uri": uri, "container": None, "member": None, "offset": None, "length": None} for uri in uris]
    return _plain(fetch_rows(rows, threads=4, max_bytes=max_bytes))


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
    assert [image.failure for image in images[:4]] == [
        ("missing", PERMANENT),
        ("missing", PERMANENT),
        ("not_a_file", PERMANENT),
        ("too_large: more than 1 MB", PERMANENT),
    ]
    assert images[4].failure is not None
    assert images[4].failure[0].startswith("fetch_failed: Too many levels of symbolic links")
    assert images[4].failure[1] is TRANSIENT
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
        manifest = write_parts(str(tmp_path / "run"), [table], Layout(shard_size=100), source={})
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
    with pytest.raises(Exception, match="web servers are read only"):
        storage.write_atomic(f"{site}/new", b"")


def test_an_image_of_a_web_server_is_decoded(site: str) -> None:
    buffer = io.BytesIO()
    draw_image(1).save(buffer, "png")
    Site.pages = {"/a.png": buffer.getvalue()}
    (data,) = fetch_urls(f"{site}/a.png")
    assert decode_image(data, stated_hw=None, max_pixels=10**6).pixels.shape[:2] == draw_image(1).size[::-1]
