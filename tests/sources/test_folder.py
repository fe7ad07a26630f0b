"""Folder listings: order, ids, what is left out."""

import io
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from PIL import Image

from owlsam_ray import storage
from owlsam_ray.config.data import DataConfig
from owlsam_ray.config.inference import DecodeConfig
from owlsam_ray.errors import FailureClass, ImageError, InputError
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.plan.image_check import verify_images
from owlsam_ray.sources import folder, list_images
from owlsam_ray.sources.listing import below, file_name_error, tables_of


def listing(root: str | Path, **fields: object) -> list[dict[str, Any]]:
    source = list_images(DataConfig.model_validate({"source": "folder", "images": str(root)} | fields))
    rows = [row for table in source.tables for row in table.to_pylist()]
    assert source.total == len(rows)
    assert not source.has_ids
    return rows


def names_of(root: str | Path, **fields: object) -> list[str]:
    return [row["file_name"] for row in listing(root, **fields)]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")


def test_full_relative_paths_in_stable_order(tmp_path: Path) -> None:
    touch(
        tmp_path, "b/1.jpg", "a/1.jpg", "a/1.PNG", "10.jpg", "9.jpg", "ü/ß.jpeg", "notes.txt", ".hidden.jpg", ".x/1.jpg"
    )
    rows = listing(tmp_path)
    names = [row["file_name"] for row in rows]
    assert names == ["10.jpg", "9.jpg", "a/1.PNG", "a/1.jpg", "b/1.jpg", "ü/ß.jpeg"]
    assert [row["uri"] for row in rows] == [f"{tmp_path}/{name}" for name in names]
    assert {(row["image_id"], row["num_bytes"]) for row in rows} == {(None, 5)}


def test_links_to_folders_are_not_followed(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "a" / "1.jpg")
    assert names_of(tmp_path) == ["a/1.jpg", "a/2.jpg"]


@pytest.mark.parametrize("name", ["1.JFIF", "2.jpe", "3.mpo", "4.ppm", "5.avif", "6.jp2", "7.j2k", "8.jpx", "9.apng"])
def test_all_that_decodes_is_listed_by_default(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert names_of(tmp_path) == [name]


def test_suffixes_are_a_setting(tmp_path: Path) -> None:
    touch(tmp_path, "1.jpg", "2.ppm")
    assert names_of(tmp_path, suffixes=[".ppm"]) == ["2.ppm"]


def test_fsspec_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("b/2.jpg", "a/1.jpg", "readme.md"):
        memory.pipe_file(f"/pictures/{name}", b"123")
    assert names_of("memory://pictures") == ["a/1.jpg", "b/2.jpg"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("gone", "does not exist"), ("file.jpg", "is not a folder"), ("empty", "holds no image file: 1 files")],
)
def test_what_cannot_be_listed(tmp_path: Path, name: str, words: str) -> None:
    touch(tmp_path, "file.jpg", "empty/readme.txt")
    with pytest.raises(InputError, match=words) as caught:
        listing(tmp_path / name)
    assert name in str(caught.value)


def byte_file(root: Path, name: bytes, content: bytes) -> None:
    path = os.path.join(os.fsencode(root), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)


def test_odd_names_on_a_disk_are_quoted_and_read(tmp_path: Path) -> None:
    root = tmp_path / "50%FF"  # nothing of the root is undone
    names = {
        b"\xff.jpg": "%FF.jpg",
        b"%FF.jpg": "%FF.jpg",
        b"a\\b.jpg": "a%5Cb.jpg",
        b"caf\xe9/%/1.jpg": "caf%E9/%25/1.jpg",
        b"\xc3\x28\\.jpg": "%C3(%5C.jpg",
        b"gr\xc3\xbcn\xfc.jpg": "grün%FC.jpg",
        b"plain.jpg": "plain.jpg",
        b"100%.jpg": "100%.jpg",
    }
    for name in names:
        byte_file(root, name, name)
    rows = listing(root)
    fetched = fetch_rows(rows, threads=2, max_bytes=100)
    assert {data: row["file_name"] for row, data in zip(rows, fetched, strict=True)} == names
    assert {bytes(name) for name, row in zip(fetched, rows, strict=True) if row["quoted"]} == {  # type: ignore[arg-type]
        name for name in names if name not in (b"%FF.jpg", b"plain.jpg", b"100%.jpg")
    }
    assert {row["uri"][: len(str(root)) + 1] for row in rows} == {f"{root}/"}
    others = [row["other_name"] for row in rows]
    assert [other is not None for other in others] == [row["quoted"] is not None for row in rows]
    assert len(set(others) - {None}) == 5
    assert [row["container"] for row in rows if row["file_name"] == "a%5Cb.jpg"] == [None]


