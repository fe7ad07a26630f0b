"""A labelled run of small pictures without models: objects, finds of them with scores, and strangers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailureClass
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.run.guard import fingerprint_parts, guard_labels
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from tests.drawn_images import draw_coco

CATEGORIES = [{"id": 3, "name": "cat", "supercategory": "animal"}, {"id": 9, "name": "dog"}, {"id": 12, "name": "owl"}]
SHARD, FAILED = 8, 2
"""Images in a shard; the place in each at which one failed."""
_SIDE = 12


@dataclass(frozen=True)
class SmallRun:
    root: Path
    truth: dict[str, Any]

    def config(self, *overrides: str) -> RunConfig:
        return load_config([self.root / "run.yaml"], overrides=overrides)

    @property
    def run(self) -> Path:
        return self.root / "run"

    def write_truth(self, name: str, **parts: Any) -> str:
        """The ground truth with other parts, in a file of its own."""
        path = self.root / name
        path.write_text(json.dumps(self.truth | parts))
        return str(path)

    def part(self, images: list[dict[str, Any]]) -> dict[str, Any]:
        """Only these images, and what is in them."""
        ids = {image["id"] for image in images}
        return {
            "images": images,
            "annotations": [each for each in self.truth["annotations"] if each["image_id"] in ids],
        }


def plan(root: Path, *, num_images: int, seed: int = 0) -> SmallRun:
    """Pictures of 48 pixels or more with one to three objects each, planned."""
    random = np.random.default_rng(seed)
    content: dict[str, Any] = draw_coco(root / "data", num_images)
    content["categories"] = CATEGORIES
    for image in content["images"]:
        for place in range(int(random.integers(1, 4))):
            x, y = float(16 * place), float(random.integers(0, 20))
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1, "image_id": image["id"], "iscrowd": 0,
                    "category_id": int(random.choice([3, 9])), "bbox": [x, y, _SIDE, _SIDE], "area": _SIDE**2,
                    "segmentation": [[x, y, x + _SIDE, y, x + _SIDE, y + _SIDE, x, y + _SIDE]],
                }
            )  # fmt: skip
    (root / "data" / "instances.json").write_text(json.dumps(content))
    (root / "weights").mkdir()
    (root / "weights" / "model.safetensors").write_bytes(b"detector")
    (root / "sam.pt").write_bytes(b"segmenter")
    tree = {
        "run": str(root / "run"),
        "data": {
            "source": "coco",
            "images": str(root / "data" / "images"),
            "annotations": str(root / "data" / "instances.json"),
        },
        "detector": {"weights": str(root / "weights")},
        "segment": {"weights": str(root / "sam.pt")},
        "resources": {"shard_size": SHARD},
        "reduce": {"min_mask_area": 0, "max_failed": 1.0},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(tree))
    small = SmallRun(root, content)
    plan_run(small.config())
    return small


def label(small: SmallRun, *, seed: int = 0, masks: bool = True, shards: range | None = None) -> None:
    """Shards as an attempt leaves them: most objects are found, with scores above those of most strangers."""
    config = small.config()
    run = plan_run(config).run
    (small.run / QUERY_FILE).write_bytes(b"queries")
    weights = {"detector": Path(config.detector.weights), "segmenter": Path(config.segment.weights)}
    run = guard_labels(run, fingerprint_parts(run, weights=weights))
    record, manifest = run.record, run.manifest
    assert record.fingerprint is not None
    labels = {category.id: index for index, category in enumerate(record.categories)}
    for shard in manifest.iter_shards() if shards is None else shards:
        rows = []
        for place, source in enumerate(manifest.read_shard(shard).to_pylist()):
            if place == FAILED:
                rows.append(Prediction(source["image_id"], failure=("truncated", FailureClass.PERMANENT)))
                continue
            objects = [each for each in small.truth["annotations"] if each["image_id"] == source["image_id"]]
            rows.append(_prediction(source, objects, labels, np.random.default_rng([seed, shard, place]), masks=masks))
        write_shard(
            str(small.run), shard, predictions_to_table(rows), fingerprint=record.fingerprint, numerics="n", stage_s={}
        )


def _prediction(
    source: dict[str, Any],
    objects: list[dict[str, Any]],
    labels: dict[int, int],
    random: np.random.Generator,
    *,
    masks: bool,
) -> Prediction:
    size = (source["height"], source["width"])
    found = [
        (labels[each["category_id"]], *each["bbox"][:2], random.beta(5, 2)) for each in objects if random.random() < 0.9
    ]
    found += [(int(random.integers(3)), 30.0, 34.0, random.beta(2, 5)) for _ in range(int(random.integers(0, 3)))]
    found = sorted(((*each[:3], round(max(0.06, each[3]), 2)) for each in found), key=lambda each: -each[3])
    boxes = np.array([[x, y, x + _SIDE, y + _SIDE] for _, x, y, _ in found], np.float32).reshape(-1, 4)
    numbers = np.array([label for label, *_ in found], np.int64)
    scores = np.array([score for *_, score in found], np.float32)
    return Prediction(
        image_id=source["image_id"],
        size_hw=size,
        detections=Detections(
            boxes_xyxy=boxes,
            scores=scores,
            raw_scores=scores,
            labels=numbers,
            prompt_ids=numbers,
            num_merged=np.ones(len(found), np.int64),
        ),
        segments=tuple(_segment(box, size) if masks else None for box in boxes.astype(int)),
    )


def _segment(box: np.ndarray, size_hw: tuple[int, int]) -> Segment:
    mask = np.zeros(size_hw, np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return Segment(encode_rle(mask), int(mask.sum()), tuple(box.tolist()), predicted_iou=0.9, stability=0.9)
