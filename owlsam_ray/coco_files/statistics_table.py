"""Formats statistics as tables for a terminal."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from owlsam_ray.terminal import safe_text

MAX_CATEGORIES = 40
"""Maximum number of categories in the table; the JSON file has all of them."""
_UNDEFINED = "–"
_BAR = 30
_GROUPS = {"r": "rare", "c": "common", "f": "frequent"}


def statistics_table(result: dict[str, Any]) -> RenderableType:
    """Tables of the result of `statistics`."""
    parts: list[RenderableType] = [_overview(result), _categories(result["categories"])]
    if result["frequency_groups"] is not None:
        parts.append(_groups(result["frequency_groups"]))
    if result["scores"] is not None:
        parts.append(_scores(result["scores"]))
    problems = {name: found for name, found in result["problems"].items() if found["count"]}
    if problems:
        parts.append(_problems(problems))
    return Group(*parts)


def _overview(result: dict[str, Any]) -> Table:
    table = _table(result["file"])
    table.show_header = False
    for name, value in _lines(result):
        table.add_row(name, safe_text(value))
    return table


def _lines(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    images, annotations, categories = result["images"], result["annotations"], result["categories"]
    per_image, shown = images["annotations_per_image"], images["categories_per_image"]
    areas, crowds, masks, sizes = annotations["areas"], annotations["crowds"], annotations["masks"], images["sizes"]
    yield "images", f"{images['number']:,} · {images['without_annotations']:,} without annotations"
    yield (
        "annotations",
        f"{annotations['number']:,} · {crowds['number']:,} crowds ({_percent(crowds['share'])}) · "
        f"{masks['number']:,} with masks ({masks['polygons']:,} polygons, {masks['rle']:,} RLE)",
    )
    yield "categories", f"{categories['number']:,} · {len(categories['without_objects']):,} without objects"
    yield "annotations per image", _spread(per_image)
    yield "categories per image", _spread(shown)
    yield "objects per category", _spread(categories["objects_per_category"])
    shares = (f"{name} {_percent(areas[name]['share'])}" for name in ("small", "medium", "large"))
    yield "object areas", f"{' · '.join(shares)} (below 32², below 96², above)"
    if sizes["known"]:
        first = sizes["most_frequent"][0]
        yield "image width", _spread(sizes["width"])
        yield "image height", _spread(sizes["height"])
        yield (
            "image sizes",
            f"{sizes['distinct']:,} · most often {first['width']} × {first['height']} "
            f"({_percent(first['images'] / sizes['known'])})",
        )


def _categories(categories: dict[str, Any]) -> RenderableType:
    rows = sorted((row for row in categories["rows"] if row["objects"]), key=lambda row: -row["objects"])
    if not rows:
        return safe_text("")
    cut = len(rows) > MAX_CATEGORIES
    table = _table("Categories" + (f": the first {MAX_CATEGORIES} of {len(rows):,} with objects" if cut else ""))
    table.add_column("category")
    table.add_column("objects", justify="right")
    table.add_column("images", justify="right")
    table.add_column("")
    for row in rows[:MAX_CATEGORIES]:
        bar = "█" * max(1, round(_BAR * row["objects"] / rows[0]["objects"]))
        table.add_row(safe_text(row["name"]), f"{row['objects']:,}", f"{row['images']:,}", bar)
    return table


def _groups(groups: dict[str, Any]) -> RenderableType:
    table = _table("Frequency groups")
    for title in ("group", "categories", "without objects", "objects"):
        table.add_column(title, justify="left" if title == "group" else "right")
    for letter, numbers in groups["groups"].items():
        table.add_row(_GROUPS[letter], *(f"{numbers[key]:,}" for key in ("categories", "without_objects", "objects")))
    stated = groups["stated"]
    comparisons = [
        f"{stated[f'{key}_equal']:,} of {stated[f'{key}_stated']:,} stated {key} equal the counts in the file"
        for key in ("instance_count", "image_count")
        if stated[f"{key}_stated"]
    ]
    return Group(table, safe_text("; ".join(comparisons)))


def _scores(scores: dict[str, Any]) -> Table:
    table = _table(f"Scores of {scores['number']:,} annotations")
    for title in ("score above", "annotations", "images"):
        table.add_column(title, justify="right")
    for line in scores["above"][::2]:
        table.add_row(f"{line['threshold']:g}", f"{line['annotations']:,}", f"{line['images']:,}")
    return table


def _problems(problems: dict[str, Any]) -> Table:
    table = _table("Problems")
    table.add_column("problem")
    table.add_column("count", justify="right")
    table.add_column("first example")
    for name, found in problems.items():
        table.add_row(name, f"{found['count']:,}", safe_text(found["examples"][0]))
    return table


def _spread(numbers: dict[str, Any]) -> str:
    if numbers["mean"] is None:
        return _UNDEFINED
    return (
        f"mean {numbers['mean']:,.2f} · median {numbers['median']:,g} · from {numbers['min']:,} to {numbers['max']:,}"
    )


def _percent(part: float | None) -> str:
    return _UNDEFINED if part is None else f"{part:.1%}"


def _table(title: str) -> Table:
    return Table(title=safe_text(title), title_justify="left", show_edge=False, pad_edge=False)
