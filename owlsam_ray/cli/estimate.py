"""`owlsam estimate`: label a sample, and estimate the time and output size of the whole run."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options, add_selection
from owlsam_ray.config.run import RunConfig

HELP = "label a sample, and estimate the time and output size of the whole run"
EXAMPLES = """examples:
  owlsam estimate run.yaml --run runs/coco
  owlsam estimate run.yaml --run runs/coco --images 1000 --set resources.actors=8

Labels a sample on the machines of the run, into RUN/estimate, and reports images/s, hours, GPU hours and output size
for all images of the run. Larger samples are more accurate: with few images, a GPU's batches are not full."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--images", type=int, default=200, metavar="N", help="number of random images to label (default: %(default)s)"
    )
    add_selection(command)


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.parallel.allocation import export_ray_environment

    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.run.progress import CountDisplay, LazyDisplay
    from owlsam_ray.trial.estimate import estimate_run

    counter = CountDisplay(console, interval_s=config.logging.progress_s)
    with LazyDisplay(console) as display:
        found = estimate_run(config, images=options.images, show_plan=counter.show, show=display.show)
    if found["images_per_s"] is None:
        console.print("The sample finished too quickly to measure a rate: increase --images.")
    else:
        gpus = f", {found['gpu_hours']:.1f} GPU hours" if found["gpus"] else ""
        console.print(
            f"{found['images']:,} images at {found['images_per_s']:.2f} images/s on {found['actors']} actor(s): "
            f"{found['hours']:.1f} hours{gpus}, {found['predictions_bytes'] / 1e9:.2f} GB of shards, "
            f"{found['coco_bytes'] / 1e9:.2f} GB of COCO JSON; {found['start_s']:.0f} s to start",
            highlight=False,
        )
    return found
