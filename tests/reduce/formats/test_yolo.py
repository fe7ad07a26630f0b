"""YOLO's folders: lines, files for every image, and names that want to be elsewhere."""

import json
import random
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.errors import FailureClass
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.reduce.formats.safe_paths import ENDINGS, label_path, numbered_paths, safe_path
from owlsam_ray.reduce.formats.yolo import YoloOutput
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, random_run, reduce_shards

HOSTILE = [
    "../x.jpg",
    "a/../../x.jpg",
    "/etc/passwd",
    "//host/x.jpg",
    "C:\\x.jpg",
    "..\\x.jpg",
    "a\x00b.jpg",
    "a\nb.jpg",
    "a\u2028b.jpg",
    "s3://bucket/x.jpg",
    "file::x.jpg",
    ".hidden/.x.jpg",
    "",
    "/",
    ".",
    "..",
    "x" * 300 + ".jpg",
    "/".join(["long" * 30] * 20) + ".jpg",
    "ü" * 200 + ".jpg",
    "trailing ",
    "a.txt/b.jpg",
    "cam/images/x.jpg",
    "images/images/x.jpg",
]


def is_safe(path: str) -> bool:
    parts = path.split("/")
    return (
        all(part and not part.startswith(".") and len(part.encode()) <= 255 for part in parts)
        and not PurePosixPath(path).is_absolute()
        and not PureWindowsPath(path).drive
        and "\\" not in path
        and "://" not in path
        and "::" not in path
        and len(path.splitlines()) == 1
        and path == path.rstrip()
        and len(path.encode()) <= 1000
        and not any(part.lower().endswith(".txt") for part in parts[:-1])
    )


@given(st.text(alphabet=st.one_of(st.sampled_from("./\\:a \n~%"), st.characters(codec="utf-8")), max_size=60))
@example("a.txt/b")
def test_every_name_becomes_a_path_below_the_folder(name: str) -> None:
    path = safe_path(name)
    assert is_safe(path), repr(path)
    assert is_safe(label_path(path)), repr(path)
    assert "\x00" not in path
    assert label_path(path).endswith(".txt")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_too(name: str) -> None:
    assert is_safe(safe_path(name)), repr(safe_path(name))
    assert is_safe(label_path(safe_path(name)))


@pytest.mark.parametrize(
    "name",
    [
        "000.jpg",
        "train2017/0001.jpg",
        "a b/c d.png",
        "Größe/ü.jpeg",
        "part-000.tar/0001.jpg",
        "2026-01-01T12:00:00.jpg",
        "a..b/IMG.JPG",
        "myimages/x.webp",
    ],
)
def test_names_that_are_fine_stay(name: str) -> None:
    assert safe_path(name) == name


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("images/train/1.jpg", "train/1.jpg"),
        ("cam/images/1.jpg", "cam/images_/1.jpg"),
        ("cam/images_/1.jpg", "cam/images__/1.jpg"),
        ("images/images/1.jpg", "images_/1.jpg"),
        ("images", "images.jpg"),
        ("train-0/17", "train-0/17.jpg"),
        ("photo.v2", "photo.v2.jpg"),
        ("drawing.gif", "drawing.gif.jpg"),
        ("x" * 300, None),
        ("end./1.jpg", "end%2E/1.jpg"),  # readers put the folder in the place of every "./"
        ("a/../1.jpg", "a/%2E%2E/1.jpg"),
        (".png", "%2Epng.jpg"),
        ("a/1.jpg\n", "a/1.jpg%0A.jpg"),
    ],
)
def test_names_that_readers_do_not_take(name: str, path: str | None) -> None:
    found = safe_path(name)
    assert found == (path or found)
    assert found.rpartition(".")[2].lower() in ENDINGS
    assert "./" not in found
    assert "/images/" not in f"/{found}"


def plain_paths(names: list[str]) -> dict[str, str]:
    """Paths of all, as the format finds them."""
    half = len(names) // 2
    numbered = numbered_paths(
        [pa.chunked_array([pa.array(part, pa.string())]) for part in (names[:half], names[half:])]
    )
    return {name: numbered.get(name) or safe_path(name) for name in names}


