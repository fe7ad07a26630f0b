"""`owlsam annotate`: label every shard that is not labelled yet."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.run import RunConfig

HELP = "label every shard that is not labelled yet"
EXAMPLES = """examples:
  owlsam annotate run.yaml --run runs/coco
  owlsam annotate run.yaml --run runs/coco --set resources.actors=2 --set resources.detector_batch=16
  owlsam annotate run.yaml --run s3://bucket/runs/coco --slice 3/16      # one of 16 calls, on any machine
  owlsam annotate run.yaml --run runs/coco --retry-failed truncated      # after repairing these files

Run the same command again after any interruption: finished shards are kept, and no image is labelled twice. Plans the
run first if it is not planned yet. On SIGINT, SIGTERM or SIGUSR1 the shards in progress are finished (within
resources.grace_s), then the exit code is 75. Images with transient storage failures are retried once at the end of
every call."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--allow-numerics-change",
        action="store_true",
        help="continue even if device, dtype, model batch or library versions differ from earlier attempts",
    )
    command.add_argument(
        "--slice",
        default="1/1",
        metavar="I/N",
        help="label only every N-th shard, starting with the I-th: N calls on N machines share the run (default: 1/1)",
    )
    command.add_argument(
        "--takeover",
        action="store_true",
        help="stop an attempt that is working on this slice, and continue in its place",
    )
    command.add_argument(
        "--retry-failed",
        nargs="?",
        const="failed",
        metavar="REASON",
        help="afterwards, retry failed images: all except quarantined ones, or those of one class (transient, "
        "permanent, quarantined) or reason (truncated, missing, …)",
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.parallel.allocation import export_ray_environment

    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.annotate.attempt import AttemptOptions, annotate_run
    from owlsam_ray.run.attempts import Slice
    from owlsam_ray.run.progress import LazyDisplay
    from owlsam_ray.run.retry import Retry

    wanted = AttemptOptions(
        part=Slice.parse(options.slice),
        takeover=options.takeover,
        retry=None if options.retry_failed is None else Retry(options.retry_failed),
        judge=True,
        allow_numerics_change=options.allow_numerics_change,
    )
    with LazyDisplay(console) as display:
        return annotate_run(config, wanted, show=display.show)
