"""Computes statistics of a COCO-format file (ground truth or output) without an object per annotation."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.coco_files.annotation_counts import AnnotationCounts, Index
from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.coco_files.histograms import SIDE_EDGES, Histogram, share, spread_of
from owlsam_ray.coco_files.problems import Problem, Problems
from owlsam_ray.coco_files.stated_size import stated_sides
from owlsam_ray.errors import shown
from owlsam_ray.ops.arrays import repeats

_IMAGE_SCHEMA = pa.schema([("id", pa.int64()), ("height", pa.float64()), ("width", pa.float64())])
_FREQUENT_SIZES = 20
_CELLS = 48
"""Maximum number of bins per side of the map of image sizes."""
_GROUPS = {"r": 10, "c": 100}
"""LVIS calls a category rare up to 10 images of its training set, common up to 100, frequent above."""

_STATED = tuple(f"{key}_{what}" for key in ("instance_count", "image_count") for what in ("stated", "equal"))


@dataclass(frozen=True, slots=True)
class _Images:
    """M images of a file."""

    index: Index
    sizes_wh: NDArray[np.float64]
    """(M, 2); infinite where a size is invalid or not stated."""


def statistics(url: str, show: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Count the contents of a COCO-format file.

    Every annotation counts, including crowds. An area is the stated one, or the box's area where none is stated. Masks
    are counted in the JSON text: a key `segmentation` inside another value would count as one.

    Args:
        url: path or fsspec URL.
        show: called with the bytes read so far and the size of the file in bytes.

    Returns:
        Plain JSON values: `file`, `bytes`, `images`, `annotations`, `categories`, `frequency_groups` (None without
        LVIS's fields), `scores` (None without scores), `problems` (count and quotes of each `Problem`).

    Raises:
        InputError: the file cannot be read, is not a COCO file, or a field has a wrong type.
    """
    problems = Problems()
    with open_document(url) as document:
        for key in ("images", "categories", "annotations"):
            if not document.has(key):
                problems.add(Problem(f"no_{key}"), f"the file has no list `{key}`")
        categories = _read_categories(document, problems)
        images = _read_images(document, problems)
        counts = AnnotationCounts(
            images=images.index,
            categories=Index(
                np.array([entry["id"] for entry in categories], np.int64), np.arange(len(categories), dtype=np.int64)
            ),
            sizes_wh=images.sizes_wh,
            num_categories=len(categories),
        )
        for block in document.blocks("annotations"):
            counts.add(block, problems)
            show(block.stop, len(document))
        show(len(document), len(document))
        num_bytes = len(document)
    counts.record_repeats(problems)
    rows = _category_rows(categories, counts)
    return {
        "file": url,
        "bytes": num_bytes,
        "images": _image_numbers(images.sizes_wh, counts),
        "annotations": {"number": counts.number} | counts.objects(),
        "categories": _category_numbers(rows),
        "frequency_groups": _frequency_groups(categories, rows),
        "scores": counts.scores(),
        "problems": problems.as_dict(),
    }


def _read_categories(document: Document, problems: Problems) -> list[dict[str, Any]]:
    """Read the categories that have a unique id; each gets a name."""
    kept: dict[int, dict[str, Any]] = {}
    for position, entry in enumerate(document.value("categories", list, [])):
        number = entry.get("id") if isinstance(entry, dict) else None
        if type(number) is not int or not -(2**63) <= number < 2**63:
            problems.add(Problem.ODD_CATEGORY, f"categories[{position}] is {shown(entry, 80)}")
        elif number in kept:
            problems.add(
                Problem.DUPLICATE_CATEGORY_ID,
                f"categories[{position}]: id {number} is also that of {shown(kept[number]['name'])}",
            )
        elif not isinstance(entry.get("name"), str):
            problems.add(Problem.ODD_CATEGORY, f"categories[{position}]: name {shown(entry.get('name'), 80)}")
            kept[number] = entry | {"name": f"(id {number})"}
        else:
            kept[number] = entry
    ids: defaultdict[str, list[int]] = defaultdict(list)
    for number, entry in kept.items():
        ids[entry["name"]].append(number)
    for name, numbers in ids.items():
        if len(numbers) > 1:
            problems.add(Problem.DUPLICATE_CATEGORY_NAME, f"{shown(name, 80)}: ids {', '.join(map(str, numbers))}")
    return list(kept.values())


def _read_images(document: Document, problems: Problems) -> _Images:
    all_ids, all_known, all_sizes = [np.empty(0, np.int64)], [np.empty(0, np.bool_)], [np.empty((0, 2))]
    for first, table in document.columns("images", _IMAGE_SCHEMA):
        ids, known, sizes = _image_columns(table, first, problems)
        all_ids.append(ids)
        all_known.append(known)
        all_sizes.append(sizes)
    ids, known = np.concatenate(all_ids), np.concatenate(all_known)
    positions = np.flatnonzero(known)
    ids = ids[known]
    later, first_of = repeats(ids)
    problems.add_many(
        Problem.DUPLICATE_IMAGE_ID,
        np.ones(len(later), np.bool_),
        lambda row: (
            f"images[{positions[later[row]]}]: id {ids[later[row]]} is also that of images[{positions[first_of[row]]}]"
        ),
    )
    return _Images(Index(ids, positions), np.concatenate(all_sizes))


