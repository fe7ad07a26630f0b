"""`owlsam stats`: count the contents of a COCO file or a run, as a table, JSON or plots."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.config.load import absolute
from owlsam_ray.errors import ConfigError

HELP = "count the contents of a COCO file or a run, as a table, JSON or plots"
EXAMPLES = """examples:
  owlsam stats instances_val2017.json
  owlsam stats lvis_v1_train.json --out statistics     # statistics.json and statistics.png
  owlsam stats --run runs/coco --json

Reports images, categories, objects per image and category, sizes, aspect ratios, crowds, scores, and irregularities in
the file. Prints a table to stderr; with --json, prints every number to stdout instead, in one line."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("file", nargs="?", metavar="FILE", help="COCO or LVIS JSON file or fsspec URL")
    command.add_argument("--run", metavar="DIR", help="reduced run to use instead of a file")
    command.add_argument("--out", metavar="DIR", help="directory to write statistics.json and statistics.png to")
    command.add_argument(
        "--json", action="store_true", help="print every number in the JSON line on stdout, and no table"
    )


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    if (options.file is None) == (options.run is None):
        raise ConfigError("name either a COCO FILE or --run DIR")
    from owlsam_ray.coco_files.statistics_run import run_statistics
    from owlsam_ray.run.paths import annotations_of_run

    url = absolute(options.file) if options.file else annotations_of_run(absolute(options.run))
    return run_statistics(
        url, out=absolute(options.out) if options.out else None, as_json=options.json, console=console
    )
