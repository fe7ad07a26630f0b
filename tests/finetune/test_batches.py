"""Which images make which step: every one once an epoch, apart between workers, the same after a resume."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from owlsam_ray.datasets.cleaning import CleaningSettings
from owlsam_ray.errors import InputError
from owlsam_ray.finetune.augment import AugmentSettings
from owlsam_ray.finetune.batches import Plan, SampleReader, iterate_batches
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


def batches_of(images: TrainingImages, plan: Plan, steps: range, **options: Any) -> list[list[dict[str, Any]]]:
    reader = options.pop("reader", None) or SampleReader(images, masks=False)
    return [
        batches
        for _, batches in iterate_batches(
            plan, reader, collate, augmentation=AugmentSettings(horizontal_flip=0.5), steps=steps, threads=3
        )
    ]


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
    alone = Plan(num_images, batch_size, seed=seed)
    places: list[tuple[int, int]] = []
    for step in range(2 + 2 * num_images // batch_size):
        together = [
            pair
            for rank in range(world_size)
            for micro in Plan(num_images, batch_size, accumulate, rank, world_size, seed).images_of(step)
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
        [Plan(50, 50, seed=seed).images_of(step)[0][i][1] for i in range(50)] for seed in (0, 1) for step in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4


def test_two_workers_see_disjoint_images_and_all_of_them(tmp_path: Path) -> None:
    images = make_images(tmp_path, 12)
    seen = []
    for rank in range(2):
        plan = Plan(12, 4, rank=rank, world_size=2, seed=3)
        seen.append([i for step in batches_of(images, plan, range(3)) for batch in step for i in batch["image_ids"]])
    assert set(seen[0]) & set(seen[1]) == set()
    assert set(seen[0]) | set(seen[1]) == {100 + index for index in range(12)}


def test_batches_after_a_resume_are_the_same(tmp_path: Path) -> None:
    images = make_images(tmp_path, 7)
    plan = Plan(7, 4, accumulate=2, seed=1)
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
            Plan(30, 3),
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
        steps = batches_of(images, Plan(6, 3, seed=2), range(8), reader=reader)
    ids = [image_id for step in steps for batch in step for image_id in batch["image_ids"]]
    assert len(ids) == 24
    assert {102, 104} & set(ids) == set()
    assert reader.failures == {"missing": 1, "not_an_image": 1}
    assert caplog.text.count("left out") == 2


def test_no_readable_image_at_all_is_told(tmp_path: Path) -> None:
    images = make_images(tmp_path, 3)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"none of the 3 training images can be read .*missing"):
        batches_of(images, Plan(3, 3), range(2))


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