def test_images_that_would_share_a_file_get_a_number() -> None:
    names = ["a/same.jpg", "b/same.jpg", "a/same.png", "a/same-2.jpg", "a/same.webp", "images/x.png", "x.jpg", "", "/"]
    paths = plain_paths(names)
    assert paths == {
        "a/same.jpg": "a/same.jpg", "b/same.jpg": "b/same.jpg", "a/same.png": "a/same-4.png",
        "a/same-2.jpg": "a/same-2.jpg", "a/same.webp": "a/same-3.webp", "images/x.png": "x.png", "x.jpg": "x-2.jpg",
        "": "%.jpg", "/": "%-2.jpg",
    }  # fmt: skip
    assert plain_paths(["a.jpg", "b.jpg"]) == {"a.jpg": "a.jpg", "b.jpg": "b.jpg"}
    assert numbered_paths([]) == {}


@pytest.mark.parametrize("seed", range(3))
def test_no_two_images_share_a_file(seed: int) -> None:
    choose = random.Random(seed)
    parts = ["images", "images_", "a", "b.", "..", ".", "x.txt", ".txt", "1.jpg", "2.png", "3", "é.jpg", "1.JPEG", "\n"]
    names = sorted({"/".join(choose.choices(parts, k=choose.randint(1, 4))) for _ in range(3000)})
    paths = plain_paths(names)
    assert len({label_path(path) for path in paths.values()}) == len(names), f"seed {seed}"
    assert all(is_safe(path) for path in paths.values())


def test_the_label_of_an_image_has_its_name() -> None:
    assert label_path("a.b/c.d.jpg") == "a.b/c.d.txt"
    assert label_path("a.b/c") == "a.b/c.txt"


def prediction(image_id: int, boxes: Sequence[Sequence[float]], masks: Sequence[Any]) -> Prediction:
    """A picture of 10 × 20, its boxes of class 0, 1, 2, 0, …."""
    count = len(boxes)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    labels = np.arange(count) % 3
    segments = [
        None if mask is None else Segment(encode_rle(mask), int(mask.sum()), (0, 0, 0, 0), 0.9, 0.9) for mask in masks
    ]
    found = Detections(np.array(boxes, np.float32).reshape(-1, 4), scores, scores, labels, labels, np.ones(count, int))
    return Prediction(image_id, size_hw=(10, 20), detections=found, segments=tuple(segments))


def run_of(root: Path, names: list[str], rows: list[Prediction] | None = None, *, shard_size: int = 2) -> Manifest:
    rows = rows or [prediction(number, [[0, 0, 10, 10]], [None]) for number in range(len(names))]
    records = [ImageRecord(row.image_id, name) for name, row in zip(names, rows, strict=True)]
    source: dict[str, Any] = {"info": {}, "licenses": [], "categories": []}
    manifest = write_parts(str(root), tables_of(records, "/i"), ShardLayout(shard_size=shard_size), source=source)
    for shard in manifest.iter_shards():
        own = predictions_to_table(rows[shard_size * shard : shard_size * (shard + 1)])
        write_shard(str(root), shard, own, fingerprint=FINGERPRINT, numerics="n", stage_s={})
    return manifest


def reduced(root: Path, manifest: Manifest, *outputs: YoloOutput | CocoOutput) -> dict[str, Any]:
    return reduce_shards(str(root), manifest, ReduceConfig(min_mask_area=0), outputs=outputs)


def lines(root: Path, name: str) -> list[list[float]]:
    text = (root / "coco" / name).read_text(encoding="ascii")
    return [[float(word) for word in line.split(" ")] for line in text.splitlines()]


