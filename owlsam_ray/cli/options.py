"""What the `owlsam` command takes: sub-commands, options, and the examples of their help."""

import argparse
import math
from typing import get_args

from owlsam_ray import __version__
from owlsam_ray.config.reduce import FormatName

_EXIT_CODES = """exit codes:
  0   complete
  1   more failed images than reduce.max_failed
  2   usage or bad input
  3   the run directory belongs to other settings, another layout or other numerics
  4   another attempt is live
  5   incomplete: shards missing or damaged, storage full, or the proof does not add up
  75  interrupted: call the same command again"""

_EXAMPLES = {
    "check": """examples:
  owlsam check jobs/coco.yaml --run runs/coco
  owlsam check jobs/coco.yaml site.yaml --run s3://bucket/runs/coco --images 32

Everything that can stop a run in its first minutes, tried in this process and without Ray, before a queue slot is
spent: the run directory is writable, the dataset is listed, weights load, prompts are embedded, some images go all the
way to masks, the output fits the disk. One line a step on stderr. Nothing stays behind in the run directory.
The hours are a rough guess from these images on this machine; `owlsam estimate` measures.""",
    "status": """examples:
  owlsam status runs/coco
  owlsam status s3://bucket/runs/coco --json
  owlsam status runs/coco --watch 10               # until nothing is left, or Ctrl-C

Needs the run directory alone, and writes nothing. An attempt is `live` when its heartbeat moved while this looked,
`silent` when it stood still for longer than heartbeats are apart (it was killed, or cannot write), `dead` when its
process ran on this machine and is gone, `unknown` when
--wait was too short to tell, `ended` when it signed off. Rate and ETA are those that live attempts tell.""",
    "verify": """examples:
  owlsam verify runs/coco
  owlsam verify runs/coco --repair && owlsam annotate jobs/coco.yaml --run runs/coco

Reads every shard file whole: checksums, columns, images against the manifest, sizes and areas of masks; and run.json,
manifest and query embeddings. Missing shards are work left, no damage. --repair moves bad shard files to RUN/damaged;
it refuses while an attempt works on the run, and ends with 0 when nothing else is wrong.""",
    "plan": """examples:
  owlsam plan jobs/coco.yaml --run runs/coco
  owlsam plan jobs/coco.yaml site.yaml --run s3://bucket/runs/coco --set resources.shard_size=512
  owlsam plan run.yaml --run runs/try --sample 1000 --seed 7      # a slice, to try it
  owlsam plan run.yaml --run runs/try --sample 10000 --seed 7 --extend   # nine thousand more
  owlsam plan run.yaml --run runs/try --extend                    # all the rest, or what is new by now
  owlsam plan jobs/coco.yaml --run runs/dogs --categories dog cat --verify exists

Images are listed once; `annotate` labels what is planned. --extend adds shards and leaves the old ones as they are.""",
    "estimate": """examples:
  owlsam estimate run.yaml --run runs/coco
  owlsam estimate run.yaml --run runs/coco --images 1000 --set resources.actors=8

Labels a sample on the machines of the run, into RUN/estimate, and tells images/s, hours, GPU hours and the size of the
output for all images of the dataset. Larger samples tell more: with few, a GPU's batches are not full.""",
    "annotate": """examples:
  owlsam annotate jobs/coco.yaml --run runs/coco
  owlsam annotate jobs/coco.yaml --run runs/coco --set resources.actors=2 --set resources.detector_batch=16
  owlsam annotate jobs/coco.yaml --run s3://bucket/runs/coco --slice 3/16      # one of sixteen calls, anywhere
  owlsam annotate jobs/coco.yaml --run runs/coco --retry-failed truncated      # these files were mended

Call the same command again after any interruption: finished shards are kept, nothing is labelled twice.
Plans first when that was not done. SIGINT, SIGTERM and SIGUSR1 let the shards in hand finish (resources.grace_s), then
the exit code is 75. Images that storage gave up on are tried once more at the end of every call.""",
    "preview": """examples:
  owlsam preview photo.jpg --prompts "a cat" "a remote control" --run-file run.yaml
  owlsam preview photos/ --run-file run.yaml --min-score 0.2 --out sheet.png
  owlsam preview photo.jpg --prompts "a cat" --set detector.weights=google/owlvit-base-patch32 \\
    --set segment.weights=weights/mobile_sam.pt --set suppress.across_labels=true
  owlsam preview runs/demo/drawn/images --demo --prompts "red circle" "blue star"

One PNG with boxes, masks, names and scores: of one picture at its own size, of several as a sheet. Prompts are asked as
they stand; without --prompts the vocabulary of the run file is. A table goes to stderr.""",
    "reduce": """examples:
  owlsam reduce jobs/coco.yaml --run runs/coco
  owlsam reduce jobs/coco.yaml --run runs/coco --set reduce.score_threshold=0.3
  owlsam reduce jobs/coco.yaml --run runs/coco --out labels/strict --set reduce.score_threshold=0.5 --formats coco yolo
  owlsam reduce jobs/coco.yaml --run runs/coco --operating-points runs/coco/operating_points.json
  owlsam reduce jobs/coco.yaml --run runs/coco --partial     # what is labelled by now; exit code 5

One run can be reduced in many ways, one --out for each, without a GPU. Every setting stands in `info`.""",
    "calibrate": """examples:
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json --precision 0.9
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json --recall 0.8 --kind mask --iou 0.75
  owlsam calibrate run.yaml --run runs/1 --ground-truth labelled.json          # the best F1
  owlsam reduce    run.yaml --run runs/1 --operating-points runs/1/operating_points.json

Looks at what the run found in the images that the ground truth lists, a part of the run that people have labelled
wholly, and fits a score threshold for each category: without a model, as often as you like. Categories with few
examples borrow from others. A table goes to stderr; thresholds, intervals and reliability to operating_points.json,
curves to a PNG beside it.""",
    "review-list": """examples:
  owlsam review-list run.yaml --run runs/1                              # of each category and score bin, 10
  owlsam review-list run.yaml --run runs/1 --by uncertain --per-cell 50 --set reduce.score_threshold=0.3
  owlsam review-list run.yaml --run runs/1 --by predicted_iou --whole-images --out reviews/masks
  owlsam reduce      run.yaml --run runs/1 --corrections runs/1/review/review.json    # once people have changed it

Chooses annotations for people to look at, after the decisions of the section `reduce`: review.json, a COCO file that
any tool opens, and review.csv, which says why each was chosen. The same seed chooses the same ones.""",
    "evaluate": """examples:
  owlsam evaluate jobs/coco.yaml --run runs/coco
  owlsam evaluate jobs/coco.yaml --run runs/coco --set 'evaluate.size_edges_px=[32]' --json
  owlsam evaluate jobs/coco.yaml --run runs/coco --set evaluate.ground_truth=lvis_v1_val.json
  owlsam evaluate --ground-truth instances_val2017.json --predictions results.json --kind segm
  owlsam evaluate --ground-truth lvis_v1_val.json --predictions results.json --kind bbox --lvis --json

With run files: what `reduce` wrote, against evaluate.ground_truth (default: data.annotations), boxes and masks; also
written to RUN/evaluation.json. Without: a file of COCO results, or a COCO file whose annotations have scores.
A table goes to stderr; with --json every number goes to stdout instead, in one line.""",
    "stats": """examples:
  owlsam stats instances_val2017.json
  owlsam stats lvis_v1_train.json --out statistics     # statistics.json and statistics.png
  owlsam stats --run runs/coco --json

Images, categories, objects per image and category, sizes, aspect ratios, crowds, scores, and what is odd in the file.
A table goes to stderr; with --json every number goes to stdout instead, in one line.""",
    "clean": """examples:
  owlsam clean instances.json --out clean.json
  owlsam clean instances.json --out clean.json --removed removed.jsonl --set min_area=100 --set duplicate_iou=0.95
  owlsam clean instances.json --out clean.json --set crowd=true --set drop_empty_images=true --set clip_boxes=true

Writes a COCO file without the annotations that a rule refuses, and a table of everything removed or changed, with the
rule (default: OUT with .removed.csv). On by default: malformed, unknown_image, unknown_category, no_box, non_finite,
zero_area, outside, bad_segmentation, empty_segmentation, duplicate_iou (0.9), degenerate_polygons, new_ids. Off:
crowd, min_area, drop_empty_images, clip_boxes. A rule that goes by a number, duplicate_iou or min_area, is switched off
with false: --set duplicate_iou=false. The rest of the file is carried over as it stands.""",
    "finetune": """examples:
  owlsam finetune jobs/demo-detector.yaml --out runs/detector
  owlsam finetune jobs/demo-segmenter.yaml --out s3://bucket/segmenter --set resources.workers=8
  owlsam annotate jobs/coco.yaml --run runs/mine --set detector.weights=runs/detector/model

Metrics go to stdout, one line of JSON each, to DIR/metrics.jsonl and to DIR/tensorboard. DIR/model is what `annotate`
loads: the best by validation, or the last without a validation set.""",
    "demo": """examples:
  owlsam demo
  owlsam demo --run runs/small --images 40 --seed 7
  owlsam demo --set reduce.score_threshold=0.5

Leaves the run file at DIR/run.yaml, the scores at DIR/evaluation.json, labelled pictures at DIR/contact_sheet.png.""",
}

