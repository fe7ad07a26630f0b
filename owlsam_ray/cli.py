"""The `owlsam` command. Logs and progress go to stderr, one line of JSON at the end to stdout."""

import argparse
import json
import logging
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from owlsam_ray import __version__
from owlsam_ray.config import RunConfig, absolute, load_config, load_evaluate_settings
from owlsam_ray.errors import (
    ConfigError,
    ExitCode,
    FailedImagesError,
    IncompleteError,
    InterruptedRunError,
    OwlsamError,
)

_EXIT_CODES = """exit codes:
  0   complete
  1   more failed images than reduce.max_failed
  2   usage or bad input
  3   the run directory belongs to other settings, another layout or other numerics
  4   another attempt is live
  5   incomplete: shards missing or damaged, storage full, or the proof does not add up
  75  interrupted: call the same command again"""

_EXAMPLES = {
    "plan": """examples:
  owlsam plan jobs/coco.yaml --run runs/coco
  owlsam plan jobs/coco.yaml site.yaml --run s3://bucket/runs/coco --set resources.shard_size=512""",
    "annotate": """examples:
  owlsam annotate jobs/coco.yaml --run runs/coco
  owlsam annotate jobs/coco.yaml --run runs/coco --set resources.actors=2 --set resources.detector_batch=16

Call the same command again after any interruption: finished shards are kept, nothing is labelled twice.
Plans first when that was not done.""",
    "reduce": """examples:
  owlsam reduce jobs/coco.yaml --run runs/coco
  owlsam reduce jobs/coco.yaml --run runs/coco --set reduce.score_threshold=0.3""",
    "evaluate": """examples:
  owlsam evaluate jobs/coco.yaml --run runs/coco
  owlsam evaluate jobs/coco.yaml --run runs/coco --set 'evaluate.size_edges_px=[32]' --json
  owlsam evaluate jobs/coco.yaml --run runs/coco --set evaluate.ground_truth=lvis_v1_val.json
  owlsam evaluate --ground-truth instances_val2017.json --predictions results.json --kind segm
  owlsam evaluate --ground-truth lvis_v1_val.json --predictions results.json --kind bbox --lvis --json

With run files: what `reduce` wrote, against evaluate.ground_truth (default: data.annotations), boxes and masks; also
written to RUN/evaluation.json. Without: a file of COCO results, or a COCO file whose annotations have scores.
A table goes to stderr; with --json every number goes to stdout instead, in one line.""",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        arguments: without the program's name; default: the process's.
    """
    options = _parser().parse_args(arguments)
    console = Console(stderr=True)
    _start_log(console, "info")
    if threading.current_thread() is threading.main_thread():
        # As Ctrl-C, until `annotate` has its own: a scheduler's stop is no failure.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.monotonic()
    summary: dict[str, Any] = {"command": options.command}
    try:
        if options.command == "evaluate" and not options.run_files:
            summary |= _evaluate_files(options, console)
        else:
            config = load_config(options.run_files, overrides=options.overrides, run=options.run)
            _start_log(console, config.logging.level)
            summary["run"] = config.run
            summary |= _COMMANDS[options.command](config, options, console)
        code = ExitCode.COMPLETE
    except FailedImagesError as error:
        summary |= error.args[1] if len(error.args) > 1 else {}
        code = _tell(error, summary)
    except OwlsamError as error:
        code = _tell(error, summary)
    except OSError as error:
        logging.getLogger("owlsam_ray").debug("storage refused", exc_info=True)
        message = f"storage refused: {error}. What was finished is kept: mend it, and call the same command again."
        code = _tell(IncompleteError(message), summary)
    except KeyboardInterrupt:
        code = _tell(InterruptedRunError("interrupted: call the same command again"), summary)
    summary |= {"wall_s": round(time.monotonic() - start, 1), "exit_code": int(code)}
    print(json.dumps(summary), flush=True)
    return int(code)


def _tell(error: OwlsamError, summary: dict[str, Any]) -> ExitCode:
    message = str(error.args[0]) if error.args else type(error).__name__
    logging.getLogger("owlsam_ray").error("%s", message)
    summary["error"] = message
    return error.exit_code


def _plan(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.guard import check_writable, plan_run, run_directory

    check_writable(run_directory(config))
    record, manifest, created = plan_run(config)
    if not created:
        logging.getLogger(__name__).info("already planned: kept as it is")
    return {
        "planned": created,
        "images": manifest.num_images,
        "shards": manifest.num_shards,
        "shard_size": manifest.parts[-1].shard_size,
        "categories": len(record.categories),
        "layout_hash": record.layout_hash[:16],
    }


def _annotate(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.resources import export_ray_environment

    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.annotate import annotate_run
    from owlsam_ray.guard import load_record, run_directory
    from owlsam_ray.progress import LazyDisplay

    with LazyDisplay(console) as display:
        counts = annotate_run(config, allow_numerics_change=options.allow_numerics_change, show=display.show)
    record = load_record(run_directory(config))
    counts["fingerprint"] = record.fingerprint[:16] if record is not None and record.fingerprint else None
    _check_failures(config, counts)
    return counts


def _reduce(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.reduce.run import reduce_run

    counts = reduce_run(config)
    _check_failures(config, counts)
    return counts


def _evaluate(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if options.ground_truth or options.predictions or options.kind or options.lvis:
        raise ConfigError(
            "--ground-truth, --predictions, --kind and --lvis are for files without a run; with a run file, "
            "give --set evaluate.ground_truth=FILE"
        )
    from owlsam_ray.evaluate.run import EVALUATION_FILE, evaluate_run

    evaluation = evaluate_run(config)
    return _show_evaluation(evaluation, options, console) | {"evaluation": f"{config.run}/{EVALUATION_FILE}"}


def _evaluate_files(options: argparse.Namespace, console: Console) -> dict[str, Any]:
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
    """Draw the table, unless JSON is asked for; returns what the last line says."""
    if options.json:
        return evaluation
    from owlsam_ray.evaluate.table import evaluation_table

    wide = console if console.is_terminal else Console(stderr=True, width=160)
    wide.print(evaluation_table(evaluation))
    overall = evaluation["groups"]["all"]["all"]
    speed = evaluation["speed"] or {}
    return (
        {key: evaluation[key] for key in ("ground_truth", "predictions", "box", "mask")}
        | {key: overall[key] for key in ("miou", "dice", "precision", "recall", "num_objects")}
        | {key: value for key, value in speed.items() if key.endswith(("_per_image", "images_per_s"))}
    )


def _check_failures(config: RunConfig, counts: dict[str, Any]) -> None:
    """Raise when more images failed than the config puts up with; everything was written all the same."""
    from owlsam_ray.reduce.proof import allowed_failures

    allowed = allowed_failures(config.reduce.max_failed, counts["images"])
    if counts["failed"] > allowed:
        raise FailedImagesError(
            f"{counts['failed']} of {counts['images']} images failed, and reduce.max_failed "
            f"({config.reduce.max_failed}) puts up with {allowed}. Nothing else is wrong: the labels of all other "
            "images are written. Reasons stand in the rows, and after reduce in coco/failures.jsonl.",
            counts,
        )


_COMMANDS = {"plan": _plan, "annotate": _annotate, "reduce": _reduce, "evaluate": _evaluate}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="owlsam",
        description="Label images at dataset scale: name what you look for, get boxes and masks.",
        epilog=_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"owlsam {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    helps = {
        "plan": "list the images once, and freeze ids and shards",
        "annotate": "label every shard that is not labelled yet",
        "reduce": "merge the shards into COCO annotations, and prove that nothing is missing",
        "evaluate": "measure labels against a ground truth: AP, matched masks, seconds per image",
    }
    for name, text in helps.items():
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"{_EXAMPLES[name]}\n\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "run_files",
            nargs="*" if name == "evaluate" else "+",
            metavar="RUNFILE",
            help="YAML run files, merged from left to right",
        )
        command.add_argument("--run", metavar="DIR", help="run directory or fsspec URL (over `run:` of the run files)")
        command.add_argument(
            "--set",
            dest="overrides",
            action="append",
            default=[],
            metavar="A.B=VALUE",
            help="override one setting; may be repeated",
        )
        if name == "annotate":
            command.add_argument(
                "--allow-numerics-change",
                action="store_true",
                help="go on with another device, dtype, model batch or library version than earlier attempts",
            )
        if name == "evaluate":
            _add_evaluate_options(command)
    return parser


def _add_evaluate_options(command: argparse.ArgumentParser) -> None:
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


def _start_log(console: Console, level: str) -> None:
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    ours = logging.getLogger("owlsam_ray")
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False


if __name__ == "__main__":
    sys.exit(main())
