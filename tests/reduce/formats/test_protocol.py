"""Results, LVIS and tables against the COCO file of the same reduce; every format for any number of workers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.records import Detections, Prediction
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats import parquet
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.reduce.formats.coco_results import CocoResultsOutput
from owlsam_ray.reduce.formats.lvis import LvisOutput
from owlsam_ray.reduce.formats.protocol import Output
from owlsam_ray.reduce.formats.yolo import YoloOutput
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of
from owlsam_ray.vocabulary.builtin import builtin
from tests.reduce.everything import keep_everything
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, K, random_run, reduce_shards

PROMPTS = ("a cat", 'a "dog"', "ü\\")
EVERYTHING = keep_everything(CATEGORIES)
ALL: tuple[Output, ...] = (
    CocoOutput(polygons=True),
    CocoResultsOutput(),
    LvisOutput.of(EVERYTHING),
    YoloOutput(),
    YoloOutput(outlines=True),
    parquet.ParquetOutput(tuple(category.name for category in CATEGORIES), PROMPTS),
)


def reduced(root: Path, manifest: Manifest, *outputs: Output, out: str = "coco", **settings: Any) -> Path:
    settings = {"min_mask_area": 0, "out": str(root / out)} | settings
    reduce_shards(str(root), manifest, ReduceConfig.model_validate(settings), outputs=outputs)
    return root / out


def tree_of(path: Path) -> Any:
    return json.loads(path.read_text(encoding="ascii"))


def boxes_of(image_id: int, labels: list[int]) -> Prediction:
    """An image with boxes of falling scores, and no mask."""
    count = len(labels)
    scores = np.linspace(0.9, 0.5, count, dtype=np.float32)
    return Prediction(
        image_id,
        size_hw=(10, 20),
        detections=Detections(
            boxes_xyxy=np.tile(np.array([1, 2, 4, 8], np.float32), (count, 1)),
            scores=scores,
            raw_scores=scores,
            labels=np.array(labels, np.int64),
            prompt_ids=np.array(labels, np.int64),
            num_merged=np.ones(count, np.int64),
        ),
        segments=(None,) * count,
    )


def run_of(root: Path, rows: list[Prediction], *, extra: dict[str, Any] | None = None) -> Manifest:
    """A run with two images a shard."""
    records = [ImageRecord(row.image_id, f"{row.image_id}.jpg", extra=extra or {}) for row in rows]
    source: dict[str, Any] = {"info": {}, "licenses": [], "categories": []}
    manifest = write_parts(str(root), tables_of(records, "/i"), ShardLayout(shard_size=2), source=source)
    for shard in manifest.iter_shards():
        own = predictions_to_table(rows[2 * shard : 2 * shard + 2])
        write_shard(str(root), shard, own, fingerprint=FINGERPRINT, numerics="n", stage_s={})
    return manifest


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 5, num_images=60, shard_size=4)

    def files(**settings: Any) -> dict[str, bytes]:
        out = reduced(tmp_path, manifest, *ALL, **settings)
        return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}

    one = files(out="one", workers=1)
    expected = {"annotations.json", "results.json", "lvis.json", "annotations.parquet", "images.parquet"}
    assert {name for name in one if "/" not in name} == expected | {"failures.jsonl", "reduce.json"}
    assert {name.split("/")[0] for name in one if "/" in name} == {"yolo", "yolo_segment"}
    assert one == files(out="two", workers=2)


def test_results_say_what_the_labels_say(tmp_path: Path) -> None:
    out = reduced(tmp_path, random_run(tmp_path, 7, num_images=40, shard_size=7), CocoOutput(), CocoResultsOutput())
    keys = ("image_id", "category_id", "bbox", "score", "segmentation")
    labels = tree_of(out / "annotations.json")["annotations"]
    assert any("segmentation" not in each for each in labels)
    assert tree_of(out / "results.json") == [{key: each[key] for key in keys if key in each} for each in labels]


def test_no_annotation_at_all_is_an_empty_list_and_empty_tables(tmp_path: Path) -> None:
    out = reduced(tmp_path, run_of(tmp_path, [boxes_of(1, [])]), *ALL)
    assert tree_of(out / "results.json") == []
    assert tree_of(out / "lvis.json")["images"][0]["neg_category_ids"] == [7, 3, 11]
    assert pq.read_table(out / "annotations.parquet").num_rows == 0
    assert (out / "yolo" / "labels" / "1.txt").read_bytes() == b""


def test_lvis_lists_what_was_not_found_and_counts_over_shards(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 8, num_images=50, shard_size=6)
    out = reduced(tmp_path, manifest, CocoOutput(), LvisOutput.of(EVERYTHING))
    plain, tree = tree_of(out / "annotations.json"), tree_of(out / "lvis.json")
    found: dict[int, set[int]] = {image["id"]: set() for image in plain["images"]}
    for each in plain["annotations"]:
        found[each["image_id"]].add(each["category_id"])
    lists = ("neg_category_ids", "not_exhaustive_category_ids")
    assert [{k: v for k, v in image.items() if k not in lists} for image in tree["images"]] == plain["images"]
    for image in tree["images"]:
        assert image["neg_category_ids"] == [each.id for each in CATEGORIES if each.id not in found[image["id"]]]
        assert image["not_exhaustive_category_ids"] == []
    instances = Counter(each["category_id"] for each in plain["annotations"])
    for category in tree["categories"]:
        assert category["instance_count"] == instances[category["id"]]
        assert category["image_count"] == sum(category["id"] in each for each in found.values())
        assert category["frequency"] == ("r" if category["image_count"] <= 10 else "c")
    with_box = 0
    for ours, theirs in zip(plain["annotations"], tree["annotations"], strict=True):
        if "segmentation" not in ours:
            with_box += 1
            x, y, width, height = ours["bbox"]
            corners = np.array(theirs.pop("segmentation")).reshape(4, 2)
            assert np.allclose([*corners.min(0), *corners.max(0)], [x, y, x + width, y + height], rtol=1e-5)
        assert ours == theirs
    assert tree["info"]["owlsam_ray"]["proof"]["lvis"] == {"box_for_mask": with_box, "over_300": 0}


def test_lvis_keeps_the_300_best_and_says_what_it_cut(tmp_path: Path) -> None:
    labels = [0] * 299 + [1, 1, 2]  # the 300 best hold one of two dogs and no bus
    manifest = run_of(tmp_path, [boxes_of(1, labels), boxes_of(2, [0] * 300)])
    settings = ReduceConfig(out=str(tmp_path / "coco"))
    counts = reduce_shards(str(tmp_path), manifest, settings, ids_per_image=1000, outputs=(LvisOutput.of(EVERYTHING),))
    tree = tree_of(tmp_path / "coco" / "lvis.json")
    assert Counter(each["image_id"] for each in tree["annotations"]) == {1: 300, 2: 300}
    assert [each["id"] for each in tree["annotations"][:300]] == list(range(1000, 1300))
    first, second = tree["images"]
    assert (first["neg_category_ids"], first["not_exhaustive_category_ids"]) == ([], [3, 11])
    assert (second["neg_category_ids"], second["not_exhaustive_category_ids"]) == ([3, 11], [])
    assert [category["instance_count"] for category in tree["categories"]] == [599, 1, 0]
    assert counts["told"]["lvis"]["over_300"] == 2


def test_lvis_claims_no_absence_where_a_limit_was_reached(tmp_path: Path) -> None:
    rows = [boxes_of(1, [0] * K), boxes_of(2, [0, 0, 1]), boxes_of(3, [0, 0]), boxes_of(4, [])]
    manifest = run_of(tmp_path, rows)

    def lists(decisions: Decisions) -> list[tuple[list[int], list[int]]]:
        outputs = (LvisOutput.of(decisions),)
        settings = ReduceConfig(out=str(tmp_path / "coco"))
        reduce_shards(str(tmp_path), manifest, settings, decisions=decisions, outputs=outputs)
        images = tree_of(tmp_path / "coco" / "lvis.json")["images"]
        return [(image["neg_category_ids"], image["not_exhaustive_category_ids"]) for image in images]

    assert lists(EVERYTHING) == [([], [7]), ([11], []), ([3, 11], []), ([7, 3, 11], [])]
    capped = Decisions(CATEGORIES, EVERYTHING.target, EVERYTHING.thresholds, max_per_image=2)
    assert lists(capped) == [([], [7]), ([], [7]), ([], [7]), ([7, 3, 11], [])]
    # What is left out later does not undo the limit: the last detection of the first image may be the one.
    small = Decisions(CATEGORIES, EVERYTHING.target, EVERYTHING.thresholds, min_mask_area=10**6)
    assert lists(small)[0][0] == []
    subset = Decisions(CATEGORIES, np.array([-1, 1, 2], np.int32), EVERYTHING.thresholds)
    assert lists(subset)[0] == ([], [])
    # Nobody looked for buses, and the weakest of the first image is below the threshold: nothing above it was cut.
    strict = Decisions(CATEGORIES, np.array([0, 1, -1], np.int32), np.full(3, 0.55))
    assert lists(strict) == [([3], []), ([3], []), ([3], []), ([7, 3], [])]


def test_lvis_says_its_own_lists_where_the_source_has_some(tmp_path: Path) -> None:
    extra = {"neg_category_ids": [99], "coco_url": "http://x/1.jpg", "not_exhaustive_category_ids": [98]}
    out = reduced(tmp_path, run_of(tmp_path, [boxes_of(1, [0])], extra=extra), LvisOutput.of(EVERYTHING))
    text = (out / "lvis.json").read_text()
    assert text.count("neg_category_ids") == text.count("not_exhaustive_category_ids") == 1
    (image,) = tree_of(out / "lvis.json")["images"]
    assert (image["neg_category_ids"], image["coco_url"]) == ([3, 11], "http://x/1.jpg")


def test_lvis_knows_the_synsets_of_its_own_categories(tmp_path: Path) -> None:
    known = {each.id: each for each in builtin("lvis")}
    categories = (known[1].category(with_synonyms=True), Category(id=2, name="my own"), Category(id=17, name="cat"))
    decisions = keep_everything(categories)
    settings = ReduceConfig(out=str(tmp_path / "coco"))
    reduce_shards(
        str(tmp_path),
        run_of(tmp_path, [boxes_of(1, [0])]),
        settings,
        categories=categories,
        outputs=(LvisOutput.of(decisions),),
    )
    first, second, third = tree_of(tmp_path / "coco" / "lvis.json")["categories"]
    assert first["synset"] == "aerosol.n.02"
    assert first["synonyms"] == ["aerosol_can", "spray_can"]
    assert first["frequency"] == "c"  # LVIS's, not the one image here
    assert "synset" not in second
    assert second["synonyms"] == ["my own"]
    assert third["synset"].startswith("cat.n.")  # by COCO's list


def test_lvis_is_cut_into_files_with_common_categories(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 9, num_images=30, shard_size=4)
    whole = tree_of(reduced(tmp_path, manifest, LvisOutput.of(EVERYTHING)) / "lvis.json")
    out = reduced(tmp_path, manifest, LvisOutput.of(EVERYTHING), out="cut", images_per_file=10)
    trees = [tree_of(path) for path in sorted(out.glob("lvis-*.json"))]
    assert len(trees) > 1
    assert [each for tree in trees for each in tree["images"]] == whole["images"]
    assert all(tree["categories"] == whole["categories"] for tree in trees)


@pytest.mark.parametrize("rows_per_group", [5, 2**16])
def test_tables_hold_what_the_labels_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows_per_group: int) -> None:
    monkeypatch.setattr(parquet, "ROW_GROUP", rows_per_group)
    manifest = random_run(tmp_path, 10, num_images=40, shard_size=7)
    names = {category.id: category.name for category in CATEGORIES}
    out = reduced(tmp_path, manifest, CocoOutput(PROMPTS), parquet.ParquetOutput(tuple(names.values()), PROMPTS))
    labels = tree_of(out / "annotations.json")
    files = {image["id"]: image for image in labels["images"]}
    file = pq.ParquetFile(out / "annotations.parquet")
    sizes = [file.metadata.row_group(each).num_rows for each in range(file.num_row_groups)]
    assert set(sizes[:-1]) <= {rows_per_group}
    assert file.schema_arrow.remove_metadata().equals(parquet.ANNOTATION_COLUMNS)
    assert json.loads(file.metadata.metadata[b"info"]) == labels["info"]
    rows = file.read().to_pylist()
    assert len(rows) == len(labels["annotations"]) > 50
    for row, ours in zip(rows, labels["annotations"], strict=True):
        image = files[ours["image_id"]]
        assert [row[key] for key in ("id", "image_id", "category_id")] == [ours["id"], image["id"], ours["category_id"]]
        assert [row[key] for key in ("file_name", "height", "width")] == [
            image[key] for key in ("file_name", "height", "width")
        ]
        assert (row["category"], row["prompt"]) == (names[ours["category_id"]], ours["prompt"])
        assert np.array([row[f"bbox_{side}"] for side in "xywh"], np.float32) == pytest.approx(
            np.array(ours["bbox"], np.float32)
        )
        assert row["area"] == pytest.approx(ours["area"], rel=1e-6)
        for key in ("score", "raw_score", "num_merged", "predicted_iou", "stability"):
            assert row[key] == (pytest.approx(ours[key], rel=1e-6) if key in ours else None)
        assert row["rle_counts"] == ours.get("segmentation", {}).get("counts")
        assert [row[f"mask_bbox_{side}"] for side in "xywh"] == ours.get("mask_bbox", [None] * 4)
    images = pq.read_table(out / "images.parquet")
    assert images.schema.remove_metadata().equals(parquet.IMAGE_COLUMNS)
    sources = [each for shard in manifest.iter_shards() for each in manifest.read_shard(shard)["image_id"].to_pylist()]
    assert images["image_id"].to_pylist() == sources
    counts = Counter(each["image_id"] for each in labels["annotations"])
    failed = 0
    for row in images.to_pylist():
        failed += row["status"] == "failed"
        assert (row["image_id"] in files) == (row["status"] != "failed")
        assert row["num_annotations"] == counts[row["image_id"]]
    assert failed == len((out / "failures.jsonl").read_text().splitlines()) > 0
