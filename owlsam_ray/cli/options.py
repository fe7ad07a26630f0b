"""Options shared by several commands, and the types of their values."""

import argparse
import json
import math


def seconds(text: str) -> float:
    """Parse a number of seconds, at least 0 and finite.

    Raises:
        ValueError: not such a number; argparse reports it.
    """
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def positive(text: str) -> int:
    """Parse a whole number, at least 1.

    Raises:
        ValueError: not such a number; argparse reports it.
    """
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def add_run_options(command: argparse.ArgumentParser, *, files: str = "+") -> None:
    """Add the run files, `--run` and `--set`."""
    command.add_argument("run_files", nargs=files, metavar="RUNFILE", help="YAML run files, merged from left to right")
    command.add_argument("--run", metavar="DIR", help="run directory or fsspec URL (overrides `run:` of the run files)")
    add_overrides(command)


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one setting; may be repeated",
    )


def add_selection(command: argparse.ArgumentParser) -> None:
    """Add the options that select images of the listing."""
    group = command.add_argument_group("selection of images (overrides the section `plan` of the run file)")
    group.add_argument("--limit", type=int, metavar="N", help="take only the first N images")
    group.add_argument("--sample", type=int, metavar="N", help="take N random images; samples with one seed are nested")
    group.add_argument("--seed", type=int, metavar="S", help="random seed for sampling (default: 0)")
    group.add_argument("--splits", nargs="+", metavar="NAME", help="only images of these splits: val2017, patch8, …")
    group.add_argument(
        "--categories", nargs="+", metavar="NAME", help="only images with an annotation of one of these categories"
    )


def all_overrides(options: argparse.Namespace) -> list[str]:
    """Return `--set` and then the options for settings of `plan` and `reduce`, each as `section.field=value`."""
    named = {name: getattr(options, name, None) for name in ("limit", "sample", "splits", "verify")}
    if hasattr(options, "sample"):  # elsewhere, --seed is not plan.seed
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
