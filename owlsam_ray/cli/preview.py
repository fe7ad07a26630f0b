"""`owlsam preview`: label a few images here and draw them, to find prompts and thresholds before a run."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.log import start_log
from owlsam_ray.cli.options import add_overrides
from owlsam_ray.config.load import absolute
from owlsam_ray.errors import FailedImagesError
from owlsam_ray.terminal import safe_text

HELP = "label a few images here and draw them, to find prompts and thresholds before a run"
EXAMPLES = """examples:
  owlsam preview photo.jpg --prompts "a cat" "a remote control" --run-file run.yaml
  owlsam preview photos/ --run-file run.yaml --min-score 0.2 --out sheet.png
  owlsam preview photo.jpg --prompts "a cat" --set detector.weights=google/owlvit-base-patch32 \\
    --set segment.weights=weights/mobile_sam.pt --set suppress.across_labels=true
  owlsam preview runs/demo/drawn/images --demo --prompts "red circle" "blue star"

Writes one PNG with boxes, masks, names and scores: one image at its own size, or several as a contact sheet. Prompts
are used exactly as given; without --prompts, the vocabulary of the run file is used. Prints a table to stderr."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or fsspec URLs")
    command.add_argument(
        "--prompts", nargs="+", default=[], metavar="TEXT", help="what to look for, used exactly as given"
    )
    command.add_argument(
        "--run-file",
        dest="run_files",
        action="append",
        default=[],
        metavar="FILE",
        help="run file with models and settings; may be repeated, later files override earlier ones",
    )
    command.add_argument("--demo", action="store_true", help="use the small models that come with the package")
    command.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="draw only labels with at least this score (default: 0.1, or detector.score_floor if that is greater)",
    )
    command.add_argument(
        "--max-images",
        type=int,
        default=12,
        metavar="N",
        help="maximum number of images on the sheet (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        default="preview.png",
        metavar="PNG",
        help="PNG file to write; replaces an earlier preview (default: %(default)s)",
    )
    add_overrides(command)


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from rich.table import Table

    from owlsam_ray.trial.preview import expand_images, preview, preview_config

    config = preview_config(options.run_files, overrides=options.overrides, prompts=options.prompts, demo=options.demo)
    start_log(console, config.logging.level)
    out = absolute(options.out)
    images = expand_images(options.images, config, count=options.max_images, out=out)
    min_score = max(0.1, config.detector.score_floor) if options.min_score is None else options.min_score
    result = preview(images, config, out=out, min_score=min_score)
    found = result.counts(min_score)
    table = Table(
        "category", "boxes", "best score", "median score", title=safe_text(f"{len(images)} image(s): {options.out}")
    )
    for entry in found:
        table.add_row(*(safe_text("–" if value is None else str(value)) for value in entry.values()))
    console.print(table)
    failed = result.failed()
    summary = {"images": len(images), "sheet": result.sheet, "found": found, "failed": failed}
    if failed:
        first = ": ".join(next(iter(failed.items())))
        raise FailedImagesError(
            f"{len(failed)} of {len(images)} images failed; the first: {first}. The others are drawn.", summary
        )
    return summary
