"""Objects365 listings: the real records with drawn pictures, in the folders in which the archives unpack."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError
from owlsam_ray.sources.listing import Listing
from owlsam_ray.sources.objects365 import MISSING, list_objects365
from tests.drawn_images import draw_image


def listing(directory: Path, tree: Any, images: Path, *, name: str = "zhiyuan_objv2_train.json") -> Listing:
    path = directory / name
    path.write_text(json.dumps(tree), encoding="utf-8")
    return list_objects365(DataConfig(source="objects365", images=str(images), annotations=str(path)))


def rows(listed: Listing) -> list[dict[str, Any]]:
    return [row for table in listed.tables for row in table.to_pylist()]


def put(root: Path, name: str, size: tuple[int, int] = (8, 8)) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_image(len(name)).resize(size, Image.Resampling.NEAREST).save(path)


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Any]:
    tree = json.loads((shared / "data" / "objects365" / "sample_records.json").read_bytes())
    return {key: tree[key] for key in ("images", "annotations")} | {"categories": [{"id": 84, "name": "Van"}]}


@pytest.mark.parametrize(
    ("files", "root", "names"),
    [
        ("{full}", ".", "{full}"),
        ("{patch}/{name}", ".", "{patch}/{name}"),
        ("train/{patch}/{name}", ".", "train/{patch}/{name}"),
        ("train/{patch}/{name}", "train", "{patch}/{name}"),
        ("val/{full}", ".", "val/{full}"),
        ("val/{full}", "val", "{full}"),
        ("images/v1/{patch}/{name}", "images/v1", "{patch}/{name}"),
        ("images/train/{name}", "images/train", "{name}"),
        ("images/train/{name}", "images", "train/{name}"),
    ],
)
def test_layouts(real: dict[str, Any], tmp_path: Path, files: str, root: str, names: str) -> None:
    parts = []
    for each in real["images"]:
        full = each["file_name"]
        parts.append({"full": full, "patch": full.split("/")[-2], "name": full.split("/")[-1]})
        put(tmp_path / "data", files.format(**parts[-1]), (each["width"], each["height"]))
    listed = listing(tmp_path, real, tmp_path / "data" / root)
    found = rows(listed)
    assert [row["file_name"] for row in found] == [names.format(**part) for part in parts]
    assert [row["split"] for row in found] == ["patch8", "patch4"]
    assert [row["image_id"] for row in found] == [420917, 215264]
    for row in found:
        with Image.open(row["uri"]) as picture:
            assert picture.size == (row["width"], row["height"])
        assert json.loads(row["extra"]) == {"license": 5, "url": ""}
    assert listed.annotated is not None
    assert [table.to_pylist() for table in listed.annotated()] == [[{"image_id": 420917, "category_id": 84}]]


def test_names_of_v1(tmp_path: Path) -> None:
    put(tmp_path, "train/obj365_train_000000000001.jpg")
    tree = {"images": [{"id": 1, "file_name": "obj365_train_000000000001.jpg", "height": 8, "width": 8}]}
    assert [row["file_name"] for row in rows(listing(tmp_path, tree, tmp_path))] == [
        "train/obj365_train_000000000001.jpg"
    ]


def test_known_missing_images_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those that are on the list and absent; others stay and become failed rows."""
    known = sorted(MISSING)
    for name in ("patch0/objects365_v1_00000001.jpg", known[0]):
        put(tmp_path, name)
    listed_names = ["patch0/objects365_v1_00000001.jpg", "patch0/objects365_v1_00000002.jpg", *known]
    images = [{"id": i, "file_name": f"images/{name.split('_')[1]}/{name}"} for i, name in enumerate(listed_names)]
    with caplog.at_level(logging.WARNING):
        found = [row["file_name"] for row in rows(listing(tmp_path, {"images": images}, tmp_path))]
    assert found == listed_names[:3]
    assert "6 images that are missing from the archives of Objects365 are left out" in caplog.text
    assert all(name in caplog.text for name in known[1:])
    assert known[0] not in caplog.text


def test_nothing_there(real: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of 2 images looked up") as caught:
        listing(tmp_path, real, tmp_path)
    for path in ("images/v1/patch8/objects365", "train/patch8/objects365", "val/images/v1/patch8/objects365"):
        assert path in str(caught.value)


@pytest.mark.parametrize("name", ["images/v1/../../../x.jpg", "/data/patch8/x.jpg", "..", 5, None])
def test_records_with_bad_names_become_bad_rows(tmp_path: Path, name: Any) -> None:
    put(tmp_path, "images/v1/patch0/a.jpg")
    images = [{"id": 0, "file_name": "images/v1/patch0/a.jpg"}, {"id": 1, "file_name": name}]
    found = rows(listing(tmp_path, {"images": images}, tmp_path))
    assert [row["container"] for row in found] == [None, "bad"]
    assert found[1]["member"].startswith("bad_name: ")
    assert re.fullmatch(r"row-.*json-1", found[1]["file_name"])
