"""Files of a shard, and what becomes of those that cannot be read."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from owlsam_ray.datasets import ImageRecord, Source
from owlsam_ray.errors import FailureClass
from owlsam_ray.fetch import FETCHED_SCHEMA, fetch_shard, to_images
from owlsam_ray.manifest import Manifest, write_part
from owlsam_ray.records import EncodedImage
from owlsam_ray.settings import DataConfig


def plan(run: Path, images: str, *names: str) -> Manifest:
    records = [ImageRecord(image_id=number, file_name=name, height=3, width=4) for number, name in enumerate(names)]
    data = DataConfig(source="folder", images=images)
    return write_part(str(run), Source(records), data, shard_size_setting=100, shard_max_mb=256)


def fetch(manifest: Manifest) -> list[EncodedImage]:
    table = fetch_shard(manifest, 0, threads=4, max_file_mb=1)
    assert table.schema.equals(FETCHED_SCHEMA)
    assert set(table["shard_rows"].to_pylist()) == {table.num_rows}
    return to_images(table)


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
    permanent = FailureClass.PERMANENT
    assert [image.failure for image in images[:4]] == [
        ("missing", permanent),
        ("missing", permanent),
        ("not_a_file", permanent),
        ("too_large: more than 1 MB", permanent),
    ]
    assert images[4].failure is not None
    assert images[4].failure[0].startswith("fetch_failed: Too many levels of symbolic links")
    assert images[4].failure[1] is FailureClass.TRANSIENT
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
    assert images[-1].failure == ("not_a_file", FailureClass.PERMANENT)


def test_a_url_that_cannot_be_opened_is_a_reason(tmp_path: Path) -> None:
    failure = fetch(plan(tmp_path, "memory://set", "a::nosuch://b.jpg"))[0].failure
    assert failure is not None
    assert failure[0].startswith("bad_uri: cannot open")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission_is_transient(tmp_path: Path) -> None:
    (tmp_path / "locked").write_bytes(b"x")
    (tmp_path / "locked").chmod(0)
    failure = fetch(plan(tmp_path / "run", str(tmp_path), "locked"))[0].failure
    assert failure == ("fetch_failed: Permission denied", FailureClass.TRANSIENT)


def test_urls(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/a.jpg", b"abc")
    images = fetch(plan(tmp_path, "memory://set", "a.jpg", "b.jpg"))
    assert bytes(images[0].data or b"") == b"abc"
    assert images[1].failure == ("missing", FailureClass.PERMANENT)


def test_storage_that_gives_up_is_transient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(*arguments: Any, **named: Any) -> bytes:
        raise TimeoutError("slow down")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", give_up)
    failure = fetch(plan(tmp_path, "memory://set", "a.jpg"))[0].failure
    assert failure == ("fetch_failed: slow down", FailureClass.TRANSIENT)
