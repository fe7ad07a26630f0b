"""`owlsam plan`: list the images once, and freeze ids and shards."""

import argparse
import logging
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options, add_selection
from owlsam_ray.config.run import RunConfig

HELP = "list the images once, and freeze ids and shards"
EXAMPLES = """examples:
  owlsam plan jobs/coco.yaml --run runs/coco
  owlsam plan jobs/coco.yaml site.yaml --run s3://bucket/runs/coco --set resources.shard_size=512
  owlsam plan run.yaml --run runs/try --sample 1000 --seed 7      # a slice, to try it
  owlsam plan run.yaml --run runs/try --sample 10000 --seed 7 --extend   # nine thousand more
  owlsam plan run.yaml --run runs/try --extend                    # all the rest, or what is new by now
  owlsam plan jobs/coco.yaml --run runs/dogs --categories dog cat --verify exists

Images are listed once; `annotate` labels what is planned. --extend adds shards and leaves the old ones as they are."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_run_options(command)
    command.add_argument(
        "--extend", action="store_true", help="add the images that a planned run does not have yet, as further shards"
    )
    command.add_argument("--verify", choices=("none", "exists", "decode"), help="look at every image first")
    add_selection(command)


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.plan.plan import plan_run
    from owlsam_ray.plan.selection import selection_of
    from owlsam_ray.run.claim import claim_setup
    from owlsam_ray.run.guard import check_writable
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.record import run_directory

    check_writable(run_directory(config))
    with (
        claim_setup(run_directory(config), config.resources) as setup,
        CountDisplay(console, interval_s=config.logging.progress_s) as display,
    ):
        plan = plan_run(config, extend=options.extend, show=display.show, raise_if_taken_over=setup.raise_if_taken_over)
    if not plan.new:
        selected = selection_of(config.plan)
        nothing = f"every image that {selected} selects" if selected else "every image of the listing"
        hint = " (a selection is unset with null: --set plan.limit=null)" if selected else ""
        logging.getLogger(__name__).info(
            "%s",
            f"nothing to add: {nothing} is planned already{hint}"
            if options.extend
            else "already planned: kept as it is",
        )
    return {
        "planned": plan.new > 0,
        "new": plan.new,
        "images": plan.manifest.num_images,
        "shards": plan.manifest.num_shards,
        "shard_size": plan.manifest.parts[-1].shard_size,
        "parts": len(plan.manifest.parts),
        "listed": plan.listed,
        "repeated": plan.repeated,
        "bad_rows": plan.bad,
        "categories": len(plan.record.categories),
        "layout_hash": plan.record.layout_hash[:16],
    }