def _image_columns(
    table: pa.Table, first: int, problems: Problems
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
    """(B,) ids, (B,) whether there is one, (B, 2) widths and heights, infinite where invalid or not stated."""
    known = table["id"].is_valid().to_numpy()
    ids = table["id"].fill_null(0).to_numpy()
    stated = np.stack([table["width"].to_numpy(), table["height"].to_numpy()], axis=1)
    columns = [stated_sides(table[name].combine_chunks()) for name in ("width", "height")]
    sizes = np.stack([side.cast(pa.float64()).to_numpy(zero_copy_only=False) for side, _ in columns], axis=1)
    unstated = np.isnan(sizes) & np.stack([fits.to_numpy(zero_copy_only=False) for _, fits in columns], axis=1)
    unstated = unstated.all(axis=1)
    odd = np.isnan(sizes).any(axis=1)
    sizes[odd] = np.inf
    problems.add_many(Problem.IMAGE_WITHOUT_ID, ~known, lambda row: f"images[{first + row}]")
    problems.add_many(
        Problem.ODD_IMAGE_SIZE,
        odd & ~unstated,
        lambda row: f"images[{first + row}] (id {ids[row]}): {_side(stated[row, 0])} × {_side(stated[row, 1])}",
    )
    problems.add_many(Problem.IMAGE_WITHOUT_SIZE, unstated, lambda row: f"images[{first + row}] (id {ids[row]})")
    return ids, known, sizes


def _side(value: float) -> str:
    return "unstated" if np.isnan(value) else f"{value:g}"


def _image_numbers(sizes_wh: NDArray[np.float64], counts: AnnotationCounts) -> dict[str, Any]:
    values, times = np.unique(counts.per_image, return_counts=True)
    empty = int(np.count_nonzero(counts.per_image == 0))
    return {
        "number": len(sizes_wh),
        "without_annotations": empty,
        "annotations_per_image": spread_of(counts.per_image)
        | {
            "mean_of_annotated": share(int(counts.per_image.sum()), len(sizes_wh) - empty),
            "distribution": np.stack([values, times], axis=1).tolist(),
        },
        "categories_per_image": spread_of(counts.categories_per_image()),
        "sizes": _size_numbers(sizes_wh[np.isfinite(sizes_wh).all(axis=1)].astype(np.int64)),
    }


def _size_numbers(sizes_wh: NDArray[np.int64]) -> dict[str, Any]:
    distinct, times = np.unique(sizes_wh, axis=0, return_counts=True)
    most = np.argsort(-times, kind="stable")[:_FREQUENT_SIZES]
    sides = Histogram(SIDE_EDGES)
    sides.add(np.sqrt(sizes_wh.prod(axis=1, dtype=np.float64)))
    greatest = int(sizes_wh.max(initial=1))
    # The smallest of 1, 2, 5, 10, 20, … px that needs at most `_CELLS` bins.
    step = next(
        digit * 10**power for power in range(10) for digit in (1, 2, 5) if greatest <= digit * 10**power * _CELLS
    )
    cells, in_cell = np.unique(sizes_wh // step, axis=0, return_counts=True)
    return {
        "known": len(sizes_wh),
        "width": spread_of(sizes_wh[:, 0]),
        "height": spread_of(sizes_wh[:, 1]),
        "distinct": len(distinct),
        "most_frequent": [
            {"width": int(distinct[place, 0]), "height": int(distinct[place, 1]), "images": int(times[place])}
            for place in most
        ],
        "side_px": sides.as_dict(),
        "map": {"step_px": step, "cells": np.concatenate([cells, in_cell[:, None]], axis=1).tolist()},
    }


def _category_rows(categories: list[dict[str, Any]], counts: AnnotationCounts) -> list[dict[str, Any]]:
    images = counts.images_per_category().tolist()
    return [
        {"id": entry["id"], "name": entry["name"], "objects": objects, "images": shown}
        for entry, objects, shown in zip(categories, counts.per_category.tolist(), images, strict=True)
    ]


def _category_numbers(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "number": len(rows),
        "without_objects": [row["name"] for row in rows if not row["objects"]],
        "objects_per_category": spread_of(np.array([row["objects"] for row in rows], np.int64)),
        "rows": rows,
    }


def _frequency_groups(categories: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Counts by LVIS's groups, and whether the counts that the file states for its categories match its content."""
    groups = [_group_of(entry) for entry in categories]
    if not any(groups):
        return None
    numbers = {}
    for group in ("r", "c", "f"):
        members = [row for row, its_group in zip(rows, groups, strict=True) if its_group == group]
        numbers[group] = {
            "categories": len(members),
            "without_objects": sum(not row["objects"] for row in members),
            "objects": sum(row["objects"] for row in members),
        }
    stated = dict.fromkeys(_STATED, 0)
    for entry, row in zip(categories, rows, strict=True):
        for key, own in (("instance_count", "objects"), ("image_count", "images")):
            if type(entry.get(key)) is int:
                stated[f"{key}_stated"] += 1
                stated[f"{key}_equal"] += entry[key] == row[own]
    return {"groups": numbers, "ungrouped": sum(group is None for group in groups), "stated": stated}


def _group_of(entry: dict[str, Any]) -> str | None:
    """The group that the file states, or the group by its stated number of images; None without either."""
    if entry.get("frequency") in ("r", "c", "f"):
        return str(entry["frequency"])
    images = entry.get("image_count")
    if type(images) is not int or images < 1:
        return None
    return next((group for group, most in _GROUPS.items() if images <= most), "f")
