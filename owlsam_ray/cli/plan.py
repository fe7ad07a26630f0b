"""`owlsam plan`: list the images once, and freeze their ids and shards."""

import argparse
import logging
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options, add_selection
from owlsam_ray.config.run import RunConfig

HELP = "list the images once, and freeze their ids and shards"
EXAMPLES = """examples:
  owlsam plan run.yaml --run runs/coco
  owlsam plan run.yaml site.yaml --run s3://bucket/runs/coco --set resources.shard_size=512
  owlsam plan run.yaml --run runs/try --sample 1000 --seed 7      # a small run, to try it
  owlsam plan run.yaml --run runs/try --sample 10000 --seed 7 --extend   # add 9,000 more
  owlsam plan run.yaml --run runs/try --extend                    # add the rest, or images that are new since then
  owlsam plan run.yaml --run runs/dogs --categories dog cat --verify exists

Lists the images once; `annotate` labels the planned images. --extend adds shards and leaves the old ones unchanged."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--extend", action="store_true", help="add images that the planned run does not have yet, in new shards"
    )
    command.add_argument(
        "--verify",
        choices=("none", "exists", "decode"),
        help="check every image first: look it up in storage (exists) or decode it (decode)",
    )
    add_selection(command)


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.plan.plan import plan_run
    from owlsam_ray.plan.selection import selection_of
    from owlsam_ray.run.claim import claim_setup
    from owlsam_ray.run.guard import check_writable
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.record import run_directory

    run_url = run_directory(config)
    check_writable(run_url)
    with (
        claim_setup(run_url, config.resources) as setup,
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
        "images": plan.run.manifest.num_images,
        "shards": plan.run.manifest.num_shards,
        "shard_size": plan.run.manifest.parts[-1].shard_size,
        "parts": len(plan.run.manifest.parts),
        "listed": plan.listed,
        "repeated": plan.repeated,
        "bad_rows": plan.bad,
        "categories": len(plan.run.record.categories),
        "layout_hash": plan.run.record.layout_hash[:16],
    }
