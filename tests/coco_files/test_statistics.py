"""Statistics against pycocotools, the files' own counts and a plain loop; what is odd; what is written."""

import io
import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools.coco import COCO
from rich.console import Console

from owlsam_ray import storage
from owlsam_ray.coco_files import document
from owlsam_ray.coco_files.histograms import RATIO_EDGES, SCORE_EDGES, SIDE_EDGES, Histogram
from owlsam_ray.coco_files.problems import Problem
from owlsam_ray.coco_files.statistics import statistics
from owlsam_ray.coco_files.statistics_plots import _draw_ratios, draw_statistics
from owlsam_ray.coco_files.statistics_run import run_statistics, write_statistics
from owlsam_ray.coco_files.statistics_table import statistics_table
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.run.paths import annotations_of_run


def _write(path: Path, tree: Any) -> str:
    path.write_text(json.dumps(tree))
    return str(path)


def _problems(result: dict[str, Any]) -> dict[str, int]:
    return {name: found["count"] for name, found in result["problems"].items() if found["count"]}


def _bins(values: list[float], edges: Any) -> tuple[list[int], int, int]:
    edges = edges.tolist()
    counts = [sum(low <= value < high for value in values) for low, high in pairwise(edges)]
    counts[-1] += sum(value == edges[-1] for value in values)
    return counts, sum(value < edges[0] for value in values), sum(value > edges[-1] for value in values)


def _check_by_loop(tree: dict[str, Any], result: dict[str, Any]) -> None:
    """Every number again, one annotation after another."""
    images = {image["id"]: image for image in reversed(tree["images"])}
    categories = {category["id"]: category for category in tree["categories"]}
    per_image, objects, shown = Counter[int](), Counter[int](), defaultdict[int, set[int]](set)
    areas, ratios, scores, best = [], [], [], dict.fromkeys(images, -1.0)
    crowds = polygons = rle = of_boxes = 0
    for entry in tree["annotations"]:
        known = entry["image_id"] in images, entry["category_id"] in categories
        per_image[entry["image_id"]] += known[0]
        objects[entry["category_id"]] += known[1]
        if all(known):
            shown[entry["category_id"]].add(entry["image_id"])
        crowds += bool(entry.get("iscrowd"))
        polygons += isinstance(entry.get("segmentation"), list) and bool(entry["segmentation"])
        rle += isinstance(entry.get("segmentation"), dict)
        box = entry.get("bbox")
        good = bool(box) and len(box) == 4 and box[2] > 0 and box[3] > 0
        if good:
            ratios.append(box[2] / box[3])
        if entry.get("area") is None:
            of_boxes += good
            areas += [box[2] * box[3]] if good else []
        elif entry["area"] > 0:
            areas.append(entry["area"])
        if "score" in entry:
            scores.append(entry["score"])
            if known[0]:
                best[entry["image_id"]] = max(best[entry["image_id"]], entry["score"])
    counts = [per_image[image["id"]] if images[image["id"]] is image else 0 for image in tree["images"]]
    told = result["images"]
    assert told["number"] == len(tree["images"])
    assert told["without_annotations"] == counts.count(0)
    assert told["annotations_per_image"]["mean"] == pytest.approx(np.mean(counts))
    assert told["annotations_per_image"]["median"] == np.median(counts)
    assert told["annotations_per_image"]["max"] == max(counts)
    assert told["annotations_per_image"]["distribution"] == [list(pair) for pair in sorted(Counter(counts).items())]
    of_images = Counter(image for names in shown.values() for image in names)
    assert told["categories_per_image"]["max"] == max(of_images.values(), default=0)
    assert told["categories_per_image"]["mean"] == pytest.approx(sum(of_images.values()) / len(counts))
    rows = [
        {"id": number, "name": category["name"], "objects": objects[number], "images": len(shown[number])}
        for number, category in categories.items()
    ]
    assert result["categories"]["rows"] == rows
    assert result["categories"]["without_objects"] == [row["name"] for row in rows if not row["objects"]]
    found = result["annotations"]
    assert found["number"] == len(tree["annotations"])
    assert found["crowds"]["number"] == crowds
    assert (found["masks"]["polygons"], found["masks"]["rle"]) == (polygons, rle)
    assert (found["areas"]["known"], found["areas"]["of_boxes"]) == (len(areas), of_boxes)
    for name, low, high in (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, np.inf)):
        assert found["areas"][name]["number"] == sum(low <= area < high for area in areas)
    for values, edges, histogram in (
        ([area**0.5 for area in areas], SIDE_EDGES, found["areas"]["side_px"]),
        (ratios, RATIO_EDGES, found["aspect_ratios"]),
        (scores, SCORE_EDGES, result["scores"]["histogram"] if scores else Histogram(SCORE_EDGES).as_dict()),
    ):
        assert (histogram["counts"], histogram["below"], histogram["above"]) == _bins(values, edges)
        assert histogram["min"] == (min(values) if values else None)
    if scores:
        for line in result["scores"]["above"]:
            assert line["annotations"] == sum(score > line["threshold"] for score in scores)
            assert line["images"] == sum(score > line["threshold"] for score in best.values())


