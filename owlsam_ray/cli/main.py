"""Run an `owlsam` command: logs and progress go to stderr, one JSON line at the end goes to stdout."""

import argparse
import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from owlsam_ray import storage
from owlsam_ray.cli import evaluate, finetune
from owlsam_ray.cli.log import start_log
from owlsam_ray.cli.options import all_overrides
from owlsam_ray.cli.parser import COMMANDS, make_parser
from owlsam_ray.cli.standard_streams import Answers, own_stdout
from owlsam_ray.config.load import (
    absolute,
    load_config,
    load_tree,
    with_frozen_of,
)
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import (
    ConfigError,
    ExitCode,
    IncompleteError,
    InterruptedRunError,
    OwlsamError,
    one_line,
)
from owlsam_ray.parallel.ending import before_end
from owlsam_ray.parallel.signals import as_interrupts
from owlsam_ray.storage.secrets import masked, masked_tree
from owlsam_ray.terminal import SafeConsole

_LONG_MESSAGE = 2000
"""Maximum characters of a library's error message. Paths have up to 4,096 bytes, but rarely more than a few hundred."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    Args:
        arguments: command-line arguments without the program's name; default: those of the process.
    """
    options = make_parser().parse_args(arguments)
    with own_stdout() as answers:
        console = SafeConsole(stderr=True)
        start_log(console, "info")
        as_interrupts()  # until `annotate` installs its own handlers
        call = _Call(options, console, answers)
        with before_end(call.end_early):
            return call.end(call.run())


@dataclass(slots=True)
class _Call:
    """One call of a command: does the work and writes the final JSON line."""

    options: argparse.Namespace
    console: Console
    answers: Answers
    start: float = field(default_factory=time.monotonic)
    summary: dict[str, Any] = field(default_factory=dict)
    ended: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> ExitCode:
        """Do the work; return the exit code."""
        self.summary["command"] = self.options.command
        return _run(self.options, self.console, self.answers, self.summary)

    def end(self, code: int) -> int:
        """Write the JSON line unless it is already written; return the exit code for the process."""
        if not self.ended.acquire(blocking=False):
            return code
        self.summary |= {"wall_s": round(time.monotonic() - self.start, 1), "exit_code": int(code)}
        try:
            self.answers.write(json.dumps(masked_tree(self.summary)))
        except BrokenPipeError:
            pass  # the reader has closed its end
        except OSError as error:
            logging.getLogger("owlsam_ray").error("cannot write the JSON line to stdout: %s", _words_of(error))
            return int(code or ExitCode.INCOMPLETE)
        return int(code)

    def end_early(self, error: OwlsamError) -> None:
        """Report an error that ends the process from another thread, see `parallel/ending`."""
        self.console.show_cursor()  # a progress bar hides it
        self.end(_report_error(error, self.summary))


def _run(options: argparse.Namespace, console: Console, answers: Answers, summary: dict[str, Any]) -> ExitCode:
    """Run a command and put its results, or its error, into the summary."""
    try:
        _refuse_empty(options)
        if options.command == "finetune":
            summary |= finetune.run(options, answers)
        elif options.command in _WITHOUT_RUN:
            summary |= _WITHOUT_RUN[options.command](options, console)
        elif options.command in _ON_DIRECTORY:
            summary["run"] = absolute(options.run)
            summary |= _ON_DIRECTORY[options.command](summary["run"], options, console)
        elif options.command == "evaluate" and not options.run_files:
            summary |= evaluate.run_on_files(options, console)
        else:
            config = _config(options)
            start_log(console, config.logging.level)
            storage.configure(config.storage.policy())
            summary["run"] = config.run
            summary |= _COMMANDS[options.command](config, options, console)
    except OwlsamError as error:
        return _report_error(error, summary)
    except OSError as error:
        logging.getLogger("owlsam_ray").debug("storage error", exc_info=True)
        message = (
            f"storage error: {_words_of(error)}. Finished work is kept: fix the cause and run the same command again."
        )
        return _report_error(IncompleteError(message), summary)
    except (KeyboardInterrupt, SystemExit):  # SystemExit: Ray's own SIGTERM handler
        return _report_error(InterruptedRunError("interrupted: run the same command again"), summary)
    except Exception as error:  # Python's own exit code, 1, would mean failed images
        logging.getLogger("owlsam_ray").exception("unexpected error; finished work is kept")
        summary["error"] = storage.described(error, _LONG_MESSAGE)
        return ExitCode.INCOMPLETE
    return ExitCode.COMPLETE


def _config(options: argparse.Namespace) -> RunConfig:
    """Load the configuration; commands that only read labels take missing frozen settings from the planned run."""
    overrides = all_overrides(options)
    if options.command in _ON_LABELS:
        from owlsam_ray.run.record import load_record

        run = options.run or load_tree(options.run_files, overrides).get("run")
        record = load_record(absolute(run)) if isinstance(run, str) and run.strip() else None
        if record is not None:
            return with_frozen_of(record.stored_config(), options.run_files, overrides=overrides, run=options.run)
    return load_config(options.run_files, overrides=overrides, run=options.run)


def _refuse_empty(options: argparse.Namespace) -> None:
    """Refuse options with an empty value, which would silently mean the default.

    Raises:
        ConfigError: an option is empty; the message names the first one.
    """
    for name, value in vars(options).items():
        if isinstance(value, str) and not value.strip():
            option = "--" + name.removeprefix("reduce_").replace("_", "-")
            raise ConfigError(
                f"{option} has an empty value (an unset shell variable?): give a value, or leave the option out"
            )


def _words_of(error: OSError) -> str:
    """The error's own message on one line: secrets masked, at most `_LONG_MESSAGE` characters."""
    return one_line(masked(str(error)[: 10 * _LONG_MESSAGE]), _LONG_MESSAGE)


def _report_error(error: OwlsamError, summary: dict[str, Any]) -> ExitCode:
    message = str(error.args[0]) if error.args else type(error).__name__
    logging.getLogger("owlsam_ray").error("%s", message)
    summary.update(error.args[1] if len(error.args) > 1 and isinstance(error.args[1], dict) else {})
    summary["error"] = message
    return error.exit_code


_ON_LABELS = ("calibrate", "reduce", "review-list", "evaluate")
_COMMANDS = {name: COMMANDS[name].run for name in ("check", "plan", "estimate", "annotate", *_ON_LABELS)}
"""Commands that take run files."""
_ON_DIRECTORY = {name: COMMANDS[name].run for name in ("verify", "status")}
_WITHOUT_RUN = {name: COMMANDS[name].run for name in ("stats", "clean", "preview", "demo")}
