"""`owlsam status`: show the progress of a run and the attempts that work on it."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import seconds
from owlsam_ray.terminal import SafeConsole

HELP = "show the progress of a run and the attempts that work on it"
EXAMPLES = """examples:
  owlsam status runs/coco
  owlsam status s3://bucket/runs/coco --json
  owlsam status runs/coco --watch 10               # until no image is left, or Ctrl-C

Reads only the run directory, and writes nothing. States of an attempt:
  live      its heartbeat advanced while this command watched
  silent    its heartbeat did not advance for longer than its interval: it was killed, or cannot write
  dead      its process ran on this machine and no longer exists
  unknown   --wait was too short to decide
  ended     it signed off
Rate and ETA come from the live attempts."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--json", action="store_true", help="print only the JSON line on stdout, and no table")
    command.add_argument(
        "--watch", nargs="?", type=seconds, const=10.0, metavar="S", help="refresh every S seconds (default: 10)"
    )
    command.add_argument(
        "--wait",
        type=seconds,
        metavar="S",
        help="wait at most S seconds for heartbeats (default: until the state of each attempt is known, at most a "
        "little more than the run's resources.heartbeat_s; no wait if no attempt is registered)",
    )


def run(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.run.status import status_table, watch_run

    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)

    def show(state: dict[str, Any]) -> None:
        if options.watch is not None and console.is_terminal:
            console.clear()
        if not options.json:
            wide.print(status_table(state))

    return watch_run(run_url, show, every_s=options.watch, wait_s=options.wait)
