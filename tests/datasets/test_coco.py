"""COCO listings: what is taken, what is refused and how it is named."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pytest

from owlsam_ray.datasets import Source, list_images
from owlsam_ray.errors import InputError
from owlsam_ray.settings import DataConfig
from tests.drawn_images import draw_coco


def listing(directory: Path, tree: Any, *, images: str | None = None) -> Source:
    path = directory / "list.json"
    path.write_text(json.dumps(tree) if not isinstance(tree, str) else tree, encoding="utf-8")
    return list_images(
        DataConfig(source="coco", images=images or str(directory / "images"), annotations=str(path)),
    )


def image(number: int, name: Any = None, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg" if name is None else name} | fields


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("1.jpg", "ä b.jpg"):
        (tmp_path / "images" / name).write_bytes(b"")
    return tmp_path


def test_a_listing_keeps_order_sizes_and_extra_fields(tmp_path: Path) -> None:
    content: dict[str, Any] = draw_coco(tmp_path, 5)
    source = listing(tmp_path, content)
    assert [record.image_id for record in source.records] == [entry["id"] for entry in content["images"]]
    first = source.records[0]
    assert (first.height, first.width) == (content["images"][0]["height"], content["images"][0]["width"])
    assert first.extra == {"license": 1, "source_page": "page/0"}
    assert (source.info, source.licenses, source.categories) == (
        content["info"],
        content["licenses"],
        content["categories"],
    )


def test_real_listing(shared: Path) -> None:
    mini = shared / "data" / "coco_mini"
    annotations = next(mini.glob("*.json"))
    source = list_images(DataConfig(source="coco", images=str(mini / "images"), annotations=str(annotations)))
    assert len(source.records) == 91
    assert len(source.categories) == 80


def test_unicode_names_and_missing_files_are_taken(root: Path) -> None:
    source = listing(root, {"images": [image(1), image(2, "ä b.jpg"), image(3, "not/there.jpg")]})
    assert [record.file_name for record in source.records] == ["1.jpg", "ä b.jpg", "not/there.jpg"]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([image(1), image(1, "2.jpg")], "id 1 is given to both '1.jpg' and '2.jpg'"),
        ([image(1), image(2, "1.jpg")], "'1.jpg' is listed twice, as id 1 and as id 2"),
        ([image(1, "../1.jpg")], "leaves the root"),
        ([image(1, "/etc/passwd")], "not relative"),
        ([image(1, "a//b.jpg")], "empty part"),
        ([image(1, "./b.jpg")], "leaves the root"),
        ([image(1, "http://host/b.jpg")], "not relative"),
        ([image(1, "a\\b.jpg")], "backslash"),
        ([image(1, "a\0b.jpg")], "NUL"),
        ([image(1, "")], "not a text"),
        ([image(1, 5)], "not a text"),
        ([{"file_name": "1.jpg"}], "id None is not an integer"),
        ([image(-1, "1.jpg")], "id -1"),
        ([{"id": True, "file_name": "1.jpg"}], "id True"),
        ([{"id": "7", "file_name": "1.jpg"}], "id '7'"),
        ([image(2**53, "1.jpg")], "is not an integer from 0 to 2^53"),
        ([image(1, height=-3, width=4)], "height -3"),
        ([image(1, height="480", width=4)], "height '480'"),
        (["1.jpg"], "images[0] is a str"),
        ([], "lists no images"),
        ({}, "lists no images"),
    ],
)
def test_bad_records_are_refused(root: Path, images: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        listing(root, {"images": images})
    assert words in str(caught.value)
    assert "list.json" in str(caught.value)


def test_many_offences_are_counted(root: Path) -> None:
    with pytest.raises(InputError, match=r"8 offences(.|\n)*… and 3 more"):
        listing(root, {"images": [image(1)] * 9})


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("{", "not valid JSON"),
        ('{"images": [{"id": 1, "file_name": "1.jpg", "x": NaN}]}', "NaN is no JSON value"),
        ("[]", "holds a list"),
        ({"images": [image(1)], "info": []}, "`info` is a list"),
    ],
)
def test_bad_files_are_refused(root: Path, tree: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        listing(root, tree)


def test_missing_annotation_file(root: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read data\.annotations .*gone\.json"):
        list_images(DataConfig(source="coco", images=str(root), annotations=str(root / "gone.json")))


def test_wrong_root_is_told_at_once(root: Path) -> None:
    with pytest.raises(InputError, match=r"none of 1 images looked up exists under data\.images .*elsewhere"):
        listing(root, {"images": [image(1)]}, images=str(root / "elsewhere"))


def test_fsspec_url(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/images/1.jpg", b"x")
    memory.pipe_file("/set/list.json", json.dumps({"images": [image(1)]}).encode())
    source = list_images(
        DataConfig(source="coco", images="memory://set/images", annotations="memory://set/list.json"),
    )
    assert [record.file_name for record in source.records] == ["1.jpg"]
