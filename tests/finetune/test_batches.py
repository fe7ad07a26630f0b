"""Which images make which step: every one once an epoch, apart between workers, the same after a resume."""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from owlsam_ray.coco_files.cleaning import CleaningSettings
from owlsam_ray.errors import FailureClass, ImageError, IncompleteError, InputError
from owlsam_ray.finetune import batches as batches_module
from owlsam_ray.finetune.augment import AugmentSettings
from owlsam_ray.finetune.batches import BatchPlan, SampleReader, iterate_batches
from owlsam_ray.finetune.data import Sample, TrainingImages, read_training_images


def make_images(root: Path, count: int) -> TrainingImages:
    """Grey pictures, picture i of the brightness i, each with one object."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    for index in range(count):
        Image.fromarray(np.full((20, 30), index, np.uint8)).save(root / "images" / f"{index}.png")
    tree = {
        "images": [
            {"id": 100 + index, "file_name": f"{index}.png", "height": 20, "width": 30} for index in range(count)
        ],
        "annotations": [
            {"id": index, "image_id": 100 + index, "category_id": 1, "bbox": [2, 3, 12, 10], "area": 120, "iscrowd": 0}
            for index in range(count)
        ],
        "categories": [{"id": 1, "name": "grey"}],
    }
    (root / "train.json").write_text(json.dumps(tree), encoding="utf-8")
    return read_training_images(str(root / "train.json"), str(root / "images"), CleaningSettings())


def collate(samples: Any, rng: np.random.Generator) -> dict[str, Any]:
    return {"image_ids": [sample.image_id for sample in samples], "chance": rng.random(), "samples": samples}


def batches_of(images: TrainingImages, plan: BatchPlan, steps: range, **options: Any) -> list[list[dict[str, Any]]]:
    reader = options.pop("reader", None) or SampleReader(images, masks=False)
    threads = options.pop("threads", 3)
    return [
        batches
        for _, batches in iterate_batches(
            plan, reader, collate, augmentation=AugmentSettings(horizontal_flip=0.5), steps=steps, threads=threads
        )
    ]


def ids_of(steps: list[list[dict[str, Any]]]) -> list[int]:
    return [image_id for step in steps for batch in step for image_id in batch["image_ids"]]


def within(seconds: float, function: Callable[[], Any]) -> Any:
    """What a function returns or raises; fails when it is not done in time."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except Exception as error:  # noqa: BLE001 - the caller looks at it
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done after {seconds} s"
    return outcome[0]


def flaky(monkeypatch: pytest.MonkeyPatch, gives: dict[int, list[bool]], *, otherwise: bool = True) -> Counter[int]:
    """Let storage fail: `gives[index]` says for each try whether it gives the image. Returns the tries."""
    tries: Counter[int] = Counter()
    load = TrainingImages.load
    lock = threading.Lock()

    def sometimes(self: TrainingImages, index: int, *, masks: bool = False) -> Sample:
        with lock:
            tries[index] += 1
            planned = gives.get(index)
            given = planned.pop(0) if planned else otherwise
        if not given:
            raise ImageError("fetch_failed: slow down", FailureClass.TRANSIENT)
        return load(self, index, masks=masks)

    monkeypatch.setattr(TrainingImages, "load", sometimes)
    monkeypatch.setattr(batches_module, "_PAUSES_S", (0.0, 0.0))
    return tries


