"""COCO listings: layouts of the folders, what is taken, what is refused and how it is named."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from owlsam_ray import storage
from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError
from owlsam_ray.schema import LISTING_SCHEMA
from owlsam_ray.sources.coco import list_coco, list_tree, read_tree
from owlsam_ray.sources.layouts import LOOKED_UP
from owlsam_ray.sources.listing import Listing
from tests.drawn_images import draw_coco


def listing(directory: Path, tree: Any, *, images: Path | None = None, name: str = "list.json") -> Listing:
    path = directory / name
    path.write_text(json.dumps(tree) if not isinstance(tree, str) else tree, encoding="utf-8")
    root = images or directory / "images"
    return list_coco(DataConfig(source="coco", images=str(root), annotations=str(path)))


def rows(listed: Listing) -> list[dict[str, Any]]:
    tables = list(listed.tables)
    assert all(table.schema.equals(LISTING_SCHEMA) for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def names(listed: Listing) -> list[str]:
    return [row["file_name"] for row in rows(listed)]


def image(number: Any, name: Any = None, **fields: Any) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg" if name is None else name} | fields


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    touch(tmp_path / "images", "1.jpg", "ä b.jpg")
    return tmp_path


def test_a_listing_keeps_order_sizes_and_extra_fields(tmp_path: Path) -> None:
    content: dict[str, Any] = draw_coco(tmp_path, 5)
    listed = listing(tmp_path, content)
    found = rows(listed)
    assert [row["image_id"] for row in found] == [entry["id"] for entry in content["images"]]
    first = found[0]
    assert (first["height"], first["width"]) == (content["images"][0]["height"], content["images"][0]["width"])
    assert json.loads(first["extra"]) == {"license": 1, "source_page": "page/0"}
    assert first["uri"] == storage.join(str(tmp_path / "images"), first["file_name"])
    assert (listed.info, listed.licenses, listed.categories) == (
        content["info"],
        content["licenses"],
        content["categories"],
    )
    assert listed.has_ids


def test_real_listing(shared: Path) -> None:
    mini = shared / "data" / "coco_mini"
    listed = list_coco(
        DataConfig(source="coco", images=str(mini / "images"), annotations=str(mini / "instances.json")),
    )
    tree = json.loads((mini / "instances.json").read_bytes())
    found = rows(listed)
    assert len(found) == 91
    assert {row["split"] for row in found} == {"train2017", "val2017", "val2014"}
    assert len(listed.categories) == 80
    assert listed.annotated is not None
    pairs = pa.concat_tables(listed.annotated())
    assert pairs.schema == pa.schema([("image_id", pa.int64()), ("category_id", pa.int64())])
    assert pairs.to_pylist() == [
        {key: entry[key] for key in ("image_id", "category_id")} for entry in tree["annotations"]
    ]
    assert sum(table.num_rows for table in listed.annotated()) == 742  # can be read again


@pytest.mark.parametrize("year", ["train2017", "val2017"])
@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("with_url", [True, False])
def test_layout_of_2017(shared: Path, tmp_path: Path, year: str, above: bool, with_url: bool) -> None:
    """Real records, real files, in the folders that their `coco_url` names; without it, the file's name tells."""
    mini = shared / "data" / "coco_mini"
    tree = json.loads((mini / "instances.json").read_bytes())
    tree["images"] = [each for each in tree["images"] if f"/{year}/" in each["coco_url"]]
    (tmp_path / year).mkdir()
    for each in tree["images"]:
        shutil.copy(mini / "images" / each["file_name"], tmp_path / year)
        if not with_url:
            del each["coco_url"]
    assert len(tree["images"]) > 30
    root = tmp_path if above else tmp_path / year
    found = rows(listing(tmp_path, tree, images=root, name=f"instances_{year}.json"))
    prefix = f"{year}/" if above else ""
    assert [row["file_name"] for row in found] == [prefix + each["file_name"] for each in tree["images"]]
    assert {row["split"] for row in found} == {year}
    assert all(storage.exists(row["uri"]) for row in found)


