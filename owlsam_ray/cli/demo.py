"""`owlsam demo`: draw pictures, label them with the models that come with the package, and measure the labels."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_overrides

HELP = "draw pictures, label them with the models that come with the package, and measure the labels"
EXAMPLES = """examples:
  owlsam demo
  owlsam demo --run runs/small --images 40 --seed 7
  owlsam demo --set reduce.score_threshold=0.5

Leaves the run file at DIR/run.yaml, the scores at DIR/evaluation.json, labelled pictures at DIR/contact_sheet.png."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument(
        "--run", metavar="DIR", default="runs/demo", help="where everything goes (default: %(default)s)"
    )
    command.add_argument("--images", type=int, default=200, metavar="N", help="pictures to draw (default: %(default)s)")
    command.add_argument("--seed", type=int, default=1, metavar="S", help="of the pictures (default: %(default)s)")
    add_overrides(command)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.demo.run import run_demo

    return run_demo(
        options.run, num_images=options.images, seed=options.seed, overrides=options.overrides, console=console
    )