def test_cocoapi_counts_equal_pycocotools(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shared / "data/cocoapi_100/instances_val2014_100.json"
    truth = COCO(str(path))
    capsys.readouterr()
    result = statistics(str(path))
    assert result["images"]["number"] == len(truth.getImgIds())
    assert result["annotations"]["number"] == len(truth.getAnnIds())
    assert result["annotations"]["crowds"]["number"] == len(truth.getAnnIds(iscrowd=True))
    assert [row["id"] for row in result["categories"]["rows"]] == truth.getCatIds()
    for row in result["categories"]["rows"]:
        assert row["name"] == truth.loadCats(row["id"])[0]["name"]
        assert row["objects"] == len(truth.getAnnIds(catIds=row["id"]))
        assert row["images"] == len(truth.getImgIds(catIds=row["id"]))
    per_image = Counter(len(truth.getAnnIds(imgIds=image)) for image in truth.getImgIds())
    assert result["images"]["annotations_per_image"]["distribution"] == [
        list(each) for each in sorted(per_image.items())
    ]
    assert _problems(result) == {}
    _check_by_loop(json.loads(path.read_bytes()), result)


def test_lvis_counts_equal_the_files_own(shared: Path) -> None:
    path = shared / "data/lvis/lvis_val_100.json"
    tree = json.loads(path.read_bytes())
    result = statistics(str(path))
    rows = {row["id"]: row for row in result["categories"]["rows"]}
    for category in tree["categories"]:
        row = rows[category["id"]]
        assert (row["objects"], row["images"]) == (category["instance_count"], category["image_count"])
    groups = result["frequency_groups"]
    assert groups["stated"] == dict.fromkeys(groups["stated"], 1230)
    for letter, numbers in groups["groups"].items():
        members = [category for category in tree["categories"] if category["frequency"] == letter]
        assert numbers == {
            "categories": len(members),
            "without_objects": sum(not category["instance_count"] for category in members),
            "objects": sum(category["instance_count"] for category in members),
        }
    assert _problems(result) == {}
    _check_by_loop(tree, result)


@pytest.mark.parametrize("seed", range(6))
def test_random_files_equal_a_plain_loop(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    print("seed", seed)
    images = [{"id": draw.randrange(40), "height": draw.choice([480, 640]), "width": 640} for _ in range(30)]
    categories = [{"id": number, "name": f"c{number % 7}"} for number in draw.sample(range(100), 9)]
    masks: list[Any] = [[[0, 0, 5, 0, 5, 5]], {"size": [4, 4], "counts": '[]"\\'}, [], None]
    annotations = []
    for number in range(600):
        entry: dict[str, Any] = {
            "id": draw.randrange(10**6) if seed % 2 else number,
            "image_id": draw.randrange(40),
            "category_id": draw.choice([*(category["id"] for category in categories), 1000]),
            "bbox": [draw.uniform(-5, 600), draw.uniform(0, 400), draw.choice([0, 1, 32, draw.uniform(0, 300)]), 32],
        }
        entry |= {"iscrowd": draw.choice([0, 0, 0, 1])} if draw.random() < 0.8 else {}
        entry |= {"area": draw.choice([0, 1024, 9216.0, draw.uniform(0, 20000), None])} if draw.random() < 0.7 else {}
        entry |= {"segmentation": draw.choice(masks)} if draw.random() < 0.8 else {}
        entry |= {"score": round(draw.uniform(0, 1), 2)} if seed % 3 else {}
        annotations.append(entry)
    tree = {"annotations": annotations, "images": images, "categories": categories}
    monkeypatch.setattr(document.Document.blocks, "__kwdefaults__", {"max_bytes": 3000})
    seen: list[tuple[int, int]] = []
    result = statistics(_write(tmp_path / "file.json", tree), lambda done, total: seen.append((done, total)))
    _check_by_loop(tree, result)
    assert len(seen) > 10
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == result["bytes"]
    problems = _problems(result)
    ids, image_ids = Counter(entry["id"] for entry in annotations), Counter(image["id"] for image in images)
    assert problems.get("duplicate_annotation_id", 0) == len(annotations) - len(ids)
    assert problems["duplicate_image_id"] == len(images) - len(image_ids)
    assert problems["unknown_image"] == sum(entry["image_id"] not in image_ids for entry in annotations)
    assert problems["unknown_category"] == sum(entry["category_id"] == 1000 for entry in annotations)
    assert problems["odd_area"] == sum(entry.get("area") == 0 for entry in annotations)


IMAGE = {"id": 1, "height": 100, "width": 200}
CATEGORY = {"id": 1, "name": "cat"}
ENTRY = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10], "area": 50, "iscrowd": 0}


