"""The images that kill a process are found, and only these are given up."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from owlsam_ray.annotate.isolate import IsolationTask, _first_groups, _Worker, isolate_shard
from owlsam_ray.annotate.isolation_messages import LabelGroup, Ready, Request
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import GuardError, IncompleteError, InputError, PreflightError, WeightsError
from owlsam_ray.models.fakes import ALLOCATE, HANG, HANG_MODEL, SEGFAULT
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.run.run import open_run
from owlsam_ray.run.shards import load_shard
from tests.runs import ROOT, label_here

NUM_IMAGES = 20
POISONED = {3: SEGFAULT, 9: ALLOCATE, 10: HANG, 17: HANG_MODEL}
REASONS = {
    3: "killed_process: SIGSEGV",
    9: "out_of_memory: above 1.5 GB",
    10: "hang: no end within 3 s",
    17: "hang: no end within 3 s",
}


def draw(folder: Path, poisoned: dict[int, int]) -> None:
    """Pictures 000.png…; of those with a name in `poisoned` the first pixel tells what they do."""
    folder.mkdir(parents=True)
    chance = np.random.default_rng(8)
    for number in range(NUM_IMAGES):
        pixels = chance.integers(0, 250, (12, 16, 3), np.uint8)
        if number in poisoned:
            pixels[0, 0] = 255, 0, poisoned[number]
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def make_task(root: Path, *, poisoned: dict[int, int] = POISONED) -> tuple[IsolationTask, pa.Table]:
    """A shard that is labelled in peace already, and the task to do it again with poison at work."""
    draw(root / "images", poisoned)
    config = RunConfig.model_validate(
        {
            "run": str(root / "run"),
            "data": {"source": "folder", "images": str(root / "images")},
            "vocabulary": {"categories": ["cat", "dog"], "templates": "a {}"},
            "detector": {"model": "fake"},
            "segment": {"model": "fake"},
            "reduce": {"min_mask_area": 0},
            "resources": {
                "shard_size": NUM_IMAGES,
                "image_deadline_s": 3,
                "actor_memory_gb": 1.5,
                "actors": 1,
                "torch_threads": 1,
            },
        }
    )
    label_here(config)
    run = open_run(config.model_copy(update={"fakes": config.fakes.model_copy(update={"poison": True})}))
    assert run is not None
    task = IsolationTask(
        run=run,
        shard=0,
        positions=None,
        allocation=allocate(config.resources, num_cpus=2, num_gpus=0),
        models=find_models(config.detector, config.segment),
    )
    return task, load_shard(str(config.run), 0)[1]


@pytest.mark.parametrize("culprits", [pytest.param((3, 9, 10, 17), marks=pytest.mark.slow), (3, 10)], ids=["4", "2"])
def test_only_the_culprits_are_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, culprits: tuple[int, ...]
) -> None:
    """Suspects that are right, one that is wrong, and a culprit that nobody suspects."""
    task, peaceful = make_task(tmp_path, poisoned={number: POISONED[number] for number in culprits})
    starts = count_starts(monkeypatch)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    rows, stage_s = isolate_shard(replace(task, suspects=frozenset({4, 10, 11, 5, 777})))
    check(rows, peaceful, {number: REASONS[number] for number in culprits})
    assert set(stage_s) >= {"decode", "detect"}
    assert len(starts) <= 12, "it is not gone by what the processes leave word of"
    left = [path.name for path in (tmp_path / "temporary").iterdir() if path.name.startswith("owlsam")]
    assert left == [], "of processes that died"


def check(rows: pa.Table, peaceful: pa.Table, reasons: dict[int, str]) -> None:
    assert rows.schema.equals(peaceful.schema)
    assert rows.num_rows == NUM_IMAGES
    for number, (row, before) in enumerate(zip(rows.to_pylist(), peaceful.to_pylist(), strict=True)):
        if number in reasons:
            assert (row["status"], row["status_class"], row["reason"]) == ("failed", "quarantined", reasons[number])
            assert row["image_id"] == before["image_id"]
        else:
            assert row == before


def with_settings(task: IsolationTask, section: str, **values: Any) -> IsolationTask:
    """The task with other settings in one section, unvalidated."""
    config = task.run.config
    changed = getattr(config, section).model_copy(update=values)
    return replace(task, run=replace(task.run, config=config.model_copy(update={section: changed})))


def count_starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Processes that are started from here on."""
    pids: list[int] = []
    start = subprocess.Popen

    def started(*arguments: Any, **named: Any) -> Any:
        process = start(*arguments, **named)
        pids.append(process.pid)
        return process

    monkeypatch.setattr("owlsam_ray.annotate.isolate.subprocess.Popen", started)
    return pids


