"""`owlsam stats`: count what a COCO file or a run holds: a table, JSON, plots."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.config.load import absolute
from owlsam_ray.errors import ConfigError

HELP = "count what a COCO file or a run holds: a table, JSON, plots"
EXAMPLES = """examples:
  owlsam stats instances_val2017.json
  owlsam stats lvis_v1_train.json --out statistics     # statistics.json and statistics.png
  owlsam stats --run runs/coco --json

Images, categories, objects per image and category, sizes, aspect ratios, crowds, scores, and what is odd in the file.
A table goes to stderr; with --json every number goes to stdout instead, in one line."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("file", nargs="?", metavar="FILE", help="COCO or LVIS JSON file or fsspec URL")
    command.add_argument("--run", metavar="DIR", help="a reduced run instead of a file")
    command.add_argument("--out", metavar="DIR", help="write statistics.json and statistics.png here")
    command.add_argument("--json", action="store_true", help="every number in the line on stdout, and no table")


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    if (options.file is None) == (options.run is None):
        raise ConfigError("name either a COCO FILE or --run DIR")
    from owlsam_ray.coco_files.statistics_run import annotations_of_run, run_statistics

    url = absolute(options.file) if options.file else annotations_of_run(absolute(options.run))
    return run_statistics(
        url, out=absolute(options.out) if options.out else None, as_json=options.json, console=console
    )
