"""`owlsam review-list`: choose annotations for people to look at."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options, positive
from owlsam_ray.config.load import absolute
from owlsam_ray.config.run import RunConfig

HELP = "choose annotations for people to look at"
EXAMPLES = """examples:
  owlsam review-list run.yaml --run runs/1                              # of each category and score bin, 10
  owlsam review-list run.yaml --run runs/1 --by uncertain --per-cell 50 --set reduce.score_threshold=0.3
  owlsam review-list run.yaml --run runs/1 --by predicted_iou --whole-images --out reviews/masks
  owlsam reduce      run.yaml --run runs/1 --corrections runs/1/review/review.json    # once people have changed it

Chooses annotations for people to look at, after the decisions of the section `reduce`: review.json, a COCO file that
any tool opens, and review.csv, which says why each was chosen. The same seed chooses the same ones."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_run_options(command)
    command.add_argument(
        "--by",
        choices=("score", "uncertain", "predicted_iou", "stability"),
        default="score",
        help="as many from each score bin, the nearest to the threshold, or the lowest (default: %(default)s)",
    )
    command.add_argument(
        "--per-cell",
        type=positive,
        default=10,
        metavar="N",
        help="of each cell (default: %(default)s)",
    )
    command.add_argument("--bins", type=positive, default=10, metavar="N", help="of scores (default: %(default)s)")
    command.add_argument(
        "--whole-images", action="store_true", help="list everything in the images that hold a chosen one"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice (default: %(default)s)")
    command.add_argument("--out", metavar="DIR", help="where the files go (default: review/ in the run directory)")


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; returns what its line of JSON says."""
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
