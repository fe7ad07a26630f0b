"""`owlsam status`: tell how far a run is, and who works on it."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import seconds
from owlsam_ray.terminal import SafeConsole

HELP = "tell how far a run is, and who works on it"
EXAMPLES = """examples:
  owlsam status runs/coco
  owlsam status s3://bucket/runs/coco --json
  owlsam status runs/coco --watch 10               # until nothing is left, or Ctrl-C

Needs the run directory alone, and writes nothing. An attempt is `live` when its heartbeat moved while this looked,
`silent` when it stood still for longer than heartbeats are apart (it was killed, or cannot write), `dead` when its
process ran on this machine and is gone, `unknown` when
--wait was too short to tell, `ended` when it signed off. Rate and ETA are those that live attempts tell."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--json", action="store_true", help="the line on stdout alone, and no table")
    command.add_argument(
        "--watch", nargs="?", type=seconds, const=10.0, metavar="S", help="look again every S seconds (default: 10)"
    )
    command.add_argument(
        "--wait",
        type=seconds,
        metavar="S",
        help="wait at most S seconds for heartbeats (default: until it is clear who lives, a little more than the "
        "run's resources.heartbeat_s at most, not at all when no attempt is registered)",
    )


def run(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.run.status import status_table, watch_run

    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)

    def show(state: dict[str, Any]) -> None:
        if options.watch is not None and console.is_terminal:
            console.clear()
        if not options.json:
            wide.print(status_table(state))

    return watch_run(run_url, show, every_s=options.watch, wait_s=options.wait)
