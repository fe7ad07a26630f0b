"""Answers that are cut, changed, packed or slow, of web servers, S3, GCS and file systems that nobody knows."""

import gzip
import time
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from owlsam_ray import storage
from owlsam_ray.storage import StoragePolicy, TooLargeError
from tests.scripted_server import Reply, ScriptedServer, part_of, scripted_server

DATA = bytes(range(200)) * 5
KINDS = ("http", "s3", "gs")


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as server:
        yield server


@pytest.fixture(autouse=True)
def quick_policy(server: ScriptedServer) -> Iterator[None]:
    storage.configure(StoragePolicy(retries=2, backoff_s=0.001, max_backoff_s=0.002, timeout_s=5, concurrency=8))
    yield
    storage.configure(StoragePolicy())


def url_of(server: ScriptedServer, kind: str, name: str, *replies: Reply) -> str:
    """Where a file lies that is answered for so."""
    server.replies[name] = list(replies)
    server.seen.pop(name, None)
    return f"{server.url}/labels/{name}" if kind == "http" else f"{kind}://labels/{name}"


# Cut


@pytest.mark.parametrize("sent", [0, 500, 999])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_that_is_cut_is_asked_for_again(server: ScriptedServer, kind: str, sent: int) -> None:
    url = url_of(server, kind, "cut", part_of(DATA, sent=sent), part_of(DATA))
    body = storage.read_whole(url, limit=10**6)
    assert (body.data, body.size) == (DATA, 1000)
    assert len(server.seen["cut"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_is_asked_for_again(server: ScriptedServer, kind: str) -> None:
    """A 200 whose connection ends before its Content-Length."""
    url = url_of(server, kind, "half", Reply(DATA[:300], headers={"Content-Length": "1000"}), Reply(DATA))
    assert storage.read_whole(url, limit=10**6).data == DATA
    assert len(server.seen["half"]) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_cut_says_how_much_came(server: ScriptedServer, kind: str) -> None:
    for name, read in (("a", storage.read_bytes), ("b", lambda url: storage.read_whole(url, limit=10**6))):
        url = url_of(server, kind, name, part_of(DATA, sent=400))
        with pytest.raises(OSError, match=r"CutError: storage sent 400 of 1000 bytes \(.*, 3 tries\)"):
            read(url)


@pytest.mark.parametrize("kind", KINDS)
def test_a_range_that_is_cut_or_another_one_is_asked_for_again(server: ScriptedServer, kind: str) -> None:
    wanted = part_of(DATA, start=100, end=150)
    wrong = [
        part_of(DATA, start=100, end=150, sent=49),
        part_of(DATA, start=0, end=50),
        part_of(DATA, start=100, end=120),
    ]
    for number, reply in enumerate(wrong):
        url = url_of(server, kind, f"range{number}", reply, wanted)
        assert storage.read_range(url, 100, 50) == DATA[100:150]
        assert server.seen[f"range{number}"] == ["bytes=100-149"] * 2
    url = url_of(server, kind, "end", part_of(DATA, start=990))
    assert storage.read_range(url, 990, 50) == DATA[990:]  # the file ends there
    url = url_of(server, kind, "unknown", Reply(DATA[5:9], 206, {"Content-Range": "bytes 5-8/*"}))
    assert storage.read_range(url, 5, 4) == DATA[5:9]


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_without_ranges_sends_whole_files(server: ScriptedServer, kind: str) -> None:
    url = url_of(server, kind, "whole", Reply(DATA))
    assert storage.read_range(url, 100, 50) == DATA[100:150]
    assert storage.read_range(url, 980, 50) == DATA[980:]
    assert storage.read_whole(url, limit=10**6) == storage.Body(DATA, 1000)
    chunked = Reply(b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", headers={"Content-Length": "", "Transfer-Encoding": "chunked"})
    assert storage.read_whole(url_of(server, kind, "chunked", chunked), limit=10) == storage.Body(b"abcde", 5)


def test_packed_objects_of_gcs_are_not_cut(server: ScriptedServer) -> None:
    """The headers count the packed bytes, which may be more or less than the file's."""
    small = b"x"
    for number, data in enumerate((DATA, small, bytes(5000))):
        packed = gzip.compress(data)
        told = f"bytes 0-{len(packed) - 1}/{len(packed)}"
        replies = [
            Reply(packed, headers={"Content-Encoding": "gzip"}),
            Reply(packed, 206, {"Content-Encoding": "gzip", "Content-Range": told}),
            Reply(data, headers={"X-Goog-Stored-Content-Encoding": "gzip"}),
            Reply(data, 206, {"X-Goog-Stored-Content-Encoding": "gzip", "Content-Range": told}),
            Reply(data, 206, {"X-Guploader-Response-Body-Transformations": "gunzipped", "Content-Range": told}),
        ]
        for each, reply in enumerate(replies):
            url = url_of(server, "gs", f"packed{number}-{each}", reply)
            assert storage.read_whole(url, limit=10**6) == storage.Body(data, None)
            assert server.seen[f"packed{number}-{each}"] == ["bytes=0-1000000"]


def test_s3_keeps_packed_objects_packed(server: ScriptedServer) -> None:
    """So its headers count what comes."""
    packed = gzip.compress(DATA)
    reply, cut = part_of(packed), part_of(packed, sent=20)
    for each in (reply, cut):
        each.headers["Content-Encoding"] = "gzip"
    assert storage.read_whole(url_of(server, "s3", "gz", cut, reply), limit=10**6) == storage.Body(packed, len(packed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_without_an_end_is_read_no_further_than_wanted(server: ScriptedServer, kind: str) -> None:
    endless = Reply(b"x" * 1000, 206, {"Content-Length": "400000000"}, pause_s=0.02, piece=20)
    with pytest.raises(OSError, match="asked for 30 bytes and got"):
        storage.read_range(url_of(server, kind, "endless", endless), 100, 30)
    with pytest.raises(TooLargeError):
        storage.read_whole(url_of(server, kind, "endless", endless), limit=30)


# Checksums


def test_a_wrong_checksum_is_asked_for_again(server: ScriptedServer) -> None:
    """Of S3, also on what the driver reads."""
    wrong, right = part_of(b"hello"), part_of(b"hello")
    wrong.headers["x-amz-checksum-crc32"] = "AAAAAA=="
    right.headers["x-amz-checksum-crc32"] = "NhCmhg=="
    for number, read in enumerate((storage.read_bytes, lambda url: storage.read_whole(url, limit=9).data)):
        assert read(url_of(server, "s3", f"sum{number}", wrong, wrong, right)) == b"hello"
    with pytest.raises(OSError, match=r"FlexibleChecksumError: .*3 tries"):
        storage.read_bytes(url_of(server, "s3", "sum", wrong))


# Slow


@pytest.mark.parametrize("promised", [200, 400_000_000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_trickle_is_given_up(server: ScriptedServer, kind: str, promised: int) -> None:
    """However much is promised, and although no single byte is late."""
    storage.configure(StoragePolicy(retries=1, backoff_s=0.001, timeout_s=0.3, concurrency=8))
    told = {"Content-Length": str(promised)}
    url = url_of(server, kind, "drops", Reply(b"x" * 100, headers=told, pause_s=0.05, piece=1))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"TrickleTimeoutError: (\d+ of {promised}|0) bytes in 0\.6 s .*2 tries"):
        storage.read_whole(url, limit=512 * 10**6)
    assert time.monotonic() - begin < 30  # on a busy machine; made of the limit it would be 5,000 s


def test_a_slow_file_is_waited_for_as_long_as_it_comes(server: ScriptedServer) -> None:
    """Every 100 kB earn a second."""
    storage.configure(StoragePolicy(retries=0, timeout_s=0.3, concurrency=8))
    data = b"y" * 600_000
    url = url_of(server, "http", "slow", Reply(data, pause_s=0.08, piece=50_000))
    begin = time.monotonic()
    assert storage.read_whole(url, limit=10**6).data == data
    assert time.monotonic() - begin > 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_too_large_is_not_read(server: ScriptedServer, kind: str) -> None:
    """Its first bytes would take a minute."""
    told = {"Content-Length": "1001"} if kind == "http" else {"Content-Range": "bytes 0-1000/3000000000"}
    status = 200 if kind == "http" else 206
    url = url_of(server, kind, "large", Reply(b"x" * 1001, status, told, pause_s=0.06, piece=1))
    begin = time.monotonic()
    with pytest.raises(TooLargeError):
        storage.read_whole(url, limit=1000)
    assert time.monotonic() - begin < 30
    assert storage.read_whole(url_of(server, kind, "just", part_of(DATA)), limit=1000).data == DATA
    endless = Reply(b"x" * 1001, headers={"Content-Length": ""}, pause_s=0.001, piece=500)
    endless.headers["Connection"] = "close"
    if kind == "http":
        with pytest.raises(TooLargeError):
            storage.read_whole(url_of(server, kind, "untold", endless), limit=1000)


# File systems that nobody knows


class Shaky(MemoryFileSystem):
    """Keeps files in memory, and gives as many bytes as it likes."""

    protocol = "shaky"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    reads: list[str] = []  # noqa: RUF012
    told: list[int | None] = []  # noqa: RUF012
    cuts = 0
    error: Exception | None = None
    cachable = False

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("shaky://").strip("/")

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        cls = type(self)
        cls.reads.append(path)
        if cls.error is not None:
            error, cls.error = cls.error, None
            raise error
        data = bytes(super().cat_file(path, start=start, end=end, **kwargs))
        if cls.cuts:
            cls.cuts -= 1
            return data[: len(data) // 2]
        return data

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super().info(path, **kwargs)
        return found | {"size": type(self).told.pop(0)} if type(self).told else found


@pytest.fixture
def shaky() -> type[Shaky]:
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    Shaky.store.clear()
    Shaky.reads, Shaky.told, Shaky.cuts, Shaky.error = [], [], 0, None
    Shaky().pipe_file("/labels/x", DATA)
    return Shaky


def test_a_foreign_file_system_that_cuts_is_asked_again(shaky: type[Shaky]) -> None:
    url = "shaky://labels/x"
    for read in (
        storage.read_bytes,
        lambda url: storage.read_whole(url, limit=10**6).data,
        lambda url: storage.read_whole(url, limit=10**6, listed=1000).data,
        lambda url: storage.read_range(url, 0, 1000),
        lambda url: storage.read_range(url, 0, 2000),
    ):
        shaky.reads, shaky.cuts = [], 2
        assert read(url) == DATA
        assert len(shaky.reads) == 3
    shaky.cuts = 99
    with pytest.raises(OSError, match=r"CutError: storage sent 500 of 1000 bytes \(shaky://labels/x, 3 tries\)"):
        storage.read_whole(url, limit=10**6)


def test_what_a_foreign_file_system_tells_may_be_old_or_nothing(shaky: type[Shaky]) -> None:
    url = "shaky://labels/x"
    shaky.told = [1200, 1200, 1000]  # the file was larger; known so until the cache is dropped
    assert storage.read_whole(url, limit=10**6) == storage.Body(DATA, 1000)
    assert storage.read_whole(url, limit=10**6, listed=1200) == storage.Body(DATA, 1000)
    shaky.told = [None, None]
    assert storage.read_whole(url, limit=10**6) == storage.Body(DATA, None)
    assert len(shaky.reads) == 3
    with pytest.raises(TooLargeError):
        storage.read_whole(url, limit=999)
    assert len(shaky.reads) == 3
    shaky.told = [900, 900]  # it was smaller
    with pytest.raises(TooLargeError):
        storage.read_whole(url, limit=999)


def test_checksums_of_a_foreign_file_system_are_asked_for_again(shaky: type[Shaky]) -> None:
    for name in ("ChecksumMismatch", "Crc32cError", "ContentMD5Mismatch", "DataCorruption"):
        shaky.error, shaky.reads = type(name, (ValueError,), {})("the bytes do not fit"), []
        if name == "DataCorruption":
            shaky.error = type(name, (Exception,), {})("the bytes do not fit")
        assert storage.read_bytes("shaky://labels/x") == DATA
        assert len(shaky.reads) == 2


def test_what_a_foreign_file_system_cannot_say_is_not_taken_for_no(
    shaky: type[Shaky], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fence, a run or an image would be taken for one that is not there."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise OddError("?")

    assert (storage.exists("shaky://labels/x"), storage.exists("shaky://labels/y")) == (True, False)
    assert (storage.is_directory("shaky://labels"), storage.is_directory("shaky://labels/x")) == (True, False)
    assert dict(storage.walk_files("shaky://labels")) == {"x": 1000}
    monkeypatch.setattr(shaky, "info", refuse)
    monkeypatch.setattr(shaky, "ls", refuse)
    functions: list[Any] = [
        storage.exists,
        storage.is_directory,
        storage.num_bytes,
        storage.list_names,
        lambda url: list(storage.walk_files(url)),
        storage.glob_files,
        storage.open_input,
    ]
    for function in functions:
        with pytest.raises(OSError, match="OddError"):
            function("shaky://labels/x*" if function is storage.glob_files else "shaky://labels/x")


class OddError(Exception):
    """Of no known family."""
