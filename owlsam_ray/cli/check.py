"""`owlsam check`: try everything that a run needs, on a few images, before it starts."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.run import RunConfig

HELP = "try everything that a run needs, on a few images, before it starts"
EXAMPLES = """examples:
  owlsam check jobs/coco.yaml --run runs/coco
  owlsam check jobs/coco.yaml site.yaml --run s3://bucket/runs/coco --images 32

Everything that can stop a run in its first minutes, tried in this process and without Ray, before a queue slot is
spent: the run directory is writable, the dataset is listed, weights load, prompts are embedded, some images go all the
way to masks, the output fits the disk. One line a step on stderr. Nothing stays behind in the run directory.
The hours are a rough guess from these images on this machine; `owlsam estimate` measures."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_run_options(command)
    command.add_argument(
        "--images", type=int, default=8, metavar="N", help="images that are labelled (default: %(default)s)"
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.trial.check import check_run

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        return check_run(config, images=options.images, say=say, show=display.show)
