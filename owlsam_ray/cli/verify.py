"""`owlsam verify`: prove every file of a run; set bad ones aside for the next attempt."""

import argparse
from typing import Any

from rich.console import Console

HELP = "prove every file of a run; set bad ones aside for the next attempt"
EXAMPLES = """examples:
  owlsam verify runs/coco
  owlsam verify runs/coco --repair && owlsam annotate jobs/coco.yaml --run runs/coco

Reads every shard file whole: checksums, columns, images against the manifest, sizes and areas of masks; and run.json,
manifest and query embeddings. Missing shards are work left, no damage. --repair moves bad shard files to RUN/damaged;
it refuses while an attempt works on the run, and ends with 0 when nothing else is wrong."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--repair", action="store_true", help="move bad shard files to RUN/damaged")


def run(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.verify import verify_run

    with CountDisplay(console, interval_s=5.0) as display:
        return verify_run(run_url, repair=options.repair, show=display.show)