_HELPS = {
    "check": "try everything that a run needs, on a few images, before it starts",
    "plan": "list the images once, and freeze ids and shards",
    "estimate": "label a sample, and tell what the whole run will take",
    "preview": "label a few pictures here and draw them: find prompts and thresholds before a run",
    "annotate": "label every shard that is not labelled yet",
    "status": "tell how far a run is, and who works on it",
    "verify": "prove every file of a run; set bad ones aside for the next attempt",
    "reduce": "merge the shards into COCO annotations, and prove that nothing is missing",
    "calibrate": "fit a score threshold for each category on labelled images: for a precision, a recall or the best F1",
    "review-list": "choose annotations for people to look at",
    "evaluate": "measure labels against a ground truth: AP, matched masks, seconds per image",
    "stats": "count what a COCO file or a run holds: a table, JSON, plots",
    "clean": "remove broken and repeated annotations from a COCO file, and say which",
    "finetune": "train a detector or a segmenter on a COCO dataset; the same command resumes",
    "demo": "draw pictures, label them with the models that come with the package, and measure the labels",
}


def _seconds(text: str) -> float:
    """A number of seconds, as an argument's type.

    Raises:
        ValueError: it is none; argparse says so.
    """
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return value


def _positive(text: str) -> int:
    """A whole number from 1 on, as an argument's type.

    Raises:
        ValueError: it is none; argparse says so.
    """
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="owlsam",
        description="Label images at dataset scale: name what you look for, get boxes and masks.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"owlsam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in _HELPS.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{_EXAMPLES[name]}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _ADD_OPTIONS.get(name, _add_run_options)(command)
    return parser


