"""Print operating points as a table."""

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from owlsam_ray.terminal import safe_text

MAX_CATEGORIES = 60
"""Most categories printed. With more, only categories below the target are printed; the JSON file has all."""
_UNDEFINED = "–"


def operating_points_table(result: dict[str, Any]) -> RenderableType:
    """Make a table of what `calibrate_run` returns; undefined values are shown as "–"."""
    rows = result["categories"]
    shown = rows if len(rows) <= MAX_CATEGORIES else [row for row in rows if not row["reached"]][:MAX_CATEGORIES]
    parts: list[RenderableType] = [_categories(result, shown)] if shown else []
    if len(shown) < len(rows):
        line = f"shown: {len(shown)} of {len(rows)} categories, which all miss the target; the JSON has the others too"
        parts.append(safe_text(line))
    parts += [safe_text(line) for line in _footnotes(result)]
    return Group(*parts)


def target_words(target: dict[str, Any]) -> str:
    """Describe the target, such as `precision of at least 0.9` or `best F1`, and what makes a detection right."""
    wanted = "best F1" if target["name"] == "f1" else f"{target['name']} of at least {target['value']:g}"
    return f"{wanted}, by {target['shape']} IoU of at least {target['iou_threshold']:g}"


def _categories(result: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    counts = result["counts"]
    table = Table(
        title=f"Operating points: {target_words(result['target'])} · {counts['images_used']} images · "
        f"{counts['objects']} objects · {counts['detections']} detections",
        title_justify="left", show_edge=False, pad_edge=False,
    )  # fmt: skip
    table.add_column("category")
    for title in ("threshold", "95 %", "precision", "95 %", "recall", "95 %", "kept", "right", "objects"):
        table.add_column(title, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            safe_text(row["name"]),
            f"{row['threshold']:.4g}", _ends(row["threshold_interval"]),
            _number(row["precision"]), _ends(row["precision_interval"]),
            _number(row["recall"]), _ends(row["recall_interval"]),
            *(str(row[f"num_{name}"]) for name in ("kept", "right", "objects")),
            safe_text(_remark(row)),
        )  # fmt: skip
    return table


def _remark(row: dict[str, Any]) -> str:
    parts = []
    if row["too_few_examples"]:
        parts = ["not reached: too few examples to show it"]
    elif not row["reached"]:
        parts = ["not reached"]
    if row["pool"] is not None:
        only = "only " if row["reached"] and not row["reached_alone"] else ""
        parts.append(f"{only}with {row['pool']['name']}")
    return ", ".join(parts)


def _footnotes(result: dict[str, Any]) -> list[str]:
    overall, rows = result["overall"], result["categories"]
    before, after = overall["before"], overall["after"]
    leaning = overall["num_reached_only_with_pool"]
    only = f", {leaning} of them only with pooled examples" if leaning else ""
    changes = ", ".join(f"{name} {_number(before[name])} → {_number(after[name])}" for name in ("precision", "recall"))
    lines = [
        f"{overall['num_reached']} of {len(rows)} categories reach the target{only}. Over all categories of "
        f"these images, from the score floor {result['score_floor']:g} to the thresholds: {changes}"
    ]
    borrowed = sum(row["pool"] is not None for row in rows)
    if borrowed:
        enough = result["enough_examples"]
        lines.append(f"{borrowed} categories with fewer than {enough} examples are pooled with others")
    counts = result["counts"]
    missing = [
        f"{counts[name]} {words}"
        for name, words in (
            ("images_not_in_the_run", "not in the run"),
            ("images_not_labelled", "not labelled yet"),
            ("images_failed", "failed"),
        )
        if counts[name]
    ]
    if missing:
        lines.append(f"Images of the ground truth that were left out: {', '.join(missing)}")
    return lines


def _number(value: float | None) -> str:
    return _UNDEFINED if value is None else f"{value:.3f}"


def _ends(interval: list[float] | None) -> str:
    return _UNDEFINED if interval is None else f"{interval[0]:.2f}…{interval[1]:.2f}"
