"""A small world in which things go wrong: two nodes of Ray, images behind an S3 that fails, a small disk, a clock.

Everything that is drawn comes from one seed, which is printed. When it happens depends on the machine: a seed names the
kinds of the events and their moments, not an interleaving.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import yaml
from PIL import Image

from owlsam_ray import storage
from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.run.run import open_stored_run
from owlsam_ray.run.shards import shard_url
from tests.annotate.test_kill import workers
from tests.faulty_s3 import Faults, FaultyS3, faulty_s3
from tests.runs import ROOT, environment

NUM_IMAGES, SHARD_SIZE = 96, 8
_QUICK = {
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_failure_threshold": "3",
    "RAY_prestart_worker_first_driver": "0",
}
_CLOCK = Path(__file__).parent / "clock"
_EXIT_CODES = {0, 2, 5, 75, *(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1))}
"""A signal in the first moments of a process, before it has handlers, ends it as the system does."""
_TMPFS_MB = 24


@dataclass
class Nodes:
    """A head without CPUs, and two nodes with two each, of which any may be killed and added again."""

    cluster: Any
    nodes: list[Any]

    def kill_one(self, chance: random.Random) -> None:
        if not self.nodes:  # both are dead already
            return
        node = chance.choice(self.nodes)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def add_one(self) -> None:
        self.nodes.append(self.cluster.add_node(num_cpus=2, object_store_memory=100 * 2**20))

    def complete(self) -> None:
        while len(self.nodes) < 2:
            self.add_one()


@contextlib.contextmanager
def ray_nodes() -> Iterator[Nodes]:
    """The cluster, for as long as the tests of a process need it."""
    before = {name: os.environ.get(name) for name in (*_QUICK, "RAY_AUTH_MODE", "PYTHONPATH")}
    os.environ.update(_QUICK | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)})
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": False},
    )
    nodes = Nodes(cluster, [])
    try:
        nodes.complete()
        yield nodes
    finally:
        with contextlib.suppress(AttributeError):  # of Ray's own, at the end
            cluster.shutdown()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class World:
    """What all seeds of a process share."""

    root: Path
    nodes: Nodes
    s3: FaultyS3
    reference: bytes = b""
    stories: list["Story"] = field(default_factory=list)

    @property
    def run_file(self) -> Path:
        return self.root / "run.yaml"

    def command(self, run: Path, *options: str) -> list[str]:
        address = f"resources.ray_address={self.nodes.cluster.address}"
        python = str(ROOT / ".venv" / "bin" / "python") if (ROOT / ".venv").exists() else "python"
        return [
            python,
            "-m",
            "owlsam_ray",
            "annotate",
            str(self.run_file),
            "--run",
            str(run),
            "--set",
            address,
            *options,
        ]

    def start(self, run: Path, *options: str, log: Path, **variables: str) -> "subprocess.Popen[bytes]":
        with log.open("ab") as out:
            return subprocess.Popen(
                self.command(run, *options),
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment() | {"PYTHONPATH": f"{_CLOCK}:{ROOT}"} | variables,
                cwd=ROOT,
                start_new_session=True,
            )

    def config(self, run: Path) -> RunConfig:
        return load_config([self.run_file], run=str(run))

    def reduce(self, run: Path) -> bytes:
        reduce_run(self.config(run))
        return (run / "coco" / "annotations.json").read_bytes()


@contextlib.contextmanager
def small_world(root: Path) -> Iterator[World]:
    """Draw the images, start the stores and the nodes, and label everything once in peace."""
    with faulty_s3() as s3:
        chance = np.random.default_rng(5)
        for number in range(NUM_IMAGES):
            path = root / "picture.png"
            Image.fromarray(chance.integers(0, 256, (20, 24 + number % 5, 3), np.uint8)).save(path)
            data = path.read_bytes() if number % 17 else path.read_bytes()[:40]  # some are cut
            storage.write_atomic(f"s3://labels/images/{number:03d}.png", data)
        (root / "run.yaml").write_text(yaml.safe_dump(_run_file()), encoding="utf-8")
        with ray_nodes() as nodes:
            world = World(root, nodes, s3)
            peaceful = root / "peaceful"
            driver = world.start(peaceful, log=root / "peaceful.log")
            assert driver.wait(timeout=180) == 0, (root / "peaceful.log").read_text()[-3000:]
            world.reference = world.reduce(peaceful)
            assert json.loads(world.reference)["annotations"]
            yield world


def _run_file() -> dict[str, Any]:
    return {
        "data": {"source": "folder", "images": "s3://labels/images"},
        "vocabulary": {"categories": ["cat", "dog", "red ball"], "templates": "a {}"},
        "detector": {"model": "fake", "max_detections": 8},
        "segment": {"model": "fake"},
        "fakes": {"delay_s": 0.2},
        "storage": {"retries": 1, "backoff_s": 0.02, "timeout_s": 5},
        "reduce": {"min_mask_area": 0, "max_failed": 1.0},
        "resources": {
            "actors": 2,
            # Few tasks at a time: each is a process of its own to start.
            "cpus_per_actor": 0.5,
            "fetch_cpus": 0.7,
            "write_cpus": 0.3,
            "fetch_threads": 4,
            "detector_batch": 4,
            "segmenter_batch": 4,
            "decoder_batch": 8,
            "torch_threads": 1,
            "decode_threads": 2,
            "shard_size": SHARD_SIZE,
            "heartbeat_s": 0.5,
            "takeover_s": 4,
            "grace_s": 2,
        },
        "logging": {"progress_s": 0.5},
    }


@contextlib.contextmanager
def small_disk(where: Path) -> Iterator[Path]:
    """A file system of its own, where that may be made; a plain folder elsewhere."""
    where.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={_TMPFS_MB}m", "tmpfs", str(where)], check=False, capture_output=True
        ).returncode
        == 0
    )
    try:
        yield where
    finally:
        if mounted:
            subprocess.run(["mount", "-o", "remount,rw", str(where)], check=False, capture_output=True)
            for _ in range(50):
                if subprocess.run(["umount", str(where)], check=False, capture_output=True).returncode == 0:
                    break
                time.sleep(0.2)  # Ray's workers may still stand in it
            else:
                subprocess.run(["umount", "-l", str(where)], check=True)


@dataclass
class Disk:
    """Trouble with a small disk."""

    root: Path

    @property
    def is_small(self) -> bool:
        return os.path.ismount(self.root)

    def fill(self) -> None:
        with contextlib.suppress(OSError), (self.root / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))

    def free(self) -> None:
        self.set_read_only(False)  # a read-only moment that began before the disk was filled ends after it
        (self.root / "ballast").unlink(missing_ok=True)

    def set_read_only(self, read_only: bool) -> None:
        how = "remount,ro" if read_only else "remount,rw"
        for _ in range(100):  # refused while a file is open for writing
            if subprocess.run(["mount", "-o", how, str(self.root)], check=False, capture_output=True).returncode == 0:
                return
            time.sleep(0.01)


@dataclass
class Story:
    """What happened under one seed."""

    seed: int
    events: Counter[str] = field(default_factory=Counter)
    drivers: int = 0
    exit_codes: list[int] = field(default_factory=list)
    written: int = 0
    """Times that a shard file appeared; the number of shards when nothing was done twice."""
    shards: int = 0
    begun: int = 0
    """Times that an actor began a shard."""

    @property
    def kills(self) -> int:
        """Processes and nodes that were killed."""
        return sum(count for name, count in self.events.items() if name.startswith("kill"))

    def tell(self) -> str:
        events = ", ".join(f"{count} {name}" for name, count in sorted(self.events.items()))
        return (
            f"seed {self.seed}: {events}; {self.drivers} drivers ended with {self.exit_codes}; {self.shards} shards "
            f"were begun {self.begun} times and written {self.written} times"
        )


def tell_together(stories: Sequence[Story]) -> str:
    """What all seeds come to; that no row was lost or stands twice was proven for each."""
    events = sum((story.events for story in stories), Counter[str]())
    codes = Counter(code for story in stories for code in story.exit_codes)
    return (
        f"{len(stories)} seeds, {sum(story.drivers for story in stories)} drivers, "
        f"{sum(story.kills for story in stories)} kills survived; shards begun again: "
        f"{sum(story.begun - story.shards for story in stories)} of {sum(story.shards for story in stories)}, written "
        f"again: {sum(story.written - story.shards for story in stories)}; rows lost: 0, rows twice: 0\n"
        f"events {dict(sorted(events.items()))}\nexit codes {dict(sorted(codes.items()))}"
    )


class FileWatcher:
    """Counts how often shards are begun, and their files appear: each new one has an inode of its own."""

    def __init__(self, run: Path) -> None:
        self._folder, self._stop = run / PREDICTIONS, threading.Event()
        self._in_hand = run / "attempts" / "in-hand"
        self.begun: set[str] = set()
        self.seen: set[tuple[str, int, int]] = set()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "FileWatcher":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def look(self) -> int:
        """Number of shard files by now."""
        count = 0
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                if entry.name.startswith("shard-"):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat()
                        self.seen.add((entry.name, status.st_ino, status.st_mtime_ns))
                        count += 1
        with contextlib.suppress(OSError):
            self.begun.update(name for name in os.listdir(self._in_hand) if name.startswith("shard-"))
        return count

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.look()


class Chaos:
    """One run, from its beginning to its end, under one seed."""

    def __init__(self, world: World, seed: int, disk: Disk, log: Path) -> None:
        self.world, self.disk, self.log = world, disk, log
        self.run = disk.root / "run"
        self.clock = log.with_suffix(".clock")
        self.chance = random.Random(seed)
        self.story = Story(seed)

    def play(self, *, lives: int, most_lives: int) -> Story:
        """Let drivers live and die until the run is complete, and prove what came of it.

        Args:
            lives: drivers that something happens to.
            most_lives: the run must be complete by then.
        """
        with FileWatcher(self.run) as watcher:
            code = -1
            while code != 0 or self._transient():
                assert self.story.drivers < most_lives, self._failure("the run does not come to an end")
                code = self._live(watcher, troubled=self.story.drivers < lives)
        self.story.written, self.story.begun = len(watcher.seen), len(watcher.begun)
        self._prove()
        return self.story

    def _failure(self, what: str) -> str:
        return f"{what}\n{self.story.tell()}\n{self.log.read_text(errors='replace')[-6000:]}"

    def _live(self, watcher: FileWatcher, *, troubled: bool) -> int:
        """One driver from start to end."""
        self.world.s3.faults = Faults()
        self.world.nodes.complete()
        before = watcher.look()
        driver = self.world.start(self.run, log=self.log, OWLSAM_TEST_CLOCK=str(self.clock))
        self.story.drivers += 1
        calm: list[Any] = []
        if troubled:
            for _ in range(self.chance.choice((1, 1, 2, 3))):
                self._wait_for_the_moment(driver, watcher, before)
                calm.append(self._strike(driver))
        try:
            time.sleep(self.chance.uniform(0, 2) if troubled else 0)
            for undo in reversed(calm):
                undo()
            code = driver.wait(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            raise AssertionError(self._failure("a driver hangs")) from None
        assert code in _EXIT_CODES, self._failure(f"exit code {code}")
        self.story.exit_codes.append(code)
        return code

    def _wait_for_the_moment(self, driver: "subprocess.Popen[bytes]", watcher: FileWatcher, before: int) -> None:
        """Some time after the start, or after the first shard of this driver."""
        deadline = time.monotonic() + 30
        if self.chance.random() < 0.3:
            deadline = time.monotonic() + self.chance.uniform(0, 8)
            before = NUM_IMAGES
        while watcher.look() <= before and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(self.chance.uniform(0, 1.5))

    def _strike(self, driver: "subprocess.Popen[bytes]") -> Any:
        """Let something happen; returns what ends it."""
        kinds = {
            "kill of the driver": self._kill_driver,
            "kill of an actor": self._kill_actor,
            "kill of a node": self._kill_node,
            "SIGTERM": self._terminate,
            "I/O errors": self._fail_requests,
            "clock jump": self._jump,
        }
        if self.disk.is_small:
            kinds |= {"full disk": self._fill_disk, "read-only moment": self._close_disk}
        # Most of what is drawn kills.
        name = self.chance.choice([each for each in sorted(kinds) for _ in range(3 if "kill" in each else 1)])
        self.story.events[name] += 1
        return kinds[name](driver) or (lambda: None)

    def _kill_driver(self, driver: "subprocess.Popen[bytes]") -> None:
        driver.send_signal(signal.SIGKILL)

    def _kill_actor(self, driver: "subprocess.Popen[bytes]") -> None:
        actors = [pid for node in self.world.nodes.nodes for pid in workers(_raylet(node), b"Annotator")]
        if actors:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(actors), signal.SIGKILL)

    def _kill_node(self, driver: "subprocess.Popen[bytes]") -> Any:
        self.world.nodes.kill_one(self.chance)
        return self.world.nodes.complete

    def _terminate(self, driver: "subprocess.Popen[bytes]") -> None:
        driver.send_signal(self.chance.choice((signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))

    def _fail_requests(self, driver: "subprocess.Popen[bytes]") -> Any:
        self.world.s3.faults = Faults(seed=self.story.seed, rate=0.6, most_in_a_row=4, stall_s=0.2)

        def end() -> None:
            self.world.s3.faults = Faults()

        return end

    def _jump(self, driver: "subprocess.Popen[bytes]") -> None:
        self.clock.write_text(str(self.chance.uniform(-1e8, 1e8)), encoding="ascii")

    def _fill_disk(self, driver: "subprocess.Popen[bytes]") -> Any:
        self.disk.fill()
        return self.disk.free

    def _close_disk(self, driver: "subprocess.Popen[bytes]") -> Any:
        self.disk.set_read_only(True)
        return lambda: self.disk.set_read_only(False)

    def _shard_rows(self) -> list[dict[str, Any]]:
        manifest = open_stored_run(str(self.run)).manifest
        self.story.shards = manifest.num_shards
        rows: list[dict[str, Any]] = []
        for shard in manifest.iter_shards():
            columns = ["image_id", "status", "reason", "status_class"]
            rows += pq.read_table(shard_url(str(self.run), shard), columns=columns).to_pylist()
        return rows

    def _transient(self) -> bool:
        """Whether storage gave up on images in the sweep as well: one more call is what the summary asks for."""
        return any(row["status_class"] == "transient" for row in self._shard_rows())

    def _prove(self) -> None:
        ids = [row["image_id"] for row in self._shard_rows()]
        lost = set(range(1, NUM_IMAGES + 1)) - set(ids)
        assert not lost, self._failure(f"rows lost: {sorted(lost)}")
        assert len(ids) == NUM_IMAGES, self._failure("rows twice")
        found = self.world.reduce(self.run)
        assert found == self.world.reference, self._failure(f"other bytes: {difference(found, self.world.reference)}")
        assert not list((self.run / "attempts" / "in-hand").glob("*")), self._failure("markers are left")


def difference(one: bytes, other: bytes) -> str:
    """Where two files begin to differ."""
    place = next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
    around = slice(max(0, place - 60), place + 60)
    return f"{len(one)} and {len(other)} bytes; at {place} {one[around]!r} and {other[around]!r}"


def _raylet(node: Any) -> int:
    """Process of a node; its workers are below."""
    return int(node.all_processes["raylet"][0].process.pid)
