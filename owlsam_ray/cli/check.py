"""`owlsam check`: try everything a run needs on a few images before it starts."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.run import RunConfig

HELP = "try everything a run needs on a few images before it starts"
EXAMPLES = """examples:
  owlsam check run.yaml --run runs/coco
  owlsam check run.yaml site.yaml --run s3://bucket/runs/coco --images 32

Tests everything that can stop a run in its first minutes, in this process and without Ray, before you spend a queue
slot: the run directory is writable, the dataset can be listed, the weights load, the prompts can be embedded, a few
images can be labelled up to their masks, and the output fits on the disk. Prints one line per step to stderr, and
leaves nothing in the run directory. The hours are a rough guess from these images on this machine; `owlsam estimate`
measures them."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--images", type=int, default=8, metavar="N", help="number of images to label (default: %(default)s)"
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.trial.check import check_run

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        return check_run(config, images=options.images, say=say, show=display.show)
