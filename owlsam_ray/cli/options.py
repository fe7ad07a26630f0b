"""Options that several commands share, and the types of their values."""

import argparse
import json
import math


def seconds(text: str) -> float:
    """A number of seconds, as an argument's type.

    Raises:
        ValueError: it is none; argparse says so.
    """
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def positive(text: str) -> int:
    """A whole number from 1 on, as an argument's type.

    Raises:
        ValueError: it is none; argparse says so.
    """
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_run_options(command: argparse.ArgumentParser, *, files: str = "+") -> None:
    """Run files, `--run` and `--set`."""
    command.add_argument("run_files", nargs=files, metavar="RUNFILE", help="YAML run files, merged from left to right")
    command.add_argument("--run", metavar="DIR", help="run directory or fsspec URL (over `run:` of the run files)")
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """`--set`."""
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one setting; may be repeated",
    )


def add_selection(command: argparse.ArgumentParser) -> None:
    """Options that choose images of the listing."""
    group = command.add_argument_group("which of the images (over the section `plan` of the run file)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N")
    group.add_argument("--sample", type=int, metavar="N", help="N by chance; a larger sample holds the smaller one")
    group.add_argument("--seed", type=int, metavar="S", help="of the sample (default: 0)")
    group.add_argument("--splits", nargs="+", metavar="NAME", help="only of these splits: val2017, patch8, …")
    group.add_argument(
        "--categories", nargs="+", metavar="NAME", help="only images with an annotation of one of these categories"
    )


def all_overrides(options: argparse.Namespace) -> list[str]:
    """`--set`, and the options that stand for settings of the section `plan`."""
    named = {name: getattr(options, name, None) for name in ("limit", "sample", "splits", "verify")}
    if hasattr(options, "sample"):  # other commands have a seed of their own
        named["seed"] = options.seed
    wanted: list[str] | None = getattr(options, "categories", None)
    if wanted is not None:
        named["categories"] = [int(each) if each.isdecimal() else each for each in wanted]
    return [
        *options.overrides,
        *(f"plan.{name}={json.dumps(value, ensure_ascii=False)}" for name, value in named.items() if value is not None),
        *(
            f"reduce.{name}={json.dumps(value, ensure_ascii=False)}"
            for name in ("out", "formats", "operating_points", "corrections")
            if (value := getattr(options, f"reduce_{name}", None)) is not None
        ),
    ]
