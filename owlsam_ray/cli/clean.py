"""`owlsam clean`: remove broken and duplicate annotations from a COCO file, and list what changed."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.config.load import absolute, load_tree, validate_tree

HELP = "remove broken and duplicate annotations from a COCO file, and list what changed"
EXAMPLES = """examples:
  owlsam clean instances.json --out clean.json
  owlsam clean instances.json --out clean.json --removed removed.jsonl --set min_area=100 --set duplicate_iou=0.95
  owlsam clean instances.json --out clean.json --set crowd=true --set drop_empty_images=true --set clip_boxes=true

Writes a COCO file without the annotations that violate a rule, and a table of everything removed or changed, with the
rule (default: OUT with the ending .removed.csv). On by default: malformed, unknown_image, unknown_category, no_box,
non_finite, zero_area, outside, bad_segmentation, empty_segmentation, duplicate_iou (0.9), degenerate_polygons, new_ids.
Off by default: crowd, min_area, drop_empty_images, clip_boxes. To switch off a rule that takes a number (duplicate_iou,
min_area), set it to false: --set duplicate_iou=false. The rest of the file is copied unchanged."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    command.add_argument("file", metavar="FILE", help="COCO JSON file or fsspec URL")
    command.add_argument("--out", required=True, metavar="JSON", help="cleaned file to write; must not be FILE")
    command.add_argument("--removed", metavar="TABLE", help="table of what was removed or changed, .csv or .jsonl")
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="RULE=VALUE",
        help="switch one rule on or off, or set its number; may be repeated",
    )


def run(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
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