@pytest.mark.parametrize(
    ("tree", "problem", "quote"),
    [
        ({"images": None}, Problem.NO_IMAGES, "no list `images`"),
        ({"annotations": None}, Problem.NO_ANNOTATIONS, "no list `annotations`"),
        ({"categories": None}, Problem.NO_CATEGORIES, "no list `categories`"),
        ({"categories": [{"id": "1", "name": "cat"}]}, Problem.ODD_CATEGORY, "categories[0] is {'id': '1'"),
        ({"categories": [CATEGORY, 5]}, Problem.ODD_CATEGORY, "categories[1] is 5"),
        ({"categories": [{"id": 1}]}, Problem.ODD_CATEGORY, "categories[0]: name None"),
        (
            {"categories": [CATEGORY, {"id": 1, "name": "dog"}]},
            Problem.DUPLICATE_CATEGORY_ID,
            "id 1 is also that of 'cat'",
        ),
        ({"categories": [CATEGORY, {"id": 2, "name": "cat"}]}, Problem.DUPLICATE_CATEGORY_NAME, "'cat': ids 1, 2"),
        ({"images": [IMAGE, {"height": 1, "width": 1}]}, Problem.IMAGE_WITHOUT_ID, "images[1]"),
        ({"images": [IMAGE, IMAGE]}, Problem.DUPLICATE_IMAGE_ID, "images[1]: id 1 is also that of images[0]"),
        ({"images": [{"id": 1, "height": 0, "width": 5}]}, Problem.ODD_IMAGE_SIZE, "images[0] (id 1): 5 × 0"),
        ({"images": [{"id": 1}]}, Problem.IMAGE_WITHOUT_SIZE, "images[0] (id 1)"),
        ({"images": [{"id": 1, "width": 5}]}, Problem.ODD_IMAGE_SIZE, "images[0] (id 1): 5 × unstated"),
        ({"annotations": [ENTRY | {"id": None}]}, Problem.ANNOTATION_WITHOUT_ID, "annotations[0] (id None)"),
        (
            {"annotations": [ENTRY, ENTRY]},
            Problem.DUPLICATE_ANNOTATION_ID,
            "annotations[1]: id 1 is also that of annotations[0]",
        ),
        ({"annotations": [ENTRY | {"image_id": 9}]}, Problem.UNKNOWN_IMAGE, "annotations[0] (id 1): image_id 9"),
        ({"annotations": [ENTRY | {"image_id": None}]}, Problem.UNKNOWN_IMAGE, "image_id None"),
        ({"annotations": [ENTRY | {"category_id": -1}]}, Problem.UNKNOWN_CATEGORY, "category_id -1"),
        ({"annotations": [ENTRY | {"bbox": []}]}, Problem.NO_BOX, "bbox []"),
        ({"annotations": [ENTRY | {"bbox": [1, 2, 3]}]}, Problem.ODD_BOX, "bbox [1.0, 2.0, 3.0]"),
        ({"annotations": [ENTRY | {"bbox": [1, 2, None, 4]}]}, Problem.ODD_BOX, "bbox [1.0, 2.0, None, 4.0]"),
        ({"annotations": [ENTRY | {"bbox": [1, 2, 0, 4]}]}, Problem.ODD_BOX, "bbox [1.0, 2.0, 0.0, 4.0]"),
        ({"annotations": [ENTRY | {"bbox": [1, 2, 10**400, 4]}]}, Problem.ODD_BOX, "bbox [1.0, 2.0, inf, 4.0]"),
        ({"annotations": [ENTRY | {"bbox": [195, 0, 6.5, 4]}]}, Problem.BOX_OUTSIDE, "bbox [195.0, 0.0, 6.5, 4.0]"),
        ({"annotations": [ENTRY | {"area": -1}]}, Problem.ODD_AREA, "area -1.0"),
        ({"annotations": [ENTRY | {"iscrowd": 2}]}, Problem.ODD_CROWD, "iscrowd 2"),
        ({"annotations": [ENTRY | {"score": 1.5}]}, Problem.ODD_SCORE, "score 1.5"),
    ],
)
def test_oddities_are_counted_and_told(tree: dict[str, Any], problem: Problem, quote: str, tmp_path: Path) -> None:
    whole: dict[str, Any] = {"images": [IMAGE], "categories": [CATEGORY], "annotations": [ENTRY]} | tree
    result = statistics(_write(tmp_path / "file.json", whole))
    assert _problems(result)[problem] == 1
    assert quote in result["problems"][problem]["examples"][0]
    json.dumps(result, allow_nan=False)
    draw_statistics(result)
    Console(file=io.StringIO()).print(statistics_table(result))


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ('"bbox": [0, 0, 1e308, 1e-308], "area": 4', Problem.ODD_BOX),
        ('"bbox": [0, 0, 1e-308, 1e308], "area": 4', Problem.ODD_BOX),
        ('"bbox": [0, 0, 1e200, 1e200]', Problem.ODD_BOX),
        ('"bbox": [0, 0, 1, 1], "score": 1e999', Problem.ODD_SCORE),
        ('"bbox": [0, 0, 1, 1], "score": -1e999', Problem.ODD_SCORE),
    ],
)
@pytest.mark.parametrize("other", ["", ', {"id": 2, "image_id": 1, "category_id": 1, "score": 0.5}'])
def test_numbers_beyond_all_floats_are_problems(tmp_path: Path, entry: str, problem: Problem, other: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(
        f'{{"images": [{json.dumps(IMAGE)}], "categories": [{json.dumps(CATEGORY)}], '
        f'"annotations": [{{"id": 1, "image_id": 1, "category_id": 1, {entry}}}{other}]}}'
    )
    console = Console(file=io.StringIO())
    result = run_statistics(str(path), out=str(tmp_path / "out"), as_json=True, console=console)
    assert _problems(result)[problem] == 1
    json.dumps(run_statistics(str(path), out=None, as_json=False, console=console), allow_nan=False)
    assert (result["scores"] or {}).get("number") == (1 if other else None)


def test_a_file_is_no_place_for_statistics(tmp_path: Path) -> None:
    url = _write(tmp_path / "file.json", {"images": [], "annotations": [], "categories": []})
    for out in (url, f"{url}/below"):
        with pytest.raises(InputError, match=r"--out .*file\.json"):
            run_statistics(url, out=out, as_json=True, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_a_pixel_outside_is_fine(tmp_path: Path) -> None:
    entry = ENTRY | {"bbox": [-1, -0.5, 202, 101]}
    tree = {"images": [IMAGE], "categories": [CATEGORY], "annotations": [entry]}
    assert _problems(statistics(_write(tmp_path / "file.json", tree))) == {}


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"images": [IMAGE | {"id": "1"}]}, 'images[0]: id "1" is not an integer'),
        ({"annotations": [ENTRY, ENTRY | {"category_id": "1"}]}, 'annotations[1] (id 1): category_id "1" is not'),
        ({"annotations": [ENTRY | {"bbox": "1 2 3 4"}]}, 'bbox "1 2 3 4" is not a list of numbers'),
        ({"categories": {}}, "`categories` is an object, not a list"),
        ({"annotations": {}}, "`annotations` is an object, not a list"),
    ],
)
def test_wrong_types_are_refused(tree: dict[str, Any], told: str, tmp_path: Path) -> None:
    whole = {"images": [IMAGE], "categories": [CATEGORY], "annotations": [ENTRY]} | tree
    with pytest.raises(InputError) as refused:
        statistics(_write(tmp_path / "file.json", whole))
    assert told in str(refused.value)


