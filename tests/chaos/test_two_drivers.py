"""Two drivers on one run directory: one of them is refused or fenced, and the bytes are those of one alone."""

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from owlsam_ray.run.attempts import ended_attempts, live_attempts
from owlsam_ray.run.verify import verify_run
from tests.chaos.world import FileWatcher, World, small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with small_world(tmp_path_factory.mktemp("world")) as world:
        yield world


def race(world: World, seed: int, where: Path) -> None:
    print("seed", seed)
    chance = random.Random(seed)
    run = where / "run"
    options = [[], ["--takeover"] if chance.random() < 0.5 else []]
    drivers = []
    with FileWatcher(run) as watcher:
        for number, own in enumerate(options):
            drivers.append(world.start(run, *own, log=where / f"{number}.log"))
            time.sleep(chance.choice((0.0, chance.uniform(0, 1), chance.uniform(0, 8))))
        codes = [driver.wait(timeout=120) for driver in drivers]
    logs = "\n".join((where / f"{number}.log").read_text(errors="replace")[-3000:] for number in (0, 1))
    print(f"seed {seed}: takeover {bool(options[1])}, exit codes {codes}, {len(watcher.seen)} files written")
    # Both end well when the second one came after the first had ended.
    one_after_the_other = codes == [0, 0] and "nothing to do" in (where / "1.log").read_text(errors="replace")
    assert sorted(codes) == [0, 4] or one_after_the_other, logs
    assert live_attempts(str(run)) == []
    assert sum(attempt.exit_code == 0 for attempt in ended_attempts(str(run))) >= 1
    assert verify_run(str(run))["left"] == 0, logs  # raises when a shard is not whole
    assert world.reduce(run) == world.reference, logs


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_two_drivers(world: World, seed: int, tmp_path: Path) -> None:
    race(world, seed, tmp_path)
