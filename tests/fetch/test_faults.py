"""What faulty storage, and file systems that nobody knows, do to the images of a shard: rows, never the run's end."""

import asyncio
import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from owlsam_ray import storage
from owlsam_ray.config.data import DataConfig
from owlsam_ray.config.inference import DecodeConfig
from owlsam_ray.errors import FailureClass, ImageError, StorageSetupError
from owlsam_ray.fetch.images import fetch_rows, fetch_shard, to_images
from owlsam_ray.plan.image_check import verify_images
from owlsam_ray.records import EncodedImage
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.sources.folder import list_folder
from owlsam_ray.sources.listing import listing_table
from owlsam_ray.storage import StoragePolicy, faults
from owlsam_ray.storage.answers import Answer, Wanted, paced, receive
from owlsam_ray.storage.clients import Client
from owlsam_ray.storage.faults import TooLargeError
from tests.faulty_s3 import Faults, faulty_s3
from tests.scripted_server import Reply, part_of, scripted_server

PERMANENT, TRANSIENT = FailureClass.PERMANENT, FailureClass.TRANSIENT


@pytest.fixture(autouse=True)
def quick_policy() -> Iterator[None]:
    storage.configure(StoragePolicy(retries=1, backoff_s=0.001, max_backoff_s=0.002, timeout_s=2, concurrency=16))
    faults._warned.clear()
    yield
    storage.configure(StoragePolicy())


class Odd(MemoryFileSystem):
    """Raises what stands here under the name of a file."""

    protocol = "odd"
    errors: dict[str, BaseException] = {}  # noqa: RUF012
    reads: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("odd://").strip("/")

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        return {"name": path, "size": 1000 if path.endswith(".parquet") else 3, "type": "file"}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        self.reads.append(path)
        name = path.rpartition("/")[2]
        if name in self.errors:
            raise self.errors[name]
        return b"abc"


@pytest.fixture
def odd() -> type[Odd]:
    fsspec.register_implementation("odd", Odd, clobber=True)
    Odd.errors, Odd.reads = {}, []
    return Odd


class Closed(MemoryFileSystem):
    """A file system that cannot be opened here."""

    protocol = "closed"
    why: Exception = ValueError("an account is needed")
    cachable = False

    def __init__(self, **_: Any) -> None:
        raise type(self).why


@pytest.fixture
def closed() -> type[Closed]:
    fsspec.register_implementation("closed", Closed, clobber=True)
    Closed.why = ValueError("an account is needed")
    return Closed


def row_of(uri: str, **more: Any) -> dict[str, Any]:
    return {"uri": uri, "container": None, "member": None, "offset": None, "length": None} | more


def plain(outcomes: list[Any]) -> list[Any]:
    return [(o.reason, o.failure_class) if isinstance(o, ImageError) else o for o in outcomes]


def plan(run: Path, *uris: str, shard_size: int = 100, **columns: Any) -> Manifest:
    table = listing_table(
        {"image_id": list(range(len(uris))), "file_name": [f"{n}.jpg" for n in range(len(uris))], "uri": list(uris)}
        | columns
    )
    return write_parts(str(run), [table], ShardLayout(shard_size=shard_size), source={})


def fetch(manifest: Manifest, shard: int = 0) -> list[EncodedImage]:
    return to_images(fetch_shard(manifest, shard, threads=4, max_file_mb=1))


# Sizes


def test_a_whole_file_of_another_size_is_flagged(tmp_path: Path) -> None:
    for name, size in (("a.jpg", 10), ("b.jpg", 12), ("c.jpg", 0)):
        (tmp_path / "i" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "i" / name).write_bytes(b"x" * size)
    listing = list_folder(DataConfig(source="folder", images=str(tmp_path / "i")))
    manifest = write_parts(str(tmp_path / "run"), listing.tables, ShardLayout(shard_size=10), source={})
    assert manifest.read_shard(0)["length"].to_pylist() == [10, 12, 0]
    (tmp_path / "i" / "b.jpg").write_bytes(b"x" * 11)
    (tmp_path / "i" / "c.jpg").write_bytes(b"x" * 5)
    images = fetch(manifest)
    assert [image.note for image in images] == [
        None,
        "size_changed: 12 bytes listed, 11 found",
        "size_changed: 0 bytes listed, 5 found",
    ]
    assert [len(image.data or b"") for image in images] == [10, 11, 5]
    assert {image.failure for image in images} == {None}


