"""Suppression strategies and mask choices on crowded drawn scenes, with the models that come with the package.

    python -m tests.bench.strategies --images 300 --seed 3 --resamples 1000 --out strategies.json

The detector and the image encoder run once on each picture; what follows runs once for each variant, through the stages
of a run. The table goes to stdout: COCO's numbers in percent, each with the 95 % interval of its difference to the
baseline over resamples of the pictures, the same ones for every variant.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from owlsam_ray.coco_files.regions import Region
from owlsam_ray.evaluate.average_precision import Kind, precision_recall
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.ops.boxes import pair_overlaps
from owlsam_ray.ops.masks import tight_box
from owlsam_ray.sources.drawing import Drawing, Split, draw
from tests.bench.bootstrap import Floats, Ints, average_precision, match_categories, mean_matched_iou, resamples
from tests.bench.labelling import Labeller, Variant, ground_truth
from tests.crowded import CROWDED

METRICS = ("box AP", "box AP50", "box AP75", "mask AP", "mask AP50", "mIoU")
_BATCH = 8
"""Pictures of one model call."""
_CLOSE = 0.5
"""Box IoU from which two objects of one label are close neighbours, in the statistics."""


_NMS: dict[str, Any] = {"strategy": "nms", "threshold": 0.6}
BASELINE = "nms 0.6"
VARIANTS = (
    Variant("none", {"strategy": "none"}),
    *(Variant(f"nms {each}", {"strategy": "nms", "threshold": each}) for each in (0.3, 0.5, 0.6, 0.7)),
    Variant("nms 0.6, across labels", _NMS | {"across_labels": True}),
    Variant("nms 0.8, IoS", {"strategy": "nms", "overlap": "ios", "threshold": 0.8}),
    *(Variant(f"soft-nms, exponential, sigma {each}", {"strategy": "soft_nms", "sigma": each}) for each in (0.3, 0.5)),
    Variant("soft-nms, linear, 0.5", {"strategy": "soft_nms", "decay": "linear", "threshold": 0.5}),
    *(Variant(f"merge {each}", {"strategy": "merge", "threshold": each}) for each in (0.6, 0.7)),
    Variant("merge 0.6, across labels", {"strategy": "merge", "threshold": 0.6, "across_labels": True}),
    Variant("nms 0.6, best of three masks", _NMS, {"masks": "best_of_three"}),
    Variant("nms 0.6, most stable mask", _NMS, {"masks": "most_stable"}),
    Variant("nms 0.6, box and centre", _NMS, {"prompt": "box_and_center"}),
)


def statistics(drawings: Sequence[Drawing]) -> dict[str, Any]:
    """How crowded the pictures are, by the tight boxes of what is visible."""
    nearest: list[float] = []
    for each in drawings:
        boxes = np.array([tight_box(mask) for mask in each.masks], np.float32).reshape(-1, 4)
        overlaps = pair_overlaps(boxes[:, None], boxes[None], "iou") * (each.labels[:, None] == each.labels[None])
        np.fill_diagonal(overlaps, 0.0)
        nearest += overlaps.max(axis=1, initial=0.0).tolist()
    counts = [len(each.labels) for each in drawings]
    return {
        "objects": sum(counts),
        "objects_per_picture": {"least": min(counts), "mean": float(np.mean(counts)), "most": max(counts)},
        "share_with_close_neighbour_of_same_label": float(np.mean(np.array(nearest) > _CLOSE)),
    }


def measure(truth: GroundTruth, regions: Sequence[Region], weights: Ints) -> dict[str, Floats]:
    """Every metric in percent, (R,) over the columns of `weights`.

    Raises:
        RuntimeError: the first column, the pictures as they are, is not what the project's evaluation gives.
    """
    result: dict[str, Floats] = {}
    kinds: tuple[tuple[Literal["box", "mask"], Kind], ...] = (("box", "bbox"), ("mask", "segm"))
    for name, kind in kinds:
        by_threshold = 100 * average_precision(match_categories(truth, regions, kind), weights)
        result[f"{name} AP"] = by_threshold.mean(axis=0)
        result[f"{name} AP50"], result[f"{name} AP75"] = by_threshold[0], by_threshold[5]
        counted = precision_recall(truth, regions, kind)
        for metric, expected in {"AP": counted.ap(), "AP50": counted.ap(iou=0.5)}.items():
            own = result[f"{name} {metric}"][0]
            if expected is None or abs(own - 100 * expected) > 1e-7:
                raise RuntimeError(f"{name} {metric}: {own} here, {expected} by the evaluator")
    result["mIoU"] = 100 * mean_matched_iou(truth, regions, weights)
    return {metric: result[metric] for metric in METRICS}


def compare(
    images: int,
    *,
    seed: int,
    count: int,
    companions: float = CROWDED.companions,
    variants: Sequence[Variant] = VARIANTS,
) -> dict[str, Any]:
    """All numbers, as JSON values.

    Args:
        images: pictures.
        seed: of the pictures and of the resamples.
        count: resamples.
        companions: share of objects that another one of the same label covers in part.
        variants: with the baseline among them.
    """
    started = time.perf_counter()
    labeller = Labeller()
    crowd = replace(CROWDED, companions=companions)
    drawings: list[Drawing] = []
    regions: list[list[Region]] = [[] for _ in variants]
    while len(drawings) < images:
        rest = range(len(drawings), min(len(drawings) + _BATCH, images))
        batch = [draw(seed, Split.TEST, index, crowd=crowd) for index in rest]
        for all_of, part in zip(regions, labeller.label(batch, len(drawings) + 1, variants), strict=True):
            all_of += part
        drawings += batch
        _tell(f"{len(drawings)}/{images} pictures labelled in {time.perf_counter() - started:.0f} s")
    labelled = time.perf_counter()
    truth = ground_truth(drawings)
    weights = resamples(images, count, seed=seed)
    measured = {}
    for variant, of_variant in zip(variants, regions, strict=True):
        measured[variant.name] = measure(truth, of_variant, weights)
        _tell(f"{len(measured)}/{len(variants)} variants measured in {time.perf_counter() - labelled:.0f} s")
    return {
        "images": images,
        "seed": seed,
        "resamples": count,
        "companions": companions,
        "baseline": BASELINE,
        "models": labeller.hashes,
        "pictures": statistics(drawings),
        "variants": {
            name: {
                metric: _difference(values[metric], measured[BASELINE][metric]) | {"value": _number(values[metric][0])}
                for metric in METRICS
            }
            | {"predictions": len(of_variant)}
            for (name, values), of_variant in zip(measured.items(), regions, strict=True)
        },
        "seconds": {
            "label": round(labelled - started, 1),
            "measure": round(time.perf_counter() - labelled, 1),
        },
    }


def _difference(values: Floats, baseline: Floats) -> dict[str, float | None]:
    """Of the sample, and the 95 % percentile interval over those resamples in which both are defined."""
    differences = values - baseline
    drawn = differences[1:][~np.isnan(differences[1:])]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (np.nan, np.nan)
    return {"difference": _number(differences[0]), "low": _number(low), "high": _number(high)}


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def table(result: dict[str, Any]) -> str:
    """Markdown: one row for each variant."""
    pictures = result["pictures"]
    per_picture = pictures["objects_per_picture"]
    close = pictures["share_with_close_neighbour_of_same_label"]
    hashes = ", ".join(f"{name} {digest[:12]}" for name, digest in result["models"].items())
    lines = [
        f"{result['images']} crowded pictures of seed {result['seed']}: {pictures['objects']} objects, "
        f"{per_picture['least']}–{per_picture['most']} a picture, {per_picture['mean']:.1f} on average; {close:.0%} "
        f"have a neighbour of the same label with a box IoU above {_CLOSE}.",
        f"Models: the demo's ({hashes}). Percent; in brackets the 95 % interval of the difference to {BASELINE}, from "
        f"{result['resamples']} resamples of the pictures. {sum(result['seconds'].values()):.0f} s.",
        "",
        f"| variant | {' | '.join(METRICS)} |",
        f"|---|{'---|' * len(METRICS)}",
    ]
    for name, row in result["variants"].items():
        cells = [_cell(row[metric], is_baseline=name == result["baseline"]) for metric in METRICS]
        title = f"**{name}** (baseline)" if name == result["baseline"] else name
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(numbers: dict[str, float | None], *, is_baseline: bool) -> str:
    value, low, high = numbers["value"], numbers["low"], numbers["high"]
    if value is None:
        return "–"
    if is_baseline or low is None or high is None:
        return f"{value:.1f}"
    return f"{value:.1f} [{low:+.2f}, {high:+.2f}]" if low or high else f"{value:.1f} [=]"


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print the table, write the numbers."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.strategies", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, default=300, help="pictures (default: 300)")
    parser.add_argument("--seed", type=int, default=3, help="of pictures and resamples (default: 3)")
    parser.add_argument("--resamples", type=int, default=1000, help="of the pictures (default: 1000)")
    parser.add_argument("--out", type=Path, help="a JSON file for all numbers")
    parser.add_argument("--companions", type=float, default=CROWDED.companions, metavar="SHARE",
                        help="of objects that one of the same label covers in part (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if options.images < 1 or options.resamples < 1 or options.seed < 0 or not 0 <= options.companions <= 1:
        parser.error("at least one picture and one resample, no seed below 0, and a share of companions in [0, 1]")
    torch.set_num_threads(1)
    result = compare(options.images, seed=options.seed, count=options.resamples, companions=options.companions)
    print(table(result))
    if options.out is not None:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
