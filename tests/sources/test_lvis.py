"""LVIS listings, on real v0.5 records and on the same ones in the shape of v1.

The reference data share no image between LVIS's 100 and COCO's 91, so the pictures of LVIS records are drawn, in the
stated sizes; COCO's real pictures serve with records in the shape of LVIS v1.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from owlsam_ray import storage
from owlsam_ray.config.data import DataConfig
from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.errors import InputError
from owlsam_ray.sources.listing import Listing
from owlsam_ray.sources.lvis import list_lvis
from owlsam_ray.vocabulary import resolve_vocabulary

HOST = "http://images.cocodataset.org"


def listing(directory: Path, tree: Any, images: Path) -> Listing:
    path = directory / "lvis.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    return list_lvis(DataConfig(source="lvis", images=str(images), annotations=str(path)))


def rows(listed: Listing) -> list[dict[str, Any]]:
    return [row for table in listed.tables for row in table.to_pylist()]


def as_v1(images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """LVIS v1 has no file names."""
    return [{key: value for key, value in each.items() if key != "file_name"} for each in images]


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((shared / "data" / "lvis" / "lvis_val_100.json").read_bytes())
    return tree


@pytest.fixture(scope="module")
def drawn(real: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 100 images of the file, one colour each."""
    root = tmp_path_factory.mktemp("lvis")
    (root / "val2017").mkdir()
    for each in real["images"]:
        name = each["coco_url"].rsplit("/", 1)[1]
        picture = Image.new("RGB", (each["width"], each["height"]), (each["id"] % 256, 90, 120))
        picture.save(root / "val2017" / name, quality=20)
    return root


@pytest.mark.parametrize("version", ["v0.5", "v1"])
@pytest.mark.parametrize("above", [True, False])
def test_real_records(real: dict[str, Any], drawn: Path, tmp_path: Path, version: str, above: bool) -> None:
    tree = real if version == "v0.5" else {**real, "images": as_v1(real["images"])}
    listed = listing(tmp_path, tree, drawn if above else drawn / "val2017")
    found = rows(listed)
    prefix = "val2017/" if above else ""
    assert [row["file_name"] for row in found] == [f"{prefix}{each['id']:012d}.jpg" for each in real["images"]]
    assert [row["image_id"] for row in found] == [each["id"] for each in real["images"]]
    assert {row["split"] for row in found} == {"val2017"}
    for row, each in zip(found, real["images"], strict=True):
        with Image.open(row["uri"]) as picture:
            assert picture.size == (row["width"], row["height"]) == (each["width"], each["height"])
        extra = json.loads(row["extra"])
        assert extra["neg_category_ids"] == each["neg_category_ids"]
        assert extra["not_exhaustive_category_ids"] == each["not_exhaustive_category_ids"]
        assert "file_name" not in extra
    assert listed.annotated is not None
    assert sum(table.num_rows for table in listed.annotated()) == len(real["annotations"]) == 977


def test_categories_keep_what_lvis_says(real: dict[str, Any], drawn: Path, tmp_path: Path) -> None:
    listed = listing(tmp_path, real, drawn)
    assert listed.categories == real["categories"]
    assert {"frequency", "synset", "synonyms"} <= listed.categories[0].keys()
    resolved = resolve_vocabulary(VocabularyConfig(categories="dataset"), listed.categories).categories
    assert len(resolved) == 1230
    assert [category.id for category in resolved] == [each["id"] for each in real["categories"]]


def test_a_set_in_two_folders_with_real_pictures(shared: Path, tmp_path: Path) -> None:
    """As the val set of LVIS v1, whose images lie in val2017 and train2017: COCO's records without file names."""
    mini = shared / "data" / "coco_mini"
    tree = json.loads((mini / "instances.json").read_bytes())
    images = [each for each in tree["images"] if "2017/" in each["coco_url"]]
    for each in images:
        target = tmp_path / "/".join(each["coco_url"].rsplit("/", 2)[1:])
        target.parent.mkdir(exist_ok=True)
        shutil.copy(mini / "images" / each["file_name"], target)
    found = rows(listing(tmp_path, tree | {"images": as_v1(images)}, tmp_path))
    assert [row["file_name"] for row in found] == ["/".join(each["coco_url"].rsplit("/", 2)[1:]) for each in images]
    assert {row["split"] for row in found} == {"train2017", "val2017"}
    assert all(storage.exists(row["uri"]) for row in found)


def small(*paths: str) -> dict[str, Any]:
    return {"images": [{"id": i, "coco_url": f"{HOST}/{path}"} for i, path in enumerate(paths)]}


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def test_one_folder_for_all_splits(tmp_path: Path) -> None:
    touch(tmp_path / "all", "1.jpg", "2.jpg")
    found = rows(listing(tmp_path, small("val2017/1.jpg", "train2017/2.jpg"), tmp_path / "all"))
    assert [(row["file_name"], row["split"]) for row in found] == [("1.jpg", "val2017"), ("2.jpg", "train2017")]


def test_the_folder_of_one_split_is_refused_for_a_file_of_two(tmp_path: Path) -> None:
    touch(tmp_path, "val2017/1.jpg", "train2017/2.jpg")
    listed = listing(tmp_path, small("val2017/1.jpg", "train2017/2.jpg"), tmp_path / "val2017")
    with pytest.raises(InputError, match=r"images of train2017, such as 2\.jpg.*set data\.images to the folder above"):
        rows(listed)


def test_a_missing_folder_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "val2017/1.jpg")
    paths = ["val2017/1.jpg", *(f"train2017/{number}.jpg" for number in range(2, 40))]
    with caplog.at_level(logging.WARNING):
        assert len(rows(listing(tmp_path, small(*paths), tmp_path))) == 39
    assert "none of 5 images of train2017 looked up exists" in caplog.text


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of 1 images looked up .*val2017/1\.jpg, .*/1\.jpg"):
        listing(tmp_path, small("val2017/1.jpg"), tmp_path)


@pytest.mark.parametrize(
    ("record", "name"),
    [
        ({"id": 1}, "row-{}-1"),
        ({"id": 1, "coco_url": 5}, "row-{}-1"),
        ({"id": 1, "coco_url": f"{HOST}/../1.jpg"}, "row-{}-1"),
        ({"id": 1, "coco_url": f"{HOST}/a/.."}, "row-{}-1"),
        ({"id": 1, "coco_url": f"{HOST}/a\\b/1.jpg"}, "a%5Cb/1.jpg"),
    ],
)
def test_records_without_a_good_name(tmp_path: Path, record: dict[str, Any], name: str) -> None:
    touch(tmp_path, "val2017/0.jpg")
    listed = listing(tmp_path, {"images": [*small("val2017/0.jpg")["images"], record]}, tmp_path)
    found = rows(listed)
    is_bad = name.startswith("row-")
    assert found[1]["file_name"] == name.format(Path(found[1]["uri"]).name)
    assert (found[1]["container"] == "bad", (found[1]["member"] or "").startswith("bad_name: ")) == (is_bad, is_bad)


def test_records_with_odd_ids_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "val2017/0.jpg")
    tree = {"images": [*small("val2017/0.jpg")["images"], {"id": None, "coco_url": f"{HOST}/val2017/1.jpg"}]}
    with pytest.raises(InputError, match=r"images\[1\]"):
        rows(listing(tmp_path, tree, tmp_path))
