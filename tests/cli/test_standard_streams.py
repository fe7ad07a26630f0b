"""stdout holds a command's own lines; a log that cannot be written changes nothing."""

import argparse
import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from owlsam_ray.cli import main as cli
from owlsam_ray.cli.standard_streams import Answers, own_stdout
from owlsam_ray.errors import InputError

_NOISY = """
import ctypes, os, subprocess, sys
from owlsam_ray.cli.standard_streams import own_stdout
with own_stdout() as answers:
    print("a library")
    os.write(1, b"its C code\\n")
    subprocess.run(["echo", "a child"])
    answers.write("an answer")
    print("a log line", file=sys.stderr)
print("afterwards")
sys.exit(7)
"""


_LOGGING = """
import logging, sys
from owlsam_ray.cli.standard_streams import own_stdout
with own_stdout() as answers:
    logging.basicConfig(level="INFO")
    logging.info("a log line")
    print("a library", flush=True)
    print("one more", file=sys.stderr)
    answers.write("an answer")
sys.exit(7)
"""


def test_only_answers_reach_stdout() -> None:
    done = subprocess.run([sys.executable, "-c", _NOISY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "an answer\nafterwards\n")
    assert sorted(done.stderr.splitlines()) == ["a child", "a library", "a log line", "its C code"]


@pytest.mark.parametrize("redirection", ["1>&3 2>/dev/full", "1>&3 2>&-", "2>&1 1>&3 3>&- | true"])
def test_a_log_that_cannot_be_written_changes_nothing(tmp_path: Path, redirection: str) -> None:
    out = tmp_path / "out"
    call = f'exec 3>{out}; set -o pipefail; "$0" -c "$1" {redirection}'
    done = subprocess.run(["bash", "-c", call, sys.executable, _LOGGING], check=False)
    assert (done.returncode, out.read_text()) == (7, "an answer\n")


def test_a_stand_in_for_stdout_is_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    with own_stdout() as answers:
        print("noise")
        answers.write("an answer")
    print("later")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("an answer\nlater\n", "noise\n")


def test_a_slow_reader_of_a_pipe_gets_everything() -> None:
    code = """
import os
from owlsam_ray.cli.standard_streams import own_stdout
os.set_blocking(1, False)
with own_stdout() as answers:
    answers.write("x" * 1_000_000)
"""
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" | (sleep 0.3; wc -c)', sys.executable, code],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert int(done.stdout) == 1_000_001


class Refusing(Answers):
    """A stdout that takes nothing."""

    def __init__(self, number: int) -> None:
        super().__init__(None, None)
        self._number = number

    def write(self, line: str) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize(
    ("number", "code", "expected", "told"),
    [
        (errno.ENOSPC, 0, 5, ["cannot write the JSON line to stdout: [Errno 28] No space left on device"]),
        (errno.EIO, 0, 5, ["cannot write the JSON line to stdout: [Errno 5] Input/output error"]),
        (errno.ENOSPC, 2, 2, ["cannot write the JSON line to stdout: [Errno 28] No space left on device"]),
        (errno.EPIPE, 0, 0, []),  # whoever closed it does not want to know
        (errno.EPIPE, 75, 75, []),
    ],
)
def test_exit_code_when_nobody_gets_the_line(
    number: int, code: int, expected: int, told: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    call = cli._Call(argparse.Namespace(command="status"), Console(stderr=True), Refusing(number))
    with caplog.at_level(logging.WARNING):
        assert call.end(code) == expected
    assert [record.message for record in caplog.records] == told
    assert call.end(75) == 75  # and no second line


@pytest.mark.parametrize(("redirection", "expected"), [(">/dev/full", 5), ("| true", 2), (">&-", 2)])
def test_python_does_not_replace_the_exit_code_at_its_end(redirection: str, expected: int) -> None:
    code = """
import sys, time
from owlsam_ray.cli.standard_streams import own_stdout
code = 2
with own_stdout() as answers:
    time.sleep(0.2)
    try:
        answers.write("an answer")
    except BrokenPipeError:
        pass
    except OSError as error:
        code = 5
sys.exit(code)
"""
    call = f'set -o pipefail; "$0" -c "$1" {redirection}'
    done = subprocess.run(["bash", "-c", call, sys.executable, code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (expected, "")


def test_the_line_of_json_survives_a_full_stderr(tmp_path: Path) -> None:
    call = f'"$0" -m owlsam_ray status {tmp_path} 2>/dev/full'
    done = subprocess.run(["bash", "-c", call, sys.executable], capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout)["exit_code"]) == (2, 2)


def test_a_display_on_a_full_stderr_is_no_refusal_of_storage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:

        def status(run: str, options: object, console: object) -> dict[str, int]:
            console.print("a table")  # type: ignore[attr-defined]
            raise InputError("no such run")

        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setitem(cli._ON_DIRECTORY, "status", status)
        assert cli.main(["status", "x"]) == 2
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, full.fileno())  # so that it can be closed
        os.close(null)
    assert json.loads(capsys.readouterr().out)["error"] == "no such run"