@settings(max_examples=60, deadline=None)
@given(
    num_images=st.integers(1, 40),
    per_call=st.integers(1, 4),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_workers_share_each_step_and_epochs_are_whole(
    num_images: int, per_call: int, accumulate: int, world_size: int, seed: int
) -> None:
    batch_size = per_call * accumulate * world_size
    alone = BatchPlan(num_images, batch_size, seed=seed)
    places: list[tuple[int, int]] = []
    for step in range(2 + 2 * num_images // batch_size):
        together = [
            pair
            for rank in range(world_size)
            for micro in BatchPlan(num_images, batch_size, accumulate, rank, world_size, seed).images_of(step)
            for pair in micro
        ]
        assert together == alone.images_of(step)[0]  # the same images, whoever reads them
        places += together
    assert [place for place, _ in places] == list(range(len(places)))
    for epoch in range(2):
        of_epoch = [index for place, index in places if place // num_images == epoch]
        assert sorted(of_epoch) == list(range(num_images))


def test_epochs_are_shuffled_anew_and_seeds_differ() -> None:
    orders = [
        [BatchPlan(50, 50, seed=seed).images_of(step)[0][i][1] for i in range(50)] for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_two_workers_see_disjoint_images_and_all_of_them(tmp_path: Path) -> None:
    images = make_images(tmp_path, 12)
    seen = []
    for rank in range(2):
        plan = BatchPlan(12, 4, rank=rank, world_size=2, seed=3)
        seen.append([i for step in batches_of(images, plan, range(3)) for batch in step for i in batch["image_ids"]])
    assert set(seen[0]) & set(seen[1]) == set()
    assert set(seen[0]) | set(seen[1]) == {100 + index for index in range(12)}


def test_batches_after_a_resume_are_the_same(tmp_path: Path) -> None:
    images = make_images(tmp_path, 7)
    plan = BatchPlan(7, 4, accumulate=2, seed=1)
    whole, rest = batches_of(images, plan, range(10)), batches_of(images, plan, range(6, 10))
    for step, again in zip(whole[6:], rest, strict=True):
        for batch, other in zip(step, again, strict=True):
            assert batch["image_ids"] == other["image_ids"]
            assert batch["chance"] == other["chance"]
            for sample, twin in zip(batch["samples"], other["samples"], strict=True):
                assert sample.boxes_xyxy.tolist() == twin.boxes_xyxy.tolist()  # the same flips


def test_steps_come_in_order_whatever_the_threads_do(tmp_path: Path) -> None:
    images = make_images(tmp_path, 30)
    steps = [
        step
        for step, _ in iterate_batches(
            BatchPlan(30, 3),
            SampleReader(images, masks=False),
            collate,
            augmentation=AugmentSettings(),
            steps=range(4, 40),
            threads=4,
        )
    ]
    assert steps == list(range(4, 40))


def test_an_unreadable_image_is_replaced_and_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = make_images(tmp_path, 6)
    (tmp_path / "images" / "2.png").unlink()
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    reader = SampleReader(images, masks=False)
    with caplog.at_level("WARNING", logger="owlsam_ray"):
        steps = batches_of(images, BatchPlan(6, 3, seed=2), range(8), reader=reader)
    ids = ids_of(steps)
    assert len(ids) == 24
    assert {102, 104} & set(ids) == set()
    assert reader.failures == {"missing": 1, "not_an_image": 1}
    assert caplog.text.count("left out") == 2


@pytest.mark.parametrize("threads", [1, 8])
def test_no_readable_image_at_all_is_told(tmp_path: Path, threads: int) -> None:
    images = make_images(tmp_path, 3)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    plan = BatchPlan(3, 12, accumulate=4)  # as many micro batches as make threads wait for each other
    error = within(20, lambda: batches_of(images, plan, range(2), threads=threads))
    assert isinstance(error, InputError)
    assert "none of the 3 training images can be read ({'missing': 3}): is data.train's `images`" in str(error)


def test_every_reader_of_an_unreadable_set_is_told_what_the_set_is_for(tmp_path: Path) -> None:
    images = make_images(tmp_path, 2)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    reader = SampleReader(images, masks=False, split="validation")
    assert reader.read(0) is None
    for _ in range(3):  # not only who met the last failure
        with pytest.raises(InputError, match=r"none of the 2 validation images .* data\.val's `images`"):
            reader.read(1)


@settings(max_examples=60, deadline=None)
@given(num_images=st.integers(1, 24), batch_size=st.integers(1, 30), place=st.integers(0, 100))
def test_replacements_are_every_other_image_once_and_those_of_the_next_steps_first(
    num_images: int, batch_size: int, place: int
) -> None:
    plan = BatchPlan(num_images, batch_size, seed=3)
    own = plan._image_at(place)
    replacements = list(plan.replacements_of(place))
    assert sorted([own, *replacements]) == list(range(num_images))
    after = place + batch_size
    if after // num_images == place // num_images:
        assert replacements[0] == plan._image_at(after)


@pytest.mark.parametrize("threads", [1, 8])
def test_the_only_readable_image_is_found(tmp_path: Path, threads: int) -> None:
    images = make_images(tmp_path, 8)
    for index in set(range(8)) - {5}:
        (tmp_path / "images" / f"{index}.png").unlink()
    steps = within(20, lambda: batches_of(images, BatchPlan(8, 4), range(3), threads=threads))
    assert ids_of(steps) == [105] * 12


def test_what_storage_gives_at_the_third_try_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(tmp_path, 6)
    tries = flaky(monkeypatch, {2: [False, False, True]})
    reader = SampleReader(images, masks=False)
    assert sorted(ids_of(batches_of(images, BatchPlan(6, 3), range(2), reader=reader))) == list(range(100, 106))
    assert tries[2] == 3
    assert reader.failures == {}


def test_an_image_that_storage_did_not_give_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = make_images(tmp_path, 4)
    flaky(monkeypatch, {2: [False] * 6})
    reader = SampleReader(images, masks=False)
    with caplog.at_level("WARNING", logger="owlsam_ray"):
        found = [reader.read(2) for _ in range(3)]
    assert found[:2] == [None, None]
    assert found[2] is not None
    assert reader.failures == {"fetch_failed": 1}
    assert caplog.messages == ["image 102 is left out of the training for now: fetch_failed: slow down"]


def test_storage_that_is_down_ends_the_training_instead_of_holding_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_a_row = r"storage failed for \d+ training images in a row"
    for count, words in ((3, "none of the 3 training images"), (60, in_a_row)):
        images = make_images(tmp_path / str(count), count)
        with monkeypatch.context() as patch:
            tries = flaky(patch, {}, otherwise=False)
            error = within(20, partial(batches_of, images, BatchPlan(count, 3), range(50), threads=2))
        assert isinstance(error, IncompleteError)
        assert re.search(words, str(error))
        assert tries.total() < 200


def test_an_error_of_one_sample_or_of_collating_reaches_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(tmp_path, 4)

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    given = partial(
        iterate_batches,
        BatchPlan(4, 2),
        SampleReader(images, masks=False),
        augmentation=AugmentSettings(),
        steps=range(2),
        threads=2,
    )
    assert isinstance(within(20, lambda: list(given(broken))), ZeroDivisionError)
    monkeypatch.setattr(batches_module, "augment", broken)
    assert isinstance(within(20, lambda: list(given(collate))), ZeroDivisionError)


@pytest.mark.parametrize("plan", [BatchPlan(32, 16), BatchPlan(32, 1), BatchPlan(32, 2, rank=1, world_size=2)])
def test_all_threads_work_at_one_step_and_few_steps_are_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plan: BatchPlan
) -> None:
    images = make_images(tmp_path, 32)
    together = threading.Barrier(8, timeout=10)  # breaks unless eight threads read at once
    load = TrainingImages.load
    reads: list[int] = []

    def meeting(self: TrainingImages, index: int, *, masks: bool = False) -> Sample:
        reads.append(index)
        if len(reads) <= 8:
            together.wait()
        return load(self, index, masks=masks)

    monkeypatch.setattr(TrainingImages, "load", meeting)
    reader = SampleReader(images, masks=False)
    given = iterate_batches(plan, reader, collate, augmentation=AugmentSettings(), steps=range(1000), threads=8)
    next(given)
    time.sleep(0.2)  # nothing more may be read while nobody asks
    per_step = plan.batch_size // plan.world_size
    assert 8 <= len(reads) <= max(4 * per_step, 8 + per_step)


def test_batches_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    images = make_images(tmp_path, 9)
    (tmp_path / "images" / "4.png").unlink()
    alone, many = (batches_of(images, BatchPlan(9, 6, 2, seed=4), range(6), threads=threads) for threads in (1, 8))
    for one, other in zip(alone, many, strict=True):
        for batch, twin in zip(one, other, strict=True):
            assert batch["image_ids"] == twin["image_ids"]
            assert batch["chance"] == twin["chance"]
            for sample, same in zip(batch["samples"], twin["samples"], strict=True):
                assert sample.boxes_xyxy.tolist() == same.boxes_xyxy.tolist()


def test_the_cache_keeps_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = make_images(tmp_path, 4)
    loads: list[int] = []
    load = TrainingImages.load

    def counted(self: TrainingImages, index: int, *, masks: bool = False) -> Sample:
        loads.append(index)
        return load(self, index, masks=masks)

    monkeypatch.setattr(TrainingImages, "load", counted)
    for megabytes, expected in ((0, 8), (1, 4)):
        loads.clear()
        reader = SampleReader(images, masks=False, cache_mb=megabytes)
        first = [reader.read(index) for index in (0, 1, 2, 3)]
        second = [reader.read(index) for index in (0, 1, 2, 3)]
        assert len(loads) == expected
        for one, other in zip(first, second, strict=True):
            assert one is not None
            assert other is not None
            assert (one.pixels == other.pixels).all()