def test_lines_of_boxes_and_outlines(tmp_path: Path) -> None:
    ring = np.zeros((10, 20), np.bool_)
    ring[2:8, 4:16] = True
    ring[4:6, 8:12] = False
    boxes = [[4, 2, 16, 8], [-5, -5, 10, 5], [5, 5, 15, 10], [25, 2, 30, 4], [3, 3, 3, 9]]
    row = prediction(1, boxes, [ring, None, np.zeros((10, 20), np.bool_), None, ring])
    rows = [row, prediction(2, [], []), Prediction(3, failure=("truncated", FailureClass.PERMANENT))]
    manifest = run_of(tmp_path, ["a/1.jpg", "a/2.png", "3.jpg"], rows)
    told = reduced(tmp_path, manifest, YoloOutput(), YoloOutput(outlines=True))["told"]
    assert lines(tmp_path, "yolo/labels/a/1.txt") == [
        [0, 0.5, 0.5, 0.6, 0.6],
        [1, 0.25, 0.25, 0.5, 0.5],
        [2, 0.5, 0.75, 0.5, 0.5],
    ]
    outline, without, empty = lines(tmp_path, "yolo_segment/labels/a/1.txt")
    assert without == [1, 0, 0, 0.5, 0, 0.5, 0.5, 0, 0.5]
    assert empty == [2, 0.25, 0.5, 0.75, 0.5, 0.75, 1, 0.25, 1]
    corners = {(round(x * 20), round(y * 10)) for x, y in zip(outline[1::2], outline[2::2], strict=True)}
    assert corners == {(4, 2), (16, 2), (16, 8), (4, 8), (8, 4), (12, 4), (12, 6), (8, 6)}
    assert told == {
        "yolo": {"no_area": 2, "numbered": 0, "renamed": 0},
        "yolo_segment": {"box_for_mask": 2, "no_area": 2, "numbered": 0, "renamed": 0},
    }
    for name in ("yolo", "yolo_segment"):
        root = tmp_path / "coco" / name
        assert (root / "labels/a/2.txt").read_bytes() == b""
        assert not (root / "labels/3.txt").exists()
        assert (root / "train.txt").read_text() == "./images/a/1.jpg\n./images/a/2.png\n"
        content = yaml.safe_load((root / "data.yaml").read_text())
        assert content["names"] == dict(enumerate(category.name for category in CATEGORIES))
        assert (content["train"], content["nc"]) == ("train.txt", 3)
        assert "val" not in content
        assert sorted(path.name for path in root.iterdir()) == ["data.yaml", "labels", "train.txt"]


def test_every_annotation_of_a_random_run_has_its_line(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 11, num_images=60, shard_size=7)
    told = reduced(tmp_path, manifest, CocoOutput(), YoloOutput(), YoloOutput(outlines=True))["told"]
    tree = json.loads((tmp_path / "coco" / "annotations.json").read_text())
    classes = {category["id"]: number for number, category in enumerate(tree["categories"])}
    no_area = 0
    for image in tree["images"]:
        sides = np.array([image["width"], image["height"]] * 2)
        expected = []
        for each in tree["annotations"]:
            if each["image_id"] != image["id"]:
                continue
            x0, y0, width, height = each["bbox"]
            box = np.clip(np.array([x0, y0, x0 + width, y0 + height]) / sides, 0, 1)
            if (box[2:] <= box[:2]).any():
                no_area += 1
                continue
            expected.append([classes[each["category_id"]], *(box[:2] + box[2:]) / 2, *(box[2:] - box[:2])])
        file = label_path(safe_path(image["file_name"]))
        found = lines(tmp_path, f"yolo/labels/{file}")
        assert np.allclose(np.array(found).reshape(-1, 5), np.array(expected).reshape(-1, 5), atol=1e-6)
        outlines = lines(tmp_path, f"yolo_segment/labels/{file}")
        assert [line[0] for line in outlines] == [line[0] for line in found]
        assert all(len(line) >= 9 and len(line) % 2 and 0 <= min(line[1:]) <= max(line[1:]) <= 1 for line in outlines)
    assert told["yolo"]["no_area"] == no_area


