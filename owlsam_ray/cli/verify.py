"""`owlsam verify`: check every file of a run; set bad shard files aside for the next attempt."""

import argparse
from typing import Any

from rich.console import Console

HELP = "check every file of a run; set bad shard files aside for the next attempt"
EXAMPLES = """examples:
  owlsam verify runs/coco
  owlsam verify runs/coco --repair && owlsam annotate run.yaml --run runs/coco

Reads every shard file completely and checks its checksums, columns, images (against the manifest), and sizes and areas
of masks. Also checks run.json, the manifest and the query embeddings. Missing shards count as work left, not as damage.
--repair moves bad shard files to RUN/damaged; it refuses while an attempt works on the run, and exits with 0 if nothing
else is wrong."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--repair", action="store_true", help="move bad shard files to RUN/damaged")


def run(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.verify import verify_run

    with CountDisplay(console, interval_s=5.0) as display:
        return verify_run(run_url, repair=options.repair, show=display.show)
