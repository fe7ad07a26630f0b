"""`owlsam reduce`: merge the shards into COCO annotations, and prove that nothing is missing."""

import argparse
from typing import Any, get_args

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.reduce import FormatName
from owlsam_ray.config.run import RunConfig

HELP = "merge the shards into COCO annotations, and prove that nothing is missing"
EXAMPLES = """examples:
  owlsam reduce jobs/coco.yaml --run runs/coco
  owlsam reduce jobs/coco.yaml --run runs/coco --set reduce.score_threshold=0.3
  owlsam reduce jobs/coco.yaml --run runs/coco --out labels/strict --set reduce.score_threshold=0.5 --formats coco yolo
  owlsam reduce jobs/coco.yaml --run runs/coco --operating-points runs/coco/operating_points.json
  owlsam reduce jobs/coco.yaml --run runs/coco --partial     # what is labelled by now; exit code 5

One run can be reduced in many ways, one --out for each, without a GPU. Every setting stands in `info`."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_run_options(command)
    command.add_argument(
        "--out", dest="reduce_out", metavar="DIR", help="where the files go (default: coco/ in the run directory)"
    )
    command.add_argument(
        "--formats",
        dest="reduce_formats",
        nargs="+",
        choices=get_args(FormatName),
        metavar="NAME",
        help=f"{', '.join(get_args(FormatName))} (default: coco)",
    )
    command.add_argument(
        "--operating-points",
        dest="reduce_operating_points",
        metavar="FILE",
        help="thresholds of categories, as `owlsam calibrate` writes them",
    )
    command.add_argument(
        "--corrections",
        dest="reduce_corrections",
        metavar="FILE",
        help="a COCO file of a review tool, replayed over the labels",
    )
    command.add_argument(
        "--partial",
        action="store_true",
        help="reduce what is labelled by now; the exit code is 5 when images are missing",
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.reduce.run import reduce_run
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.proof import check_failures

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        counts = reduce_run(config, partial=options.partial, show=display.show)
    check_failures(config.reduce.max_failed, counts)
    return counts
