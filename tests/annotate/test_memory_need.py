"""What a run needs of memory is told before it starts, and one that has too little ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owlsam_ray.annotate.memory_need import KillWatch, MemoryNeed, check_memory, check_node_memory, memory_need
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import PreflightError
from owlsam_ray.parallel.allocation import Allocation, allocate
from tests.parallel.test_ray_watch import start, the_line, write_run


def allocation(actors: int, gpus: int = 0) -> Allocation:
    return allocate(ResourcesConfig(actors=actors), num_cpus=32, num_gpus=gpus)


def test_weights_and_actors_count(tmp_path: Path) -> None:
    (tmp_path / "detector").mkdir()
    for name, size in (("a.safetensors", 3000), ("b.safetensors", 4000), ("same.bin", 6900), ("config.json", 10**6)):
        with (tmp_path / "detector" / name).open("wb") as file:
            file.truncate(size)
    with (tmp_path / "sam.pt").open("wb") as file:
        file.truncate(500)
    models = (tmp_path / "detector", tmp_path / "sam.pt")
    bare = memory_need(allocation(1), (tmp_path / "nothing", tmp_path / "nothing"))
    need = memory_need(allocation(3), models)
    assert need.actor - bare.actor == 7500
    assert need.total == need.driver + need.fetch + 3 * need.actor
    # On a GPU the weights lie there, and CUDA's libraries here.
    assert memory_need(allocation(1, gpus=1), models).actor == bare.actor + 10**9


def test_stand_ins_need_what_was_measured() -> None:
    """1,450 MiB are too little for one actor with stand-ins, 1,800 MiB enough."""
    need = memory_need(allocation(1), (Path("none"), Path("none")))
    check_memory(need, 1800 * 2**20)
    check_memory(need, None)
    for here in (1450, 1100, 1):
        with pytest.raises(PreflightError) as caught:
            check_memory(need, here * 2**20)
        assert str(caught.value) == (
            "too little memory: this run needs at least 1.60 GB (driver and Ray 0.75, 1 actor(s) of 0.70 each, fetch "
            f"0.15), and this machine, container or job may use {here * 2**20 / 1e9:.2f} GB. Give it more, lower "
            "resources.actors, or choose smaller models."
        )


@pytest.mark.parametrize(
    ("nodes", "fits"),
    [
        *(([2e9], True), ([1.9e9], False), ([1e9, 1e9], True), ([9e8, 9e8], False), ([], True)),
        *(([None], True), ([9e8, None], True)),
    ],
)
def test_actors_on_the_nodes_of_a_cluster(nodes: list[float | None], fits: bool) -> None:
    need = MemoryNeed(driver=1, actor=10**9, fetch=1, actors=2)
    if fits:
        check_node_memory(need, nodes)
    else:
        with pytest.raises(PreflightError, match=r"2 actor\(s\) need at least 1\.00 GB each, and the nodes have "):
            check_node_memory(need, nodes)


class Machine:
    """Kills and finished shards over a time."""

    def __init__(self) -> None:
        self.kills: int | None = 100
        self.done, self.now = 5, 1000.0
        self.watch = KillWatch(lambda: self.done, None, lambda: self.kills, lambda: self.now)
        assert self.watch.cause() is None

    def after(self, seconds: float, *, kills: int = 0, done: int = 0) -> str | None:
        self.now, self.done = self.now + seconds, self.done + done
        self.kills = None if self.kills is None else self.kills + kills
        return self.watch.cause()


def test_kills_without_a_shard_end_the_run() -> None:
    machine = Machine()
    assert machine.after(59, kills=19) is None
    assert machine.after(100) is None
    cause = machine.after(1, kills=1)
    assert cause is not None
    assert re.fullmatch(
        r"too little memory \([\d.]+ GB\): the kernel killed 20 processes in 160 s, and no shard was finished", cause
    )


def test_what_does_not_end_a_run() -> None:
    quick, busy, paused, blind = Machine(), Machine(), Machine(), Machine()
    assert quick.after(50, kills=500) is None, "some time is given"
    for _ in range(20):
        assert busy.after(30, kills=15, done=1) is None, "shards are finished"
    paused.watch.pause(True)
    assert paused.after(1000, kills=1000) is None, "images that take all memory are being found"
    paused.watch.pause(False)
    assert paused.after(1000, kills=5) is None
    blind.kills = None
    assert blind.after(1000) is None


# In a control group with a limit, where this process may make one.

_GROUPS = Path("/sys/fs/cgroup/memory")


@pytest.fixture
def group() -> Iterator[Path]:
    own = next((line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line), "::/")
    folder = _GROUPS / own.split(":", 2)[2].lstrip("/") / f"owlsam-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no control group can be made here")
    yield folder
    for _ in range(100):
        for pid in (folder / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.1)


def start_in(group: Path, limit: int, arguments: list[str], log: Path) -> "subprocess.Popen[str]":
    (group / "memory.limit_in_bytes").write_text(str(limit))
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if ":memory:" in line)
    before = _GROUPS / own.split(":", 2)[2].lstrip("/")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        return start(arguments, log)
    finally:
        (before / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.slow
def test_a_run_with_too_little_memory_does_not_start(tmp_path: Path, group: Path) -> None:
    arguments = write_run(tmp_path)
    driver = start_in(group, 1450 * 2**20, ["annotate", *arguments], tmp_path / "log")
    stdout, _ = driver.communicate(timeout=300)
    summary = the_line(2, stdout.splitlines(), "annotate")
    assert driver.returncode == 2
    assert "needs at least 1.60 GB" in summary["error"]
    assert "may use 1.52 GB" in summary["error"]


_HOG = """
import sys, time
held = []
while True:
    used, limit = (int(open(f"{sys.argv[1]}/memory.{name}_in_bytes").read()) for name in ("usage", "limit"))
    if limit - used > 40 * 2**20:
        held.append(bytearray(b"x" * (20 * 2**20)))
    time.sleep(0.01)
"""


@pytest.mark.slow
def test_a_run_whose_memory_is_taken_away_ends(tmp_path: Path, group: Path) -> None:
    arguments = write_run(tmp_path, delay_s=1)
    driver = start_in(group, 3000 * 2**20, ["annotate", *arguments], tmp_path / "log")
    deadline = time.monotonic() + 300
    # Then the preflight is over, and no actor is there yet.
    while "memory: the run needs at least" not in (tmp_path / "log").read_text():
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    # The kernel ends Ray's workers first (Ray asks for that); when none is left, the hog.
    hog: subprocess.Popen[bytes] | None = None
    while driver.poll() is None and time.monotonic() < deadline + 400:
        if hog is None or hog.poll() is not None:
            hog = subprocess.Popen([sys.executable, "-c", _HOG, str(group)])
            (group / "cgroup.procs").write_text(str(hog.pid))
        time.sleep(0.05)
    if hog is not None:
        hog.kill()
        hog.wait()
    stdout, _ = driver.communicate(timeout=10)
    assert driver.returncode in (5, 75), (tmp_path / "log").read_text()[-3000:]
    summary = the_line(driver.returncode, stdout.splitlines(), "annotate")
    assert re.search(r"memory|Ray's (raylet|GCS)", summary["error"])
