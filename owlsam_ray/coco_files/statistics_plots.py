"""Draws statistics as one page of plots."""

import io
import warnings
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

SHOWN_CATEGORIES = 40
_NARROW = 0.17
"""Fraction of the axis below which a two-line label would run into its neighbours."""
_BLUE, _DARK, _ORANGE, _GREY, _INK = "#4878a8", "#1f3f60", "#d9822b", "#8a8f98", "#22262b"
_SHADES = LinearSegmentedColormap.from_list("blues", ["#c9dbee", _BLUE, _DARK])
PAGE_STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
}
"""Shared by every page of plots."""
_STYLE: Any = PAGE_STYLE | {
    "axes.labelsize": 9,
    "axes.labelcolor": _INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    "text.parse_math": False,  # a category may be called "$"
    "font.size": 9,
}


def draw_statistics(result: dict[str, Any]) -> bytes:
    """Draw one PNG: categories, annotations per image, areas, aspect ratios, image sizes, and scores if there are any.

    Args:
        result: result of `statistics`.
    """
    rows = max(1, min(SHOWN_CATEGORIES, result["categories"]["number"]))
    height = max(10.5, 3.2 + 0.21 * rows)
    with rc_context(_STYLE), warnings.catch_warnings():
        # Characters missing from the font are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=(15, height), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
        last = "ranks" if result["scores"] is None else "scores"
        axes = figure.subplot_mosaic(
            [["categories", "per_image", "areas"], ["categories", "ratios", "sizes"], ["categories", "ranks", last]],
            width_ratios=[1.25, 1, 1],
        )
        figure.suptitle(_headline(result), x=0.01, ha="left", fontsize=13, fontweight="bold")
        _draw_categories(axes["categories"], result["categories"])
        _draw_per_image(axes["per_image"], result["images"])
        _draw_areas(axes["areas"], result["annotations"]["areas"])
        _draw_ratios(axes["ratios"], result["annotations"]["aspect_ratios"])
        _draw_sizes(axes["sizes"], result["images"]["sizes"])
        _draw_ranks(axes["ranks"], result["categories"]["rows"])
        if result["scores"] is not None:
            _draw_scores(axes["scores"], result["scores"])
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _headline(result: dict[str, Any]) -> str:
    name = result["file"] if len(result["file"]) <= 70 else f"…{result['file'][-69:]}"
    return (
        f"{name}   ·   {result['images']['number']:,} images   ·   "
        f"{result['annotations']['number']:,} annotations   ·   {result['categories']['number']:,} categories"
    )


def _draw_categories(axes: Axes, categories: dict[str, Any]) -> None:
    rows = sorted(categories["rows"], key=lambda row: -row["objects"])
    shown = rows[:SHOWN_CATEGORIES]
    axes.set_title("Objects per category")
    if not shown:
        _say(axes, "no categories")
        return
    objects = np.array([row["objects"] for row in shown])
    images = np.array([row["images"] for row in shown])
    places = np.arange(len(shown))
    axes.barh(places, objects, height=0.72, color=_BLUE, label="objects")
    axes.plot(
        images, places, linestyle="none", marker="|", markersize=9, markeredgewidth=2, color=_ORANGE, label="images"
    )
    axes.set_xlim(0, max(1, objects.max()) * 1.14)
    for place, count in zip(places, objects, strict=True):
        axes.annotate(f"{count:,}", (count, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, [_cut(row["name"]) for row in shown])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.xaxis.set_major_formatter(_THOUSANDS)
    without = len(categories["without_objects"])
    label = "number" if len(shown) == len(rows) else f"number; the first {len(shown)} of {len(rows):,} categories"
    axes.set_xlabel(f"{label}; {without:,} of {len(rows):,} have none" if without else label)
    # Outside the bars: with balanced categories no corner is free.
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2, frameon=False, fontsize=8.5,
        columnspacing=1.2, handlelength=1.4,
    )  # fmt: skip


