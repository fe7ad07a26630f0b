"""What a run gets of a machine, and the preflight of law 10."""

from typing import Any

import pytest

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import PreflightError
from owlsam_ray.parallel.allocation import allocate, check_nodes, check_object_store


def settings(**values: Any) -> ResourcesConfig:
    return ResourcesConfig.model_validate(values)


@pytest.mark.parametrize(
    ("num_cpus", "actors", "cpus"),
    [
        (1, 1, 0.25),  # what fetch and write leave of one CPU
        (2, 1, 1.0),
        (4, 1, 3.0),
        (16, 2, 7.0),
    ],
)
def test_defaults_fit_a_cpu_machine(num_cpus: int, actors: int, cpus: float) -> None:
    allocation = allocate(settings(), num_cpus=num_cpus, num_gpus=0)
    assert (allocation.device, allocation.actors, allocation.cpus_per_actor) == ("cpu", actors, cpus)
    assert allocation.gpus_per_actor == 0


def test_defaults_take_every_gpu() -> None:
    allocation = allocate(settings(), num_cpus=64, num_gpus=8)
    assert (allocation.device, allocation.actors, allocation.gpus_per_actor) == ("cuda", 8, 1)
    assert allocation.cpus_per_actor == 7
    assert (allocation.detector_batch, allocation.segmenter_batch) == (32, 16)
    assert allocate(settings(), num_cpus=64, num_gpus=8, segmenter="sam").segmenter_batch == 4
    assert allocate(settings(segmenter_batch=9), num_cpus=64, num_gpus=8, segmenter="sam").segmenter_batch == 9


def test_two_actors_share_two_cpus_without_equalling_fetch() -> None:
    allocation = allocate(settings(actors=2), num_cpus=2, num_gpus=0)
    assert allocation.cpus_per_actor == pytest.approx(0.4)
    assert 2 * allocation.cpus_per_actor + 0.75 <= 2


@pytest.mark.parametrize(
    ("values", "num_cpus", "num_gpus", "words"),
    [
        ({"actors": 2, "cpus_per_actor": 1}, 2, 0, "2 actor(s) × 1 CPU"),  # stands still in Ray without a word
        ({"cpus_per_actor": 0.5}, 2, 0, "fuse"),
        ({"cpus_per_actor": 1.5}, 4, 0, "whole numbers"),
        ({"device": "cuda"}, 4, 0, "no GPU"),
        ({"device": "cuda", "gpus_per_actor": 0}, 4, 1, "hides the GPUs"),
        ({"actors": 3, "gpus_per_actor": 1, "device": "cuda"}, 64, 2, "3 GPUs"),
        ({"actors": 8}, 1, 0, "would make no progress"),
    ],
)
def test_what_cannot_start_is_refused(values: dict[str, Any], num_cpus: float, num_gpus: float, words: str) -> None:
    with pytest.raises(PreflightError) as caught:
        allocate(settings(**values), num_cpus=num_cpus, num_gpus=num_gpus)
    assert words in str(caught.value)
    assert "resources." in str(caught.value)


def test_every_actor_must_fit_a_node() -> None:
    allocation = allocate(settings(actors=2, cpus_per_actor=6), num_cpus=16, num_gpus=0)
    check_nodes(allocation, [{"CPU": 8.0}, {"CPU": 8.0}])
    with pytest.raises(PreflightError, match=r"2 actor\(s\) of 6 CPU \+ 0 GPU each .* room for 0"):
        check_nodes(allocation, [{"CPU": 4.0}] * 4)
    on_gpus = allocate(settings(actors=2), num_cpus=64, num_gpus=2)
    check_nodes(on_gpus, [{"CPU": 64.0, "GPU": 2.0}])
    with pytest.raises(PreflightError, match="room for 1"):
        check_nodes(on_gpus, [{"CPU": 32.0, "GPU": 1.0}, {"CPU": 32.0}])


def test_decoder_batches_are_multiples_of_8_and_threads_powers_of_two() -> None:
    for batch, expected in ((1, 8), (8, 8), (9, 16), ("auto", 16)):
        assert allocate(settings(decoder_batch=batch), num_cpus=2, num_gpus=0).decoder_batch == expected
    for cpus, threads in ((1, 1), (2, 2), (3, 2), (7, 4), (100, 8)):
        assert allocate(settings(actors=1), num_cpus=cpus, num_gpus=0).torch_threads == threads


def test_object_store_must_hold_the_shards_in_flight() -> None:
    allocation = allocate(settings(), num_cpus=2, num_gpus=0)
    check_object_store(allocation, settings(), shard_bytes=10 * 2**20, store_bytes=40 * 2**20)
    with pytest.raises(PreflightError, match="4 shards in flight of up to 10 MiB need 40 MiB"):
        check_object_store(allocation, settings(), shard_bytes=10 * 2**20, store_bytes=39 * 2**20)