def _add_run_options(command: argparse.ArgumentParser, *, files: str = "+") -> None:
    command.add_argument("run_files", nargs=files, metavar="RUNFILE", help="YAML run files, merged from left to right")
    command.add_argument("--run", metavar="DIR", help="run directory or fsspec URL (over `run:` of the run files)")
    _add_overrides(command)


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="override one setting; may be repeated",
    )


def _add_preview_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="+", metavar="IMAGE", help="image files, folders or fsspec URLs")
    command.add_argument("--prompts", nargs="+", default=[], metavar="TEXT", help="what to look for, as it stands")
    command.add_argument(
        "--run-file",
        dest="run_files",
        action="append",
        default=[],
        metavar="FILE",
        help="models and choices of a run; may be repeated, later ones win",
    )
    command.add_argument("--demo", action="store_true", help="use the small models that come with the package")
    command.add_argument(
        "--min-score",
        type=float,
        metavar="S",
        help="draw labels from this score (default: 0.1, or detector.score_floor if that is greater)",
    )
    command.add_argument(
        "--max-images", type=int, default=12, metavar="N", help="pictures of the sheet (default: %(default)s)"
    )
    command.add_argument(
        "--out",
        default="preview.png",
        metavar="PNG",
        help="the picture; an earlier one is replaced (default: %(default)s)",
    )
    _add_overrides(command)


