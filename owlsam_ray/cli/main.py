"""The `owlsam` command. Logs and progress go to stderr, one line of JSON at the end to stdout."""

import argparse
import json
import logging
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.logging import RichHandler

from owlsam_ray import storage
from owlsam_ray.cli.options import make_parser
from owlsam_ray.cli.standard_streams import Answers, own_stdout
from owlsam_ray.config.load import (
    absolute,
    load_config,
    load_evaluate_settings,
    load_tree,
    validate_tree,
    with_frozen_of,
)
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import (
    ConfigError,
    ExitCode,
    FailedImagesError,
    IncompleteError,
    InterruptedRunError,
    OwlsamError,
    one_line,
)
from owlsam_ray.parallel.ending import before_end
from owlsam_ray.parallel.logs import SafeFormatter, stderr_handler
from owlsam_ray.parallel.signals import as_interrupts
from owlsam_ray.storage.secrets import masked, masked_tree
from owlsam_ray.terminal import SafeConsole, safe_text

_LONG_MESSAGE = 2000
"""Characters of an error of somebody else's; a path has up to 4,096 bytes, but seldom more than some hundred."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    Args:
        arguments: without the program's name; default: the process's.
    """
    options = make_parser().parse_args(arguments)
    with own_stdout() as answers:
        console = SafeConsole(stderr=True)
        _start_log(console, "info")
        as_interrupts()  # until `annotate` has handlers of its own
        call = _Call(options, console, answers)
        with before_end(call.end_early):
            return call.end(call.run())


@dataclass(slots=True)
class _Call:
    """One call of a command: its work, and the line of JSON that it ends with."""

    options: argparse.Namespace
    console: Console
    answers: Answers
    start: float = field(default_factory=time.monotonic)
    summary: dict[str, Any] = field(default_factory=dict)
    ended: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> ExitCode:
        """Do the work; returns the exit code."""
        self.summary["command"] = self.options.command
        return _run(self.options, self.console, self.answers, self.summary)

    def end(self, code: int) -> int:
        """Write the line of JSON, unless that was done; returns the exit code by which the process is to end."""
        if not self.ended.acquire(blocking=False):
            return code
        self.summary |= {"wall_s": round(time.monotonic() - self.start, 1), "exit_code": int(code)}
        try:
            self.answers.write(json.dumps(masked_tree(self.summary)))
        except BrokenPipeError:
            pass  # nobody wants to know
        except OSError as error:
            logging.getLogger("owlsam_ray").error("cannot write the line of JSON to stdout: %s", _words_of(error))
            return int(code or ExitCode.INCOMPLETE)
        return int(code)

    def end_early(self, error: OwlsamError) -> None:
        """Tell what ends the process from outside the main thread, see `ending`."""
        self.console.show_cursor()  # a progress bar hides it
        self.end(_tell(error, self.summary))


def _run(options: argparse.Namespace, console: Console, answers: Answers, summary: dict[str, Any]) -> ExitCode:
    """Run a command, and put into its summary what it found."""
    try:
        _refuse_empty(options)
        if options.command == "finetune":
            summary |= _finetune(options, answers)
        elif options.command in _WITHOUT_RUN:
            summary |= _WITHOUT_RUN[options.command](options, console)
        elif options.command in _ON_DIRECTORY:
            summary["run"] = absolute(options.run)
            summary |= _ON_DIRECTORY[options.command](summary["run"], options, console)
        elif options.command == "evaluate" and not options.run_files:
            summary |= _evaluate_files(options, console)
        else:
            config = _config(options)
            _start_log(console, config.logging.level)
            storage.configure(config.storage.policy())
            summary["run"] = config.run
            summary |= _COMMANDS[options.command](config, options, console)
    except OwlsamError as error:
        return _tell(error, summary)
    except OSError as error:
        logging.getLogger("owlsam_ray").debug("storage refused", exc_info=True)
        message = (
            f"storage refused: {_words_of(error)}. What was finished is kept: mend it, and call the same command again."
        )
        return _tell(IncompleteError(message), summary)
    except (KeyboardInterrupt, SystemExit):  # the latter of Ray's own handler of SIGTERM
        return _tell(InterruptedRunError("interrupted: call the same command again"), summary)
    except Exception as error:  # Python's own exit code, 1, would say that images failed
        logging.getLogger("owlsam_ray").exception("an error that nobody expected; what was finished is kept")
        summary["error"] = storage.described(error, _LONG_MESSAGE)
        return ExitCode.INCOMPLETE
    return ExitCode.COMPLETE


def _config(options: argparse.Namespace) -> RunConfig:
    """The config of a call. What only reads a labelled run takes from it what the run files do not say."""
    overrides = _all_overrides(options)
    if options.command in _ON_LABELS:
        from owlsam_ray.run.record import load_record

        run = options.run or load_tree(options.run_files, overrides).get("run")
        record = load_record(absolute(run)) if isinstance(run, str) and run.strip() else None
        if record is not None:
            return with_frozen_of(record.stored_config(), options.run_files, overrides=overrides, run=options.run)
    return load_config(options.run_files, overrides=overrides, run=options.run)


