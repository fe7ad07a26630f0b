"""`owlsam demo`: draw images, label them with the models that come with the package, and measure the labels."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_overrides

HELP = "draw images, label them with the models that come with the package, and measure the labels"
EXAMPLES = """examples:
  owlsam demo
  owlsam demo --run runs/small --images 40 --seed 7
  owlsam demo --set reduce.score_threshold=0.5

Writes the run file to DIR/run.yaml, the scores to DIR/evaluation.json, and labelled images to DIR/contact_sheet.png."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument(
        "--run", metavar="DIR", default="runs/demo", help="directory for all output (default: %(default)s)"
    )
    command.add_argument(
        "--images", type=int, default=200, metavar="N", help="number of images to draw (default: %(default)s)"
    )
    command.add_argument(
        "--seed", type=int, default=1, metavar="S", help="random seed of the images (default: %(default)s)"
    )
    add_overrides(command)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.demo.run import run_demo

    return run_demo(
        options.run, num_images=options.images, seed=options.seed, overrides=options.overrides, console=console
    )
