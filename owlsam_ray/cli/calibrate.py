"""`owlsam calibrate`: fit a score threshold for each category on labelled images."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray import storage
from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.load import absolute
from owlsam_ray.config.run import RunConfig
from owlsam_ray.terminal import SafeConsole

HELP = "fit a score threshold for each category on labelled images, for a precision, a recall or the best F1"
EXAMPLES = """examples:
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json --precision 0.9
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json --recall 0.8 --kind mask --iou 0.75
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json          # the best F1
  owlsam reduce    run.yaml --run runs/1 --operating-points runs/1/operating_points.json

Compares the run's detections with the ground truth and fits a score threshold for each category. The ground truth
lists some of the run's images, with every object annotated. Needs no model, so repeat it as often as you like.
Categories with few examples are pooled with others. Prints a table to stderr; writes thresholds, intervals and
reliability to operating_points.json, and curves to a PNG beside it."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--ground-truth",
        metavar="FILE",
        help="COCO or LVIS JSON that labels some of the images (default: evaluate.ground_truth)",
    )
    target = command.add_mutually_exclusive_group()
    target.add_argument(
        "--precision",
        type=float,
        metavar="P",
        help="find the lowest thresholds whose precision is at least P with a safety margin",
    )
    target.add_argument(
        "--recall",
        type=float,
        metavar="R",
        help="find the highest thresholds whose recall is at least R with a safety margin",
    )
    target.add_argument("--f1", action="store_true", help="find the thresholds with the best F1 (default)")
    command.add_argument(
        "--kind", choices=("box", "mask"), default="box", help="compare boxes or masks (default: %(default)s)"
    )
    command.add_argument(
        "--iou", type=float, default=0.5, metavar="X", help="minimum IoU of a correct detection (default: %(default)s)"
    )
    command.add_argument(
        "--min-examples",
        type=int,
        default=50,
        metavar="N",
        help="pool categories that have fewer examples with others (default: %(default)s)",
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed of the intervals (default: %(default)s)"
    )
    command.add_argument(
        "--out", metavar="FILE", help="JSON file to write (default: operating_points.json in the run directory)"
    )
    command.add_argument(
        "--json", action="store_true", help="print everything in the JSON line on stdout, and no table"
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.calibrate.curves import Target
    from owlsam_ray.calibrate.points import Fitting
    from owlsam_ray.calibrate.run import MatchRule, calibrate_run
    from owlsam_ray.calibrate.table import operating_points_table
    from owlsam_ray.run.paths import OPERATING_POINTS_FILE
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.record import run_directory

    target = Target()
    if options.precision is not None:
        target = Target("precision", options.precision)
    elif options.recall is not None:
        target = Target("recall", options.recall)
    out = absolute(options.out) if options.out else storage.join(run_directory(config), OPERATING_POINTS_FILE)
    with CountDisplay(console, interval_s=config.logging.progress_s, unit="shards") as display:
        result = calibrate_run(
            config,
            target,
            absolute(options.ground_truth) if options.ground_truth else None,
            matching=MatchRule(options.kind, options.iou),
            fitting=Fitting(min_examples=options.min_examples, seed=options.seed),
            out=out,
            show=display.show,
        )
    if options.json:
        return result | {"operating_points": out}
    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)
    wide.print(operating_points_table(result))
    rows = result["categories"]
    return {
        "operating_points": out,
        "ground_truth": result["ground_truth"],
        "target": result["target"],
        "counts": result["counts"],
        "categories": len(rows),
        "reached": sum(row["reached"] for row in rows),
    }