@pytest.mark.parametrize("above", [True, False])
def test_layout_of_2014(shared: Path, tmp_path: Path, above: bool) -> None:
    """The official records of 2014 and the 17 of their images that are at hand."""
    data = shared / "data"
    tree = json.loads((data / "cocoapi_100" / "instances_val2014_100.json").read_bytes())
    there = {int(path.stem): path for path in (data / "coco_mini" / "images").iterdir()}
    tree["images"] = [each for each in tree["images"] if each["id"] in there]
    (tmp_path / "val2014").mkdir()
    for each in tree["images"]:
        shutil.copy(there[each["id"]], tmp_path / "val2014" / each["file_name"])
    assert len(tree["images"]) == 17
    found = rows(listing(tmp_path, tree, images=tmp_path if above else tmp_path / "val2014"))
    prefix = "val2014/" if above else ""
    assert [row["file_name"] for row in found] == [prefix + each["file_name"] for each in tree["images"]]
    assert all(storage.exists(row["uri"]) for row in found)
    for each in tree["images"]:
        del each["coco_url"]
    again = rows(listing(tmp_path, tree, images=tmp_path if above else tmp_path / "val2014"))
    assert [row["file_name"] for row in again] == [row["file_name"] for row in found]
    assert {row["split"] for row in again} == {"val2014"}


def test_records_of_2017_with_files_of_2014(tmp_path: Path) -> None:
    url = "http://images.cocodataset.org/val2014/COCO_val2014_000000000073.jpg"
    touch(tmp_path, "val2014/COCO_val2014_000000000073.jpg")
    found = rows(listing(tmp_path, {"images": [image(73, "000000000073.jpg", coco_url=url)]}, images=tmp_path))
    assert [row["file_name"] for row in found] == ["val2014/COCO_val2014_000000000073.jpg"]


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("instances_val2017.json", "val2017"),
        ("image_info_test-dev2017.json", "test2017"),
        ("image_info_test2015.json", "test2015"),
        ("image_info_unlabeled2017.json", "unlabeled2017"),
        ("captions_train2014.json", "train2014"),
        ("person_keypoints_val2017.json", "val2017"),
        ("instances_valminusminival2014.json", "val2014"),
    ],
)
def test_split_by_the_files_name(tmp_path: Path, name: str, folder: str) -> None:
    touch(tmp_path, f"{folder}/1.jpg")
    assert names(listing(tmp_path, {"images": [image(1)]}, images=tmp_path, name=name)) == [f"{folder}/1.jpg"]


def test_the_layout_is_chosen_once_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "1.jpg", *(f"val2017/{number}.jpg" for number in range(2, 9)))
    with caplog.at_level(logging.INFO):
        listed = listing(tmp_path, {"images": [image(i) for i in range(1, 9)]}, images=tmp_path, name="val2017.json")
    assert "(7 of 8 looked up exist)" in caplog.text
    assert names(listed)[0] == "val2017/1.jpg"  # which is not there: one failed row


def test_few_images_are_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(url: str) -> bool:
        asked.append(url)
        return "val2017" in url

    monkeypatch.setattr(storage, "exists", answer)
    tree = {"images": [image(i) for i in range(5000)]}
    assert len(names(listing(tmp_path, tree, images=tmp_path, name="val2017.json"))) == 5000
    assert len(asked) <= 2 * LOOKED_UP


def test_a_part_of_the_images_is_found_anywhere_in_the_file(tmp_path: Path) -> None:
    """Not among the first ones: the whole file is sampled before it is refused."""
    touch(tmp_path, *(f"{number}.jpg" for number in range(60_000, 100_000, 50)))
    tree = {"images": [image(i, f"{i}.jpg", note="x" * 100) for i in range(100_000)]}
    assert len(names(listing(tmp_path, tree, images=tmp_path))) == 100_000


