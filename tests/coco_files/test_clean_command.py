"""`clean_file`: every rule and its switch, what is carried over, the table, and files that are refused."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from owlsam_ray.coco_files.annotations import read_objects
from owlsam_ray.coco_files.clean import clean_file, cleaning_table
from owlsam_ray.coco_files.cleaning import CleaningSettings, Rule, clean
from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.coco_files.file_copy import TABLE_COLUMNS
from owlsam_ray.coco_files.file_rules import CHANGES, RULES, FileCleaning
from owlsam_ray.coco_files.statistics import statistics
from owlsam_ray.errors import InputError
from owlsam_ray.ops.masks import encode_rle

SQUARE = [[10, 10, 50, 10, 50, 50, 10, 50]]
HUGE = 10**400  # an integer beyond all floats
OFF = FileCleaning(
    malformed=False, unknown_image=False, unknown_category=False, no_box=False, non_finite=False, zero_area=False,
    outside=False, bad_segmentation=False, empty_segmentation=False, duplicate_iou=None, degenerate_polygons=False,
    new_ids=False,
)  # fmt: skip


def annotation(number: Any = 1, **fields: Any) -> dict[str, Any]:
    base = {"id": number, "image_id": 7, "category_id": 3, "bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    return {**base, "segmentation": SQUARE, **fields}


def tree_of(*annotations: Any, **fields: Any) -> dict[str, Any]:
    images = [
        {"id": 7, "file_name": "a/ä 7.jpg", "height": 100, "width": 200, "license": 1},
        {"id": 8, "file_name": "8.jpg"},
    ]
    categories = [{"id": 3, "name": "cat", "keypoints": []}, {"id": 4, "name": "dog"}]
    return {
        "info": {"year": 2026},
        "images": images,
        "annotations": list(annotations),
        "categories": categories,
    } | fields


class Cleaned:
    """One call on a file in a folder, and what it left."""

    def __init__(self, folder: Path, tree: Any, settings: FileCleaning, *, removed: str = "gone.jsonl") -> None:
        (folder / "in.json").write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
        table = folder / removed
        self.counts = clean_file(str(folder / "in.json"), str(folder / "out.json"), settings, removed=str(table))
        self.tree = json.loads((folder / "out.json").read_bytes())
        self.ids = [entry["id"] if isinstance(entry, dict) else entry for entry in self.tree["annotations"]]
        self.lines = [json.loads(line) for line in table.read_text("utf-8").splitlines()]
        self.told = {(line["action"], line["annotation_id"], line["rule"]) for line in self.lines}


def run(folder: Path, *annotations: Any, **fields: Any) -> Cleaned:
    return Cleaned(folder, tree_of(*annotations), FileCleaning(**fields))


BROKEN: list[tuple[dict[str, Any], str, str]] = [
    ({"id": "1"}, "malformed", "annotations[0]: id '1' is not an integer"),
    ({"bbox": [1, 2, 3]}, "malformed", "is not [x, y, width, height]"),
    ({"area": "12"}, "malformed", "area '12' is not a number"),
    ({"score": "0.5"}, "malformed", "score '0.5' is not a number"),
    ({"score": True}, "malformed", "score True is not a number"),
    ({"image_id": 99}, "unknown_image", "image_id 99 is not among the 2 images"),
    ({"image_id": "7"}, "unknown_image", "image_id '7'"),
    ({"image_id": None}, "unknown_image", "image_id None"),
    ({"image_id": HUGE}, "unknown_image", "image_id <integer of about 401 digits>"),
    ({"category_id": 5}, "unknown_category", "category_id 5 is not among the 2 categories"),
    ({"category_id": True}, "unknown_category", "category_id True"),
    ({"iscrowd": 1}, "crowd", ""),
    ({"bbox": None}, "no_box", ""),
    ({"bbox": []}, "no_box", ""),
    ({"bbox": [10, 10, HUGE, 40]}, "non_finite", ""),
    ({"area": HUGE}, "non_finite", ""),
    ({"bbox": [10, 10, 0, 40]}, "zero_area", "bbox [10, 10, 0, 40], area 1600, image 200 × 100"),
    ({"area": 0}, "zero_area", "area 0"),
    ({"bbox": [200, 10, 40, 40]}, "outside", "bbox [200, 10, 40, 40], area 1600, image 200 × 100"),
    ({"bbox": [10, 10, 9.9, 10]}, "small", "bbox [10, 10, 9.9, 10]"),
    ({"area": 99.9}, "small", "area 99.9"),
    ({"segmentation": "mask.png"}, "bad_segmentation", "neither polygons nor an RLE with a size"),
    ({"segmentation": [[1, 2, 3]]}, "bad_segmentation", "not a list of x, y"),
    ({"segmentation": {"size": [9, 9], "counts": [81]}}, "bad_segmentation", "an RLE of 9 × 9 does not have the size"),
    ({"segmentation": [[10, 10, 50, 50]]}, "empty_segmentation", ""),
    ({"segmentation": []}, "empty_segmentation", ""),
    ({"bbox": [10, 10, 40, 41]}, "duplicate", "IoU 0.9756 with annotation 0"),
]  # fmt: skip
ON: dict[str, dict[str, Any]] = {"crowd": {"crowd": True}, "small": {"min_area": 100}}
SWITCHED_OFF: dict[str, dict[str, Any]] = {"duplicate": {"duplicate_iou": None}, "small": {"min_area": None}}


@pytest.mark.parametrize(("fields", "rule", "detail"), BROKEN)
def test_every_rule_has_its_switch(tmp_path: Path, fields: dict[str, Any], rule: str, detail: str) -> None:
    entries = [annotation(1, **fields), annotation(0, category_id=3 if rule == "duplicate" else 4)]
    cleaned = run(tmp_path, *entries, **ON.get(rule, {}))
    assert cleaned.ids == [0]
    assert len(cleaned.lines) == 1
    line = cleaned.lines[0]
    assert (line["action"], line["rule"]) == ("removed", rule)
    assert (line["image_id"], line["annotation_id"]) == (entries[0]["image_id"], entries[0]["id"])
    assert line["file_name"] == (None if rule == "unknown_image" else "a/ä 7.jpg")
    assert line["category"] == (None if rule == "unknown_category" else "cat")
    assert detail in line["detail"]
    assert {name for name, count in cleaned.counts["removed"].items() if count} == {rule}
    off = run(tmp_path, *entries, **SWITCHED_OFF.get(rule, {rule: False}))
    assert off.tree["annotations"] == entries
    assert off.lines == []
    assert off.counts["removed"][rule] is None


@pytest.mark.parametrize("entry", ["text", None, 5, [1]])
def test_entries_that_are_no_objects(tmp_path: Path, entry: Any) -> None:
    cleaned = run(tmp_path, annotation(), entry)
    assert cleaned.ids == [1]
    assert cleaned.lines[0]["detail"] == f"annotations[1] is a {type(entry).__name__}, not an object"
    assert Cleaned(tmp_path, tree_of(entry), OFF).tree["annotations"] == [entry]


def test_all_rules_off_changes_nothing(tmp_path: Path) -> None:
    entries = [annotation(i % 5, **fields) for i, (fields, _, _) in enumerate(BROKEN)]
    (tmp_path / "in.json").write_text(json.dumps(tree_of(*entries)), encoding="utf-8")
    clean_file(str(tmp_path / "in.json"), str(tmp_path / "out.json"), OFF)
    tree = json.loads((tmp_path / "out.json").read_bytes())
    note = tree["info"].pop("cleaned")
    assert tree == tree_of(*entries)
    assert not any(note["removed"].values())
    assert (tmp_path / "out.removed.csv").read_text("utf-8") == ",".join(TABLE_COLUMNS) + "\n"


def test_the_first_rule_counts(tmp_path: Path) -> None:
    entry = annotation(1, image_id=99, category_id=99, bbox=[10, 10, 0, 40], segmentation="x")
    assert run(tmp_path, entry, annotation(2)).told == {("removed", 1, "unknown_image")}
    assert run(tmp_path, entry, annotation(2), unknown_image=False).told == {("removed", 1, "unknown_category")}
    both = {"unknown_image": False, "unknown_category": False}
    assert run(tmp_path, entry, **both).told == {("removed", 1, "zero_area")}
    assert run(tmp_path, entry, **both, zero_area=False).told == {("removed", 1, "bad_segmentation")}


def test_everything_else_is_carried_over(tmp_path: Path) -> None:
    """As text: numbers that no float holds, fields that nobody knows, the order of everything."""
    text = (
        '{"videos": [{"x": 1e999}],\r\n "images": [{"id": 7, "file_name": "a\\u00e4.jpg", "deep": {"a": [1, {}]}} , '
        '{"id": 8}],\n'
        '"annotations":[{"note": "], {\\"", "score": 0.10000000000000000555, "id": 12345678901234567, "image_id": 7, '
        '"category_id": 3, "bbox": [1E1, 10, 40, 40]},{"id": 2, "image_id": 9, "category_id": 3}],'
        '"licenses": null, "categories": [{"id": 3, "name": "a"}], "zz": 1}'
    )
    cleaned = Cleaned(tmp_path, text, FileCleaning())
    out = (tmp_path / "out.json").read_text("utf-8")
    kept = text[text.index('{"note"') : text.index(',{"id": 2')]
    assert kept in out
    assert '"videos": [{"x": 1e999}]' in out
    assert list(cleaned.tree) == ["info", "videos", "images", "annotations", "licenses", "categories", "zz"]
    assert cleaned.tree["images"] == json.loads(text)["images"]
    assert cleaned.told == {("removed", 2, "unknown_image")}


def test_the_note_says_what_was_done(tmp_path: Path) -> None:
    cleaned = run(tmp_path, annotation(), annotation(2, image_id=99), min_area=5)
    info = cleaned.tree["info"]
    assert list(info) == ["year", "cleaned"]
    note = info["cleaned"]
    assert note["settings"] == FileCleaning(min_area=5).model_dump(mode="json")
    counts = {key: value for key, value in cleaned.counts.items() if key not in ("out", "table")}
    assert {key: note[key] for key in counts} == counts
    assert (counts["annotations_in"], counts["annotations_out"]) == (2, 1)
    assert tuple(counts["removed"]) == RULES
    assert tuple(counts["changed"]) == CHANGES
    again = clean_file(str(tmp_path / "out.json"), str(tmp_path / "twice.json"))
    assert again["annotations_out"] == again["annotations_in"] == 1
    assert json.loads((tmp_path / "twice.json").read_bytes())["info"]["cleaned"]["before"] == note


def test_boxes_are_cut_when_asked(tmp_path: Path) -> None:
    entries = [
        annotation(1, bbox=[-10.5, 60, 40, 80]),
        annotation(2, bbox=[10, 10, 30, 30], category_id=4),
        annotation(3, image_id=8, bbox=[-5, -5, 4000, 80]),  # its picture states no size
    ]
    assert run(tmp_path, *entries).tree["annotations"] == entries
    cleaned = run(tmp_path, *entries, clip_boxes=True)
    assert [entry["bbox"] for entry in cleaned.tree["annotations"]] == [
        [0, 60, 29.5, 40],
        [10, 10, 30, 30],
        [0, 0, 3995, 75],
    ]
    assert cleaned.counts["changed"]["clipped_box"] == 2
    assert cleaned.lines[0]["detail"] == "bbox [-10.5, 60, 40, 80] is now [0.0, 60.0, 29.5, 40.0]"
    rest = [{key: value for key, value in entry.items() if key != "bbox"} for entry in entries]
    assert [{k: v for k, v in entry.items() if k != "bbox"} for entry in cleaned.tree["annotations"]] == rest


def test_degenerate_polygons_go_alone(tmp_path: Path) -> None:
    entry = annotation(segmentation=[[1, 1, 2, 2], *SQUARE, [5, 5, 6, 6, 7, 7]])
    cleaned = run(tmp_path, entry)
    assert cleaned.tree["annotations"] == [annotation()]
    assert cleaned.told == {("changed", 1, "dropped_polygon")}
    assert cleaned.lines[0]["detail"] == "2 of 3 polygons have no area"
    assert run(tmp_path, entry, degenerate_polygons=False).tree["annotations"] == [entry]


def test_empty_lists_of_a_file_of_boxes_stay(tmp_path: Path) -> None:
    entries = [annotation(1, segmentation=[]), annotation(2, segmentation=[], category_id=4)]
    assert run(tmp_path, *entries).ids == [1, 2]
    assert run(tmp_path, *entries, annotation(3, image_id=8)).ids == [3]


def test_repeated_ids_get_new_ones(tmp_path: Path) -> None:
    entries = [annotation(5), annotation(5, category_id=4), annotation(9, image_id=99), annotation(5, image_id=8)]
    cleaned = run(tmp_path, *entries)
    assert cleaned.ids == [5, 10, 11]
    assert cleaned.told == {("changed", 5, "new_id"), ("removed", 9, "unknown_image")}
    assert [line["detail"] for line in cleaned.lines if line["rule"] == "new_id"] == ["id is now 10", "id is now 11"]
    assert run(tmp_path, *entries, new_ids=False).ids == [5, 5, 5]


def test_crowd_regions_make_no_duplicates(tmp_path: Path) -> None:
    assert run(tmp_path, annotation(1, iscrowd=1), annotation(2)).ids == [1, 2]
    assert run(tmp_path, annotation(1, iscrowd=1), annotation(2), crowd=True).ids == [2]


def test_images_without_annotations(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = [annotation(1, bbox=[10, 10, 0, 40])]
    kept = run(tmp_path, *entries)
    assert [image["id"] for image in kept.tree["images"]] == [7, 8]
    assert kept.counts["images_emptied"] == 1
    assert "1 images lost all of their annotations" in caplog.text
    assert "none of 1 annotations is left" in caplog.text
    cleaned = run(tmp_path, *entries, drop_empty_images=True)
    assert cleaned.tree["images"] == cleaned.tree["annotations"] == []
    assert [(line["image_id"], line["rule"], line["detail"]) for line in cleaned.lines] == [
        (7, "zero_area", "bbox [10, 10, 0, 40], area 1600, image 200 × 100"),
        (7, "empty_image", "all of its annotations are removed"),
        (8, "empty_image", "has no annotations"),
    ]
    assert cleaned.counts["removed"]["empty_image"] == 2
    assert (cleaned.counts["images_out"], cleaned.counts["images_emptied"]) == (0, 0)
    assert "none of 2 images is left" in caplog.text


def test_a_file_without_anything(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    assert Cleaned(tmp_path, tree, FileCleaning()).counts["annotations_out"] == 0


@pytest.mark.parametrize(
    ("fields", "entry", "words"),
    [
        ({"images": None}, {}, r"unknown_image 2; it has no `images`\).*--set unknown_image=false"),
        ({"images": []}, {}, "it has no `images`"),
        ({"categories": None}, {}, r"unknown_category 2; it has no `categories`\).*--set unknown_category=false"),
        ({"categories": []}, {}, "it has no `categories`"),
        (
            {},
            {"image_id": "7"},
            r"all 2 annotations would be removed \(unknown_image 2; the first has the image_id '7'\)",
        ),
        ({}, {"category_id": 99}, "the first has the category_id 99"),
        ({}, {"id": "1"}, r"malformed 2; the first: annotations\[0\]: id '1'.*--set malformed=false"),
    ],
)
def test_a_fault_of_the_file_is_not_its_annotations(
    tmp_path: Path, fields: dict[str, Any], entry: dict[str, Any], words: str
) -> None:
    tree = tree_of(annotation(1, **entry), annotation(2, **entry), **fields)
    with pytest.raises(InputError, match=words):
        Cleaned(tmp_path, tree, FileCleaning())
    assert os.listdir(tmp_path) == ["in.json"]
    assert len(Cleaned(tmp_path, tree, OFF).ids) == 2


def test_half_of_each_is_refused_as_well(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--set unknown_image=false --set unknown_category=false"):
        run(tmp_path, annotation(1, image_id=99), annotation(2, category_id=99))


@pytest.mark.parametrize(("stated", "meant"), [(False, 0), (True, 1), (0.0, 0), (1.0, 1)])
def test_crowd_flags_become_integers(tmp_path: Path, stated: Any, meant: int) -> None:
    cleaned = run(tmp_path, annotation(1, iscrowd=stated), annotation(2, category_id=4))
    flags = [entry["iscrowd"] for entry in cleaned.tree["annotations"]]
    assert flags == [meant, 0]
    assert type(flags[0]) is int
    assert cleaned.told == {("changed", 1, "crowd_flag")}
    assert cleaned.counts["changed"]["crowd_flag"] == 1
    assert statistics(str(tmp_path / "out.json"))["annotations"]["crowds"]["number"] == meant


def test_new_ids_stay_below_what_floats_hold(tmp_path: Path) -> None:
    near = 2**53 - 1
    assert run(tmp_path, annotation(near), annotation(near, category_id=4), annotation(1, image_id=8)).ids == [
        near,
        2,
        1,
    ]
    beyond = 2**63 - 1
    entries = [annotation(beyond), annotation(beyond, category_id=4), annotation(5, image_id=8)]
    assert run(tmp_path, *entries).ids == [beyond, 6, 5]


@pytest.mark.parametrize("counts", ["0", "l04", "PPPPP1PPPPP1", "Rm``````````````````", "0PPPPPPPPPPPPPPPP1"])
def test_compressed_runs_must_fill_the_picture(tmp_path: Path, counts: str) -> None:
    size = [100, 200]
    cleaned = run(tmp_path, annotation(1, segmentation={"size": size, "counts": counts}), annotation(2, category_id=4))
    assert cleaned.ids == [2]
    assert cleaned.lines[0]["rule"] == "bad_segmentation"
    assert any(words in cleaned.lines[0]["detail"] for words in ("do not add up to 100 × 200", "not a compressed RLE"))


@pytest.mark.parametrize("seed", range(5))
def test_sound_compressed_runs_stay(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    mask = np.random.default_rng(seed).random((100, 200)) < 0.02 + 0.2 * seed
    text = encode_rle(mask).decode()
    assert run(tmp_path, annotation(segmentation={"size": [100, 200], "counts": text})).ids == [1]
    wrong = {"size": [100, 200], "counts": text + "1"}
    assert run(tmp_path, annotation(segmentation=wrong), annotation(2, category_id=4)).ids == [2]


def test_the_table_as_csv(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps(tree_of(annotation(1, iscrowd=1), annotation(2, bbox=None))))
    counts = clean_file(
        str(tmp_path / "in.json"), str(tmp_path / "out.json"), FileCleaning(crowd=True, drop_empty_images=True)
    )
    assert counts["table"] == str(tmp_path / "out.removed.csv")
    with open(counts["table"], newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        list(TABLE_COLUMNS),
        ["removed", "7", "a/ä 7.jpg", "1", "cat", "crowd", ""],
        ["removed", "7", "a/ä 7.jpg", "2", "cat", "no_box", ""],
        ["removed", "7", "a/ä 7.jpg", "", "", "empty_image", "all of its annotations are removed"],
        ["removed", "8", "8.jpg", "", "", "empty_image", "has no annotations"],
    ]


def test_real_file_equals_fine_tunings_rules(shared: Path, tmp_path: Path) -> None:
    """The columns of a stream against `clean` on the whole tree, with the same rules."""
    url = str(shared / "data" / "coco_mini" / "instances.json")
    tree = json.loads(Path(url).read_bytes())
    ids = [image["id"] for image in tree["images"]]
    objects = read_objects(tree, url=url, image_ids=ids, category_ids=[each["id"] for each in tree["categories"]])
    sizes = np.array([(image["height"], image["width"]) for image in tree["images"]], np.float64)
    plain = CleaningSettings(min_area=1000, duplicate_iou=0.5, clip_boxes=False, drop_empty_images=True)
    expected = clean(objects, image_ids=ids, sizes_hw=sizes, settings=plain)
    counts = clean_file(
        url,
        str(tmp_path / "out.json"),
        FileCleaning(crowd=True, min_area=1000, duplicate_iou=0.5, drop_empty_images=True),
    )
    cleaned = json.loads((tmp_path / "out.json").read_bytes())
    assert sorted(entry["id"] for entry in cleaned["annotations"]) == sorted(objects.ids[expected.kept].tolist())
    assert [image["id"] for image in cleaned["images"]] == [ids[index] for index in expected.images]
    report = expected.report.as_dict()
    assert {rule: counts["removed"][rule] for rule in Rule} == report["removed"]
    assert report["removed"]["crowd"] == 9
    assert report["removed"]["duplicate"] >= 1
    by_id = {entry["id"]: entry for entry in tree["annotations"]}
    assert all(entry == by_id[entry["id"]] for entry in cleaned["annotations"])


@pytest.mark.parametrize("seed", range(20))
def test_random_files_equal_fine_tunings_rules(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    polygons: list[Any] = [
        SQUARE,
        [],
        [[1, 1, 2, 2]],
        [[1, 1, 2, 2], *SQUARE],
        "x",
        None,
        {"size": [1, 1], "counts": [1]},
    ]
    entries = [
        annotation(
            int(number),
            image_id=int(rng.choice([7, 8])),
            category_id=int(rng.choice([3, 4])),
            bbox=rng.integers([-20, -20, -1, -1], [220, 120, 60, 60]).tolist() if rng.random() < 0.9 else None,
            area=int(rng.integers(-1, 3000)) if rng.random() < 0.8 else None,
            iscrowd=int(rng.random() < 0.1),
            segmentation=polygons[int(rng.choice(7, p=[0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]))],
        )
        for number in rng.permutation(60)
    ]
    tree = json.loads(json.dumps(tree_of(*entries)))
    objects = read_objects(tree, url="x", image_ids=[7, 8], category_ids=[3, 4])
    sizes = np.array([(100, 200), (np.inf, np.inf)])
    plain = CleaningSettings(min_area=20, duplicate_iou=0.2)
    expected = clean(objects, image_ids=[7, 8], sizes_hw=sizes, settings=plain)
    cleaned = run(tmp_path, *entries, crowd=True, min_area=20, duplicate_iou=0.2, clip_boxes=True)
    kept = [objects.ids[index] for index in sorted(expected.kept.tolist())]
    assert cleaned.ids == kept
    report = expected.report.as_dict()
    assert {rule: cleaned.counts["removed"][rule] or 0 for rule in Rule} == report["removed"]
    assert cleaned.counts["changed"]["clipped_box"] == report["changed"]["clipped_box"]
    assert cleaned.counts["changed"]["dropped_polygon"] == report["changed"]["dropped_polygon"]


def test_large_files_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same result whatever the size of a block."""
    entries = [annotation(i, bbox=[i % 50, 10, 20, i % 9], image_id=7 + i % 3) for i in range(500)]
    whole = run(tmp_path, *entries)
    for method in (Document.blocks, Document.batches):
        monkeypatch.setattr(method, "__kwdefaults__", {"max_bytes": 1000})
    with open_document(str(tmp_path / "in.json")) as document:
        assert len(list(document.blocks("annotations"))) > 50
    parts = run(tmp_path, *entries)
    assert (parts.tree, parts.lines) == (whole.tree, whole.lines)
    assert 0 < len(parts.ids) < 400


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("", "is empty"),
        ('{"annotations": [}', r"not valid JSON: .*byte 17"),
        ('{"images": []}', "has no list `annotations`"),
        ('{"images": [], "annotations": null}', "has no list `annotations`"),
        (tree_of(images=[{"id": 1}, {"id": 1}]), "images: id 1 is given 2 times"),
        (tree_of(images=[{"id": "1"}]), r"images\[0\]: id '1' is not an integer"),
        (
            tree_of(images=[{"id": 1, "height": -2}]),
            r"height -2 is not a whole number of pixels(.|\n)*heights and widths must",
        ),
        (tree_of(images=[{"id": 1, "height": 5, "width": "9"}]), r"images\[0\] \(id 1\): width '9' is not a whole"),
        (tree_of(categories=[{"id": 3}]), r"categories\[0\] \(id 3\): name None is not a text(.|\n)*must have a name"),
        (tree_of(categories=[{"id": 3, "name": 5}]), "name 5 is not a text"),
        (tree_of(categories=[{"id": 3}, {"id": 3}]), r"categories\[1\]: id 3 is given twice"),
        (tree_of(categories=[{"name": "x"}]), r"categories\[0\]: id None"),
        (tree_of(categories={}), "`categories` is an object"),
        (tree_of(info=[]), "`info` is a list"),
        ({**tree_of(), "annotations": {}}, "`annotations` is an object"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, tree: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Cleaned(tmp_path, tree, FileCleaning())
    assert sorted(os.listdir(tmp_path)) == ["in.json"]


def test_nothing_is_overwritten_by_accident(tmp_path: Path) -> None:
    source = tmp_path / "in.json"
    source.write_text(json.dumps(tree_of(annotation())))
    (tmp_path / "link.json").symlink_to(source)
    os.link(source, tmp_path / "hard.json")
    for out in (source, tmp_path / "." / "in.json", tmp_path / "link.json", tmp_path / "hard.json"):
        with pytest.raises(InputError, match=r"--out would overwrite .*in\.json"):
            clean_file(str(source), str(out))
    with pytest.raises(InputError, match=r"must end in \.csv or \.jsonl"):
        clean_file(str(source), str(tmp_path / "out.json"), removed=str(source))
    (tmp_path / "in.csv").write_text(json.dumps(tree_of(annotation())))
    with pytest.raises(InputError, match="--removed would overwrite"):
        clean_file(str(tmp_path / "in.csv"), str(tmp_path / "out.json"), removed=str(tmp_path / "in.csv"))
    with pytest.raises(InputError, match="--out and --removed would overwrite"):
        clean_file(str(source), str(tmp_path / "x.csv"), removed=str(tmp_path / "x.csv"))
    assert json.loads(source.read_bytes()) == tree_of(annotation())


@pytest.mark.parametrize(("option", "place"), [("--out", "d"), ("--out", "in.json/x"), ("--removed", "d.csv")])
def test_places_that_hold_no_file(tmp_path: Path, option: str, place: str) -> None:
    (tmp_path / "in.json").write_text(json.dumps(tree_of(annotation())))
    for folder in ("d", "d.csv"):
        (tmp_path / folder).mkdir()
    chosen = {"--out": str(tmp_path / "out.json"), "--removed": str(tmp_path / "t.csv")} | {
        option: str(tmp_path / place)
    }
    with pytest.raises(InputError, match=f"{option} .*{place}.*: name "):
        clean_file(str(tmp_path / "in.json"), chosen["--out"], removed=chosen["--removed"])
    assert sorted(os.listdir(tmp_path)) == ["d", "d.csv", "in.json"]


@pytest.mark.parametrize("settings", [FileCleaning, CleaningSettings])
@pytest.mark.parametrize("rule", ["duplicate_iou", "min_area"])
def test_a_switch_is_no_number(settings: type[FileCleaning] | type[CleaningSettings], rule: str) -> None:
    off = 0.0 if (settings, rule) == (CleaningSettings, "min_area") else None
    assert getattr(settings.model_validate({rule: False}), rule) == off
    with pytest.raises(ValidationError, match="true is not a number: give the number, or false"):
        settings.model_validate({rule: True})


def test_overlapping_pairs_stay_with_the_rule_off(tmp_path: Path) -> None:
    assert run(tmp_path, annotation(1), annotation(2), duplicate_iou=False).ids == [1, 2]


def test_urls() -> None:
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/in.json", json.dumps(tree_of(annotation(), annotation(2))).encode())
    with pytest.raises(InputError, match="--out would overwrite"):
        clean_file("memory://set/in.json", "memory:///set/in.json")
    counts = clean_file("memory://set/in.json", "memory://set/out.json")
    assert counts["removed"]["duplicate"] == 1
    assert sorted(memory.store) == ["/set/in.json", "/set/out.json", "/set/out.removed.csv"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("owlsam_ray.coco_files.file_copy.RemovalTable.add", fail)
    (tmp_path / "in.json").write_text(json.dumps(tree_of(annotation(), annotation(2))))
    with pytest.raises(OSError, match="No space"):
        clean_file(str(tmp_path / "in.json"), str(tmp_path / "out.json"))
    assert os.listdir(tmp_path) == ["in.json"]


def test_the_terminals_table_shows_every_rule(tmp_path: Path) -> None:
    cleaned = run(tmp_path, annotation(), annotation(2))
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(cleaning_table(cleaned.counts))
    console.file.close()
    text = console.export_text()
    assert "1 of 2 annotations and 2 of 2 images stay" in text
    assert all(rule in text for rule in (*RULES, *CHANGES))
    assert "off" in text


@pytest.mark.parametrize(
    "fields", [{"duplicate_iou": 2}, {"min_area": -1}, {"min_area": float("nan")}, {"crowds": True}]
)
def test_settings_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        FileCleaning(**fields)
