"""Print an evaluation as tables."""

from collections.abc import Iterable
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from owlsam_ray.evaluate.sizes import ALL
from owlsam_ray.terminal import safe_text

UNDEFINED = "–"
MAX_CATEGORIES = 40
"""Most categories printed. With more, their rows are only in the JSON file."""
_OF_BOXES = {"box_ap": "box AP", "box_ap50": "box AP50"}
_OF_MASKS = {"mask_ap": "mask AP", "mask_ap50": "mask AP50", "miou": "mIoU", "dice": "Dice"}
_OF_BOTH = {"precision": "precision", "recall": "recall", "num_objects": "objects"}


def evaluation_table(evaluation: dict[str, Any]) -> RenderableType:
    """Make tables of an evaluation as returned by `evaluate_run`; undefined values are shown as "–"."""
    columns = _columns(evaluation)
    parts: list[RenderableType] = [_numbers(evaluation), _groups(evaluation, columns)]
    categories = evaluation["categories"]
    if len(categories) <= MAX_CATEGORIES:
        parts.append(_categories(categories, columns))
    else:
        parts.append(safe_text(f"{len(categories)} categories: see `categories` in the JSON"))
    parts.append(safe_text(_footnote(evaluation)))
    parts += [safe_text(line) for line in _left_out(evaluation["counts"])]
    if evaluation["mapping"] is not None:
        parts.append(safe_text(_mapping(evaluation["mapping"])))
    if evaluation["speed"] is not None:
        parts.append(safe_text(_speed(evaluation["speed"])))
    return Group(*parts)


def _numbers(evaluation: dict[str, Any]) -> Table:
    counts = evaluation["counts"]
    table = _table(
        f"{evaluation['style'].upper()} numbers · {counts['images']} images · {counts['objects']} objects · "
        f"{counts['predictions']} predictions"
    )
    table.add_column("")
    kinds = {kind: evaluation[kind] for kind in ("box", "mask") if evaluation[kind] is not None}
    names = list(next(iter(kinds.values())))
    for name in names:
        table.add_column(name, justify="right")
    for kind, numbers in kinds.items():
        table.add_row(kind, *(_cell(numbers[name]) for name in names))
    return table


def _columns(evaluation: dict[str, Any]) -> dict[str, str]:
    """Keys and titles of the kinds that were evaluated."""
    boxes = _OF_BOXES if evaluation["box"] is not None else {}
    masks = _OF_MASKS if evaluation["mask"] is not None else {}
    return boxes | masks | _OF_BOTH


def _groups(evaluation: dict[str, Any], columns: dict[str, str]) -> Table:
    table = _table("Groups and sizes (side of the object's box, px)")
    table.add_column("group")
    table.add_column("size")
    _add_columns(table, columns)
    for name, sizes in evaluation["groups"].items():
        for size, row in sizes.items():
            table.add_row(
                safe_text(name if size == ALL else ""), size, *_cells(row, columns), end_section=size == list(sizes)[-1]
            )
    return table


def _categories(categories: list[dict[str, Any]], columns: dict[str, str]) -> Table:
    table = _table("Categories")
    table.add_column("category")
    _add_columns(table, columns)
    for category in categories:
        table.add_row(safe_text(category["name"]), *_cells(category["sizes"][ALL], columns))
    return table


def _footnote(evaluation: dict[str, Any]) -> str:
    settings, kept = evaluation["settings"], evaluation["reduce_score_threshold"]
    text = (
        f"precision, recall, mIoU, Dice: scores of at least {settings['score_threshold']:g}, matched by "
        f"{settings['matched_by']} IoU of at least {settings['iou_threshold']:g}; AP: all scores"
    )
    return text if kept is None else f"{text} that reduce kept (above {kept:g})"


def _left_out(counts: dict[str, Any]) -> list[str]:
    """Describe images of one side that the other one lacks, and annotations that do not count as objects."""
    lines = []
    if counts["images_not_labelled"]:
        lines.append(f"{counts['images_not_labelled']} more images of the ground truth are not labelled: not scored")
    if counts["images_not_in_the_ground_truth"]:
        lines.append(
            f"{counts['images_not_in_the_ground_truth']} images with {counts['predictions_left_out']} predictions are "
            "not in the ground truth: left out"
        )
    if counts["images_failed"]:
        lines.append(f"{counts['images_failed']} of the images failed: their objects count as missed")
    if counts["crowd_regions"] and not counts["objects"]:
        lines.append(f"all {counts['crowd_regions']} objects are crowd regions")
    return lines


def _mapping(mapping: dict[str, Any]) -> str:
    without = len(mapping["categories_without_counterpart"])
    return (
        f"{mapping['name']}: {mapping['predictions_left_out']} predictions left out, of categories without a "
        f"counterpart; {without} of the ground truth's categories have none, and the row (mapped) leaves them out"
    )


def _speed(speed: dict[str, Any]) -> str:
    detector, segmenter, total, actor, wall = (
        _cell(speed[key], digits=4)
        for key in (
            "detector_s_per_image",
            "segmenter_s_per_image",
            "models_s_per_image",
            "images_per_s_per_actor",
            "wall_images_per_s",
        )
    )
    return (
        f"seconds per image: detector {detector} + segmenter {segmenter} = {total}; images per second: {actor} by one "
        f"actor's models, {wall} in the last attempt"
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", show_edge=False, pad_edge=False)


def _add_columns(table: Table, columns: dict[str, str]) -> None:
    for title in columns.values():
        table.add_column(title, justify="right")


def _cells(row: dict[str, Any], columns: Iterable[str]) -> Iterable[str]:
    return (_cell(row[key]) for key in columns)


def _cell(value: float | None, *, digits: int = 3) -> str:
    if value is None:
        return UNDEFINED
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"