def _draw_per_image(axes: Axes, images: dict[str, Any]) -> None:
    numbers = images["annotations_per_image"]
    axes.set_title("Annotations per image")
    if not images["number"]:
        _say(axes, "no images")
        return
    values, times = np.array(numbers["distribution"]).T
    width = max(1, -(-(int(values.max()) + 1) // 60))
    bins = np.bincount(values // width, weights=times)
    axes.bar(np.arange(len(bins)) * width + (width - 1) / 2, bins, width=0.9 * width, color=_BLUE)
    axes.axvline(numbers["mean"], color=_ORANGE, linewidth=1.5)
    axes.set_xlabel(
        f"annotations{'' if width == 1 else f', {width} a bar'}\nmean {numbers['mean']:.3g}, "
        f"median {numbers['median']:g}, max {numbers['max']:,}; {images['without_annotations']:,} images have none"
    )
    axes.set_ylabel("images")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(_THOUSANDS)


def _draw_areas(axes: Axes, areas: dict[str, Any]) -> None:
    axes.set_title("Object sizes")
    if not areas["known"]:
        _say(axes, "no areas")
        return
    edges, counts = _trimmed(areas["side_px"])
    _log_bars(axes, edges, counts)
    low, high = axes.get_xlim()
    top = counts.max() * 1.36
    for name, start, stop in (("small", 0, 32), ("medium", 32, 96), ("large", 96, np.inf)):
        left, right = max(low, start), min(high, stop)
        part = np.log2(right / left) / np.log2(high / low) if left < right else 0.0
        if part > 0:
            text = f"{name}\n{areas[name]['share']:.1%}"
            narrow = part < _NARROW
            axes.text(
                np.sqrt(left * right), top * 0.985, text.replace("\n", " ") if narrow else text, ha="center", va="top",
                rotation=90 if narrow else 0, fontsize=7 if narrow else 9,
            )  # fmt: skip
        if low < stop < high:
            axes.axvline(stop, color=_ORANGE, linewidth=1.2)
    axes.set_ylim(0, top)
    axes.set_xlabel("√area, px (log)")
    axes.set_ylabel("annotations")


def _draw_ratios(axes: Axes, ratios: dict[str, Any]) -> None:
    axes.set_title("Aspect ratios of boxes")
    edges, counts = _trimmed(ratios)
    if not counts.any():
        _say(axes, "no boxes")
        return
    _log_bars(axes, edges, counts)
    axes.axvline(1, color=_ORANGE, linewidth=1.2)
    _mark_pooled(axes, ratios)
    axes.set_xlabel("width / height (log)")
    axes.set_ylabel("annotations")


def _draw_sizes(axes: Axes, sizes: dict[str, Any]) -> None:
    axes.set_title("Image sizes")
    if not sizes["known"]:
        _say(axes, "no sizes")
        return
    step = sizes["map"]["step_px"]
    across, down, times = np.array(sizes["map"]["cells"]).T
    grid = np.zeros((down.max() - down.min() + 1, across.max() - across.min() + 1))
    grid[down - down.min(), across - across.min()] = times
    mesh = axes.pcolormesh(
        np.arange(across.min(), across.max() + 2) * step,
        np.arange(down.min(), down.max() + 2) * step,
        np.ma.masked_equal(grid, 0),
        cmap=_SHADES,
        norm=LogNorm(0.7, max(1.5, times.max())),
    )
    least, most = min(across.min(), down.min()) * step, (max(across.max(), down.max()) + 1) * step
    limits = max(0, least - 0.15 * (most - least)), most + 0.05 * (most - least)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    axes.set_facecolor("#f4f5f7")
    axes.axline((0, 0), slope=1, color=_GREY, linewidth=0.8, linestyle=":")
    bar = axes.figure.colorbar(mesh, ax=axes, pad=0.02, fraction=0.06, format=_THOUSANDS)
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.set_label("images", fontsize=8.5)
    bar.outline.set_visible(False)
    first, noun = sizes["most_frequent"][0], "size" if sizes["distinct"] == 1 else "sizes"
    axes.set_xlabel(
        f"width, px; {sizes['distinct']:,} {noun}, most often {first['width']} × {first['height']} "
        f"({first['images'] / sizes['known']:.1%})"
    )
    axes.set_ylabel("height, px")


def _draw_ranks(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title("Categories by rank")
    objects = np.sort([row["objects"] for row in rows if row["objects"]])[::-1]
    if not len(objects):
        _say(axes, "no objects")
        return
    images = np.sort([row["images"] for row in rows if row["objects"]])[::-1]
    ranks = np.arange(1, len(objects) + 1)
    marker = "." if len(objects) < 60 else None
    axes.plot(ranks, objects, color=_BLUE, marker=marker, label="objects")
    axes.plot(ranks, images, color=_ORANGE, marker=marker, linewidth=1, label="images")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(_THOUSANDS)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("rank of the category")
    axes.set_ylabel("number (log)")
    axes.legend(frameon=False, fontsize=8.5)


def _draw_scores(axes: Axes, scores: dict[str, Any]) -> None:
    axes.set_title("Scores")
    histogram = scores["histogram"]
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.9, align="edge", color=_BLUE)
    axes.set_xlim(0, 1)
    axes.set_xlabel("score")
    axes.set_ylabel("annotations (bars)")
    axes.yaxis.set_major_formatter(_THOUSANDS)
    above = axes.twinx()
    above.plot(
        [line["threshold"] for line in scores["above"]],
        [line["annotations"] / scores["number"] for line in scores["above"]],
        color=_ORANGE,
        marker=".",
    )
    above.set_ylim(0, 1.05)
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    above.set_ylabel("share above the score (line)", color=_ORANGE)


def _mark_pooled(axes: Axes, histogram: dict[str, Any]) -> None:
    """Mark the outermost edges whose bars also include everything beyond."""
    low, high = histogram["edges"][0], histogram["edges"][-1]
    marks = {low: "≤" if histogram["below"] else "", high: "≥" if histogram["above"] else ""}
    left, right = axes.get_xlim()
    powers = 2.0 ** np.arange(np.ceil(np.log2(left) - 1e-3), np.log2(right) + 1e-3)
    ticks = [value for value in powers if np.log2(value) % 2 == 0] if len(powers) > 6 else list(powers)
    labels = [
        next((mark for edge, mark in marks.items() if np.isclose(value, edge)), "") + _power_of_two(value, 0)
        for value in ticks
    ]
    axes.set_xticks(ticks, labels)
    axes.set_xlim(left, right)


def _log_bars(axes: Axes, edges: np.ndarray[Any, Any], counts: np.ndarray[Any, Any]) -> None:
    axes.bar(edges[:-1], counts, width=np.diff(edges) * 0.92, align="edge", color=_BLUE)
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.xaxis.set_major_formatter(FuncFormatter(_power_of_two))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_formatter(_THOUSANDS)


def _trimmed(histogram: dict[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Edges and counts without the empty bins at both ends; values beyond are counted in the outermost bins."""
    edges, counts = np.array(histogram["edges"]), np.array(histogram["counts"])
    counts[0] += histogram["below"]
    counts[-1] += histogram["above"]
    filled = np.flatnonzero(counts)
    if not len(filled):
        return edges, counts
    first, last = max(0, filled[0] - 1), min(len(counts), filled[-1] + 2)
    return edges[first : last + 1], counts[first:last]


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=_GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _cut(name: str) -> str:
    line = " ".join(name.split())
    return line if len(line) <= 28 else f"{line[:27]}…"


def _power_of_two(value: float, _: int) -> str:
    return f"{value:g}" if value >= 1 else f"1/{1 / value:g}"


_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 or value == 0 else "")