def test_groups_by_image_counts_where_no_frequency_is_stated(tmp_path: Path) -> None:
    categories = [
        {"id": number, "name": str(number)} | ({} if count is None else {"image_count": count})
        for number, count in enumerate((0, 1, 10, 11, 100, 101, None))
    ]
    result = statistics(_write(tmp_path / "file.json", {"images": [], "annotations": [], "categories": categories}))
    groups = result["frequency_groups"]
    assert [numbers["categories"] for numbers in groups["groups"].values()] == [2, 2, 1]
    assert groups["ungrouped"] == 2
    assert groups["stated"]["image_count_stated"] == 6
    assert groups["stated"]["image_count_equal"] == 1
    assert groups["stated"]["instance_count_stated"] == 0
    Console(file=io.StringIO()).print(statistics_table(result))


@pytest.mark.parametrize("tree", [{}, {"images": [], "annotations": [], "categories": []}])
def test_nothing_in_it(tree: dict[str, Any], tmp_path: Path) -> None:
    result = statistics(_write(tmp_path / "file.json", tree))
    assert result["images"]["annotations_per_image"]["mean"] is None
    assert result["annotations"]["crowds"] == {"number": 0, "share": None}
    assert result["scores"] is None
    assert draw_statistics(result).startswith(b"\x89PNG")
    Console(file=io.StringIO()).print(statistics_table(result))


