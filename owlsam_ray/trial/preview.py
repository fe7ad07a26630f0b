"""`owlsam preview`: label and draw a few images in this process, to find prompts and thresholds before a run.

All stages are those of a run, from bytes to RLE, but without Ray and without a run directory.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from owlsam_ray import storage
from owlsam_ray.coco_files.document import open_document
from owlsam_ray.config.base import MEGABYTE
from owlsam_ray.config.data import DataConfig
from owlsam_ray.config.load import absolute, load_tree, validate_tree, with_absolute_paths
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError, ImageError, InputError, shown
from owlsam_ray.fetch.images import fetch_file
from owlsam_ray.inference.decode import decode_image
from owlsam_ray.inference.queries import embed_vocabulary
from owlsam_ray.models.load import find_models
from owlsam_ray.models.shipped import check_shipped, model_settings
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.records import EncodedImage, Prediction
from owlsam_ray.sources import list_images
from owlsam_ray.trial.contact_sheet import CELL, LabelledImage, label_picture, was_drawn_here, write_contact_sheet
from owlsam_ray.trial.images import label_here
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary

_COLUMNS = 4
_SIDES = (640, 1600)
"""Minimum and maximum long side, in pixels, of an image that is drawn alone."""
_OF_REDUCE = ("reduce", "evaluate", "run")


@dataclass(frozen=True, slots=True)
class Preview:
    """Result of a preview."""

    rows: list[tuple[str, Prediction]]
    """Path or URL of each image, and its labels."""
    vocabulary: Vocabulary
    sheet: str
    """Path of the PNG."""

    def counts(self, min_score: float) -> list[dict[str, Any]]:
        """For each category, in order: the number of drawn boxes, and their best and median scores (None if none)."""
        result = []
        for label, category in enumerate(self.vocabulary.categories):
            scores = np.concatenate(
                [np.zeros(0, np.float32)]
                + [row.detections.scores[row.detections.labels == label] for _, row in self.rows]
            )
            scores = scores[scores >= min_score]
            result.append(
                {
                    "category": category.name,
                    "boxes": len(scores),
                    "best_score": round(float(scores.max()), 4) if len(scores) else None,
                    "median_score": round(float(np.median(scores)), 4) if len(scores) else None,
                }
            )
        return result

    def failed(self) -> dict[str, str]:
        """Reasons of failure by path or URL, for images that could not be labelled."""
        return {url: row.failure[0] for url, row in self.rows if row.failure is not None}


def preview_config(
    run_files: Sequence[str], *, overrides: Sequence[str], prompts: Sequence[str], demo: bool
) -> RunConfig:
    """Build the settings of a preview from run files, the demo's models, or `--set` alone.

    Args:
        run_files: run files, merged from left to right; may be empty.
        overrides: settings as `section.field=value`.
        prompts: texts used verbatim, each as a separate category; if empty, the vocabulary of the run file is used.
        demo: start with the models that come with the package.

    Raises:
        ConfigError: no models or no prompts are named, or a setting is invalid.
    """
    if demo and run_files:
        raise ConfigError("--demo and --run-file both choose the models: give one of them")
    for section in load_tree([], overrides):
        if section in _OF_REDUCE:
            raise ConfigError(f"--set {section}…: a preview draws what a run would keep; its threshold is --min-score")
        if section == "vocabulary" and prompts:
            raise ConfigError("--prompts and --set vocabulary… both choose the prompts: give one of them")
    tree = model_settings() if demo else {}
    for section, values in load_tree(run_files, overrides).items():
        if section not in _OF_REDUCE:
            tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    for section in ("detector", "segment"):
        if not isinstance(tree.get(section), dict) or "weights" not in tree[section]:
            raise ConfigError(
                f"no model: {section}.weights is not set. Name a run file (--run-file run.yaml), or give "
                "--set detector.weights=… --set segment.weights=…, or --demo for the small models that come with the "
                "package"
            )
    if any(not prompt.strip() for prompt in prompts):
        raise ConfigError("--prompts holds an empty text")
    if prompts:
        repeated = sorted({prompt for prompt in prompts if prompts.count(prompt) > 1})
        if repeated:
            raise ConfigError(f"--prompts names {shown(repeated[0])} twice")
        tree["vocabulary"] = {
            "categories": [
                {"id": number, "name": prompt, "prompts": [prompt]} for number, prompt in enumerate(prompts, start=1)
            ]
        }
    elif not tree.get("data") and isinstance(given := tree.get("vocabulary", {}), dict) and "categories" not in given:
        raise ConfigError("nothing to look for: give --prompts, or a run file with vocabulary.categories")
    tree.setdefault("data", {"source": "folder", "images": "."})
    return with_absolute_paths(validate_tree(RunConfig, tree, run_files or ["--set"]))


def expand_images(paths: Sequence[str], config: RunConfig, *, count: int, out: str) -> list[str]:
    """Expand folders to the image files below them; return at most `count` files, evenly spread.

    Args:
        paths: files, folders or fsspec URLs.
        config: its `data.suffixes` select the files in folders.
        count: maximum number of images.
        out: the PNG that will be written; if it is in one of the folders, it is skipped.

    Raises:
        ConfigError: `count` is below 1; or `out` is not a local .png file, is one of the images, or exists and is not
            an earlier preview.
        InputError: a path does not exist or cannot be accessed, or there are no images.
    """
    if count < 1:
        raise ConfigError(f"--max-images is {count}: it must be at least 1")
    if "://" in out or not out.lower().endswith(".png"):
        raise ConfigError(f"--out {out} must be a .png file on this machine")
    if os.path.lexists(out) and not was_drawn_here(Path(out)):
        raise ConfigError(f"--out {out} exists and is not a preview: it would be overwritten. Choose another name")
    found: list[str] = []
    for path in paths:
        url = absolute(path)
        try:
            is_folder = storage.is_directory(url)
            is_there = is_folder or storage.exists(url)
        except OSError as error:
            raise InputError(f"cannot access {path}: {error}") from None
        if is_folder:
            folder = DataConfig(source="folder", images=url, suffixes=config.data.suffixes)
            tables = (table.filter(pc.is_null(table["container"])) for table in list_images(folder).tables)
            below = [uri for table in tables for uri in table["uri"].to_pylist()]  # each is opened verbatim
            found += [each for each in below if not _is_same_file(each, out)]
        elif is_there:
            if _is_same_file(url, out):
                raise ConfigError(f"--out {out} is one of the images: it would be overwritten")
            found.append(url)
        else:
            raise InputError(f"there is no image or folder at {path}")
    if not found:
        raise InputError(f"no image in {', '.join(paths)} except an earlier preview")
    wanted = min(count, len(found))
    return [found[index * len(found) // wanted] for index in range(wanted)]


def _is_same_file(url: str, out: str) -> bool:
    return "://" not in url and os.path.realpath(url) == os.path.realpath(out)


def preview(images: Sequence[str], config: RunConfig, *, out: str, min_score: float) -> Preview:
    """Label images and draw them into one PNG.

    Args:
        images: files or fsspec URLs, at least one.
        config: models and settings; of `resources`, only device, dtype, torch threads and decoder batch are used.
        out: path of the PNG; it is written unless all images failed.
        min_score: labels with a lower score are not drawn.

    Raises:
        InputError: no image can be labelled, the vocabulary is invalid, or `out` cannot be written.
        ConfigError: `min_score` is outside 0…1 or below `detector.score_floor`.
        WeightsError: the models do not load.
        PreflightError: the models do not run on this machine.
    """
    if not 0 <= min_score <= 1:
        raise ConfigError(f"--min-score {min_score:g} is not a score: scores are from 0 to 1")
    if min_score < config.detector.score_floor:
        raise ConfigError(
            f"--min-score {min_score:g} is below detector.score_floor {config.detector.score_floor:g}: such boxes are "
            f"not kept. Give --set detector.score_floor={min_score:g} as well"
        )
    _check_writable(Path(out).parent)
    vocabulary = resolve_vocabulary(config.vocabulary, _source_categories(config))
    encoded = [_fetch(number, url, config) for number, url in enumerate(images)]
    rows = list(zip(images, _label(encoded, config, vocabulary), strict=True))
    result = Preview(rows, vocabulary, out)
    alone = len(images) == 1
    drawn = [
        _picture(url, image, row, config, vocabulary, min_score=min_score, alone=alone)
        for (url, row), image in zip(rows, encoded, strict=True)
        if row.failure is None
    ]
    if not drawn:
        reasons = "; ".join(f"{url}: {reason}" for url, reason in result.failed().items())
        raise InputError(f"no image could be labelled: {reasons}")
    side = min(max(max(drawn[0].pixels.shape), _SIDES[0]), _SIDES[1]) if alone else CELL
    write_contact_sheet(drawn, Path(out), columns=_COLUMNS, long_side=side)
    return result


def _check_writable(directory: Path) -> None:
    """Check that the output can be written, before the models run.

    Raises:
        InputError: it cannot.
    """
    try:
        storage.try_writing(str(directory))
    except OSError as error:
        raise InputError(f"--out: cannot write to {directory}: {error.strerror or error}") from None


def _source_categories(config: RunConfig) -> list[dict[str, Any]]:
    """The dataset's categories if the vocabulary uses them; else empty."""
    if config.vocabulary.categories != "dataset" or config.data.annotations is None:
        return []
    with open_document(config.data.annotations) as document:
        categories: list[dict[str, Any]] = document.value("categories", list, [])
    return categories


