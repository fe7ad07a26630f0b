"""Evaluate a reduced run, or a file of predictions, against a ground truth."""

import json
import logging
from typing import Any

from owlsam_ray import storage
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import IncompleteError, InputError, one_line
from owlsam_ray.evaluate.average_precision import Kind
from owlsam_ray.evaluate.ground_truth import GroundTruth, load_ground_truth
from owlsam_ray.evaluate.predictions import Predictions, load_predictions
from owlsam_ray.evaluate.speed import run_speed
from owlsam_ray.evaluate.summary import summarize
from owlsam_ray.run.paths import ANNOTATIONS, COCO_FOLDER, EVALUATION_FILE, FAILURES
from owlsam_ray.run.record import RunRecord
from owlsam_ray.run.run import open_labelled_run

_log = logging.getLogger(__name__)


def evaluate_run(config: RunConfig) -> dict[str, Any]:
    """Evaluate what `reduce` wrote, boxes and masks, and write `RUN/evaluation.json`.

    Returns:
        The content of the file: the keys of `summarize`, `ground_truth`, `predictions`, `reduce_score_threshold`, and
        `speed` (see `run_speed`). Images that both the ground truth and the run have are scored; those that failed
        count as images without predictions. The numbers of other images on either side are counted and logged. Numbers
        of masks are None, and this is logged, if the ground truth or the run has no masks.

    Raises:
        InputError: there is no run, no ground truth, or an entry of a file is malformed or of another dataset.
        GuardError: the run was made with other settings.
        IncompleteError: the run is not labelled, or not reduced yet.
    """
    run = open_labelled_run(config)
    annotations = storage.join(run.url, COCO_FOLDER, ANNOTATIONS)
    if not storage.exists(annotations):
        raise IncompleteError(
            f"{run.url} is not reduced yet, or not to one COCO file (no coco/annotations.json): run `owlsam reduce` "
            "first, without reduce.out and reduce.images_per_file. To evaluate other files, give --ground-truth and "
            "--predictions without a run"
        )
    truth = load_ground_truth(_ground_truth_url(config), masks=True)
    predictions = load_predictions(
        annotations, truth, masks=truth.has_masks, mapping=config.evaluate.mapping,
        failed=_failed_images(storage.join(run.url, COCO_FOLDER, FAILURES)),
    )  # fmt: skip
    provenance = _provenance(predictions, run.record)
    truth, listed = _scored(truth, predictions), len(truth.images)
    _warn(truth, predictions, listed)
    evaluation = {
        "ground_truth": truth.url,
        "predictions": annotations,
        "reduce_score_threshold": provenance.get("score_threshold"),
        **summarize(truth, predictions, _kinds(truth, predictions), config.evaluate, num_listed=listed),
        "speed": run_speed(run),
    }
    text = json.dumps(evaluation, indent=1, allow_nan=False)
    storage.write_atomic(storage.join(run.url, EVALUATION_FILE), text.encode())
    return evaluation


def evaluate_files(
    ground_truth: str, predictions: str, kind: Kind, settings: EvaluateConfig, *, lvis: bool = False
) -> dict[str, Any]:
    """Evaluate a file of COCO results, or labels with scores, in boxes or in masks.

    Args:
        ground_truth: path or fsspec URL of a COCO or LVIS file.
        predictions: path or fsspec URL.
        kind: IoU of boxes or of masks.
        settings: thresholds, sizes, and the mapping of categories.
        lvis: evaluate as LVIS does, even if no image has `neg_category_ids`.

    Returns:
        The same as `evaluate_run`, with None for `reduce_score_threshold` and `speed`.

    Raises:
        InputError: an entry of a file is malformed or of another dataset, or masks are missing.
    """
    truth = load_ground_truth(ground_truth, masks=kind == "segm", lvis=lvis)
    if kind == "segm" and not truth.has_masks:
        raise InputError(f"{ground_truth} has no segmentations: evaluate boxes, with --kind bbox")
    found = load_predictions(predictions, truth, masks=kind == "segm", mapping=settings.mapping)
    if kind == "segm" and found.regions and all(region.rle is None for region in found.regions):
        raise InputError(f"{predictions} has no segmentations: evaluate boxes, with --kind bbox")
    truth, listed = _scored(truth, found), len(truth.images)
    _warn(truth, found, listed)
    return {
        "ground_truth": truth.url,
        "predictions": found.url,
        "reduce_score_threshold": None,
        **summarize(truth, found, (kind,), settings, num_listed=listed),
        "speed": None,
    }


def _ground_truth_url(config: RunConfig) -> str:
    url = config.evaluate.ground_truth or config.data.annotations
    if url is None:
        raise InputError("no ground truth: set evaluate.ground_truth, a COCO or LVIS JSON file with annotations")
    return url


def _provenance(predictions: Predictions, record: RunRecord) -> dict[str, Any]:
    """Return what `reduce` recorded about the labels.

    Raises:
        IncompleteError: they were not made from this run's shards.
    """
    provenance = predictions.info.get("owlsam_ray")
    if not isinstance(provenance, dict) or provenance.get("fingerprint") != record.fingerprint:
        raise IncompleteError(f"{predictions.url} was not made from this run's labels: run `owlsam reduce` again")
    return provenance


def _kinds(truth: GroundTruth, predictions: Predictions) -> tuple[Kind, ...]:
    if not truth.has_masks:
        _log.warning("%s has no segmentations: boxes only", truth.url)
        return ("bbox",)
    if predictions.regions and all(region.rle is None for region in predictions.regions):
        _log.warning("no label of the run has a mask: boxes only")
        return ("bbox",)
    return ("bbox", "segm")


def _failed_images(url: str) -> dict[int, str]:
    """File names by id of the images that `reduce` lists as failed."""
    try:
        text = storage.read_bytes(url)
    except FileNotFoundError:
        return {}
    try:
        rows = [json.loads(line) for line in text.splitlines()]
        return {row["image_id"]: row["file_name"] for row in rows}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise InputError(f"{url} is damaged ({one_line(error)}): reduce again") from None


def _scored(truth: GroundTruth, predictions: Predictions) -> GroundTruth:
    """Keep the images that are scored: the images listed by the predictions' file, and failed ones.

    For a bare list of results, keep all: it does not distinguish images without detections from images not processed.
    """
    return truth if predictions.labelled is None else truth.of_images(predictions.labelled | predictions.failed)


def _warn(truth: GroundTruth, predictions: Predictions, num_listed: int) -> None:
    if not predictions.regions:
        _log.warning("%s holds no predictions of these images: every object counts as missed", predictions.url)
    if predictions.num_images_left_out:
        _log.warning(
            "%d images of %s are not in the ground truth: left out, with %d predictions",
            predictions.num_images_left_out, predictions.url, predictions.num_left_out,
        )  # fmt: skip
    if len(truth.images) < num_listed:
        _log.warning(
            "%d of the ground truth's %d images are not labelled: scored without them",
            num_listed - len(truth.images), num_listed,
        )  # fmt: skip
    if predictions.failed:
        _log.warning(
            "%d of the %d images that are scored failed: their objects count as missed",
            len(predictions.failed), len(truth.images),
        )  # fmt: skip
    if not truth.objects:
        _log.warning("none of the %d images that are scored has an object: recall and AP are null", len(truth.images))
    elif all(each.is_crowd for each in truth.objects):
        _log.warning(
            "all %d objects of %s are crowd regions (iscrowd), in which predictions are neither right nor wrong: "
            "recall and AP are null. Some tools export brush masks as crowds: set their iscrowd to 0",
            len(truth.objects), truth.url,
        )  # fmt: skip