@pytest.mark.slow
def test_some_positions_and_kills_from_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an image that is alone, and of several: nobody is given up."""
    task, peaceful = make_task(tmp_path, poisoned={})
    slow = with_settings(task, "fakes", delay_s=0.5)
    pids, groups = count_starts(monkeypatch), list[list[int]]()
    send = _Worker._send

    def send_and_kill(worker: _Worker, request: Request) -> None:
        send(worker, request)
        if isinstance(request, LabelGroup):
            groups.append(list(request.positions))
            if len(groups) in (1, 3):
                os.kill(pids[-1], signal.SIGKILL)

    monkeypatch.setattr(_Worker, "_send", send_and_kill)
    rows, _ = isolate_shard(replace(slow, positions=(2, 5, 7, 11), suspects=frozenset({6})))
    assert groups == [[5], [5], [2, 7, 11], [2], [7, 11]]
    assert len(pids) == 3
    assert rows.equals(peaceful.take([2, 5, 7, 11]))


@pytest.mark.parametrize(
    ("suspects", "expected"),
    [
        ((), [[0, 1, 2]]),
        ((11, 999), [[1], [0, 2]]),
        ((10, 11, 12), [[0], [1], [2]]),
    ],
)
def test_suspects_come_first(suspects: tuple[int, ...], expected: list[list[int]]) -> None:
    assert _first_groups([0, 1, 2], [10, 11, 12], frozenset(suspects)) == expected


def test_many_suspects_are_one_group() -> None:
    groups = _first_groups(list(range(100)), list(range(100)), frozenset(range(30, 47)))
    assert groups == [list(range(30, 47)), [*range(30), *range(47, 100)]]
    assert _first_groups([], [], frozenset({1})) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault",
    [
        "import owlsam_ray.inference.engine as e, time; e.suppress = lambda *a, **k: time.sleep(9999)",
        "import owlsam_ray.models.fakes as f, ctypes; "
        "f.FakeDetector.preprocess = lambda *a: ctypes.PyDLL(None).sleep(9999)",
    ],
    ids=["where nobody watches", "with the interpreter's lock"],
)
def test_every_hang_comes_to_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    task, _ = make_task(tmp_path, poisoned={})
    with_fault(monkeypatch, tmp_path, fault)
    rows, _ = isolate_shard(replace(task, positions=(5,)))
    assert rows["reason"].to_pylist() == ["hang: no end within 3 s"]


def with_fault(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    """Have the processes that are started from here on run some code first."""
    script = folder / "python"
    module = "sys.argv = sys.argv[2:]; runpy.run_module('owlsam_ray.annotate.isolation_worker', run_name='__main__')"
    script.write_text(f"#!{sys.executable}\nimport sys, runpy\n{fault}\n{module}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


_RAISES = """
import owlsam_ray.models.fakes as fakes
real, count = fakes.FakeDetector.preprocess, [0]
def preprocess(self, pixels):
    if EVERY or pixels.sum() == SUM:
        raise MemoryError("no room for this one")
    return real(self, pixels)
