"""Review lists: the right annotations, the same for any number of workers, and a way back through reduce."""

import csv
import json
import math
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from owlsam_ray.coco_files.clean import clean_file
from owlsam_ray.errors import InputError
from owlsam_ray.reduce.review_list import review_list
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.reduce.sampling import SampleOptions, mix
from tests.calibrate.small_run import SmallRun, label, plan

Tree = dict[str, Any]
IMAGES = 64


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    made = plan(tmp_path_factory.mktemp("run"), num_images=IMAGES)
    label(made)
    reduce_run(made.config())
    return made


def tree_of(small: SmallRun, folder: str = "coco") -> Tree:
    tree: Tree = json.loads((small.run / folder / "annotations.json").read_text())
    return tree


def listed(small: SmallRun, tmp_path: Path, *sets: str, **options: Any) -> tuple[Tree, list[dict[str, str]], Tree]:
    """The file, the table, the counts."""
    counts = review_list(small.config(*sets), SampleOptions(**options), out=str(tmp_path))
    with (tmp_path / "review.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return json.loads((tmp_path / "review.json").read_text()), rows, counts


def test_as_many_of_each_category_and_score_bin(small: SmallRun, tmp_path: Path) -> None:
    whole = {each["id"]: each for each in tree_of(small)["annotations"]}
    tree, rows, counts = listed(small, tmp_path, per_cell=3, bins=4)
    cells = Counter((each["category_id"], min(3, int(each["score"] * 4))) for each in whole.values())
    found = Counter((each["category_id"], min(3, int(each["score"] * 4))) for each in tree["annotations"])
    assert found == {cell: min(3, count) for cell, count in cells.items()}
    assert max(cells.values()) > 3
    assert tree["annotations"] == [whole[each["id"]] for each in tree["annotations"]]
    shown = {each["image_id"] for each in tree["annotations"]}
    assert tree["images"] == [each for each in tree_of(small)["images"] if each["id"] in shown]
    assert tree["categories"] == tree_of(small)["categories"]
    assert [int(row["id"]) for row in rows] == [each["id"] for each in tree["annotations"]]
    names = {each["id"]: each["name"] for each in tree["categories"]}
    files = {each["id"]: each["file_name"] for each in tree["images"]}
    for row, each in zip(rows, tree["annotations"], strict=True):
        assert (row["file_name"], row["category"]) == (files[each["image_id"]], names[each["category_id"]])
        low, high = (float(word) for word in row["why"].removeprefix("score in ").split("–"))
        assert low <= float(row["score"]) <= high
    assert counts == {
        "images": len(shown),
        "annotations": len(rows),
        "chosen": len(rows),
        "out": str(tmp_path),
        "files": ["review.json", "review.csv"],
    }


def test_of_equal_ones_a_hash_decides(small: SmallRun, tmp_path: Path) -> None:
    whole = tree_of(small)["annotations"]
    tree, _, _ = listed(small, tmp_path / "a", per_cell=4, bins=1, seed=7)
    order = {each["id"]: int(key) for each, key in zip(
        whole, mix(np.array([each["id"] for each in whole]), 7), strict=True)}  # fmt: skip
    cells = defaultdict(list)
    for each in whole:
        cells[each["category_id"]].append(each["id"])
    expected = sorted(one for ids in cells.values() for one in sorted(ids, key=order.__getitem__)[:4])
    assert [each["id"] for each in tree["annotations"]] == expected
    other, _, _ = listed(small, tmp_path / "b", per_cell=4, bins=1, seed=8)
    assert other["annotations"] != tree["annotations"]


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_files(small: SmallRun, tmp_path: Path) -> None:
    for workers in (1, 2):
        listed(small, tmp_path / str(workers), f"reduce.workers={workers}", per_cell=5)
    for name in ("review.json", "review.csv"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_the_least_certain(small: SmallRun, tmp_path: Path) -> None:
    sets = ("reduce.score_threshold=0.2", "reduce.score_thresholds={cat: 0.5}")
    reduce_run(small.config(*sets, f"reduce.out={small.run / 'late'}"))
    late = tree_of(small, "late")
    names = {each["id"]: each["name"] for each in late["categories"]}
    tree, rows, _ = listed(small, tmp_path / "score", *sets, by="uncertain", per_cell=4)
    for category, name in names.items():
        scores = sorted(each["score"] for each in late["annotations"] if each["category_id"] == category)
        found = sorted(each["score"] for each in tree["annotations"] if each["category_id"] == category)
        assert found == scores[:4]
        limit = "0.5" if name == "cat" else "0.2"
        assert {row["why"].split()[-1] for row in rows if row["category"] == name} == {limit}
    for quality in ("predicted_iou", "stability"):
        tree, _, _ = listed(small, tmp_path / quality, by=quality, per_cell=3)
        for category in names:
            own = [each for each in tree_of(small)["annotations"] if each["category_id"] == category]
            values = sorted(each[quality] for each in own if quality in each)
            found = sorted(each[quality] for each in tree["annotations"] if each["category_id"] == category)
            assert found == values[:3]


def test_whole_images_come_with_all_their_annotations(small: SmallRun, tmp_path: Path) -> None:
    part, rows, _ = listed(small, tmp_path / "part", per_cell=1)
    whole, same_rows, counts = listed(small, tmp_path / "whole", per_cell=1, whole_images=True)
    assert rows == same_rows
    assert whole["images"] == part["images"]
    ids = {each["id"] for each in whole["images"]}
    assert whole["annotations"] == [each for each in tree_of(small)["annotations"] if each["image_id"] in ids]
    assert counts["annotations"] == len(whole["annotations"]) > counts["chosen"] == len(rows)
    assert whole["info"]["owlsam_ray"]["review"]["scope"] == "images"


@pytest.mark.parametrize("whole_images", [False, True])
def test_the_list_comes_back_as_corrections(small: SmallRun, tmp_path: Path, whole_images: bool) -> None:
    tree, _, _ = listed(small, tmp_path / "list", per_cell=2, whole_images=whole_images)
    before = tree_of(small)["annotations"]

    def again(tree: Tree, *sets: str) -> list[Tree]:
        (tmp_path / "fixed.json").write_text(json.dumps(tree))
        counts = reduce_run(
            small.config(f"reduce.corrections={tmp_path / 'fixed.json'}", f"reduce.out={tmp_path / 'out'}", *sets)
        )
        assert counts["corrections"]["conflicts"] == {}
        found: list[Tree] = json.loads((tmp_path / "out" / "annotations.json").read_text())["annotations"]
        return found

    assert again(tree) == before
    gone = tree["annotations"].pop(3)["id"]
    tree["annotations"][0]["bbox"] = [0, 0, 5, 5]
    moved = tree["annotations"][0]["id"]
    found = {each["id"]: each for each in again(tree)}
    assert set(found) == {each["id"] for each in before} - {gone}
    assert (found[moved]["bbox"], found[moved]["corrected"]) == ([0, 0, 5, 5], True)
    assert [each for each in found.values() if each["id"] != moved] == [
        each for each in before if each["id"] not in (moved, gone)
    ]
    kept = again(tree, "reduce.score_threshold=0.99")
    assert {each["id"] for each in tree["annotations"]} <= {each["id"] for each in kept}
    # What people made or confirmed is not shown to them again.
    fixed = f"reduce.corrections={tmp_path / 'fixed.json'}"
    second, _, _ = listed(small, tmp_path / "second", fixed, per_cell=1000)
    seen = {each["id"] for each in tree["annotations"]}
    assert {each["id"] for each in second["annotations"]} == set(found) - seen
    assert moved in seen
    with pytest.raises(InputError, match="earlier ones would be lost"):
        again(second)


def strict(text: str) -> Any:
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in a file"))


def test_numbers_beyond_all_floats_of_the_source_become_null(tmp_path: Path) -> None:
    """In every file that carries the source's own fields along."""
    made = plan(tmp_path, num_images=8)
    shutil.rmtree(made.run)
    tree = made.truth | {"info": {"gain": math.inf, "deep": [{"a": -math.inf}]}, "licenses": [{"id": math.inf}]}
    tree["images"][0] |= {"gain": [math.inf, -math.inf], "note": "NaN 1e999"}
    (tmp_path / "data" / "instances.json").write_text(json.dumps(tree).replace("Infinity", "1e999"))
    label(made)
    config = made.config("reduce.formats=[coco, lvis, parquet]")
    reduce_run(config)
    review_list(config, SampleOptions(), out=str(tmp_path / "review"))
    for name in ("run/coco/annotations.json", "run/coco/lvis.json", "review/review.json"):
        written = strict((tmp_path / name).read_text())
        assert written["info"].pop("owlsam_ray")["fingerprint"]
        assert written["info"] == {"gain": None, "deep": [{"a": None}]}
        assert written["licenses"] == [{"id": None}]
        image = min(written["images"], key=lambda each: each["id"])
        assert (image["gain"], image["note"]) == ([None, None], "NaN 1e999")
    info = strict(pq.read_metadata(tmp_path / "run" / "coco" / "annotations.parquet").metadata[b"info"].decode())
    assert info["gain"] is None
    out = tmp_path / "cleaned.json"
    clean_file(str(tmp_path / "data" / "instances.json"), str(out))
    assert strict(out.read_text())["info"]["gain"] is None
    for path in (made.run / "coco").glob("*.json"):
        strict(path.read_text())


def test_uncertain_ones_need_a_threshold(small: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"set reduce\.score_threshold or reduce\.operating_points"):
        listed(small, tmp_path, by="uncertain")


def test_the_folder_of_the_labels_is_refused(small: SmallRun) -> None:
    with pytest.raises(InputError, match="where reduce writes"):
        review_list(small.config(), SampleOptions(), out=str(small.run / "coco"))