def _refuse_empty(options: argparse.Namespace) -> None:
    """Refuse options that were given without a value, which would stand for their defaults.

    Raises:
        ConfigError: names the first one.
    """
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip():
            option = "--" + name.removeprefix("reduce_").replace("_", "-")
            raise ConfigError(f"{option} has an empty value (an unset shell variable?): give one, or leave it out")


def _words_of(error: OSError) -> str:
    """Its own words, of whatever library they are, and of any length."""
    return one_line(masked(str(error)[: 10 * _LONG_MESSAGE]), _LONG_MESSAGE)


def _all_overrides(options: argparse.Namespace) -> list[str]:
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


def _tell(error: OwlsamError, summary: dict[str, Any]) -> ExitCode:
    message = str(error.args[0]) if error.args else type(error).__name__
    logging.getLogger("owlsam_ray").error("%s", message)
    summary.update(error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {})
    summary["error"] = message
    return error.exit_code


def _plan(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.plan.plan import plan_run
    from owlsam_ray.plan.selection import selection_of
    from owlsam_ray.run.claim import claim_setup
    from owlsam_ray.run.guard import check_writable
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.record import run_directory

    check_writable(run_directory(config))
    with (
        claim_setup(run_directory(config), config.resources) as setup,
        CountDisplay(console, interval_s=config.logging.progress_s) as display,
    ):
        plan = plan_run(config, extend=options.extend, show=display.show, raise_if_taken_over=setup.raise_if_taken_over)
    if not plan.new:
        selected = selection_of(config.plan)
        nothing = f"every image that {selected} selects" if selected else "every image of the listing"
        hint = " (a selection is unset with null: --set plan.limit=null)" if selected else ""
        logging.getLogger(__name__).info(
            "%s",
            f"nothing to add: {nothing} is planned already{hint}"
            if options.extend
            else "already planned: kept as it is",
        )
    return {
        "planned": plan.new > 0,
        "new": plan.new,
        "images": plan.manifest.num_images,
        "shards": plan.manifest.num_shards,
        "shard_size": plan.manifest.parts[-1].shard_size,
        "parts": len(plan.manifest.parts),
        "listed": plan.listed,
        "repeated": plan.repeated,
        "bad_rows": plan.bad,
        "categories": len(plan.record.categories),
        "layout_hash": plan.record.layout_hash[:16],
    }


def _annotate(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.parallel.allocation import export_ray_environment

    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.annotate.attempt import AttemptOptions, annotate_run
    from owlsam_ray.run.attempts import Slice
    from owlsam_ray.run.progress import LazyDisplay
    from owlsam_ray.run.retry import Retry

    wanted = AttemptOptions(
        part=Slice.parse(options.slice),
        takeover=options.takeover,
        retry=None if options.retry_failed is None else Retry(options.retry_failed),
        judge=True,
        allow_numerics_change=options.allow_numerics_change,
    )
    with LazyDisplay(console) as display:
        return annotate_run(config, wanted, show=display.show)


def _estimate(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.parallel.allocation import export_ray_environment

    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.run.progress import CountDisplay, LazyDisplay
    from owlsam_ray.trial.estimate import estimate_run

    counter = CountDisplay(console, interval_s=config.logging.progress_s)
    with LazyDisplay(console) as display:
        found = estimate_run(config, images=options.images, show_plan=counter.show, show=display.show)
    if found["images_per_s"] is None:
        console.print("The sample was done at once, so no rate could be seen: take more --images.")
    else:
        gpus = f", {found['gpu_hours']:.1f} GPU hours" if found["gpus"] else ""
        console.print(
            f"{found['images']:,} images at {found['images_per_s']:.2f} images/s on {found['actors']} actor(s): "
            f"{found['hours']:.1f} hours{gpus}, {found['predictions_bytes'] / 1e9:.2f} GB of shards, "
            f"{found['coco_bytes'] / 1e9:.2f} GB of COCO JSON; {found['start_s']:.0f} s to start",
            highlight=False,
        )
    return found


def _reduce(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.reduce.run import reduce_run
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.proof import check_failures

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        counts = reduce_run(config, partial=options.partial, show=display.show)
    check_failures(config.reduce.max_failed, counts)
    return counts


def _calibrate(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.calibrate.curves import Target
    from owlsam_ray.calibrate.points import Fitting
    from owlsam_ray.calibrate.run import MatchRule, calibrate_run
    from owlsam_ray.calibrate.table import operating_points_table
    from owlsam_ray.reduce.operating_points import OPERATING_POINTS_FILE
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.record import run_directory

    target = Target()
    if options.precision is not None:
        target = Target("precision", options.precision)
    elif options.recall is not None:
        target = Target("recall", options.recall)
    out = absolute(options.out) if options.out else storage.join(run_directory(config), OPERATING_POINTS_FILE)
    with CountDisplay(console, interval_s=config.logging.progress_s, unit="shards") as display:
        result = calibrate_run(
            config,
            target,
            absolute(options.ground_truth) if options.ground_truth else None,
            matching=MatchRule(options.kind, options.iou),
            fitting=Fitting(min_examples=options.min_examples, seed=options.seed),
            out=out,
            show=display.show,
        )
    if options.json:
        return result | {"operating_points": out}
    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)
    wide.print(operating_points_table(result))
    rows = result["categories"]
    return {
        "operating_points": out,
        "ground_truth": result["ground_truth"],
        "target": result["target"],
        "counts": result["counts"],
        "categories": len(rows),
        "reached": sum(row["reached"] for row in rows),
    }


def _review_list(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
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


def _finetune(options: argparse.Namespace, answers: Answers) -> dict[str, Any]:
    from owlsam_ray.finetune.config import load_finetune_config
    from owlsam_ray.parallel.allocation import export_ray_environment

    config = load_finetune_config(options.job_files, overrides=options.overrides, out=options.out)
    _start_log(SafeConsole(stderr=True), config.logging.level)
    export_ray_environment(config.resources.auth_mode)

    from owlsam_ray.finetune.job import finetune

    return {"out": config.out} | finetune(config, report=lambda line: answers.write(json.dumps(masked_tree(line))))


def _demo(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.demo.run import run_demo

    return run_demo(
        options.run, num_images=options.images, seed=options.seed, overrides=options.overrides, console=console
    )


def _preview(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from rich.table import Table

    from owlsam_ray.trial.preview import expand_images, preview, preview_config

    config = preview_config(options.run_files, overrides=options.overrides, prompts=options.prompts, demo=options.demo)
    _start_log(console, config.logging.level)
    out = absolute(options.out)
    images = expand_images(options.images, config, count=options.max_images, out=out)
    min_score = max(0.1, config.detector.score_floor) if options.min_score is None else options.min_score
    result = preview(images, config, out=out, min_score=min_score)
    found = result.counts(min_score)
    table = Table(
        "category", "boxes", "best score", "median score", title=safe_text(f"{len(images)} picture(s): {options.out}")
    )
    for entry in found:
        table.add_row(*(safe_text("–" if value is None else str(value)) for value in entry.values()))
    console.print(table)
    failed = result.failed()
    summary = {"images": len(images), "sheet": result.sheet, "found": found, "failed": failed}
    if failed:
        first = ": ".join(next(iter(failed.items())))
        raise FailedImagesError(
            f"{len(failed)} of {len(images)} pictures failed, the first: {first}. The others are drawn.", summary
        )
    return summary


def _check(config: RunConfig, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.trial.check import check_run

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False, soft_wrap=True)

    with CountDisplay(console, interval_s=config.logging.progress_s) as display:
        return check_run(config, images=options.images, say=say, show=display.show)


def _verify(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.run.progress import CountDisplay
    from owlsam_ray.run.verify import verify_run

    with CountDisplay(console, interval_s=5.0) as display:
        return verify_run(run_url, repair=options.repair, show=display.show)


def _status(run_url: str, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    from owlsam_ray.run.status import status_table, watch_run

    wide = console if console.is_terminal else SafeConsole(stderr=True, width=160)

    def show(state: dict[str, Any]) -> None:
        if options.watch is not None and console.is_terminal:
            console.clear()
        if not options.json:
            wide.print(status_table(state))

    return watch_run(run_url, show, every_s=options.watch, wait_s=options.wait)


def _stats(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    if (options.file is None) == (options.run is None):
        raise ConfigError("name either a COCO FILE or --run DIR")
    from owlsam_ray.coco_files.statistics_run import annotations_of_run, run_statistics

    url = absolute(options.file) if options.file else annotations_of_run(absolute(options.run))
    return run_statistics(
        url, out=absolute(options.out) if options.out else None, as_json=options.json, console=console
    )


def _clean(options: argparse.Namespace, console: Console) -> dict[str, Any]:
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


_COMMANDS = {
    "check": _check,
    "plan": _plan,
    "estimate": _estimate,
    "annotate": _annotate,
    "calibrate": _calibrate,
    "reduce": _reduce,
    "review-list": _review_list,
    "evaluate": _evaluate,
}
_ON_LABELS = ("calibrate", "reduce", "review-list", "evaluate")
_ON_DIRECTORY = {"verify": _verify, "status": _status}
_WITHOUT_RUN = {"stats": _stats, "clean": _clean, "preview": _preview, "demo": _demo}


def _start_log(console: Console, level: str) -> None:
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
        handler.setFormatter(SafeFormatter("%(message)s"))
    else:
        handler = stderr_handler("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    ours = logging.getLogger("owlsam_ray")
    ours.handlers = [handler]
    ours.setLevel(level.upper())
    ours.propagate = False


if __name__ == "__main__":
    sys.exit(main())
