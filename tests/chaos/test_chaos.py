"""Whatever is killed, whenever: the run completes, with the bytes of an undisturbed one."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import Chaos, Disk, World, small_disk, small_world, tell_together


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with small_world(tmp_path_factory.mktemp("world")) as world:
        yield world
        if world.stories:
            print(tell_together(world.stories))


def play(world: World, seed: int, where: Path) -> None:
    print("seed", seed)
    with small_disk(where / "disk") as root:
        story = Chaos(world, seed, Disk(root), where / "log").play(lives=3, most_lives=9)
    print(story.tell())
    world.stories.append(story)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(220))
def test_chaos(world: World, seed: int, tmp_path: Path) -> None:
    play(world, seed, tmp_path)