@pytest.mark.parametrize("ratio", [1.0, 100.0, 0.01])
def test_what_lies_beyond_the_bins_is_marked(ratio: float) -> None:
    ratios = Histogram(RATIO_EDGES)
    ratios.add(np.array([0.1, 1.0, 10.0, ratio]))
    axes = Figure().subplots()
    _draw_ratios(axes, ratios.as_dict())
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert ("≥16" in labels, "≤1/16" in labels) == (ratio > 16, ratio < 1 / 16)


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    names = ["$x_1$", "$", "[bold]red", "狗", "a\nb", "n" * 300, "\\frac{"]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    annotations = [ENTRY | {"id": number, "category_id": number} for number in range(len(names))]
    result = statistics(
        _write(tmp_path / "[red]$.json", {"images": [IMAGE], "annotations": annotations, "categories": categories})
    )
    assert draw_statistics(result).startswith(b"\x89PNG")
    text = io.StringIO()
    Console(file=text, width=400).print(statistics_table(result))
    assert "[bold]red" in text.getvalue()
    assert "[red]$.json" in text.getvalue()


def test_written_through_any_storage(shared: Path, tmp_path: Path) -> None:
    url = str(shared / "data/cocoapi_100/instances_val2014_100.json")
    console = Console(file=io.StringIO())
    for out in (str(tmp_path / "a" / "b"), "memory://statistics/out"):
        told = run_statistics(url, out=out, as_json=False, console=console)
        written = json.loads(storage.read_bytes(told["statistics"]))
        assert written == statistics(url)
        picture = Image.open(io.BytesIO(storage.read_bytes(told["plots"])))
        assert picture.size[0] >= 1200
        assert len(picture.convert("RGB").getcolors(2**24) or []) > 50
    assert told["annotations"] == 839
    assert (told["images"], told["categories"], told["crowds"]) == (100, 80, 9)
    assert "person" in console.file.getvalue()  # type: ignore[attr-defined]
    assert write_statistics(written, str(tmp_path / "a" / "b"))["plots"] == str(tmp_path / "a" / "b" / "statistics.png")
    silent = Console(file=io.StringIO())
    assert run_statistics(url, out=None, as_json=True, console=silent) == written
    assert silent.file.getvalue() == ""  # type: ignore[attr-defined]


