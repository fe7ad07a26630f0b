"""Reducing shards without a run around them, and runs of random rows."""

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from owlsam_ray import storage
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import FailureClass
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.reduce.corrections.corrections import load_corrections
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats.coco import CocoOutput, FailuresOutput
from owlsam_ray.reduce.formats.protocol import Output
from owlsam_ray.reduce.fragments import ReduceJob
from owlsam_ray.reduce.run import Reduction, spans_of
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.proof import ShardRules, check_all_present
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of
from tests.reduce.everything import keep_everything

CATEGORIES = (
    Category(id=7, name="Katze", supercategory="Tier"),
    Category(id=3, name="dog"),
    Category(id=11, name='a "red" bus'),
)
K = 40
FINGERPRINT = "f"


def reduce_shards(
    run_url: str,
    manifest: Manifest,
    settings: ReduceConfig,
    *,
    categories: tuple[Category, ...] = CATEGORIES,
    ids_per_image: int = K,
    fingerprint: str = FINGERPRINT,
    decisions: Decisions | None = None,
    outputs: tuple[Output, ...] = (CocoOutput(),),
) -> dict[str, Any]:
    """What `reduce_run` does with the shards of a manifest."""
    check_all_present(manifest)
    out = settings.out or storage.join(run_url, "coco")
    if decisions is None:
        everything = keep_everything(categories)
        threshold = -np.inf if settings.score_threshold is None else settings.score_threshold
        decisions = Decisions(
            categories,
            everything.target,
            np.full(len(categories), threshold),
            min_mask_area=settings.min_mask_area,
        )
    scratch = storage.join(out, "fragments-test")
    rules = ShardRules(fingerprint, ids_per_image, len(categories))
    provenance: dict[str, Any] = {"fingerprint": fingerprint, "ids_per_image": ids_per_image}
    provenance["image_list"] = manifest.images_digest()
    try:
        corrections = load_corrections(settings, manifest, rules, decisions, categories=categories, scratch=scratch)
        if corrections is not None:
            outputs = (corrections.output, *outputs)
            provenance["corrections"] = corrections.provenance
        job = ReduceJob(
            manifest=manifest,
            rules=rules,
            decisions=decisions,
            outputs=(FailuresOutput(), *outputs),
            scratch=scratch,
            overlay=None if corrections is None else corrections.overlay,
        )
        reduction = Reduction(
            settings,
            ResourcesConfig(),
            job,
            spans_of(manifest, settings.images_per_file),
            out,
            provenance,
            Counter() if corrections is None else corrections.counts,
        )
        return reduction.work(list(manifest.iter_shards()), partial=False)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def random_prediction(choose: random.Random, image_id: int, *, num_labels: int, most: int = 12) -> Prediction:
    """An image that failed, or with overlapping boxes, some with masks."""
    if choose.random() < 0.1:
        reason = choose.choice(["truncated", "fetch_failed: slow", 'odd: "\\ü'])
        return Prediction(image_id, failure=(reason, choose.choice(list(FailureClass))))
    height, width = choose.randrange(1, 60), choose.randrange(1, 60)
    count = choose.choice([0, 1, 2, most])
    numbers = np.random.default_rng(choose.randrange(2**32))
    corners = numbers.random((count, 4), np.float32) * np.float32(choose.choice([1e-6, 1, 50, 3000]))
    boxes = np.concatenate([corners[:, :2], corners[:, :2] + corners[:, 2:]], axis=1).astype(np.float32)
    scores = np.sort(numbers.random(count, np.float32))[::-1].copy()
    segments: list[Segment | None] = []
    for _ in range(count):
        if choose.random() < 0.2:
            segments.append(None)
            continue
        mask = numbers.random((height, width)) < choose.choice([0.0, 0.02, 0.5, 1.0])
        rows, columns = np.nonzero(mask)
        box = (0, 0, 0, 0)
        if len(rows):
            box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        segments.append(
            Segment(
                encode_rle(mask),
                int(mask.sum()),
                box,
                predicted_iou=float(numbers.random(dtype=np.float32)),
                stability=float(numbers.random(dtype=np.float32)),
            )
        )
    return Prediction(
        image_id=image_id,
        size_hw=(height, width),
        detections=Detections(
            boxes_xyxy=boxes,
            scores=scores,
            raw_scores=scores,
            labels=numbers.integers(0, num_labels, count),
            prompt_ids=numbers.integers(0, num_labels, count),
            num_merged=numbers.integers(1, 4, count),
        ),
        segments=tuple(segments),
        note=choose.choice([None, None, "stated_size_differs: x"]),
    )


def random_run(root: Path, seed: int, *, num_images: int, shard_size: int, most: int = 12) -> Manifest:
    """A run of random rows; names and other fields of all kinds."""
    choose = random.Random(seed)
    ids = choose.sample(range(1, 10**6), num_images)
    records = [
        ImageRecord(
            each,
            choose.choice([f"{each}.jpg", f'a "b"\\{each}.png', f"ü/{each}.jpg", f"\x7f\n{each}"]),
            extra=choose.choice(
                [{}, {"license": 1}, {"odd": "x\ud800"}, {"url": "http://x/ü", "deep": {"a": [1.5, None, "}"]}}]
            ),
        )
        for each in ids
    ]
    source = {"info": {"year": 2026}, "licenses": [{"id": 1}], "categories": []}
    manifest = write_parts(str(root), tables_of(records, "/i"), ShardLayout(shard_size=shard_size), source=source)
    for shard in manifest.iter_shards():
        shard_ids = manifest.read_shard(shard)["image_id"].to_pylist()
        rows = [random_prediction(choose, each, num_labels=len(CATEGORIES), most=most) for each in shard_ids]
        write_shard(str(root), shard, predictions_to_table(rows), fingerprint=FINGERPRINT, numerics="n", stage_s={})
    return manifest