def test_image_info_has_no_annotations(root: Path) -> None:
    categories = [{"id": 1, "name": "person"}]
    listed = listing(root, {"images": [image(1)], "categories": categories}, name="image_info_test2017.json")
    assert listed.annotated is None
    assert listed.categories == categories
    empty = listing(root, {"images": [image(1)], "annotations": []}).annotated
    assert empty is not None
    assert list(empty()) == []


def test_unicode_names_and_missing_files_are_taken(root: Path) -> None:
    listed = listing(root, {"images": [image(1), image(2, "ä b.jpg"), image(3, "not/there.jpg")]})
    assert names(listed) == ["1.jpg", "ä b.jpg", "not/there.jpg"]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([{"file_name": "1.jpg"}], "id None is not an integer"),
        ([image(-1, "1.jpg")], "id -1"),
        ([{"id": True, "file_name": "1.jpg"}], "id True"),
        ([image(1), image(None, "2.jpg")], "images[1]: id None"),
        ([image(1.0, "1.jpg")], "id 1.0"),
        ([image(2**53, "1.jpg")], "is not an integer from 0 to 2^53"),
        ([image(1, height=-3, width=4)], "height -3"),
        ([image(1, height="480", width=4)], "height '480'"),
        ([image(1, height=480.5, width=4)], "height 480.5"),
        ([image(1, height=True, width=4)], "height True"),
        (["1.jpg"], "images[0] is a str"),
        ([], "lists no images"),
        ({}, "`images` is an object, not a list"),
        (None, "lists no images"),
    ],
)
def test_bad_records_are_refused(root: Path, images: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        rows(listing(root, {"images": images}))
    assert words in str(caught.value)
    assert "list.json" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "path", "called"),
    [
        ("./1.jpg", "1.jpg", "1.jpg"),
        ("x//y/../1.jpg", "x/1.jpg", "x/1.jpg"),
        ("{root}/x/1.jpg", "x/1.jpg", "x/1.jpg"),
        ("file://{root}/x/1.jpg", "x/1.jpg", "x/1.jpg"),
        ("x\\1.jpg", "x\\1.jpg", "x%5C1.jpg"),
        ("x/%\\1.jpg", "x/%\\1.jpg", "x/%25%5C1.jpg"),
    ],
)
def test_names_that_are_written_oddly(root: Path, name: str, path: str, called: str) -> None:
    images = [image(1), image(2, name.replace("{root}", str(root / "images"))), image(3, "x~1.jpg")]
    found = rows(listing(root, {"images": images}))
    assert [row["file_name"] for row in found] == ["1.jpg", called, "x~1.jpg"]
    assert [row["uri"] for row in found] == [f"{root}/images/{each}" for each in ("1.jpg", path, "x~1.jpg")]
    assert [row["container"] for row in found] == [None] * 3
    assert (found[1]["quoted"] is None) == (path == called)
    assert [row["other_name"] is None for row in found] == [True, False, True]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (image(7, "../1.jpg"), "bad_name: '../1.jpg' in images[1] does not lie below data.images"),
        (image(7, "x/../../1.jpg"), "bad_name: 'x/../../1.jpg' in images[1] does not lie below data.images"),
        (image(7, "/etc/passwd"), "bad_name: '/etc/passwd' in images[1] does not lie below data.images"),
        (
            image(7, "http://me:pw@host/b.jpg?sig=1"),
            "bad_name: 'http://***@host/b.jpg?***' in images[1] does not lie below data.images",
        ),
        (image(7, "a\0b.jpg"), "bad_name: 'a\\x00b.jpg' in images[1] holds a NUL"),
        (image(7, ""), "bad_name: '' in images[1] is no file name"),
        (image(7, 5), "bad_name: 5 in images[1] is no file name"),
        (
            {"id": 7, "coco_url": "x"},
            "bad_name: None in images[1] is no file name (did you mean data.source: lvis?)",
        ),
    ],
)
def test_records_that_no_image_is_read_by_keep_their_place(root: Path, record: Any, reason: str) -> None:
    found = rows(listing(root, {"images": [image(1), record | {"height": 4, "width": 5}, image(3)]}))
    assert [row["image_id"] for row in found] == [1, 7, 3]
    assert found[1] | {"other_name": None, "extra": None} == dict.fromkeys(LISTING_SCHEMA.names) | {
        "image_id": 7,
        "file_name": "row-list.json-1",
        "uri": str(root / "list.json"),
        "container": "bad",
        "member": reason,
        "offset": 1,
        "height": 4,
        "width": 5,
    }


