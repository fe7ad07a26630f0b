"""Every function of `storage` on all five kinds of storage, S3 with faults, and what failures turn into."""

import contextlib
import errno
import io
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import InputError
from owlsam_ray.storage import StoragePolicy
from tests.faulty_s3 import AWS, Faults, FaultyS3, faulty_s3, gcs_emulator, in_environment

QUICK = StoragePolicy(retries=6, backoff_s=0.01, max_backoff_s=0.05, timeout_s=0.5, concurrency=16)


@pytest.fixture(autouse=True)
def quick_policy() -> Iterator[None]:
    storage.configure(QUICK)
    yield
    storage.configure(StoragePolicy())


@pytest.fixture(params=["path", "file", "memory", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "path":
        yield str(tmp_path / "run")
    elif request.param == "file":
        yield f"file://{tmp_path}/run"
    elif request.param == "memory":
        fsspec.filesystem("memory").store.clear()
        yield "memory://labels/run"
    else:
        with faulty_s3() if request.param == "s3" else gcs_emulator():
            yield f"{request.param}://labels/run"


@pytest.fixture
def s3() -> Iterator[FaultyS3]:
    with faulty_s3() as server:
        yield server


def test_every_function_on_every_kind(root: str) -> None:
    shelf, data = storage.join(root, "a b", "ü"), bytes(range(256)) * 5
    url = storage.join(shelf, "one::two #1 [x]*.bin")
    assert storage.list_names(shelf) == []
    assert not storage.exists(shelf)
    assert not storage.exists(url)
    assert not storage.is_directory(shelf)
    storage.try_writing(shelf)
    assert storage.list_names(shelf) == []
    storage.write_atomic(url, b"first")
    storage.write_atomic(url, memoryview(data))
    assert storage.exists(url)
    assert storage.exists(shelf)
    assert storage.is_directory(shelf)
    assert not storage.is_directory(url)
    assert storage.read_bytes(url) == data
    assert storage.num_bytes(url) == len(data)
    assert storage.read_range(url, 250, 10) == data[250:260]
    assert storage.read_range(url, 0, 5) == data[:5]
    assert storage.read_range(url, 1270, 99) == data[1270:]
    assert storage.read_range(url, 5000, 9) == b""
    assert storage.read_range(url, 7, 0) == b""
    with storage.open_atomic(storage.join(shelf, "two")) as file:
        file.write(b"tw")
        file.write(b"o")
    storage.write_atomic(storage.join(shelf, "empty"), b"")
    assert storage.read_bytes(storage.join(shelf, "empty")) == b""
    storage.write_atomic(storage.join(root, "top"), b"1234")
    storage.write_atomic(storage.join(shelf, ".hidden"), b"")
    storage.write_atomic(storage.join(shelf, ".tmp-x"), b"")
    assert storage.list_names(shelf) == [".hidden", "empty", "one::two #1 [x]*.bin", "two"]
    assert storage.list_names(root) == ["a b", "top"]
    assert sorted(storage.walk_files(root)) == [
        ("a b/ü/empty", 0),
        ("a b/ü/one::two #1 [x]*.bin", 1280),
        ("a b/ü/two", 3),
        ("top", 4),
    ]
    for missing in (storage.join(root, "gone"), storage.join(root, "gone", "deeper"), shelf):
        for read in (storage.read_bytes, storage.num_bytes, storage.open_input):
            with pytest.raises((FileNotFoundError, IsADirectoryError)):
                read(missing).close()  # type: ignore[union-attr]
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)
    assert storage.remove_stale_temporaries(shelf) == 0
    assert (storage.free_bytes(root) is None) == (root.startswith(("memory", "s3", "gs")))


def test_a_remote_file_is_read_as_parquet_and_with_seeks(root: str) -> None:
    table = pa.table({"number": list(range(1000)), "data": [bytes([n % 256]) * 500 for n in range(1000)]})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=100, compression="none")
    url = storage.join(root, "t.parquet")
    storage.write_atomic(url, buffer.getvalue())
    with storage.open_input(url) as file:
        reader = pq.ParquetFile(file)
        assert reader.read_row_group(3).equals(table.slice(300, 100))
        assert reader.read().equals(table)
    with storage.open_input(url) as file:
        file.seek(-4, io.SEEK_END)
        assert file.read() == b"PAR1"
        assert file.read() == b""
        file.seek(10)
        assert file.read(300_000) == buffer.getvalue()[10:300_010]
        assert file.tell() == 300_010


