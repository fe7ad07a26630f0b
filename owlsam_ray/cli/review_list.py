"""`owlsam review-list`: choose annotations to review."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options, positive
from owlsam_ray.config.load import absolute
from owlsam_ray.config.run import RunConfig

HELP = "choose annotations to review"
EXAMPLES = """examples:
  owlsam review-list run.yaml --run runs/1                              # 10 per category and score bin
  owlsam review-list run.yaml --run runs/1 --by uncertain --per-cell 50 --set reduce.score_threshold=0.3
  owlsam review-list run.yaml --run runs/1 --by predicted_iou --whole-images --out reviews/masks
  owlsam reduce      run.yaml --run runs/1 --corrections runs/1/review/review.json    # after the review

Applies the section `reduce`, then chooses annotations to review. Writes review.json, a COCO file that any tool opens,
and review.csv, which gives the reason for each choice. The same seed chooses the same annotations."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command)
    command.add_argument(
        "--by",
        choices=("score", "uncertain", "predicted_iou", "stability"),
        default="score",
        help="equally many from each score bin (score), those nearest to the threshold (uncertain), or those with the "
        "lowest value (default: %(default)s)",
    )
    command.add_argument(
        "--per-cell",
        type=positive,
        default=10,
        metavar="N",
        help="annotations per category and score bin (--by score), or else per category (default: %(default)s)",
    )
    command.add_argument(
        "--bins", type=positive, default=10, metavar="N", help="number of score bins (default: %(default)s)"
    )
    command.add_argument(
        "--whole-images", action="store_true", help="list all annotations of the images that have a chosen one"
    )
    command.add_argument(
        "--seed", type=int, default=0, metavar="S", help="random seed of the choice (default: %(default)s)"
    )
    command.add_argument("--out", metavar="DIR", help="output directory (default: review/ in the run directory)")


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    from owlsam_ray.reduce.review_list import review_list
    from owlsam_ray.reduce.sampling import SampleOptions
    from owlsam_ray.run.progress import CountDisplay

    wanted = SampleOptions(
        by=options.by,
        per_cell=options.per_cell,
        bins=options.bins,
        whole_images=options.whole_images,
        seed=options.seed,
    )
    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        return review_list(config, wanted, out=absolute(options.out) if options.out else None, show=display.show)