fakes.FakeDetector.preprocess = preprocess
"""


@pytest.mark.parametrize("line", ["Segmentation fault", '{"kind": "done"}'])
def test_a_process_that_replies_rubbish_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    """Twice, since something outside of it may be to blame."""
    task, _ = make_task(tmp_path, poisoned={})
    script = tmp_path / "python"
    replies = f"read setup; echo '{Ready().model_dump_json()}'; read group; echo '{line}'; read more"
    script.write_text(f"#!/bin/sh\n{replies}\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    starts = count_starts(monkeypatch)
    rows, _ = isolate_shard(replace(task, positions=(5,)))
    assert rows["reason"].to_pylist() == ["killed_process: unreadable reply"]
    assert len(starts) == 2


@pytest.mark.slow
def test_a_process_that_every_image_ends_is_ill_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, _ = make_task(tmp_path, poisoned={})
    with_fault(monkeypatch, tmp_path, _RAISES.replace("EVERY", "True"))
    with pytest.raises(PreflightError, match="the images are not the cause"):
        isolate_shard(task)


@pytest.mark.slow
def test_what_a_model_raises_is_the_reason_of_its_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, peaceful = make_task(tmp_path, poisoned={})
    sum_of_one = int(np.asarray(Image.open(tmp_path / "images" / "002.png")).sum())
    with_fault(monkeypatch, tmp_path, _RAISES.replace("EVERY", "False").replace("SUM", str(sum_of_one)))
    rows, _ = isolate_shard(replace(task, positions=(0, 1, 2, 3)))
    assert rows["reason"].to_pylist()[2] == "model_error: MemoryError: no room for this one"
    assert rows.take([0, 1, 3]).equals(peaceful.take([0, 1, 3]))


@pytest.mark.slow
def test_what_is_no_fault_of_an_image_is_told(tmp_path: Path) -> None:
    task, _ = make_task(tmp_path, poisoned={})
    gone = task.models.__class__(tmp_path / "nothing", tmp_path / "nothing")
    broken = replace(with_settings(task, "detector", model="owlvit"), models=gone)
    with pytest.raises((WeightsError, InputError, IncompleteError), match="nothing"):
        isolate_shard(broken)
    (tmp_path / "run" / "manifest" / "part-0000.parquet").write_bytes(b"no")
    with pytest.raises((GuardError, OSError, pa.ArrowInvalid)):
        isolate_shard(task)


@pytest.mark.parametrize("moment_s", [0.0, pytest.param(12.0, marks=pytest.mark.slow)], ids=["loading", "labelling"])
def test_the_process_ends_with_its_parent(tmp_path: Path, moment_s: float) -> None:
    """Also before it has loaded anything, and in the middle of a group."""
    make_task(tmp_path, poisoned={6: HANG})
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(moment_s)
    assert os.path.exists(f"/proc/{child}")
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and "Z" not in Path(f"/proc/{child}/stat").read_text().split(")")[1]:
        assert time.monotonic() < deadline, "the process outlives its parent"
        time.sleep(0.05)


_PARENT = """
import subprocess, sys
from pathlib import Path
from owlsam_ray.annotate import isolate
from owlsam_ray.config.load import RunConfig
from owlsam_ray.run.record import load_record
from owlsam_ray.run.run import reopen_run
from owlsam_ray.models.load import find_models
from owlsam_ray.parallel.allocation import allocate
root = Path(sys.argv[1])
record = load_record(str(root / "run"))
fields = record.config | {"run": str(root / "run"), "fakes": {"poison": True}}
fields["resources"]["image_deadline_s"] = 600
config = RunConfig.model_validate(fields)
start = subprocess.Popen
def start_and_print(*arguments, **named):
    process = start(*arguments, **named)
    print(process.pid, flush=True)
    return process
isolate.subprocess.Popen = start_and_print
isolate.isolate_shard(isolate.IsolationTask(
    run=reopen_run(config, record), shard=0, positions=None,
    allocation=allocate(config.resources, num_cpus=2, num_gpus=0), models=find_models(config.detector, config.segment),
))
"""