def test_sizes_that_are_floats_or_not_stated(root: Path) -> None:
    pairs = [(96.0, 128.0), (0, 0), (-1, -1), (0.0, -1.0), (None, 7)]
    images = [image(n, height=height, width=width) for n, (height, width) in enumerate(pairs, 1)]
    found = rows(listing(root, {"images": images}))
    assert [(row["height"], row["width"]) for row in found] == [(96, 128), *[(None, None)] * 3, (None, 7)]


def test_ids_that_are_texts_are_kept_and_the_images_numbered(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = listing(root, {"images": [image("A-7", "1.jpg", note="n"), image("008", "2.jpg"), image(9)]})
    assert not listed.has_ids
    found = rows(listed)
    assert [row["image_id"] for row in found] == [None] * 3
    assert [json.loads(row["extra"]) for row in found] == [
        {"source_id": "A-7", "note": "n"},
        {"source_id": "008"},
        {"source_id": 9},
    ]
    assert "image ids are texts, such as 'A-7': they are kept as 'source_id'" in caplog.text


@pytest.mark.parametrize(("ids", "text"), [([1, "s7"], "s7"), ([*range(1, 40), "040"], "040"), ([None, "x"], None)])
def test_a_text_among_the_ids_is_found_wherever_it_stands(
    root: Path, caplog: pytest.LogCaptureFixture, ids: list[Any], text: str | None
) -> None:
    images = [image(1, f"{place}.jpg") | {"id": each} for place, each in enumerate(ids, 1)]
    listed = listing(root, {"images": images})
    if text is None:  # without an id there is nothing to keep
        with pytest.raises(InputError, match=r"images\[0\]: id None"):
            rows(listed)
        return
    assert not listed.has_ids
    assert [json.loads(row["extra"])["source_id"] for row in rows(listed)] == ids
    assert f"image ids are texts, such as {text!r}" in caplog.text


def test_a_text_that_is_the_id_of_something_else_changes_nothing(root: Path) -> None:
    assert listing(root, {"images": [image(1, license={"id": "cc"}), image(2, "b.jpg")]}).has_ids


@pytest.mark.parametrize("later", [None, 2.5, True, -1])
def test_one_id_that_is_none_is_refused_by_its_place(root: Path, later: Any) -> None:
    with pytest.raises(InputError, match=r"images\[1\]: id .* is not an integer from 0 to 2\^53"):
        rows(listing(root, {"images": [image(1), image(later, "2.jpg")]}))


@pytest.mark.parametrize("later", ["A-7", "8"])
def test_one_text_after_integers_makes_all_ids_texts(root: Path, later: str) -> None:
    found = rows(listing(root, {"images": [image(1), image(later, "2.jpg")]}))
    assert [(row["image_id"], json.loads(row["extra"])) for row in found] == [
        (None, {"source_id": 1}),
        (None, {"source_id": later}),
    ]


def test_many_offences_are_counted(root: Path) -> None:
    with pytest.raises(InputError, match=r"8 problems(.|\n)*… and 3 more"):
        rows(listing(root, {"images": [image(1), *[image(-1)] * 8]}))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"is empty \(0 bytes\)"),
        ("{", "not valid JSON"),
        ('{"images": [{"id": 1, "file_name": "1.jpg", "x": NaN}]}', "at byte 49"),
        ('{"images": [{"id": 1 "file_name": "1.jpg"}]}', "at byte 21"),
        ("[]", "holds a list"),
        ('{"images": [{"id": 1, "file_name": "1.jpg"}], "info": []}', "`info` is a list"),
    ],
)
def test_bad_files_are_refused(root: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        listing(root, text)
    (root / "list.json").write_text(text)
    if "info" not in text:
        with pytest.raises(InputError, match=words):
            read_tree(str(root / "list.json"))


def test_bad_references_are_refused_when_they_are_read(root: Path) -> None:
    tree = {"images": [image(1)], "annotations": [{"id": 5, "image_id": "1", "category_id": 3}]}
    listed = listing(root, tree)
    assert listed.annotated is not None
    with pytest.raises(InputError, match=r'annotations\[0\] \(id 5\): image_id "1" is not an integer'):
        list(listed.annotated())


def test_missing_annotation_file(root: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*gone\.json"):
        list_coco(DataConfig(source="coco", images=str(root), annotations=str(root / "gone.json")))


def test_wrong_root_is_told_at_once(root: Path) -> None:
    with pytest.raises(InputError, match=r"none of 1 images looked up exists below data\.images .*elsewhere") as caught:
        listing(root, {"images": [image(1)]}, images=root / "elsewhere", name="instances_val2017.json")
    assert "elsewhere/1.jpg" in str(caught.value)
    assert "elsewhere/val2017/1.jpg" in str(caught.value)


def test_refused_look_ups_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> bool:
        raise PermissionError(13, "Access Denied", url)

    monkeypatch.setattr(storage, "exists", refuse)
    with pytest.raises(InputError, match=r"Storage refused: .*Access Denied"):
        listing(root, {"images": [image(1)]})


def test_fsspec_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/val2017/1.jpg", b"x")
    tree = {"images": [image(1)], "annotations": [{"image_id": 1, "category_id": 2}]}
    memory.pipe_file("/set/instances_val2017.json", json.dumps(tree).encode())
    listed = list_coco(
        DataConfig(source="coco", images="memory://set", annotations="memory://set/instances_val2017.json")
    )
    memory.store.clear()  # it was copied: nothing is asked for again
    assert [row["uri"] for row in rows(listed)] == ["memory://set/val2017/1.jpg"]
    assert listed.annotated is not None
    assert [table.to_pylist() for table in listed.annotated()] == [[{"image_id": 1, "category_id": 2}]]


def test_trees_are_listed_the_same_way(tmp_path: Path) -> None:
    """`list_tree`, which fine-tuning uses, against the stream."""
    tree: dict[str, Any] = draw_coco(tmp_path, 30)
    url, images = str(tmp_path / "instances.json"), str(tmp_path / "images")
    listed = list_tree(read_tree(url), url=url, root=images)
    streamed = rows(list_coco(DataConfig(source="coco", images=images, annotations=url)))
    assert [(record.image_id, record.file_name, record.height, record.width) for record in listed.records] == [
        (row["image_id"], row["file_name"], row["height"], row["width"]) for row in streamed
    ]
    assert listed.image_ids == [row["image_id"] for row in streamed]
    assert listed.categories == tree["categories"]


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ([image(1), image(1, "2.jpg")], "id 1 is given to both '1.jpg' and '2.jpg'"),
        ([image(1), image(2, "1.jpg")], "'1.jpg' is listed twice, as id 1 and as id 2"),
        ([image(1), image("2")], "images[1]: id '2'"),
        ([], "lists no images"),
        ({}, "lists no images"),
    ],
)
def test_trees_with_repeated_images_are_refused(root: Path, images: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        list_tree({"images": images}, url="list.json", root=str(root / "images"))
    assert words in str(caught.value)
