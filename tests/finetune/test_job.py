"""The whole command: Ray Train, SIGKILL and resume, two workers, bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.cli import main as cli
from owlsam_ray.sources.drawing import Split
from owlsam_ray.sources.drawn import annotation_file
from tests.finetune.drawn import DETECTOR, SEGMENTER, draw_sets, write_job
from tests.runs import ROOT, environment

ALONE = {"num_cpus": 1, "torch_threads": 1, "loader_threads": 1}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_sets(tmp_path_factory.mktemp("drawn"), train=48)


def command(job: Path, out: Path, settings: dict[str, Any]) -> list[str]:
    sets = [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]
    return [sys.executable, "-m", "owlsam_ray", "finetune", str(job), "--out", str(out), *sets]


def call(
    job: Path, out: Path, settings: dict[str, Any] | None = None, *, check: int = 0
) -> tuple[list[dict[str, Any]], str]:
    """Run to the end; returns the lines on stdout and the log."""
    done = subprocess.run(
        command(job, out, settings or {}),
        capture_output=True,
        text=True,
        check=False,
        env=environment() | {"RAY_DEDUP_LOGS": "0"},
        cwd=ROOT,
    )
    assert done.returncode == check, f"exit {done.returncode}\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def wait_for(condition: Any, *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_training_of_200_steps_goes_on_where_it_was(tmp_path: Path, drawn: Path) -> None:
    job = write_job(
        tmp_path, drawn, model=DETECTOR, optimizer={"steps": 200, "batch_size": 16, "lr": 2e-3},
        checkpoint={"every": 50, "validate_every": 200}, resources=ALONE, augment={"rotate90": 0.5},
    )  # fmt: skip
    lines, _ = call(job, tmp_path / "whole")
    whole = losses(tmp_path / "whole")
    values = [whole[step] for step in sorted(whole)]
    assert sum(values[-5:]) < 0.7 * sum(values[:5])  # each value is the mean of ten steps
    assert lines[-1]["steps"] == 200
    assert [line["step"] for line in lines[:-1] if "loss" in line] == sorted(whole)
    assert (tmp_path / "whole" / "model" / "model.safetensors").is_file()

    out = tmp_path / "killed"
    process = subprocess.Popen(
        command(job, out, {}), env=environment(), cwd=ROOT, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (out / "checkpoints" / "step-00000050.pt").is_file(), seconds=240)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    # The worker of a killed driver goes on for some seconds, and checkpoints with it.
    wait_for(lambda: not _ray_of(process.pid), seconds=60)
    wait_for(lambda: time.time() - (out / "metrics.jsonl").stat().st_mtime > 6, seconds=60)
    saved = sorted(int(path.stem[5:]) for path in (out / "checkpoints").glob("step-*.pt"))[-1]
    assert saved < 200, "the kill came too late to show anything"
    again, _ = call(job, out)
    assert again[0] == {"step": saved, "resumed": True}
    assert [line["step"] for line in again[:-1] if "loss" in line] == list(range(saved + 10, 201, 10))
    assert losses(out) == pytest.approx(whole, abs=1e-6)


def _ray_of(pid: int) -> list[str]:
    """Daemons of the Ray instance that a killed driver had started; they end by themselves."""
    found = subprocess.run(["pgrep", "-f", f"session_.*_{pid}/"], capture_output=True, text=True, check=False)
    return found.stdout.split()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_training_with_75(tmp_path: Path, drawn: Path, number: signal.Signals) -> None:
    job = write_job(tmp_path, drawn, optimizer={"steps": 100_000}, resources=ALONE)
    process = subprocess.Popen(
        command(job, tmp_path / "out", {}), env=environment(), cwd=ROOT, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_for(lambda: (tmp_path / "out" / "checkpoints" / "step-00000004.pt").is_file(), seconds=240)
        process.send_signal(number)
        stdout, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75
    assert json.loads(stdout.splitlines()[-1])["exit_code"] == 75


@pytest.mark.slow
def test_two_workers_see_disjoint_data_and_agree(tmp_path: Path, drawn: Path) -> None:
    job = write_job(
        tmp_path, drawn, model=SEGMENTER, optimizer={"steps": 20, "batch_size": 4},
        checkpoint={"every": 10, "validate_every": 20},
        resources={"workers": 2, "num_cpus": 2, "torch_threads": 1, "loader_threads": 1},
    )  # fmt: skip
    lines, log = call(job, tmp_path / "out", {"logging.level": "debug"})
    assert lines[-1]["steps"] == 20
    seen = {int(rank): set(json.loads(ids)) for rank, ids in re.findall(r"worker (\d) saw images (\[[\d, ]*\])", log)}
    assert set(seen) == {0, 1}
    assert seen[0] & seen[1] == set()
    assert len(seen[0] | seen[1]) == 48  # one epoch of 12 steps, and the next is not counted
    assert (tmp_path / "out" / "model" / "config.json").is_file()


def call_here(
    capsys: pytest.CaptureFixture[str], job: Path, out: Path, settings: dict[str, Any] | None = None
) -> tuple[int, str]:
    """The same in this process, for what ends before Ray starts; returns the exit code and the log."""
    capsys.readouterr()
    code = cli.main(command(job, out, settings or {})[3:])
    captured = capsys.readouterr()
    assert json.loads(captured.out.splitlines()[-1])["exit_code"] == code
    return code, captured.err


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: Any, **named: Any) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("ray.init", start)


@pytest.mark.usefixtures("no_ray")
def test_bad_input_is_told_before_ray_starts(tmp_path: Path, drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(annotation_file(drawn, Split.TRAIN).read_text())
    for name, change, expected in (
        ("none", {"annotations": []}, "no annotation to train on"),
        ("crowd", {"annotations": [one | {"iscrowd": 1} for one in tree["annotations"]]}, "crowd"),
        ("unknown", {"annotations": [tree["annotations"][0] | {"category_id": 999}]}, "999"),
    ):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(tree | change))
        job = write_job(tmp_path, drawn)
        settings = {"data.train.annotations": str(file), "data.val": None}
        code, log = call_here(capsys, job, tmp_path / name, settings)
        assert (code, expected in log) == (2, True), log
        assert not (tmp_path / name).exists()
    job = write_job(tmp_path, drawn)
    code, log = call_here(capsys, job, tmp_path / "typo", {"optimizer.step": 3})
    assert (code, "optimizer.step" in log) == (2, True), log
    code, log = call_here(capsys, job, tmp_path / "batch", {"resources.workers": 3})
    assert (code, "not a multiple" in log) == (2, True), log


@pytest.mark.usefixtures("no_ray")
def test_another_training_on_the_same_directory_is_refused(
    tmp_path: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path, drawn, resources=ALONE)
    (tmp_path / "out").mkdir()
    record = {"config": {"optimizer": {"lr": 3.0}}}
    (tmp_path / "out" / "finetune.json").write_text(json.dumps(record))
    code, log = call_here(capsys, job, tmp_path / "out")
    assert (code, "optimizer" in log) == (3, True), log