def _add_check_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--images", type=int, default=8, metavar="N", help="images that are labelled (default: %(default)s)"
    )


def _add_status_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--json", action="store_true", help="the line on stdout alone, and no table")
    command.add_argument(
        "--watch", nargs="?", type=_seconds, const=10.0, metavar="S", help="look again every S seconds (default: 10)"
    )
    command.add_argument(
        "--wait",
        type=_seconds,
        metavar="S",
        help="wait at most S seconds for heartbeats (default: until it is clear who lives, a little more than the "
        "run's resources.heartbeat_s at most, not at all when no attempt is registered)",
    )


def _add_verify_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="run directory or fsspec URL")
    command.add_argument("--repair", action="store_true", help="move bad shard files to RUN/damaged")


def _add_plan_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--extend", action="store_true", help="add the images that a planned run does not have yet, as further shards"
    )
    command.add_argument("--verify", choices=("none", "exists", "decode"), help="look at every image first")
    _add_selection(command)


def _add_selection(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("which of the images (over the section `plan` of the run file)")
    group.add_argument("--limit", type=int, metavar="N", help="the first N")
    group.add_argument("--sample", type=int, metavar="N", help="N by chance; a larger sample holds the smaller one")
    group.add_argument("--seed", type=int, metavar="S", help="of the sample (default: 0)")
    group.add_argument("--splits", nargs="+", metavar="NAME", help="only of these splits: val2017, patch8, …")
    group.add_argument(
        "--categories", nargs="+", metavar="NAME", help="only images with an annotation of one of these categories"
    )


def _add_estimate_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument("--images", type=int, default=200, metavar="N", help="of the sample (default: %(default)s)")
    _add_selection(command)


def _add_annotate_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--allow-numerics-change",
        action="store_true",
        help="go on with another device, dtype, model batch or library version than earlier attempts",
    )
    command.add_argument(
        "--slice",
        default="1/1",
        metavar="I/N",
        help="only every N-th shard, from the I-th on: N calls, on as many machines, share the run (default: 1/1)",
    )
    command.add_argument(
        "--takeover", action="store_true", help="stop an attempt that works on this slice, and go on in its place"
    )
    command.add_argument(
        "--retry-failed",
        nargs="?",
        const="failed",
        metavar="REASON",
        help="then try failed images again: all but quarantined ones, or those of a class (transient, permanent, "
        "quarantined) or a reason (truncated, missing, …)",
    )


def _add_reduce_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--out", dest="reduce_out", metavar="DIR", help="where the files go (default: coco/ in the run directory)"
    )
    command.add_argument(
        "--formats",
        dest="reduce_formats",
        nargs="+",
        choices=get_args(FormatName),
        metavar="NAME",
        help=f"{', '.join(get_args(FormatName))} (default: coco)",
    )
    command.add_argument(
        "--operating-points",
        dest="reduce_operating_points",
        metavar="FILE",
        help="thresholds of categories, as `owlsam calibrate` writes them",
    )
    command.add_argument(
        "--corrections",
        dest="reduce_corrections",
        metavar="FILE",
        help="a COCO file of a review tool, replayed over the labels",
    )
    command.add_argument(
        "--partial",
        action="store_true",
        help="reduce what is labelled by now; the exit code is 5 when images are missing",
    )


