"""Real Slurm, two nodes on loopback: jobs that are interrupted queue themselves again, and end with the same bytes."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from owlsam_ray.config.load import load_config
from tests.runs import ROOT, environment, label_here

pytestmark = pytest.mark.slurm
NUM_IMAGES, SHARD_SIZE = 80, 4
NUM_SHARDS = NUM_IMAGES // SHARD_SIZE
SECOND_SLICE = {f"shard-{number:08d}.parquet" for number in range(1, NUM_SHARDS, 2)}
SUBMIT = ROOT / "cluster" / "slurm" / "submit.sh"
_NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
_CLUSTER = Path(__file__).parent / "cluster.sh"


@dataclass(frozen=True)
class Slurm:
    """A cluster that runs."""

    folder: Path

    def call(
        self, *command: str, cwd: Path | None = None, check: bool = True, env: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Output of a program that talks to the cluster."""
        own = {"SLURM_CONF": str(self.folder / "slurm.conf"), "OWLSAM_TEST_SLURM": str(self.folder)}
        done = subprocess.run(
            command,
            env=environment() | own | dict(env),
            cwd=cwd or self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert not check or done.returncode == 0, f"{command} exits with {done.returncode}\n{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job (or the first of an array)."""
        text = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, what: str, ready: Callable[[], bool], *, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                pytest.fail(f"not within {seconds} s: {what}\n{self.call('squeue', check=False)}")
            time.sleep(0.3)
        print(what, "after", round(time.monotonic() - deadline + seconds, 1), "s")

    def ended(self, *jobs: str) -> bool:
        return all(self.job(job)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED") for job in jobs)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The cluster, which nothing is left of at the end."""
    if os.geteuid() != 0:
        pytest.skip("Slurm's daemons and munged are started as root here")
    path = f"{os.environ['PATH']}:/usr/sbin"
    missing = [name for name in _NEEDED if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (Debian: slurm-wlm, munge)")
    # Not pytest's own folder: munged wants a socket that everybody may reach, at a short path.
    folder = Path(tempfile.mkdtemp(prefix="owl-"))
    guard = subprocess.Popen([_CLUSTER, "guard", folder], start_new_session=True)  # for when this process is killed
    try:
        subprocess.run([_CLUSTER, "up", folder], check=True, timeout=60)
        yield Slurm(folder)
    finally:
        guard.terminate()
        guard.wait(timeout=10)
        subprocess.run([_CLUSTER, "down", folder], check=True, timeout=60)
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Data:
    """Drawn images, a run file, and the COCO bytes of a local run."""

    run_file: Path
    expected: bytes


@pytest.fixture(autouse=True)
def _tell_logs(slurm: Slurm) -> Iterator[None]:
    """For a test that fails."""
    yield
    for path in sorted(slurm.folder.glob("jobs/*/*.log")):
        print(f"--- {path.name}\n{path.read_text(encoding='utf-8')[-6000:]}")
    shutil.rmtree(slurm.folder / "jobs", ignore_errors=True)


@pytest.fixture(scope="session")
def data(slurm: Slurm) -> Data:
    folder = slurm.folder / "the data"  # with a space, for scripts that take a path apart
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(11)
    for number in range(NUM_IMAGES):
        pixels = random.integers(0, 256, (20, 24 + number % 5, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{number:03d}.png")
    config: dict[str, Any] = {
        "data": {"source": "folder", "images": str(folder / "images")},
        "vocabulary": {"categories": ["cat", "dog", "red ball"], "templates": "a {}"},
        "detector": {"model": "fake", "max_detections": 8},
        "segment": {"model": "fake"},
        "reduce": {"min_mask_area": 0},
        "resources": {
            "shard_size": SHARD_SIZE,
            "shards_in_flight": 1,
            "detector_batch": SHARD_SIZE,
            "torch_threads": 1,
            "grace_s": 10,
            "heartbeat_s": 1,
            "takeover_s": 10,
        },
        "logging": {"progress_s": 0.5},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return Data(run_file, label_here(load_config([run_file], run=str(folder / "local run"))))


@dataclass(frozen=True)
class Submitted:
    """A run whose jobs are in Slurm's hands."""

    slurm: Slurm
    run: Path
    label: str
    """Number of the labelling job, or of the array."""
    reduce: str

    @property
    def shards(self) -> dict[str, int]:
        """Name of each shard's file → its inode, which a file that is written again does not keep."""
        return {path.name: path.stat().st_ino for path in (self.run / "predictions").glob("shard-*.parquet")}

    @property
    def coco(self) -> bytes:
        return (self.run / "coco" / "annotations.json").read_bytes()

    def exit_codes(self, part: str) -> list[int]:
        """Of the attempts at a slice, in their order."""
        files = sorted((self.run / "attempts").glob("*.ended.json"))
        attempts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        return [each["exit_code"] for each in attempts if each["scope"] == "label" and each["slice"] == part]

    def wait_for_shards(self, number: int, of: AbstractSet[str] | None = None) -> None:
        def there() -> bool:
            return len(self.shards if of is None else self.shards.keys() & of) >= number

        self.slurm.wait(f"{number} shards", there, seconds=240)

    def wait_for_end(self, seconds: float = 300) -> None:
        self.slurm.wait("the end of all jobs", lambda: self.slurm.ended(self.label, self.reduce), seconds=seconds)

    def states(self, *jobs: str) -> list[tuple[str, str, int]]:
        """State, exit code and restarts of jobs."""
        found = [self.slurm.job(job) for job in jobs]
        return [(each["JobState"], each["ExitCode"], int(each["Restarts"])) for each in found]


def submit(slurm: Slurm, data: Data, name: str, *, tasks: int, call_s: float, options: Sequence[str] = ()) -> Submitted:
    """Plan and submit with the project's script; each model call, and so each shard, takes `call_s`."""
    folder = slurm.folder / "jobs" / name
    folder.mkdir(parents=True)
    config = yaml.safe_load(data.run_file.read_text(encoding="utf-8")) | {"fakes": {"delay_s": call_s}}
    run_file, run = folder / "a run.yaml", folder / "the run"
    run_file.write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [str(SUBMIT), run_file.name, run.name, str(tasks), "--cpus-per-task=2", "--mem=2000", *options]
    settings = {
        "OWLSAM": str(Path(sys.executable).parent / "owlsam"),
        "OWLSAM_TMP": str(slurm.folder),
        "OWLSAM_REDUCE_OPTIONS": "--cpus-per-task=1",
    }
    output = slurm.call(*command, cwd=folder, env=settings)
    found = re.fullmatch(r"annotate (\d+)\nreduce (\d+)\n", output)
    assert found is not None, output
    return Submitted(slurm, run, found[1], found[2])


def test_an_array_of_two_of_which_one_is_interrupted(slurm: Slurm, data: Data) -> None:
    jobs = submit(slurm, data, "array", tasks=2, call_s=0.6)
    # The last task: its number is the array's, and must not mean the whole array.
    first, last = f"{jobs.label}_0", f"{jobs.label}_1"
    jobs.wait_for_shards(1, of=SECOND_SLICE)
    slurm.call("scancel", "--signal=USR1", "--batch", last)  # what Slurm sends before the time limit
    slurm.wait("requeue", lambda: slurm.job(last)["Restarts"] == "1", seconds=60)
    before = jobs.shards
    assert slurm.job(jobs.reduce)["JobState"] == "PENDING"
    assert before.keys() & SECOND_SLICE < SECOND_SLICE
    jobs.wait_for_end()
    finished = ("COMPLETED", "0:0")
    assert jobs.states(first, last, jobs.reduce) == [(*finished, 0), (*finished, 1), (*finished, 0)]
    assert jobs.exit_codes("1/2") == [0]
    assert jobs.exit_codes("2/2") == [75, 0]
    assert before.items() <= jobs.shards.items()
    assert jobs.coco == data.expected


def test_a_cancelled_job_stays_cancelled(slurm: Slurm, data: Data) -> None:
    jobs = submit(slurm, data, "cancelled", tasks=1, call_s=60)
    slurm.wait("an attempt", lambda: any((jobs.run / "attempts").glob("*.json")), seconds=60)
    slurm.call("scancel", jobs.label)
    jobs.wait_for_end(60)
    states = jobs.states(jobs.label, jobs.reduce)
    assert [(state, restarts) for state, _, restarts in states] == [("CANCELLED", 0), ("CANCELLED", 0)]
    assert "queued again (" not in next(jobs.run.parent.glob("owlsam-*.log")).read_text(encoding="utf-8")


@pytest.mark.slow
def test_one_node_that_is_interrupted(slurm: Slurm, data: Data) -> None:
    jobs = submit(slurm, data, "one", tasks=1, call_s=0.4)
    jobs.wait_for_shards(4)
    slurm.call("scancel", "--signal=USR1", "--batch", jobs.label)
    jobs.wait_for_end()
    assert jobs.states(jobs.label, jobs.reduce) == [("COMPLETED", "0:0", 1), ("COMPLETED", "0:0", 0)]
    assert jobs.exit_codes("1/1") == [75, 0]
    assert jobs.coco == data.expected


@pytest.mark.slow
def test_a_real_time_limit(slurm: Slurm, data: Data) -> None:
    # Slurm looks twice a minute at who is near the limit: this one of two minutes is felt after 85 to 115 seconds.
    limit = ["--time=2", "--signal=B:USR1@5"]
    jobs = submit(slurm, data, "limit", tasks=2, call_s=12, options=limit)
    jobs.wait_for_end(900)
    states = jobs.states(f"{jobs.label}_0", f"{jobs.label}_1", jobs.reduce)
    assert [(state, code) for state, code, _ in states] == [("COMPLETED", "0:0")] * 3
    for (_, _, restarts), part in zip(states, ("1/2", "2/2"), strict=False):
        assert restarts >= 1
        assert jobs.exit_codes(part) == [75] * restarts + [0]
    assert jobs.coco == data.expected