@pytest.mark.parametrize("mode", ["exists", "decode"])
def test_names_that_are_no_utf8_are_looked_up(tmp_path: Path, mode: Any) -> None:
    for number, name in enumerate([b"\xe4.png", b"\xf6.png", b"%E4.png"]):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "x.png")
        os.rename(os.fsencode(tmp_path / "x.png"), os.path.join(os.fsencode(tmp_path), name))
    found = list_images(DataConfig.model_validate({"source": "folder", "images": str(tmp_path)}))
    tables = list(found.tables)
    os.unlink(os.path.join(os.fsencode(tmp_path), b"\xf6.png"))
    out = io.BytesIO()
    result = verify_images(tables, mode, out, threads=2, decode=DecodeConfig())
    assert (result.images, result.failed) == (3, 1)
    assert json.loads(out.getvalue())["file_name"] == "%F6.png"


def test_keys_that_cannot_be_asked_for_are_bad_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["a.jpg", "../b.jpg", "c/./d.jpg", "n\0.jpg", "s\udcff.jpg", "sub//e.jpg", "w\\x.jpg", "x://y.jpg"]
    monkeypatch.setattr(storage, "is_directory", lambda url: True)
    monkeypatch.setattr(storage, "walk_files", lambda url: ((key, 7) for key in keys))
    rows = {row["file_name"]: row for row in listing("memory://set")}
    bad = {name: row["member"] for name, row in rows.items() if row["container"] == "bad"}
    assert bad == {
        "%2E%2E/b.jpg": "bad_name: '../b.jpg' holds a part . or ..",
        "c/%2E/d.jpg": "bad_name: 'c/./d.jpg' holds a part . or ..",
        "n%00.jpg": "bad_name: 'n\\x00.jpg' holds a NUL",
        "s%FF.jpg": "bad_name: 's\\udcff.jpg' is not valid Unicode",
    }
    assert {name: row["uri"] for name, row in rows.items() if name not in bad} == {
        "a.jpg": "memory://set/a.jpg",
        "sub/%2Fe.jpg": "memory://set/sub//e.jpg",
        "w%5Cx.jpg": "memory://set/w\\x.jpg",
        "x:/%2Fy.jpg": "memory://set/x://y.jpg",
    }
    assert all(file_name_error(name) is None for name in rows)
    assert {row["num_bytes"] for name, row in rows.items() if name not in bad} == {7}


def test_odd_names_in_every_batch_keep_their_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "tables_of", partial(tables_of, rows=3))
    names = [f"{number}{chr(92) * (number % 4 == 1)}.jpg" for number in range(10)]
    touch(tmp_path, *names)
    assert [row["uri"] for row in listing(tmp_path)] == [f"{tmp_path}/{name}" for name in sorted(names)]


def test_linked_folders_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "a/1.jpg", "far/2.jpg")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "far")
    assert names_of(tmp_path / "a") == ["1.jpg"]
    assert "1 linked folders" in caplog.text
    assert "the first: linked/" in caplog.text


def test_names_below_http_are_quoted() -> None:
    names = pa.array(["a b/ü?.jpg", "x#1.jpg", "50%.jpg"])
    expected = ["https://h/i/a%20b/%C3%BC%3F.jpg", "https://h/i/x%231.jpg", "https://h/i/50%25.jpg"]
    assert below("https://h/i/", names).to_pylist() == expected
    assert below("s3://h/i", names).to_pylist()[1] == "s3://h/i/x#1.jpg"
    assert below("https://h/i", pa.array(["a%20b.jpg"]), are_uris=True).to_pylist() == ["https://h/i/a%20b.jpg"]


def test_what_is_left_out_is_told_by_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "1.jpg", "2.HEIC", "x/3.heic", "4.txt", "5", "6.JFIF", "7.pgm", "8.avif")
    assert names_of(tmp_path) == ["1.jpg", "6.JFIF", "7.pgm", "8.avif"]
    left_out = "4 files are left out because of their endings (data.suffixes): 2 .heic, 1 .txt, 1 none"
    assert f"data.images {tmp_path}: {left_out}" in caplog.text
    caplog.clear()
    touch(tmp_path / "only", "1.jpg")
    assert names_of(tmp_path / "only") == ["1.jpg"]
    assert "left out" not in caplog.text


def test_links_that_lead_nowhere_are_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg")
    targets = {"self": "self.jpg", "file": "a.jpg/x.jpg", "gone": "gone/x", "long": "n" * 300, "two": "three.jpg"}
    targets["three"] = "two.jpg"
    for name, target in targets.items():
        (tmp_path / f"{name}.jpg").symlink_to(target)
    rows = listing(tmp_path)
    assert [(row["file_name"], row["num_bytes"]) for row in rows] == [
        ("a.jpg", 5), *((f"{name}.jpg", None) for name in sorted(targets)),
    ]  # fmt: skip
    fetched = fetch_rows(rows, threads=2, max_bytes=10)
    assert fetched[0] == b"12345"
    failures = [(str(error), error.failure_class) for error in fetched if isinstance(error, ImageError)]
    assert failures == [("missing", FailureClass.PERMANENT)] * 6
