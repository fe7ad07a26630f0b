"""A name against a picture: every category of the drawn dataset asked for by each, with the demo's detector.

    python -m tests.bench.exemplars --images 200 --seed 1

Test pictures go through the stages of a run, once with the bare names and once with one drawn exemplar of each category
in their place. Exemplars come from pictures of another seed; one a category is few, so the numbers by picture move with
the seed by more than those by name. The table of box AP (mean over the categories of a group) goes to stdout.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.config.inference import DetectorConfig, SegmentConfig, SuppressConfig
from owlsam_ray.config.vocabulary import Exemplar, VocabularyConfig
from owlsam_ray.evaluate.average_precision import precision_recall
from owlsam_ray.evaluate.ground_truth import EvaluatedCategory
from owlsam_ray.inference.detect import cap_detections, select_detections
from owlsam_ray.inference.queries import embed_queries
from owlsam_ray.inference.suppress import suppress
from owlsam_ray.models.load import find_models, load_detector
from owlsam_ray.models.shipped import model_settings
from owlsam_ray.models.weights import sha256_of
from owlsam_ray.ops.masks import tight_box
from owlsam_ray.records import Detections
from owlsam_ray.sources.drawing import CATEGORIES, SEEN, UNKNOWN_SHAPE, WITHHELD_PAIR, Split, draw
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary
from tests.bench.labelling import ground_truth

GROUPS = (SEEN, WITHHELD_PAIR, UNKNOWN_SHAPE)
MIN_SIDE = 48
"""√(w·h) of an exemplar's box in pixels."""
SEED_STEP = 1000
"""From the seed of the pictures to that of the exemplars."""


def choose(seed: int) -> dict[int, tuple[int, int]]:
    """Label → (picture, object in it) of the first object that is large and whole, for every category.

    Whatever covers a part of an object touches what is left of it: where no later box comes next to its own, none does.
    """
    found: dict[int, tuple[int, int]] = {}
    for index in count():
        drawing = draw(seed, Split.TEST, index)
        boxes = np.array([tight_box(mask) for mask in drawing.masks]).reshape(-1, 4)
        for position, (label, box) in enumerate(zip(drawing.labels.tolist(), boxes, strict=True)):
            later = boxes[position + 1 :]
            near = (later[:, :2] <= box[2:]).all(axis=1) & (later[:, 2:] >= box[:2]).all(axis=1)
            if np.prod(box[2:] - box[:2]) >= MIN_SIDE**2 and not near.any():
                found.setdefault(label, (index, position))
        if len(found) == len(CATEGORIES):
            break
    return dict(sorted(found.items()))


def write_exemplars(seed: int, directory: Path) -> tuple[Exemplar, ...]:
    """One of each category, in their order: whole pictures as PNG, and the box of the object."""
    exemplars = []
    for label, (index, position) in choose(seed).items():
        drawing, path = draw(seed, Split.TEST, index), directory / f"{index:06d}.png"
        Image.fromarray(drawing.pixels).save(path)
        box = tight_box(drawing.masks[position])
        exemplars.append(Exemplar(category=CATEGORIES[label].name, image=str(path), box=box))
    return tuple(exemplars)


def vocabularies(exemplars: tuple[Exemplar, ...]) -> dict[str, Vocabulary]:
    """The same categories by name and by picture."""
    names = tuple(category.name for category in CATEGORIES)
    result = {}
    for way, shown in {"name": (), "picture": exemplars}.items():
        settings = VocabularyConfig(
            categories=names, exemplars=shown, exemplars_replace_text=bool(shown), **model_settings()["vocabulary"]
        )
        result[way] = resolve_vocabulary(settings, [])
    return result


def compare(images: int, *, seed: int) -> dict[str, Any]:
    """Objects and AP by group and way of asking, as JSON values; None where a group has no object."""
    started = time.perf_counter()
    sections = model_settings()
    settings, suppression = DetectorConfig(**sections["detector"]), SuppressConfig(**sections["suppress"])
    weights = find_models(settings, SegmentConfig(**sections["segment"])).detector
    with tempfile.TemporaryDirectory() as directory:
        asked = vocabularies(write_exemplars(seed + SEED_STEP, Path(directory)))
        queries = {
            way: embed_queries(each.queries, detector_weights=weights, settings=settings, ensemble="embeddings")
            for way, each in asked.items()
        }
    detector = load_detector(settings, weights, device=torch.device("cpu"), dtype=torch.float32)
    drawings = [draw(seed, Split.TEST, index) for index in range(images)]
    regions: dict[str, list[Region]] = {way: [] for way in asked}
    for image_id, drawing in enumerate(drawings, start=1):
        size_hw = (drawing.pixels.shape[0], drawing.pixels.shape[1])
        batch = detector.preprocess(drawing.pixels)[None]
        for way, vocabulary in asked.items():
            boxes, scores = detector.detect(batch, queries[way])
            found = select_detections(
                detector.unscale(boxes[0], size_hw).numpy(), scores[0].numpy(), size_hw=size_hw,
                query_labels=np.array(vocabulary.query_labels, np.int64), settings=settings,
            )  # fmt: skip
            left = suppress(found, suppression, score_floor=settings.score_floor)
            regions[way] += _regions(cap_detections(left, settings.max_detections), image_id)
    categories = {each.id: EvaluatedCategory(each.name, each.supercategory, None) for each in CATEGORIES}
    truth = replace(ground_truth(drawings), categories=categories)
    counted = {way: precision_recall(truth, of_way, "bbox") for way, of_way in regions.items()}
    groups = {}
    for group in GROUPS:
        ids = {each.id for each in CATEGORIES if each.supercategory == group}
        groups[group] = {
            "objects": sum(each.category_id in ids for each in truth.objects),
            "box AP50": {way: each.ap(ids, iou=0.5) for way, each in counted.items()},
            "box AP": {way: each.ap(ids) for way, each in counted.items()},
        }
    seconds = time.perf_counter() - started
    return {"images": images, "seed": seed, "groups": groups, "model": sha256_of(weights), "seconds": seconds}


def _regions(detections: Detections, image_id: int) -> list[Region]:
    boxes = detections.boxes_xyxy.astype(np.float64).tolist()
    columns = zip(boxes, detections.labels.tolist(), detections.scores.tolist(), strict=True)
    return [
        Region(image_id, CATEGORIES[label].id, (x0, y0, x1 - x0, y1 - y0), (x1 - x0) * (y1 - y0), None, score)
        for (x0, y0, x1, y1), label, score in columns
    ]


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each group."""
    ways = [(metric, way) for metric in ("box AP50", "box AP") for way in ("name", "picture")]
    lines = [
        f"{result['images']} drawn test pictures of seed {result['seed']}, exemplars of seed "
        f"{result['seed'] + SEED_STEP}; the demo's detector ({result['model'][:12]}); {result['seconds']:.0f} s.",
        "",
        f"| objects | number | {' | '.join(f'{metric} by {way}' for metric, way in ways)} |",
        f"|---|---|{'---|' * len(ways)}",
    ]
    for group, row in result["groups"].items():
        values = [row[metric][way] for metric, way in ways]
        cells = ["–" if value is None else f"{value:.3f}" for value in values]
        lines.append(f"| {group} | {row['objects']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.exemplars", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, default=200, help="pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the pictures (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.images < 1 or options.seed < 0:
        parser.error("at least one picture, and no seed below 0")
    torch.set_num_threads(1)
    print(table(compare(options.images, seed=options.seed)))


if __name__ == "__main__":
    main()
