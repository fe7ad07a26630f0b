"""`owlsam reduce`: merge the shards into COCO annotations, and prove that nothing is missing."""

import argparse
from typing import Any, get_args

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.reduce import FormatName
from owlsam_ray.config.run import RunConfig

HELP = "merge the shards into COCO annotations, and prove that nothing is missing"
EXAMPLES = """examples:
  owlsam reduce run.yaml --run runs/coco
  owlsam reduce run.yaml --run runs/coco --set reduce.score_threshold=0.3
  owlsam reduce run.yaml --run runs/coco --out labels/strict --set reduce.score_threshold=0.5 --formats coco yolo
  owlsam reduce run.yaml --run runs/coco --operating-points runs/coco/operating_points.json
  owlsam reduce run.yaml --run runs/coco --partial     # what is labelled so far; exit code 5

Reduce one run in as many ways as needed, each with its own --out, without a GPU. `info` records every setting."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--out", dest="reduce_out", metavar="DIR", help="output directory (default: coco/ in the run directory)"
    )
    command.add_argument(
        "--formats",
        dest="reduce_formats",
        nargs="+",
        choices=get_args(FormatName),
        metavar="NAME",
        help=f"output formats: {', '.join(get_args(FormatName))} (default: coco)",
    )
    command.add_argument(
        "--operating-points",
        dest="reduce_operating_points",
        metavar="FILE",
        help="score thresholds of the categories, a file that `owlsam calibrate` wrote",
    )
    command.add_argument(
        "--corrections",
        dest="reduce_corrections",
        metavar="FILE",
        help="COCO file from a review tool, replayed over the labels",
    )
    command.add_argument(
        "--partial",
        action="store_true",
        help="reduce what is labelled so far; the exit code is 5 if images are missing",
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.reduce.run import reduce_run
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.proof import check_failures

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        counts = reduce_run(config, partial=options.partial, show=display.show)
    check_failures(config.reduce.max_failed, counts)
    return counts
