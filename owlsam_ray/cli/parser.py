"""The command-line parser: each command is a module with `HELP`, `EXAMPLES`, `add_options` and `run`."""

import argparse
from types import ModuleType

from owlsam_ray import __version__
from owlsam_ray.cli import (
    annotate,
    calibrate,
    check,
    clean,
    demo,
    estimate,
    evaluate,
    finetune,
    plan,
    preview,
    reduce,
    review_list,
    stats,
    status,
    verify,
)

_EXIT_CODES = """exit codes:
  0   complete
  1   more failed images than reduce.max_failed
  2   usage or bad input
  3   the run directory was made with other settings, another layout or other numerics
  4   another attempt is live
  5   incomplete: shards missing or damaged, storage full, or the proof failed
  75  interrupted: run the same command again"""


COMMANDS: dict[str, ModuleType] = {
    "check": check,
    "plan": plan,
    "estimate": estimate,
    "preview": preview,
    "annotate": annotate,
    "status": status,
    "verify": verify,
    "reduce": reduce,
    "calibrate": calibrate,
    "review-list": review_list,
    "evaluate": evaluate,
    "stats": stats,
    "clean": clean,
    "finetune": finetune,
    "demo": demo,
}
"""Modules of the commands by name, in the order of the help."""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the `owlsam` command line."""
    parser = argparse.ArgumentParser(
        prog="owlsam",
        description="Label images at dataset scale: name what you look for, get boxes and masks.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"owlsam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=f"{module.HELP[0].upper()}{module.HELP[1:]}.",
            epilog=f"{module.EXAMPLES}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_options(command)
    return parser