def test_hostile_names_stay_in_the_folder_and_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "run"
    names = HOSTILE
    manifest = run_of(root, names)
    output = YoloOutput(numbered=numbered_of(manifest))
    assert reduced(root, manifest, output)["told"]["yolo"] == {"no_area": 0, "numbered": 1, "renamed": len(names)}
    folder = root / "coco" / "yolo"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    labels = {path.relative_to(folder / "labels").as_posix() for path in (folder / "labels").rglob("*.txt")}
    assert len(labels) == len(names)
    listed = (folder / "train.txt").read_text().splitlines()
    assert {label_path(line.removeprefix("./images/")) for line in listed} == labels
    found = [path.relative_to(folder / "labels").as_posix() for path in read_labels(folder)]
    assert sorted(found) == sorted(labels)
    renamed = [json.loads(line) for line in (folder / "renamed.jsonl").read_text().splitlines()]
    assert [each["file_name"] for each in renamed] == names
    assert [f"./images/{each['path']}" for each in renamed] == listed


@pytest.mark.parametrize("shard_size", [1, 3])
def test_a_pair_with_one_file_of_labels_is_told_and_all_formats_come_out(
    tmp_path: Path, shard_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 20, 10], [0, 0, 10, 5]]
    rows = [prediction(place, [box], [None]) for place, box in enumerate(boxes)]
    manifest = run_of(tmp_path, ["x/a.jpg", "b.jpg", "x/a.png"], rows, shard_size=shard_size)
    output = YoloOutput(numbered=numbered_of(manifest), val="mine.txt")
    told = reduced(tmp_path, manifest, output, CocoOutput())["told"]["yolo"]
    assert told == {"no_area": 0, "numbered": 1, "renamed": 1}
    assert "yolo: 1 images would share a label file with another image" in caplog.text
    assert "('x/a.png' is now 'x/a-2.png')" in caplog.text
    root = tmp_path / "coco" / "yolo"
    assert (root / "train.txt").read_text() == "./images/x/a.jpg\n./images/b.jpg\n./images/x/a-2.png\n"
    assert [len(lines(tmp_path, f"yolo/labels/{name}.txt")) for name in ("x/a", "b", "x/a-2")] == [1, 1, 1]
    assert lines(tmp_path, "yolo/labels/x/a.txt") == [[0, 0.25, 0.5, 0.5, 1]]
    assert lines(tmp_path, "yolo/labels/x/a-2.txt") == [[0, 0.25, 0.25, 0.5, 0.5]]
    assert json.loads((root / "renamed.jsonl").read_text()) == {
        "image_id": 2, "file_name": "x/a.png", "path": "x/a-2.png",
    }  # fmt: skip
    assert yaml.safe_load((root / "data.yaml").read_text())["val"] == "mine.txt"
    assert len(json.loads((tmp_path / "coco" / "annotations.json").read_text())["images"]) == 3


def numbered_of(manifest: Manifest) -> dict[str, str]:
    return numbered_paths(table["file_name"] for table in manifest.iter_names())


def read_labels(folder: Path) -> list[Path]:
    """Files of labels as the readers of the YOLO family look for them, from `train.txt` on."""
    listed = (folder / "train.txt").read_text(encoding="utf-8").strip().splitlines()
    images = [line.replace("./", f"{folder}/") if line.startswith("./") else line for line in listed]
    assert all(image.rpartition(".")[2].lower() in ENDINGS for image in images)
    paths = [Path("/labels/".join(image.rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt") for image in images]
    assert all(path.is_file() for path in paths)
    return paths


def test_a_second_reduce_replaces_the_folder(tmp_path: Path) -> None:
    manifest = run_of(tmp_path, ["a.jpg", "b.jpg"])
    reduced(tmp_path, manifest, YoloOutput())
    stale = tmp_path / "coco" / "yolo" / "labels" / "old.txt"
    stale.write_text("0 0 0 1 1\n")
    reduced(tmp_path, manifest, YoloOutput())
    assert not stale.exists()
    assert (tmp_path / "coco" / "yolo" / "data.yaml").exists()