def test_a_run_that_is_not_reduced(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no run"):
        annotations_of_run(str(tmp_path))
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(IncompleteError, match="run `owlsam reduce` first"):
        annotations_of_run(str(tmp_path))
    (tmp_path / "coco").mkdir()
    path = _write(tmp_path / "coco" / "annotations.json", {})
    assert annotations_of_run(str(tmp_path)) == path


_MEASURE = """
import json, sys, time
from owlsam_ray.coco_files.statistics_run import statistics
def anonymous():
    return int(open("/proc/self/status").read().split("RssAnon:")[1].split()[0]) / 1024
start, before, peak = time.monotonic(), anonymous(), 0
def look(done, total):
    global peak
    peak = max(peak, anonymous())
number = statistics(sys.argv[1], look)["annotations"]["number"]
modules = [name for name in ("torch", "matplotlib", "ray", "transformers") if name in sys.modules]
print(json.dumps([number, time.monotonic() - start, peak - before, modules]))
"""


def _measure(url: str) -> tuple[int, float, float, list[str]]:
    """Annotations, seconds, MiB of its own memory at most, large modules that were imported; in a fresh process."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, url], check=True, capture_output=True, text=True)
    number, seconds, memory, modules = json.loads(done.stdout)
    return number, seconds, memory, modules


def test_counting_imports_no_models_and_no_plots(shared: Path) -> None:
    number, _, _, modules = _measure(str(shared / "data/coco_mini/instances.json"))
    assert number == 742
    assert modules == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(shared: Path, tmp_path: Path) -> None:
    """coco_mini again and again with new ids: 500 MB, 0.9 M annotations."""
    tree = json.loads((shared / "data/coco_mini/instances.json").read_bytes())
    repeats = 500_000_000 // len(json.dumps(tree["annotations"]))
    path = tmp_path / "large.json"
    with path.open("w") as file:
        file.write(f'{{"categories": {json.dumps(tree["categories"])}')
        for key in ("images", "annotations"):
            file.write(f', "{key}": [')
            for turn in range(repeats):
                moved = [
                    json.dumps(
                        entry
                        | {"id": entry["id"] + turn * 10**12}
                        | ({"image_id": entry["image_id"] + turn * 10**12} if key == "annotations" else {})
                    )
                    for entry in tree[key]
                ]
                file.write((", " if turn else "") + ", ".join(moved))
            file.write("]")
        file.write("}")
    start = time.monotonic()
    number, seconds, memory, _ = _measure(str(path))
    size = path.stat().st_size / 1e6
    print(f"{size:.0f} MB: {seconds:.1f} s ({time.monotonic() - start:.1f} s in all), {memory:.0f} MiB")
    assert number == repeats * 742
    assert memory < 200
