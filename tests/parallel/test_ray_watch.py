"""When a part of Ray dies the command ends with 75 and one line of JSON, in seconds."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from owlsam_ray.parallel import ray_watch
from owlsam_ray.parallel.ray_watch import _Process, _Watch
from owlsam_ray.run.shards import done_shards
from tests.bench.reducing import make_run
from tests.finetune.drawn import draw_sets, write_job
from tests.runs import ROOT, environment

RAYLET, GCS = "raylet/raylet", "gcs/gcs_server"


class Told(Exception):  # noqa: N818
    """Of a death."""


def tell(cause: str) -> None:
    raise Told(cause)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (signal.SIGKILL, r"Ray's raylet \(process \d+\) was killed by SIGKILL"),
        (signal.SIGSEGV, r"Ray's raylet \(process \d+\) was killed by SIGSEGV"),
        (None, r"Ray's raylet \(process \d+\) ended with exit code 0"),
    ],
)
def test_a_process_of_ours_that_dies(how: signal.Signals | None, told: str) -> None:
    child = subprocess.Popen(["sleep", "60" if how else "0.5"])
    watch = _Watch([_Process("raylet", child.pid, child)], None, tell)
    watch.look()
    if how is not None:
        child.send_signal(how)
    start = time.monotonic()
    with pytest.raises(Told, match=told):
        watch.run()
    assert time.monotonic() - start < 5


def test_a_process_of_somebody_else_that_dies() -> None:
    child = subprocess.Popen(["sleep", "60"])
    watch = _Watch([_Process("gcs_server", child.pid)], None, tell)
    watch.look()
    child.kill()  # a zombie until it is waited for: dead all the same
    with pytest.raises(Told, match=r"Ray's GCS \(process \d+\) died"):
        watch.run()
    child.wait()
    with pytest.raises(Told):
        watch.look()  # where a system has no pidfd


def test_a_gcs_elsewhere_may_be_away_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_watch, "_ASK_GCS_S", 0.05)
    monkeypatch.setattr(ray_watch, "_GCS_PATIENCE_S", 0.6)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address: tuple[str, int] = server.getsockname()
        watch = _Watch([], address, tell)
        until(lambda: watch.look(), seconds=0.9)
    until(lambda: watch.look(), seconds=0.3)
    with socket.create_server(address):
        until(lambda: watch.look(), seconds=0.6)
    with pytest.raises(Told, match=r"has not answered for 0.6 s"):
        until(lambda: watch.look(), seconds=10)


def until(call: Callable[[], None], *, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        call()
        time.sleep(0.02)


def test_the_listener_of_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen()
        assert ray_watch._listener(str(tmp_path / "s")) == os.getpid()
    assert ray_watch._listener(str(tmp_path / "s")) is None
    assert ray_watch._listener(str(tmp_path / "none")) is None


# Whole commands.


def start(arguments: Sequence[str], log: Path) -> "subprocess.Popen[str]":
    with log.open("a") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "owlsam_ray", *arguments],
            stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment(), cwd=ROOT, start_new_session=True,
        )  # fmt: skip


def parts_of_ray(driver: int, name: str) -> list[int]:
    """Processes that a driver started itself, of this name."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            of_this_name = entry.name.isdigit() and name in (entry / "cmdline").read_text()
            if of_this_name and f"\nPPid:\t{driver}\n" in (entry / "status").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def kill_when(
    driver: "subprocess.Popen[str]", name: str, moment: Callable[["subprocess.Popen[str]"], bool]
) -> tuple[int, list[str]]:
    """SIGKILL a part of Ray; exit code and lines on stdout."""
    deadline = time.monotonic() + 300
    while not (moment(driver) and parts_of_ray(driver.pid, name)):
        assert driver.poll() is None, f"it ended with {driver.returncode} before the kill"
        assert time.monotonic() < deadline, "the moment of the kill never came"
        time.sleep(0.02)
    (victim,) = parts_of_ray(driver.pid, name)
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    stdout, _ = driver.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert not parts_of_ray(driver.pid, ""), "parts of Ray are left behind"
    return driver.returncode, stdout.splitlines()


def working(driver: "subprocess.Popen[str]") -> bool:
    """Whether tasks or actors of ours run already; idle workers are there while Ray still starts."""
    ours = ("ray::MapWorker", "ray::MapBatches", "ray::_isolate", "ray::_call")
    return any(parts_of_ray(raylet, name) for raylet in parts_of_ray(driver.pid, RAYLET) for name in ours)


def the_line(code: int, lines: list[str], command: str) -> dict[str, Any]:
    """The one line of JSON, and no other."""
    assert len(lines) == 1, lines
    summary: dict[str, Any] = json.loads(lines[0])
    assert (summary["command"], summary["exit_code"]) == (command, code)
    return summary


def write_run(root: Path, *, delay_s: float = 0.2) -> tuple[str, ...]:
    """A run of 60 pictures in shards of 10 with stand-ins for the models; returns the arguments of a command."""
    (root / "pictures").mkdir()
    noise = np.random.default_rng(4)
    for number in range(60):
        pixels = noise.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number:02d}.png")
    config = {
        "data": {"source": "folder", "images": str(root / "pictures")},
        "vocabulary": {"categories": ["thing"]},
        "detector": {"model": "fake"},
        "segment": {"model": "fake"},
        "fakes": {"delay_s": delay_s},
        "resources": {"shard_size": 10, "actors": 1, "num_cpus": 2, "object_store_mb": 100},
    }
    (root / "run.yaml").write_text(yaml.safe_dump(config))
    return str(root / "run.yaml"), "--run", str(root / "run")


