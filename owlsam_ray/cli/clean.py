"""`owlsam clean`: remove broken and repeated annotations from a COCO file, and say which."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.config.load import absolute, load_tree, validate_tree

HELP = "remove broken and repeated annotations from a COCO file, and say which"
EXAMPLES = """examples:
  owlsam clean instances.json --out clean.json
  owlsam clean instances.json --out clean.json --removed removed.jsonl --set min_area=100 --set duplicate_iou=0.95
  owlsam clean instances.json --out clean.json --set crowd=true --set drop_empty_images=true --set clip_boxes=true

Writes a COCO file without the annotations that a rule refuses, and a table of everything removed or changed, with the
rule (default: OUT with .removed.csv). On by default: malformed, unknown_image, unknown_category, no_box, non_finite,
zero_area, outside, bad_segmentation, empty_segmentation, duplicate_iou (0.9), degenerate_polygons, new_ids. Off:
crowd, min_area, drop_empty_images, clip_boxes. A rule that goes by a number, duplicate_iou or min_area, is switched off
with false: --set duplicate_iou=false. The rest of the file is carried over as it stands."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("file", metavar="FILE", help="COCO JSON file or fsspec URL")
    command.add_argument("--out", required=True, metavar="JSON", help="the cleaned file; not the file itself")
    command.add_argument("--removed", metavar="TABLE", help="what was removed or changed, .csv or .jsonl")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="RULE=VALUE",
        help="switch or tune one rule; may be repeated",
    )


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
    from owlsam_ray.coco_files.clean import clean_file, cleaning_table
    from owlsam_ray.coco_files.file_rules import FileCleaning

    settings = validate_tree(FileCleaning, load_tree([], options.overrides), ["--set"], what="cleaning settings")
    counts = clean_file(
        absolute(options.file),
        absolute(options.out),
        settings,
        removed=absolute(options.removed) if options.removed else None,
    )
    console.print(cleaning_table(counts))
    return counts
