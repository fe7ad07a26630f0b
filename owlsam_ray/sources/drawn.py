"""Writes the drawn dataset to disk: `images/<split>/000000.jpg`, and `<split>.json` in COCO format.

Several processes may draw the same split at once: each file appears whole, and an existing file is not rewritten.
"""

import contextlib
import io
import json
import multiprocessing
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from owlsam_ray.errors import GuardError
from owlsam_ray.parallel.child_imports import without_working_directory
from owlsam_ray.sources.drawing import CATEGORIES, SEEN, Drawing, Split, draw
from owlsam_ray.storage import TEMPORARY_PREFIX, remove_stale_temporaries, write_atomic

_CHUNK = 32
"""Images that a process draws at a time."""


def image_root(directory: Path) -> Path:
    """Directory that the `file_name`s of the COCO files are relative to."""
    return directory / "images"


def annotation_file(directory: Path, split: Split) -> Path:
    """The COCO file of a split."""
    return directory / f"{split.name.lower()}.json"


def write_split(directory: Path, split: Split, count: int, *, seed: int = 0, workers: int | None = None) -> Path:
    """Draw a split; a finished split of the same seed and count is left unchanged.

    Args:
        directory: created when it does not exist.
        split: part of the dataset.
        count: number of images.
        seed: seed of the dataset.
        workers: number of processes; default: the CPUs available to this process.

    Returns:
        The COCO file. It appears under its name once all images are written.

    Raises:
        GuardError: a finished split of another seed or count exists, and something may still be reading it.
    """
    file = annotation_file(directory, split)
    if _is_finished(file, count, seed):
        return file
    pictures = image_root(directory) / split.name.lower()
    pictures.mkdir(parents=True, exist_ok=True)
    for each in (directory, pictures):
        remove_stale_temporaries(str(each))
    chunks = [range(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]
    processes = min(workers or len(os.sched_getaffinity(0)), len(chunks))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, of_image in _drawn(partial(_write_chunk, directory, split, seed), chunks, processes):
        images.append(image)
        for annotation in of_image:
            annotations.append({"id": len(annotations) + 1, **annotation})
    tree = {
        "info": {"description": "drawn shapes", "seed": seed, "split": split.name.lower()},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        # Training lists only the pairs that it sees: a name without objects would be learned as never matching.
        "categories": [
            category.model_dump(include={"id", "name", "supercategory"})
            for category in CATEGORIES
            if split is Split.TEST or category.supercategory == SEEN
        ],
    }
    if not _is_finished(file, count, seed):  # another process may have finished first
        write_atomic(str(file), json.dumps(tree).encode())
    return file


def _is_finished(file: Path, count: int, seed: int) -> bool:
    if not file.is_file():
        return False
    way_out = f"choose another directory, or delete {file} if nothing reads it any more"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        there = (len(tree["images"]), tree["info"]["seed"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise GuardError(f"{file} is not a file of drawn pictures: {way_out}") from None
    if there != (count, seed):
        raise GuardError(
            f"{file} lists {there[0]} drawn pictures of seed {there[1]}, not {count} of seed {seed}: {way_out}"
        )
    return True


def _write_once(file: Path, data: bytes) -> None:
    """Write a file atomically; a file with the same bytes is left untouched.

    `write_atomic` is not used: its fsync takes several times as long as the drawing.
    """
    with contextlib.suppress(FileNotFoundError):
        if file.read_bytes() == data:
            return
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{file.name}-{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _drawn(write: Any, chunks: list[range], processes: int) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Yield the result of `write` for each image, in order, using several processes when that pays off."""
    if processes <= 1:
        for chunk in chunks:
            yield from write(chunk)
        return
    # Spawned: a forked child of a process with threads may hang.
    with without_working_directory():
        pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
        results = pool.map(write, chunks)
    with pool:
        for result in results:
            yield from result


def _write_chunk(
    directory: Path, split: Split, seed: int, indices: range
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Draw and write images; return the COCO image and the annotations (without ids) of each."""
    result = []
    for index in indices:
        drawing = draw(seed, split, index)
        name = f"{split.name.lower()}/{index:06d}.jpg"
        data = io.BytesIO()
        # Full colour resolution: a shape may be twelve pixels wide.
        Image.fromarray(drawing.pixels).save(data, "JPEG", quality=92, subsampling=0)
        _write_once(image_root(directory) / name, data.getvalue())
        height, width = drawing.pixels.shape[:2]
        image = {"id": index + 1, "file_name": name, "height": height, "width": width}
        result.append((image, _annotations(drawing, index + 1)))
    return result


def _annotations(drawing: Drawing, image_id: int) -> list[dict[str, Any]]:
    """COCO annotations of a drawing, in drawing order; none for an empty one."""
    if len(drawing.labels) == 0:
        return []
    rles = coco_mask.encode(np.asfortranarray(drawing.masks.transpose(1, 2, 0).astype(np.uint8)))
    return [
        {
            "image_id": image_id,
            "category_id": CATEGORIES[label].id,
            "bbox": box,
            "area": area,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            "iscrowd": 0,
        }
        for label, rle, area, box in zip(
            drawing.labels, rles, coco_mask.area(rles).tolist(), coco_mask.toBbox(rles).tolist(), strict=True
        )
    ]