def _label(images: Sequence[EncodedImage], config: RunConfig, vocabulary: Vocabulary) -> list[Prediction]:
    """Label images with the steps of an actor, but one image per detector and encoder call, which avoids padding."""
    given = config.resources
    resources = ResourcesConfig(
        device=given.device,
        dtype=given.dtype,
        actors=1,
        detector_batch=1,
        segmenter_batch=1,
        decoder_batch=given.decoder_batch,
        torch_threads=given.torch_threads,
    )
    num_cpus = max(2, len(os.sched_getaffinity(0)))
    allocation = allocate(resources, num_cpus=num_cpus, num_gpus=torch.cuda.device_count())
    check_shipped(config.detector.weights, config.segment.weights)
    models = find_models(config.detector, config.segment)
    queries = embed_vocabulary(vocabulary, config, detector_weights=models.detector)
    config = config.model_copy(update={"resources": resources})
    predictions, _ = label_here(images, config, allocation, models=models, queries=queries)
    return predictions


def _fetch(number: int, url: str, config: RunConfig) -> EncodedImage:
    outcome: bytes | ImageError
    try:
        outcome = fetch_file(url, max_bytes=config.decode.max_file_mb * MEGABYTE)
    except ImageError as error:
        outcome = error
    return EncodedImage.of(outcome, image_id=number)


def _picture(
    url: str,
    image: EncodedImage,
    row: Prediction,
    config: RunConfig,
    vocabulary: Vocabulary,
    *,
    min_score: float,
    alone: bool,
) -> LabelledImage:
    decoded = decode_image(
        image.data or b"", stated_hw=None, max_pixels=config.decode.max_pixels, grey16=config.decode.grey16
    )
    kept = np.flatnonzero(row.detections.scores >= min_score)
    segments = [row.segments[index] for index in kept.tolist()]
    return label_picture(
        decoded.pixels,
        row.detections.boxes_xyxy[kept],
        names=[vocabulary.categories[label].name for label in row.detections.labels[kept].tolist()],
        scores=row.detections.scores[kept].tolist(),
        rles=[None if segment is None else segment.rle_counts for segment in segments],
        caption=url.rsplit("/", 1)[-1],
        long_side=_SIDES[1] if alone else CELL,
    )
