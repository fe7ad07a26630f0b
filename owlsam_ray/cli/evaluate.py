"""`owlsam evaluate`: measure labels against a ground truth: AP, matched masks, seconds per image."""

import argparse
from typing import Any

from rich.console import Console

from owlsam_ray.cli.options import add_run_options
from owlsam_ray.config.load import absolute, load_evaluate_settings
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError
from owlsam_ray.terminal import SafeConsole

HELP = "measure labels against a ground truth: AP, matched masks, seconds per image"
EXAMPLES = """examples:
  owlsam evaluate run.yaml --run runs/coco
  owlsam evaluate run.yaml --run runs/coco --set 'evaluate.size_edges_px=[32]' --json
  owlsam evaluate run.yaml --run runs/coco --set evaluate.ground_truth=lvis_v1_val.json
  owlsam evaluate --ground-truth instances_val2017.json --predictions results.json --kind segm
  owlsam evaluate --ground-truth lvis_v1_val.json --predictions results.json --kind bbox --lvis --json

With run files, compares the boxes and masks that `reduce` wrote with evaluate.ground_truth (default: data.annotations),
and also writes RUN/evaluation.json. Without run files, compares a file of COCO results, or a COCO file whose
annotations have scores. Prints a table to stderr; with --json, prints every number to stdout instead, in one line."""


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_run_options(command, files="*")
    command.add_argument(
        "--json", action="store_true", help="print every number in the JSON line on stdout, and no table"
    )
    files = command.add_argument_group("files without a run")
    files.add_argument("--ground-truth", metavar="FILE", help="COCO or LVIS JSON file or fsspec URL")
    files.add_argument(
        "--predictions", metavar="FILE", help="COCO results, or a COCO file whose annotations have scores"
    )
    files.add_argument("--kind", choices=("bbox", "segm"), help="compare boxes or masks")
    files.add_argument(
        "--lvis", action="store_true", help="evaluate by the rules of LVIS; implied if images have neg_category_ids"
    )


def run(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run the command; return the fields of its JSON line."""
    if options.ground_truth or options.predictions or options.kind or options.lvis:
        raise ConfigError(
            "--ground-truth, --predictions, --kind and --lvis are for files without a run; with a run file, "
            "give --set evaluate.ground_truth=FILE"
        )
    from owlsam_ray.evaluate.run import evaluate_run
    from owlsam_ray.run.paths import EVALUATION_FILE

    evaluation = evaluate_run(config)
    return _show_evaluation(evaluation, options, console) | {"evaluation": f"{config.run}/{EVALUATION_FILE}"}


def run_on_files(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Evaluate files without a run; return the fields of the JSON line."""
    if not options.ground_truth or not options.predictions or not options.kind:
        raise ConfigError("nothing to evaluate: name a RUNFILE, or all of --ground-truth, --predictions and --kind")
    if options.run:
        raise ConfigError("--run needs a RUNFILE that describes the run")
    settings = load_evaluate_settings(options.overrides)
    from owlsam_ray.evaluate.run import evaluate_files

    evaluation = evaluate_files(
        absolute(options.ground_truth), absolute(options.predictions), options.kind, settings, lvis=options.lvis
    )
    return _show_evaluation(evaluation, options, console)


def _show_evaluation(evaluation: dict[str, Any], options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Print the table, or with `--json` none; return the fields of the JSON line."""
    if options.json:
        return evaluation
    from owlsam_ray.evaluate.table import evaluation_table

    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)
    wide.print(evaluation_table(evaluation))
    overall = evaluation["groups"]["all"]["all"]
    speed = evaluation["speed"] or {}
    return (
        {key: evaluation[key] for key in ("ground_truth", "predictions", "box", "mask")}
        | {key: overall[key] for key in ("miou", "dice", "precision", "recall", "num_objects")}
        | {
            key: evaluation["counts"][key]
            for key in ("images", "images_not_labelled", "images_failed", "images_not_in_the_ground_truth")
        }
        | {key: value for key, value in speed.items() if key.endswith(("_per_image", "images_per_s"))}
    )
