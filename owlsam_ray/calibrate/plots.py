"""Draw operating points as one page of plots."""

import io
import warnings
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullLocator

from owlsam_ray.calibrate.table import target_words
from owlsam_ray.coco_files.statistics_plots import PAGE_STYLE

SHOWN_CATEGORIES = 60
_BLUE, _ORANGE, _GREY = "#4878a8", "#d9822b", "#8a8f98"
_STYLE: Any = PAGE_STYLE | {
    "text.parse_math": False,  # a category may be called "$"
    "font.size": 9,
}


def draw_operating_points(result: dict[str, Any]) -> bytes:
    """Draw the reliability curve, the distribution of scores, and the effect of each threshold as one PNG.

    Args:
        result: return value of `calibrate_run`.
    """
    rows = result["categories"][:SHOWN_CATEGORIES]
    with rc_context(_STYLE), warnings.catch_warnings():
        # Names in scripts that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(
            figsize=(12, max(6.5, 1.6 + 0.2 * len(rows))),
            dpi=110,
            layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1),
        )
        axes = figure.subplot_mosaic([["curve", "points"], ["scores", "points"]], height_ratios=[2.2, 1])
        figure.suptitle(f"Operating points: {target_words(result['target'])}", x=0.01, ha="left", fontweight="bold")
        _draw_curve(axes["curve"], result["reliability"])
        _draw_scores(axes["scores"], result["reliability"]["bins"])
        _draw_points(axes["points"], rows, len(result["categories"]), result["target"])
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_curve(axes: Axes, curve: dict[str, Any]) -> None:
    axes.set_title(f"Reliability, all categories (expected calibration error {curve['ece']:.3f})")
    mean, precision = (np.array([each[key] for each in curve["bins"]]) for key in ("mean_score", "precision"))
    ends = np.array([each["precision_interval"] for each in curve["bins"]])
    axes.plot([0, 1], [0, 1], color=_GREY, linewidth=0.8, linestyle=":")
    axes.errorbar(
        mean, precision, yerr=np.maximum(np.stack([precision - ends[:, 0], ends[:, 1] - precision]), 0), color=_BLUE,
        marker="o", markersize=4, capsize=2,
    )  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("share of right detections")


def _draw_scores(axes: Axes, bins: list[dict[str, Any]]) -> None:
    places = [(each["low"] + each["high"]) / 2 for each in bins]
    axes.bar(places, [each["count"] for each in bins], width=0.09, color=_BLUE)
    axes.set_xlim(0, 1)
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("score")
    axes.set_ylabel("detections (log)")


def _draw_points(axes: Axes, rows: list[dict[str, Any]], number: int, target: dict[str, Any]) -> None:
    axes.set_title("Above the thresholds" if number == len(rows) else f"The first {len(rows)} of {number} categories")
    for name, colour, shift in (("precision", _BLUE, -0.14), ("recall", _ORANGE, 0.14)):
        known = [(place, row) for place, row in enumerate(rows) if row[name] is not None]
        if not known:
            continue
        places = np.array([place for place, _ in known]) + shift
        values = np.array([row[name] for _, row in known])
        ends = np.array([row[f"{name}_interval"] for _, row in known])
        axes.errorbar(
            values, places, xerr=np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0), linestyle="none",
            marker="o", markersize=3, linewidth=1, color=colour, label=name,
        )  # fmt: skip
    if "value" in target:
        axes.axvline(target["value"], color=_GREY, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_label(row) for row in rows], fontsize=7.5)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, fontsize=8)


def _label(row: dict[str, Any]) -> str:
    name = row["name"] if len(row["name"]) <= 28 else f"{row['name'][:27]}…"
    return f"{name} > {row['threshold']:.3g}{'' if row['reached'] else ' (not reached)'}"
