"""Compute seconds per image, split into detector and segmenter, from the footers of a run's shards."""

import contextlib
import json
from typing import Any

from owlsam_ray import storage
from owlsam_ray.run.counts import RunCounts
from owlsam_ray.run.paths import PROGRESS_FILE
from owlsam_ray.run.run import StoredRun

DETECTOR_STAGE, SEGMENTER_STAGE = "detect", "segment"


def run_speed(run: StoredRun) -> dict[str, Any]:
    """Return busy seconds of the models, and the rate of the last attempt.

    Returns:
        `images` (number of images that reached the models), `stage_s` (busy seconds of each stage, summed over all
        actors), `detector_s_per_image` + `segmenter_s_per_image` = `models_s_per_image`, its inverse
        `images_per_s_per_actor` (the rate of one actor's models when nothing holds them up), and `wall_images_per_s`
        (of the last attempt that labelled something, including start-up, as in `progress.json`). None where nothing was
        measured.

    Raises:
        IncompleteError: a shard file is damaged or foreign.
    """
    run_counts = RunCounts(run).refresh()
    counts, stage_s = run_counts.counts, run_counts.stage_s
    images = counts["ok"] + counts["empty"]
    detector = stage_s.get(DETECTOR_STAGE, 0.0) / images if images else None
    segmenter = stage_s.get(SEGMENTER_STAGE, 0.0) / images if images else None
    total = detector + segmenter if detector is not None and segmenter is not None else None
    return {
        "images": images,
        "detections": counts["detections"],
        "masks": counts["masks"],
        "stage_s": {stage: round(seconds, 3) for stage, seconds in sorted(stage_s.items())},
        "detector_s_per_image": detector,
        "segmenter_s_per_image": segmenter,
        "models_s_per_image": total,
        "images_per_s_per_actor": 1 / total if total else None,
        "wall_images_per_s": _wall_rate(run.url),
    }


def _wall_rate(run_url: str) -> float | None:
    """Images per second reported by the last attempt; None if it labelled nothing, or reported nothing."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        rate = json.loads(storage.read_bytes(storage.join(run_url, PROGRESS_FILE))).get("images_per_s")
        return float(rate) if rate > 0 else None
    return None
