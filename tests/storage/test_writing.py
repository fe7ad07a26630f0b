"""Files exist whole or not at all, on disks and elsewhere."""

import errno
import os
import time
from pathlib import Path

import fsspec
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import InputError


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/run"


def test_write_read_list_remove(root: str) -> None:
    url = storage.join(root, "a", "b.bin")
    assert storage.list_names(storage.join(root, "a")) == []
    storage.write_atomic(url, b"one")
    storage.write_atomic(url, memoryview(b"two"))
    assert storage.read_bytes(url) == b"two"
    assert storage.exists(url)
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_a_failed_stream_leaves_nothing(root: str) -> None:
    url = storage.join(root, "a", "out.json")

    def write_half() -> None:
        with storage.open_atomic(url) as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert not storage.exists(url)
    if "://" not in root:
        assert os.listdir(os.path.join(root, "a")) == []
    with storage.open_atomic(url) as file:
        file.write(b"whole")
    assert storage.read_bytes(url) == b"whole"


def test_only_old_temporaries_are_removed(tmp_path: Path) -> None:
    young, old = tmp_path / ".tmp-young", tmp_path / ".tmp-old"
    for file in (young, old, tmp_path / "shard"):
        file.write_bytes(b"")
    os.utime(old, (time.time() - 7200,) * 2)
    assert storage.remove_stale_temporaries(str(tmp_path)) == 1
    assert young.exists()
    assert not old.exists()
    assert storage.list_names(str(tmp_path)) == ["shard"]
    assert storage.remove_stale_temporaries(str(tmp_path / "gone")) == 0
    assert storage.remove_stale_temporaries("memory://nowhere") == 0


def test_a_moved_file_is_whole_and_replaces_none(root: str) -> None:
    old, new, other = (storage.join(root, *names) for names in (("a", "x.bin"), ("b", "c", "x.bin"), ("a", "y.bin")))
    storage.write_atomic(old, b"one")
    storage.move(old, new)
    assert storage.read_bytes(new) == b"one"
    assert storage.list_names(storage.join(root, "a")) == []
    storage.write_atomic(other, b"two")
    with pytest.raises(FileExistsError):
        storage.move(other, new)
    assert (storage.read_bytes(new), storage.read_bytes(other)) == (b"one", b"two")
    with pytest.raises(FileNotFoundError):
        storage.move(old, storage.join(root, "d"))


def test_a_copy_that_fails_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_atomic("memory://bucket/move/x", b"one")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(fsspec.filesystem("memory"), "pipe_file", full)
    with pytest.raises(OSError, match="No space left"):
        storage.move("memory://bucket/move/x", "memory://bucket/moved/x")
    assert storage.read_bytes("memory://bucket/move/x") == b"one"


def test_temporary_files_and_free_space(tmp_path: Path) -> None:
    for name in (".tmp-b", ".tmp-a", "shard"):
        (tmp_path / name).touch()
    assert storage.temporary_files(str(tmp_path)) == [".tmp-a", ".tmp-b"]
    assert storage.temporary_files(str(tmp_path / "gone")) == storage.temporary_files("memory://nowhere") == []
    assert storage.free_bytes("memory://nowhere") is None
    free = storage.free_bytes(str(tmp_path / "not" / "made" / "yet"))
    assert free is not None
    assert free > 0
    assert not (tmp_path / "not").exists()


def test_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    storage.write_atomic(str(tmp_path / "old"), b"old")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("old", "new"):
        with pytest.raises(OSError, match="No space left"):
            storage.write_atomic(str(tmp_path / name), b"data")
    assert os.listdir(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(InputError, match="nosuch"):
        storage.open_filesystem("nosuch://bucket/key")


@pytest.mark.parametrize(
    ("root", "names", "joined"),
    [("/", ("a",), "/a"), ("/x/", ("a", "b"), "/x/a/b"), ("s3://b", ("a",), "s3://b/a"), ("r", ("a",), "r/a")],
)
def test_join(root: str, names: tuple[str, ...], joined: str) -> None:
    assert storage.join(root, *names) == joined
