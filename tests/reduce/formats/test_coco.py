"""Shards → COCO: content, ids, proof; and every way in which a shard cannot be trusted."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO

from owlsam_ray.config.reduce import ReduceConfig, allowed_failures
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.shards import FOOTER_KEY, shard_url, write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of
from tests.reduce.made_runs import reduce_shards

K = 5
SIZE = (6, 8)
CATEGORIES = (Category(id=7, name="Katze", supercategory="Tier"), Category(id=3, name="dog"))


def detected(image_id: int, scores: list[float], *, note: str | None = None, masks: bool = True) -> Prediction:
    mask = np.zeros(SIZE, np.bool_)
    mask[1:3, 2:5] = True
    count = len(scores)
    values = np.array(scores, np.float32)
    segment = Segment(encode_rle(mask), 6, (2, 1, 5, 3), predicted_iou=0.9, stability=0.5)
    return Prediction(
        image_id=image_id,
        size_hw=SIZE,
        detections=Detections(
            boxes_xyxy=np.tile(np.array([0.1, 1, 5.3, 4], np.float32), (count, 1)),
            scores=values,
            raw_scores=values,
            labels=np.arange(count) % 2,
            prompt_ids=np.arange(count) % 2,
            num_merged=np.ones(count, np.int64),
        ),
        segments=tuple(segment if masks else None for _ in scores),
        note=note,
    )


def predictions() -> list[Prediction]:
    return [
        detected(101, [0.9, 0.5]),
        detected(55, []),
        Prediction(image_id=7, failure=("truncated", FailureClass.PERMANENT)),
        detected(8, [0.4], masks=False, note="stated_size_differs: stated 1x1, file 6x8"),
        Prediction(image_id=9, failure=("fetch_failed: slow", FailureClass.TRANSIENT)),
    ]


def make_run(run: Path) -> Manifest:
    """Five images in shards of two."""
    rows = predictions()
    records = [
        ImageRecord(row.image_id, f"ü/{row.image_id}.jpg", extra={"license": 1, "url": "x\ud800"}) for row in rows
    ]
    source = {"info": {"year": 2026}, "licenses": [{"id": 1}], "categories": []}
    manifest = write_parts(str(run), tables_of(records, "/i"), ShardLayout(shard_size=2), source=source)
    for shard in range(3):
        write(run, shard, predictions_to_table(rows[2 * shard : 2 * shard + 2]))
    return manifest


def write(run: Path, shard: int, table: pa.Table, fingerprint: str = "f") -> None:
    write_shard(str(run), shard, table, fingerprint=fingerprint, numerics="n", stage_s={})


def reduce(run: Path, manifest: Manifest, **settings: Any) -> dict[str, Any]:
    return reduce_shards(
        str(run),
        manifest,
        ReduceConfig(**({"min_mask_area": 0} | settings)),
        categories=CATEGORIES,
        ids_per_image=K,
        fingerprint="f",
    )


def test_small_masks_are_left_out_and_counted(tmp_path: Path) -> None:
    """The mask of every detection has 6 pixels; one detection has none and stays."""
    manifest = make_run(tmp_path)

    def with_area(pixels: int) -> tuple[dict[str, Any], list[int]]:
        counts = reduce(tmp_path, manifest, min_mask_area=pixels, score_threshold=0.45)
        tree = json.loads((tmp_path / "coco" / "annotations.json").read_text(encoding="utf-8"))
        assert tree["info"]["owlsam_ray"]["proof"]["left_out"].get("small_mask", 0) == counts["num_small"]
        return counts, [annotation["id"] for annotation in tree["annotations"]]

    counts, ids = with_area(6)
    assert (counts["num_annotations"], counts["num_small"], ids) == (2, 0, [5, 6])
    counts, ids = with_area(7)
    assert (counts["num_annotations"], counts["num_small"], ids) == (0, 2, [])
    whole = reduce(tmp_path, manifest, min_mask_area=7)
    assert (whole["num_annotations"], whole["num_masks"], whole["num_small"]) == (1, 0, 2)


def test_content(tmp_path: Path) -> None:
    counts = reduce(tmp_path, make_run(tmp_path))
    tree = json.loads((tmp_path / "coco" / "annotations.json").read_text(encoding="utf-8"))
    assert [image["id"] for image in tree["images"]] == [101, 55, 8]
    assert tree["images"][0] == {
        "id": 101, "file_name": "ü/101.jpg", "height": 6, "width": 8, "license": 1, "url": "x\ud800",
    }  # fmt: skip
    assert tree["licenses"] == [{"id": 1}]
    assert tree["categories"][0] == {"id": 7, "name": "Katze", "supercategory": "Tier"}
    assert tree["info"]["year"] == 2026
    assert tree["info"]["owlsam_ray"]["proof"] == {
        "images": 5, "ok": 2, "empty": 1, "failed": 2, "annotations": 3,
        "failed_by_reason": {"fetch_failed": 1, "truncated": 1},
        "flagged_by_reason": {"stated_size_differs": 1}, "detections": 3, "left_out": {},
    }  # fmt: skip
    first, second, third = tree["annotations"]
    rle = first["segmentation"].pop("counts")
    assert first == {
        "id": 1 * K + 0, "image_id": 101, "category_id": 7, "bbox": [0.1, 1.0, 5.2000003, 3.0], "area": 6, "iscrowd": 0,
        "segmentation": {"size": [6, 8]}, "score": 0.9, "predicted_iou": 0.9, "stability": 0.5,
        "mask_bbox": [2, 1, 3, 2],
    }  # fmt: skip
    assert isinstance(rle, str)
    assert (second["id"], second["category_id"]) == (K + 1, 3)
    assert third["id"] == 4 * K
    assert "segmentation" not in third
    assert third["area"] == pytest.approx(5.2 * 3)
    failures = [json.loads(line) for line in (tmp_path / "coco" / "failures.jsonl").read_text().splitlines()]
    assert failures == [
        {"image_id": 7, "file_name": "ü/7.jpg", "reason": "truncated", "class": "permanent"},
        {"image_id": 9, "file_name": "ü/9.jpg", "reason": "fetch_failed: slow", "class": "transient"},
    ]
    assert [counts[name] for name in ("images", "ok", "empty", "failed", "unlabelled")] == [5, 2, 1, 2, 0]
    assert [counts[name] for name in ("num_annotations", "num_masks")] == [3, 2]


def test_pycocotools_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reduce(tmp_path, make_run(tmp_path))
    coco = COCO(str(tmp_path / "coco" / "annotations.json"))
    assert coco.getImgIds() == [101, 55, 8]
    mask = coco.annToMask(coco.loadAnns([K])[0])
    assert mask.shape == SIZE
    assert mask.sum() == 6


def test_ids_stay_when_the_threshold_changes(tmp_path: Path) -> None:
    manifest = make_run(tmp_path)
    ids = []
    for threshold in (None, 0.4, 0.5):
        counts = reduce(tmp_path, manifest, score_threshold=threshold)
        tree = json.loads((tmp_path / "coco" / "annotations.json").read_text())
        ids.append([annotation["id"] for annotation in tree["annotations"]])
        assert counts["num_annotations"] == len(ids[-1])
        assert len(tree["images"]) == 3
    # 0.4 as float32 is a little more than 0.4.
    assert ids == [[K, K + 1, 4 * K], [K, K + 1, 4 * K], [K]]


def test_same_shards_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        reduce(tmp_path / name, make_run(tmp_path / name))
    for file in ("annotations.json", "failures.jsonl"):
        assert (tmp_path / "a" / "coco" / file).read_bytes() == (tmp_path / "b" / "coco" / file).read_bytes()


def test_missing_shards_are_counted(tmp_path: Path) -> None:
    manifest = make_run(tmp_path)
    Path(shard_url(str(tmp_path), 1)).unlink()
    with pytest.raises(IncompleteError, match=r"1 of 3 shards .* \(the first: 1\)"):
        reduce(tmp_path, manifest)
    assert not (tmp_path / "coco").exists()


def edited(run: Path, row: int, **values: Any) -> None:
    """Shard 0 with other values in one row, and a footer that fits."""
    table = pq.read_table(shard_url(str(run), 0))
    rows = table.to_pylist()
    rows[row] |= values
    write(run, 0, pa.Table.from_pylist(rows, PREDICTION_SCHEMA))


RLE = encode_rle(np.ones(SIZE, np.bool_))


@pytest.mark.parametrize(
    ("row", "values", "words"),
    [
        (0, {"image_id": 55}, "image ids are not the manifest's"),
        (0, {"status": "fine"}, "unknown status 'fine'"),
        (0, {"status": "empty"}, "status empty with 2 detections"),
        (1, {"status": "ok"}, "status ok with 0 detections"),
        (0, {"status": "failed"}, "failed without a reason"),
        (0, {"det_index": [0, K]}, "is not strictly ascending within"),
        (0, {"det_index": [1, 0]}, "is not strictly ascending within"),
        (0, {"det_index": [0, 0]}, "is not strictly ascending within"),
        (0, {"label": [0, 2]}, "a label outside the 2 categories"),
        (0, {"score": [0.5]}, "differ in length"),
        (0, {"rle_counts": [RLE, RLE]}, "a mask of 48 among 48 pixels"),
        (0, {"height": 7}, "a mask of 6 among 48 pixels, but the image has 7x8"),
        (0, {"rle_counts": [b"??\xff", RLE]}, "not a compressed RLE"),
        (0, {"x0": [None, 1.0]}, "x0"),
        (0, {"score": [float("nan"), 0.5]}, "score"),
        (0, {"predicted_iou": [None, 0.5]}, "predicted_iou"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, row: int, values: dict[str, Any], words: str) -> None:
    manifest = make_run(tmp_path)
    edited(tmp_path, row, **values)
    with pytest.raises(IncompleteError) as caught:
        reduce(tmp_path, manifest)
    assert words in str(caught.value)
    assert shard_url(str(tmp_path), 0) in str(caught.value)
    assert "owlsam annotate" in str(caught.value)
    assert not (tmp_path / "coco" / "annotations.json").exists()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("fewer rows", "image ids"),
        ("fingerprint", "another label fingerprint"),
        ("columns", "columns"),
        ("body", "shard-00000000.parquet"),
        ("claims", "claims"),
    ],
)
def test_shards_of_other_means_are_refused(tmp_path: Path, damage: str, words: str) -> None:
    manifest = make_run(tmp_path)
    path = Path(shard_url(str(tmp_path), 0))
    table = pq.read_table(path)
    footer = json.loads(pq.read_metadata(path).metadata[FOOTER_KEY])
    del footer["data_sha256"], footer["footer_sha256"]  # as in files of 0.1, or they alone would tell
    if damage == "fewer rows":
        write(tmp_path, 0, table.slice(0, 1))
    elif damage == "fingerprint":
        write(tmp_path, 0, table, fingerprint="other")
    elif damage == "columns":
        pq.write_table(table.drop_columns(["x0"]).replace_schema_metadata({FOOTER_KEY: json.dumps(footer)}), path)
    elif damage == "body":
        data = bytearray(path.read_bytes())
        data[4:200] = bytes(196)
        path.write_bytes(data)
    else:
        footer["counts"]["ok"] = 2
        pq.write_table(table.replace_schema_metadata({FOOTER_KEY: json.dumps(footer)}), path)
    with pytest.raises(IncompleteError) as caught:
        reduce(tmp_path, manifest)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "images", "allowed"),
    [(3, 1000, 3), (0, 10, 0), (0.01, 1000, 10), (0.01, 99, 0), (1.0, 7, 7), (1, 7, 1)],
)
def test_allowed_failures(setting: float, images: int, allowed: int) -> None:
    assert allowed_failures(setting, images) == allowed