@pytest.mark.slow
def test_annotate_ends_with_75_when_the_raylet_dies(tmp_path: Path) -> None:
    arguments, run = write_run(tmp_path), tmp_path / "run"
    driver = start(["annotate", *arguments], tmp_path / "log")
    code, lines = kill_when(driver, RAYLET, lambda _: len(done_shards(str(run))) >= 1)
    summary = the_line(code, lines, "annotate")
    assert code == 75
    assert "Ray's raylet (process" in summary["error"]
    assert f"{len(done_shards(str(run)))} of 6 shards are done; run the same command again" in summary["error"]
    (ended,) = (json.loads(path.read_text()) for path in (run / "attempts").glob("*.ended.json"))
    assert (ended["exit_code"], ended["last_error"]) == (75, summary["error"])
    assert not [path for path in (run / "attempts").glob("*.json") if "ended" not in path.name]
    assert "state-dump" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", [RAYLET, GCS])
def test_the_third_loss_in_a_row_is_the_last_and_the_run_goes_on_when_it_can(tmp_path: Path, name: str) -> None:
    arguments, run = write_run(tmp_path, delay_s=3), tmp_path / "run"
    count = run / "attempts" / "slice-1-of-1.lost-ray"
    for expected in (75, 75, 5):
        driver = start(["annotate", *arguments], tmp_path / "log")
        code, lines = kill_when(driver, name, working)  # markers of the last call are there already
        assert code == expected
        summary = the_line(code, lines, "annotate")
    assert "3 attempts in a row have ended this way without progress (0 of 6 shards are done)" in summary["error"]
    assert "memory" in summary["error"]
    assert count.exists()
    (tmp_path / "run.yaml").write_text((tmp_path / "run.yaml").read_text().replace("delay_s: 3", "delay_s: 0"))
    driver = start(["annotate", *arguments], tmp_path / "log")
    stdout, _ = driver.communicate(timeout=300)
    assert (driver.returncode, json.loads(stdout)["ok"] + json.loads(stdout)["empty"]) == (0, 60)
    assert not count.exists()


@pytest.mark.slow
def test_a_signal_to_the_whole_job_is_no_loss(tmp_path: Path) -> None:
    """As Slurm and `timeout` send it: Ray's parts end along with the driver."""
    arguments, run = write_run(tmp_path, delay_s=3), tmp_path / "run"
    driver = start(["annotate", *arguments], tmp_path / "log")
    deadline = time.monotonic() + 300
    while not any((run / "attempts" / "in-hand").glob("shard-*")):
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(driver.pid, signal.SIGTERM)
    stdout, _ = driver.communicate(timeout=120)
    summary = the_line(75, stdout.splitlines(), "annotate")
    assert driver.returncode == 75
    assert "asked to stop" in summary["error"]
    assert not list((run / "attempts").glob("*.lost-ray"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [RAYLET, GCS])
def test_reduce_ends_with_75(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, 400_000, shard_size=20)
    for expected in (75, 75, 5):
        arguments = ["reduce", str(tmp_path / "run.yaml"), "--run", str(tmp_path / "run")]
        driver = start([*arguments, "--set=reduce.executor=ray", "--set=reduce.workers=2"], tmp_path / "log")
        code, lines = kill_when(driver, name, working)
        assert code == expected, (tmp_path / "log").read_text()[-3000:]
        again = "run the same command again" if expected == 75 else "3 attempts in a row"
        assert again in the_line(code, lines, "reduce")["error"]
    driver = start(arguments, tmp_path / "log")
    driver.communicate(timeout=300)
    assert driver.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", [RAYLET, GCS])
def test_estimate_ends_with_75(tmp_path: Path, name: str) -> None:
    arguments = write_run(tmp_path)
    driver = start(["estimate", *arguments, "--images", "60"], tmp_path / "log")
    sample = tmp_path / "run" / "estimate"
    code, lines = kill_when(driver, name, lambda _: len(done_shards(str(sample))) >= 1)
    assert code == 75
    the_line(code, lines, "estimate")


@pytest.mark.slow
@pytest.mark.parametrize("name", [RAYLET, GCS])
def test_finetune_ends_with_75(tmp_path: Path, name: str) -> None:
    drawn = draw_sets(tmp_path / "drawn", train=24)
    job = write_job(tmp_path, drawn, optimizer={"steps": 100_000}, resources={"num_cpus": 1, "torch_threads": 1})
    driver = start(["finetune", str(job), "--out", str(tmp_path / "out")], tmp_path / "log")
    code, lines = kill_when(driver, name, lambda _: (tmp_path / "out/checkpoints/step-00000004.pt").is_file())
    assert code == 75
    the_line(code, lines[-1:], "finetune")
    assert all(line.startswith('{"') for line in lines)
    assert "the last checkpoint is of step" in json.loads(lines[-1])["error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [RAYLET, GCS])
def test_the_watch_is_sooner_than_ray_20_times_of_20(tmp_path: Path, name: str) -> None:
    arguments, run = write_run(tmp_path, delay_s=30), tmp_path / "run"
    codes = []
    for _ in range(20):
        (run / "attempts" / "slice-1-of-1.lost-ray").unlink(missing_ok=True)
        for marker in (run / "attempts" / "in-hand").glob("*"):
            marker.unlink()
        driver = start(["annotate", *arguments], tmp_path / "log")
        code, lines = kill_when(driver, name, lambda _: any((run / "attempts" / "in-hand").glob("shard-*")))
        codes.append((code, len(lines)))
    assert codes == [(75, 1)] * 20