def _add_calibrate_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--ground-truth",
        metavar="FILE",
        help="COCO or LVIS JSON of some of the images (default: evaluate.ground_truth)",
    )
    target = command.add_mutually_exclusive_group()
    target.add_argument("--precision", type=float, metavar="P", help="the lowest thresholds with safely this precision")
    target.add_argument("--recall", type=float, metavar="R", help="the highest thresholds with safely this recall")
    target.add_argument("--f1", action="store_true", help="the best F1 (default)")
    command.add_argument(
        "--kind", choices=("box", "mask"), default="box", help="what is compared (default: %(default)s)"
    )
    command.add_argument(
        "--iou", type=float, default=0.5, metavar="X", help="from which a detection is right (default: %(default)s)"
    )
    command.add_argument(
        "--min-examples",
        type=int,
        default=50,
        metavar="N",
        help="with fewer, a category borrows (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the intervals (default: %(default)s)")
    command.add_argument("--out", metavar="FILE", help="the JSON file (default: operating_points.json of the run)")
    command.add_argument("--json", action="store_true", help="everything in the line on stdout, and no table")


def _add_review_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command)
    command.add_argument(
        "--by",
        choices=("score", "uncertain", "predicted_iou", "stability"),
        default="score",
        help="as many from each score bin, the nearest to the threshold, or the lowest (default: %(default)s)",
    )
    command.add_argument(
        "--per-cell",
        type=_positive,
        default=10,
        metavar="N",
        help="of each cell (default: %(default)s)",
    )
    command.add_argument("--bins", type=_positive, default=10, metavar="N", help="of scores (default: %(default)s)")
    command.add_argument(
        "--whole-images", action="store_true", help="list everything in the images that hold a chosen one"
    )
    command.add_argument("--seed", type=int, default=0, metavar="S", help="of the choice (default: %(default)s)")
    command.add_argument("--out", metavar="DIR", help="where the files go (default: review/ in the run directory)")


def _add_evaluate_options(command: argparse.ArgumentParser) -> None:
    _add_run_options(command, files="*")
    command.add_argument("--json", action="store_true", help="every number in the line on stdout, and no table")
    files = command.add_argument_group("without a run")
    files.add_argument("--ground-truth", metavar="FILE", help="COCO or LVIS JSON file or fsspec URL")
    files.add_argument(
        "--predictions", metavar="FILE", help="COCO results, or a COCO file whose annotations have scores"
    )
    files.add_argument("--kind", choices=("bbox", "segm"), help="compare boxes or masks")
    files.add_argument(
        "--lvis", action="store_true", help="as LVIS does; is so anyway when the images have neg_category_ids"
    )


def _add_finetune_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "job_files", nargs="+", metavar="JOBFILE", help="YAML files of a training, merged from left to right"
    )
    command.add_argument("--out", metavar="DIR", help="directory or fsspec URL of the training (over `out:`)")
    _add_overrides(command)


def _add_demo_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run", metavar="DIR", default="runs/demo", help="where everything goes (default: %(default)s)"
    )
    command.add_argument("--images", type=int, default=200, metavar="N", help="pictures to draw (default: %(default)s)")
    command.add_argument("--seed", type=int, default=1, metavar="S", help="of the pictures (default: %(default)s)")
    _add_overrides(command)


def _add_stats_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", nargs="?", metavar="FILE", help="COCO or LVIS JSON file or fsspec URL")
    command.add_argument("--run", metavar="DIR", help="a reduced run instead of a file")
    command.add_argument("--out", metavar="DIR", help="write statistics.json and statistics.png here")
    command.add_argument("--json", action="store_true", help="every number in the line on stdout, and no table")


def _add_clean_options(command: argparse.ArgumentParser) -> None:
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


_ADD_OPTIONS = {
    "check": _add_check_options,
    "status": _add_status_options,
    "verify": _add_verify_options,
    "stats": _add_stats_options,
    "clean": _add_clean_options,
    "plan": _add_plan_options,
    "estimate": _add_estimate_options,
    "preview": _add_preview_options,
    "annotate": _add_annotate_options,
    "calibrate": _add_calibrate_options,
    "review-list": _add_review_options,
    "evaluate": _add_evaluate_options,
    "reduce": _add_reduce_options,
    "finetune": _add_finetune_options,
    "demo": _add_demo_options,
}