def test_large_files_come_in_pieces_and_go_in_parts(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owlsam_ray.storage.reading._CHUNK", 2**20)
    data = random.Random(1).randbytes(3 * 2**20 + 5)
    for size in (len(data), 2**20, 2**21):
        storage.write_atomic("s3://labels/large", data[:size])
        assert storage.read_bytes("s3://labels/large") == data[:size]
    monkeypatch.setattr("owlsam_ray.storage.writing._LARGE", 2**20)
    s3.faults = Faults(always={}, rate=0.4, seed=3, kinds=("500", "503"))
    storage.write_atomic("s3://labels/parts", data)
    with storage.open_atomic("s3://labels/spooled") as file:
        file.write(data)
    s3.faults = Faults()
    assert storage.read_bytes("s3://labels/parts") == storage.read_bytes("s3://labels/spooled") == data


@pytest.mark.parametrize("size", [0, 5, 6 * 2**20, 6 * 2**20 + 1, 13 * 2**20])
def test_streams_go_in_parts_and_appear_whole(s3: FaultyS3, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owlsam_ray.storage.uploads._PART", 6 * 2**20)
    data = random.Random(size).randbytes(size)
    s3.faults = Faults(seed=size, rate=0.4, kinds=("500", "503"))
    with storage.open_stream("s3://labels/stream") as file:
        for start in range(0, size, 700_001):
            file.write(data[start : start + 700_001])
        assert not storage.exists("s3://labels/stream")
    s3.faults = Faults()
    assert storage.read_bytes("s3://labels/stream") == data


def test_a_stream_that_is_cut_leaves_nothing(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("owlsam_ray.storage.uploads._PART", 6 * 2**20)
    storage.write_atomic("s3://labels/stream", b"before")

    def write_and_fail() -> None:
        with storage.open_stream("s3://labels/stream") as file:
            file.write(bytes(7 * 2**20))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    s3.faults = Faults(always={"PUT /labels/stream": "500"})
    with pytest.raises(OSError, match="500"), storage.open_stream("s3://labels/stream") as file:
        file.write(bytes(13 * 2**20))
    s3.faults = Faults()
    assert storage.read_bytes("s3://labels/stream") == b"before"
    client, _ = storage.open_filesystem("s3://labels")
    assert s3.faults.counts["PUT"] == 0
    assert "Uploads" not in client.call_s3("list_multipart_uploads", Bucket="labels")


@pytest.mark.parametrize("seed", range(2))
def test_s3_with_faults_loses_and_changes_nothing(s3: FaultyS3, seed: int) -> None:
    """Every kind of fault on every kind of request: all succeed in the end."""
    print(f"seed {seed}")
    content = {f"{number % 3}/{number:03d}": random.Random(number).randbytes(50 + 977 * number) for number in range(32)}
    s3.faults = Faults(seed=seed, rate=0.35, stall_s=0.7)

    def write(name: str) -> None:
        if int(name[-1]) % 2:
            storage.write_atomic(f"s3://labels/run/{name}", content[name])
        else:
            with storage.open_atomic(f"s3://labels/run/{name}") as file:
                file.write(content[name])

    def look(name: str) -> None:
        url, data = f"s3://labels/run/{name}", content[name]
        assert storage.read_bytes(url) == data
        assert storage.exists(url)
        assert storage.num_bytes(url) == len(data)
        assert storage.read_range(url, 30, 40) == data[30:70]
        assert not storage.exists(f"{url}.gone")
        storage.remove(url)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, content))
        assert list(storage.walk_files("s3://labels/run")) == sorted((name, len(content[name])) for name in content)
        list(pool.map(look, content))
    assert storage.list_names("s3://labels/run/0") == []
    counts = s3.faults.counts
    for method in ("GET", "PUT", "HEAD", "LIST", "DELETE"):
        assert sum(counts[f"{method} {kind}"] for kind in s3.faults.kinds) > 0, f"no fault on {method}: {counts}"
    for kind in s3.faults.kinds:
        assert sum(count for name, count in counts.items() if name.endswith(f" {kind}")) > 0, kind


def test_a_page_of_a_listing_is_repeated_alone(s3: FaultyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    from owlsam_ray.storage import listing
    from owlsam_ray.storage import requests as operations

    def in_small_pages(*arguments: Any, **named: Any) -> Any:
        return operations.list_page(*arguments, **named, limit=7)

    monkeypatch.setattr(listing, "list_page", in_small_pages)
    names = [f"{number:03d}" for number in range(40)]
    for name in names:
        storage.write_atomic(f"s3://labels/many/{name}", b"x")
    s3.faults = Faults(seed=1, rate=0.5, stall_s=0.7)
    assert [name for name, _ in storage.walk_files("s3://labels/many")] == names
    assert storage.list_names("s3://labels/many") == names
    failed = sum(s3.faults.counts[f"LIST {kind}"] for kind in s3.faults.kinds)
    assert failed > 0
    assert s3.faults.counts["LIST"] == 12 + failed


@pytest.mark.parametrize(
    ("kind", "number", "words"),
    [
        ("500", errno.EIO, "500 InternalError: injected"),
        ("503", errno.EIO, "503 SlowDown: injected"),
        ("stall", errno.ETIMEDOUT, "ReadTimeoutError"),
        ("cut", errno.EIO, "ClientPayloadError"),
    ],
)
def test_what_fails_for_good_says_where_and_how_often(s3: FaultyS3, kind: str, number: int, words: str) -> None:
    storage.write_atomic("s3://labels/bad", b"x" * 100)
    storage.configure(StoragePolicy(retries=2, backoff_s=0.01, timeout_s=0.3, concurrency=4))
    s3.faults = Faults(always={"/bad": kind}, stall_s=0.6)
    with pytest.raises(OSError, match=words) as caught:
        storage.read_bytes("s3://labels/bad")
    assert caught.value.errno == number
    assert f"(s3://labels/bad at {s3.url}, 3 tries)" in str(caught.value)
    assert s3.faults.counts["GET"] == 3  # the libraries below added none


@pytest.mark.parametrize("kind", ["500", "stall", "cut"])
def test_failures_of_every_function_are_of_one_family(s3: FaultyS3, kind: str) -> None:
    url = "s3://labels/bad/x"
    storage.write_atomic(url, b"x" * 100)
    storage.configure(StoragePolicy(retries=1, backoff_s=0.01, timeout_s=0.15, concurrency=4))
    s3.faults = Faults(always={"bad": kind}, stall_s=0.3)
    functions: list[Any] = [
        storage.exists,
        storage.num_bytes,
        storage.read_bytes,
        storage.open_input,
        lambda u: storage.write_atomic(u, b"1"),
        storage.list_names,
        storage.is_directory,
        lambda u: list(storage.walk_files(u)),
        storage.try_writing,
        storage.remove,
    ]
    for function in functions:
        if kind == "cut" and function is storage.remove:
            continue  # the deletion came through before the connection went; the second is none
        with pytest.raises(OSError, match=r"s3://labels/bad.* 2 tries"):
            function(url)


def test_what_no_second_try_mends_is_asked_once(s3: FaultyS3) -> None:
    with pytest.raises(FileNotFoundError, match=r"404 NoSuchKey.*s3://labels/gone at http.*1 try"):
        storage.read_bytes("s3://labels/gone")
    with pytest.raises(FileNotFoundError, match=r"404 NoSuchBucket"):
        storage.write_atomic("s3://other-bucket/x", b"")
    assert not storage.exists("s3://other-bucket")
    assert s3.faults.counts["GET"] == s3.faults.counts["PUT"] - 1 == 1  # one PUT made the bucket
    with pytest.raises(InputError, match=r"cannot open 's3://B!/x'"):
        storage.read_bytes("s3://B!/x")


def test_missing_credentials_name_the_variables(s3: FaultyS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with in_environment({"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}):
        with pytest.raises(InputError, match=r"no credentials for s3://labels/x.*AWS_ACCESS_KEY_ID"):
            storage.read_bytes("s3://labels/x")
        with pytest.raises(InputError, match="FSSPEC_S3_ANON"):
            storage.exists("s3://labels/x")


def test_nothing_listens() -> None:
    with in_environment(
        {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    ):
        storage.configure(StoragePolicy(retries=1, backoff_s=0.01))
        with pytest.raises(OSError, match=r"EndpointConnectionError.*2 tries"):
            storage.exists("s3://labels/x")


def test_listings_are_never_stale(root: str) -> None:
    """Another process wrote or deleted: the next look sees it."""
    folder = storage.join(root, "shards")
    storage.write_atomic(storage.join(folder, "1"), b"")
    assert storage.list_names(folder) == ["1"]
    filesystem, path = storage.open_filesystem(folder)
    other = type(filesystem)(skip_instance_cache=True)
    list(filesystem.walk(path))
    filesystem.exists(f"{path}/2")
    other.pipe_file(f"{path}/2", b"data")
    other.rm_file(f"{path}/1")
    assert not storage.exists(storage.join(folder, "1"))
    assert storage.exists(storage.join(folder, "2"))
    assert storage.list_names(folder) == ["2"]
    assert list(storage.walk_files(folder)) == [("2", 4)]


def test_folders_that_cannot_be_listed_are_no_empty_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x").write_bytes(b"1")
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a")
    (tmp_path / "linked").symlink_to(tmp_path / "a" / "b" / "x")
    assert sorted(storage.walk_files(str(tmp_path))) == [("a/b/x", 1), ("linked", 1)]
    (tmp_path / "nowhere").symlink_to("gone")
    assert ("nowhere", None) in storage.walk_files(str(tmp_path))
    original = os.scandir

    def broken(path: str) -> Any:
        if path.rstrip("/").endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", broken)
    with pytest.raises(PermissionError):
        list(storage.walk_files(str(tmp_path)))


def test_no_more_requests_at_a_time_than_set(s3: FaultyS3) -> None:
    storage.write_atomic("s3://labels/x", b"x")
    s3.faults = Faults(always={"/x": "stall"}, stall_s=0.05)
    storage.configure(StoragePolicy(retries=0, concurrency=3))
    start = time.monotonic()

    def read() -> None:
        with pytest.raises(OSError, match="500"):
            storage.read_bytes("s3://labels/x")

    threads = [threading.Thread(target=read) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - start >= 4 * 0.05


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2])
def test_a_server_that_says_nothing_more_is_given_up(answer: bytes) -> None:
    """aiohttp waits for `100 Continue` without a timeout, and drops the timeout when a second one comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=_accept_and_wait, args=(server, answer), daemon=True).start()
        with in_environment(AWS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.getsockname()[1]}"}):
            storage.configure(StoragePolicy(retries=1, backoff_s=0.01, timeout_s=0.3))
            start = time.monotonic()
            with pytest.raises(TimeoutError, match="2 tries"):
                storage.write_atomic("s3://labels/x", b"x" * 1000)
            assert time.monotonic() - start < 60  # rather than never: a busy machine needs some seconds


def _accept_and_wait(server: socket.socket, answer: bytes) -> None:
    with contextlib.ExitStack() as connections, contextlib.suppress(OSError):
        while True:
            connections.enter_context(server.accept()[0]).sendall(answer)