def test_only_whole_files_are_of_another_size(tmp_path: Path) -> None:
    """What is cut is tried again; what is packed on the way has no size to compare."""
    data = b"0123456789"
    with scripted_server() as server:
        server.replies = {
            "cut": [part_of(data, sent=4), part_of(data)],
            "other": [Reply(data)],
            "packed": [Reply(data, headers={"X-Goog-Stored-Content-Encoding": "gzip"})],
            "same": [Reply(data)],
            "lost": [part_of(data, sent=9)],
        }
        uris = [f"{server.url}/{name}" for name in ("cut", "other", "same", "lost")]
        uris += ["gs://labels/packed", "s3://labels/other"]
        images = fetch(plan(tmp_path, *uris, length=[10, 7, 10, 10, 25, 12]))
    assert [image.note for image in images] == [
        None,
        "size_changed: 7 bytes listed, 10 found",
        None,
        None,
        None,
        "size_changed: 12 bytes listed, 10 found",
    ]
    reason, failure_class = images[3].failure or ("", None)
    assert reason.startswith("fetch_failed: CutError: storage sent 9 of 10 bytes")
    assert failure_class is TRANSIENT
    assert [bytes(image.data or b"") for image in images if image.failure is None] == [data] * 5


def test_what_a_table_says_of_sizes_is_no_size(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    manifest = plan(tmp_path / "run", str(tmp_path / "a.jpg"), num_bytes=[99])
    assert manifest.read_shard(0)["length"].to_pylist() == [None]
    (image,) = fetch(manifest)
    assert (bytes(image.data or b""), image.note, image.failure) == (b"abc", None, None)


class _Endless:
    """A body that never ends, and how much of it was taken."""

    def __init__(self) -> None:
        self.taken = 0

    def __aiter__(self) -> "_Endless":
        return self

    async def __anext__(self) -> bytes:
        self.taken += 1000
        assert self.taken < 10**6, "a server fills the memory"
        return b"x" * 1000


@pytest.mark.parametrize("status", [200, 206])
@pytest.mark.parametrize("told", [{}, {"content-range": "bytes 0-9/*"}, {"content-encoding": "gzip"}])
@pytest.mark.parametrize("is_whole", [True, False])
def test_a_body_without_an_end_is_given_up(status: int, told: dict[str, str], is_whole: bool) -> None:
    endless, wanted = _Endless(), Wanted(0, 5000, is_whole=is_whole)

    async def take() -> int:
        async with paced(Client("http", None, (), timeout_s=60)) as pace:
            return len((await receive(Answer(status, told, endless, unpacks=True), wanted, pace)).data)

    if is_whole:
        with pytest.raises(TooLargeError):
            asyncio.run(take())
    else:
        assert asyncio.run(take()) >= 5000
    assert endless.taken <= 6000


def test_halves_of_files_members_and_cells_are_asked_for_again() -> None:
    """Every range comes with half its bytes once; the lengths of the bodies fit."""
    images = [bytes([number]) * (3000 + number) for number in range(12)]
    tar_bytes, table_bytes = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for number, data in enumerate(images[4:8]):
            entry = tarfile.TarInfo(f"{number}.jpg")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    pq.write_table(pa.table({"image": images[8:]}), table_bytes, row_group_size=2, compression="none")
    with tarfile.open(fileobj=io.BytesIO(tar_bytes.getvalue())) as tar:
        places = [(entry.offset_data, entry.size) for entry in tar]
    with faulty_s3() as server:
        for number, data in enumerate(images[:4]):
            storage.write_atomic(f"s3://labels/{number}.jpg", data)
        storage.write_atomic("s3://labels/a.tar", tar_bytes.getvalue())
        storage.write_atomic("s3://labels/t.parquet", table_bytes.getvalue())
        rows = [row_of(f"s3://labels/{number}.jpg") for number in range(4)]
        rows += [row_of("s3://labels/a.tar", container="tar", offset=offset, length=size) for offset, size in places]
        rows += [row_of("s3://labels/t.parquet", container="parquet", member="image", offset=n) for n in range(4)]
        server.faults = Faults(rate=1.0, most_in_a_row=1, kinds=("half",))
        assert fetch_rows(rows, threads=4, max_bytes=10**6) == images
        assert server.faults.counts["GET half"] >= 4 + 1 + 3


# Errors that nobody knows


class TransportError(Exception):
    """The family of a library that talks HTTP."""


class ConnectError(TransportError):
    """One of it."""


class ReadTimeoutError(TransportError):
    """Another."""


class SilentError(Exception):
    """Raises when it is asked what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class GoneError(Exception):
    """As libraries that talk HTTP have it."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status_code = status
        self.reason = "as they say"


def test_any_error_of_a_foreign_file_system_is_a_row(odd: type[Odd]) -> None:
    class OfflineError(FileNotFoundError):
        """Of the hub."""

    OfflineError.__name__ = "LocalEntryNotFoundError"
    wanted: dict[str, tuple[BaseException, str, FailureClass]] = {
        "plain": (Exception("a\nb"), "fetch_failed: Exception: a b", TRANSIENT),
        "connect": (ConnectError("refused"), "fetch_failed: ConnectError: refused", TRANSIENT),
        "runtime": (RuntimeError("the client is closed"), "fetch_failed: RuntimeError: the client", TRANSIENT),
        "silent": (SilentError(), "fetch_failed: SilentError", TRANSIENT),
        "stop": (StopIteration(), "fetch_failed: StopIteration", TRANSIENT),
        "group": (ExceptionGroup("many", [ValueError()]), "fetch_failed: ExceptionGroup: many", TRANSIENT),
        "memory": (MemoryError(), "fetch_failed: MemoryError", TRANSIENT),
        "offline": (OfflineError("not in the cache"), "fetch_failed: LocalEntryNotFoundError", TRANSIENT),
        "oserror": (OSError("odd"), "fetch_failed: OSError: odd (odd://b/oserror, 1 try)", TRANSIENT),
        "gone": (GoneError(404), "missing", PERMANENT),
        "busy": (GoneError(503), "fetch_failed: 503: as they say", TRANSIENT),
        "denied": (GoneError(403), "forbidden: 403: as they say", PERMANENT),
        "key": (KeyError("no such part"), "bad_uri: cannot open 'odd://", PERMANENT),
        "value": (ValueError("no such name"), "bad_uri: cannot open 'odd://", PERMANENT),
        "todo": (NotImplementedError(), "bad_uri: cannot open 'odd://", PERMANENT),
    }
    odd.errors = {name: error for name, (error, _, _) in wanted.items()}
    names = ["good", *wanted, "fine"]
    outcomes = plain(fetch_rows([row_of(f"odd://b/{name}") for name in names], threads=4, max_bytes=100))
    assert outcomes[0] == outcomes[-1] == b"abc"
    for (name, (_, reason, failure_class)), outcome in zip(wanted.items(), outcomes[1:-1], strict=True):
        assert outcome[0].startswith(reason), name
        assert outcome[1] is failure_class, name
    assert [name for name in wanted if odd.reads.count(f"/b/{name}") == 2] == ["connect", "offline", "busy"]


def test_an_error_is_logged_once(odd: type[Odd], caplog: pytest.LogCaptureFixture) -> None:
    odd.errors = {str(number): ReadTimeoutError(f"slow {number}") for number in range(50)}
    with caplog.at_level(logging.WARNING, logger="owlsam_ray"):
        outcomes = plain(fetch_rows([row_of(f"odd://b/{n}") for n in range(50)], threads=8, max_bytes=100))
    assert [reason.split(" (")[0] for reason, _ in outcomes] == [
        f"fetch_failed: ReadTimeoutError: slow {number}" for number in range(50)
    ]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("odd:// fails: ReadTimeoutError: slow ")
    assert "(test_faults.py:" in line
    assert "\n" not in line


def test_members_and_cells_of_a_foreign_file_system_are_rows(odd: type[Odd], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    odd.errors = {"a.tar": GoneError(500), "t.parquet": SilentError()}
    rows = [row_of("odd://b/a.tar", container="tar", offset=512 * number, length=100) for number in range(3)]
    rows += [row_of("odd://b/t.parquet", container="parquet", member="image", offset=number) for number in range(3)]
    rows.append(row_of(str(tmp_path / "a.jpg")))
    outcomes = plain(fetch_rows(rows, threads=4, max_bytes=1000))
    assert [reason.split(" (")[0] for reason, _ in outcomes[:6]] == [
        *["fetch_failed: 500: as they say"] * 3,
        *["fetch_failed: SilentError"] * 3,
    ]
    assert {failure_class for _, failure_class in outcomes[:6]} == {TRANSIENT}
    assert outcomes[6] == b"abc"


def test_a_hub_that_does_not_answer_fails_its_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    (tmp_path / "a.jpg").write_bytes(b"abc")
    rows = [row_of("hf://datasets/o/n/x.png"), row_of(str(tmp_path / "a.jpg"))]
    (failed, good) = plain(fetch_rows(rows, threads=2, max_bytes=100))
    fsspec.get_filesystem_class("hf").clear_instance_cache()
    assert failed[0].startswith("fetch_failed: ConnectError")
    assert failed[1] is TRANSIENT
    assert good == b"abc"


# What is not set up


@pytest.mark.parametrize("why", [ValueError("an account"), ImportError("pip install it"), ZeroDivisionError("odd")])
def test_a_scheme_that_is_not_set_up_fails_its_images_where_others_work(
    closed: type[Closed], tmp_path: Path, why: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    closed.why = why
    (tmp_path / "a.jpg").write_bytes(b"abc")
    uris = [*(f"closed://b/{number}" for number in range(30)), str(tmp_path / "a.jpg")]
    with caplog.at_level(logging.WARNING, logger="owlsam_ray"):
        images = fetch(plan(tmp_path / "run", *uris))
    assert bytes(images[-1].data or b"") == b"abc"
    for image in images[:-1]:
        reason, failure_class = image.failure or ("", None)
        assert reason.startswith("no_access: cannot open 'closed://b/")
        assert str(why) in reason
        assert failure_class is TRANSIENT
    assert 1 <= len(caplog.records) <= 2


def test_a_shard_that_is_not_set_up_fails_alone(closed: type[Closed], tmp_path: Path) -> None:
    """Only when nothing of the run can be read it is the run's end."""
    (tmp_path / "a.jpg").write_bytes(b"abc")
    uris = ["closed://b/1", "closed://b/2", str(tmp_path / "gone.jpg"), str(tmp_path / "a.jpg")]
    manifest = plan(tmp_path / "mixed", *uris, shard_size=2)
    for image in fetch(manifest, 0):
        assert (image.failure or ("",))[0].startswith("no_access: cannot open")
    assert [image.failure for image in fetch(manifest, 1)] == [("missing", PERMANENT), None]
    alone = plan(tmp_path / "alone", *uris[:2], shard_size=1)
    with pytest.raises(StorageSetupError, match="an account is needed"):
        fetch(alone, 1)
    rows = [row_of("", container="bad", member="bad_uri: null"), row_of(uris[0])]
    with pytest.raises(StorageSetupError, match="an account is needed"):  # a row without an address is no other storage
        fetch_rows(rows, threads=1, max_bytes=10)
    # Tried again in a finished shard, they keep their rows.
    again = fetch_shard(alone, 1, threads=1, max_file_mb=1, positions=[0])
    assert again["status_class"].to_pylist() == ["transient"]


def test_all_that_is_missing_is_told_at_once(
    closed: type[Closed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    storage.forget_clients()
    uris = ["closed://b/1", "closed://b/2", "s3://labels/x", "s3://labels/y"]
    manifest = plan(tmp_path / "run", *uris, shard_size=2)
    with pytest.raises(StorageSetupError) as caught:
        fetch_rows([row_of(uri) for uri in uris], threads=1, max_bytes=10)
    first, second = str(caught.value).splitlines()
    assert first.startswith("cannot open 'closed://b/1'")
    assert second.startswith("no credentials for s3://labels/x")
    for shard in (0, 1):
        with pytest.raises(StorageSetupError):
            fetch(manifest, shard)
    storage.forget_clients()


def test_a_look_at_every_image_goes_on(closed: type[Closed], odd: type[Odd], tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"abc")
    uris = [str(tmp_path / "a.jpg"), "closed://b/1", "nosuch://b/1", "odd://b/x"]
    table = listing_table({"file_name": [str(n) for n in range(4)], "uri": uris})
    out = io.BytesIO()
    found = verify_images([table], "exists", out, threads=2, decode=DecodeConfig())
    assert (found.images, found.failed) == (4, 2)
    assert found.failed_by_reason == {"no_access": 1, "bad_uri": 1}
    with pytest.raises(StorageSetupError, match="an account is needed"):
        verify_images([table.slice(1, 1)], "exists", out, threads=2, decode=DecodeConfig())
