"""Training MobileSAM: the same model as inference, losses on points, gradients, export."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import interpolate

from owlsam_ray.errors import TrainingError, WeightsError
from owlsam_ray.finetune.data import Sample
from owlsam_ray.finetune.mask_losses import (
    FAR_POINTS,
    NEAR_POINTS,
    dice_loss,
    draw_points,
    estimated_iou,
    focal_loss,
    logits_at,
)
from owlsam_ray.finetune.segmenter import SegmenterSettings, SegmenterTask
from owlsam_ray.finetune.segmenter_module import random_parts
from owlsam_ray.models.mobile_sam import MobileSam
from owlsam_ray.models.mobile_sam_layout import MobileSamConfig
from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.ops.masks import tight_box, upsample_logits
from tests.seeded_mobile_sam import TINY, write_tiny

CPU = torch.device("cpu")
LEARNER = MobileSamConfig(
    image_size=64,
    embed_dims=(16, 24, 32, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 1, 2, 2),
    window_sizes=(4, 4, 4, 4),
    prompt_dim=32,
    decoder_layers=1,
    decoder_heads=2,
    decoder_mlp_dim=64,
    iou_head_dim=32,
)


def drawn(seed: int, *, objects: int = 3, size_hw: tuple[int, int] = (60, 80)) -> Sample:
    """Bright ellipses and rectangles on a dark, noisy ground; a later one covers the earlier."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    height, width = size_hw
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = random.normal(40, 8, (height, width, 3))
    owner = np.full((height, width), -1)
    for index in range(objects):
        h, w = random.uniform(12, height / 2), random.uniform(12, width / 2)
        v, u = (
            (y - random.uniform(h / 2, height - h / 2)) / (h / 2),
            (x - random.uniform(w / 2, width - w / 2)) / (w / 2),
        )
        inside = u**2 + v**2 <= 1 if index % 2 else np.maximum(abs(u), abs(v)) <= 1
        owner[inside] = index
        pixels[inside] = random.uniform(90, 255, 3)
    masks = owner[None] == np.arange(objects)[:, None, None]
    masks = masks[masks.any(axis=(1, 2))]
    boxes = np.array([tight_box(mask) for mask in masks], np.float32).reshape(-1, 4)
    return Sample(
        image_id=seed,
        pixels=np.clip(pixels, 0, 255).astype(np.uint8),
        boxes_xyxy=boxes,
        labels=np.zeros(len(boxes), np.int64),
        masks=masks,
    )


def learner(**settings: Any) -> SegmenterTask:
    return SegmenterTask(SegmenterSettings(architecture=LEARNER, **settings), seed=3)


def forward(task: SegmenterTask, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    outputs: tuple[Tensor, Tensor] = task.module(*task.inputs(batch))
    return outputs


def train(task: SegmenterTask, samples: list[Sample], *, steps: int, lr: float = 2e-3) -> list[float]:
    """Losses of some steps on the same samples."""
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=lr)
    losses = []
    for step in range(steps):
        batch = task.collate(samples, np.random.default_rng([5, step]))
        loss = task.loss(forward(task, batch), batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [drawn(seed, size_hw=size) for seed, size in enumerate([(60, 80), (64, 64), (80, 50), (40, 96)])]


# The same model as inference


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny(directory)
    return directory


def test_all_four_masks_equal_those_of_inference(tiny_directory: Path, samples: list[Sample]) -> None:
    task = SegmenterTask(SegmenterSettings(weights=str(tiny_directory)), seed=0)
    model = MobileSam.load(str(tiny_directory), device=CPU, dtype=torch.float32)
    batch = task.collate(samples, np.random.default_rng(0))
    for pixels, sample in zip(batch["pixels"], samples, strict=True):
        assert torch.equal(pixels, model.preprocess(sample.pixels))
    task.module.eval()
    with torch.no_grad():
        logits, quality = forward(task, batch)
    embeddings = model.encode(batch["pixels"])
    single, multi = (
        model.decode(embeddings, batch["image_index"], batch["boxes"], multimask=multimask)
        for multimask in (False, True)
    )
    assert logits.shape == (len(batch["boxes"]), 4, TINY.image_size // 4, TINY.image_size // 4)
    assert logits.std() > 1, "weights that decide nothing would prove nothing"
    torch.testing.assert_close(logits, torch.cat([single[0], multi[0]], dim=1), rtol=0, atol=1e-4)
    torch.testing.assert_close(quality, torch.cat([single[1], multi[1]], dim=1), rtol=0, atol=1e-5)


def test_hooks_do_not_stay(samples: list[Sample]) -> None:
    task = learner()
    forward(task, task.collate(samples, np.random.default_rng(0)))
    assert not any(layer._forward_hooks for layer in task.module.modules())


def test_evaluation_between_steps_sees_the_moved_weights(samples: list[Sample]) -> None:
    """The encoder caches attention biases in evaluation; training must not run into the cache, nor leave it stale."""
    task = learner()
    batch = task.collate(samples, np.random.default_rng(0))

    def evaluated() -> Tensor:
        task.module.eval()
        with torch.no_grad():
            return forward(task, batch)[0]

    first = evaluated()
    train(task, samples, steps=1)  # still in evaluation: what a loop that forgets would do
    task.module.train()
    train(task, samples, steps=2, lr=1e-2)
    biases = [value for name, value in task.module.named_parameters() if name.endswith("attention_biases")]
    assert all(value.abs().max() > 0 for value in biases), "attention biases learn"
    again = evaluated()
    fresh = learner()
    fresh.module.load_state_dict(task.module.state_dict())
    fresh.module.eval()
    with torch.no_grad():
        assert torch.equal(again, forward(fresh, batch)[0])
    assert not torch.allclose(first, again, atol=1e-3)


def test_export_loads_where_inference_loads(tmp_path: Path, samples: list[Sample]) -> None:
    task = learner()
    train(task, samples, steps=3)
    task.export(task.module.state_dict(), tmp_path / "out")
    model = MobileSam.load(str(tmp_path / "out"), device=CPU, dtype=torch.float32)
    batch = task.collate(samples, np.random.default_rng(0))
    task.module.eval()
    with torch.no_grad():
        logits, quality = forward(task, batch)
    embeddings = model.encode(batch["pixels"])
    single, single_quality = model.decode(embeddings, batch["image_index"], batch["boxes"], multimask=False)
    torch.testing.assert_close(logits[:, :1], single, rtol=0, atol=1e-4)
    torch.testing.assert_close(quality[:, :1], single_quality, rtol=0, atol=1e-5)

    again = SegmenterTask(SegmenterSettings(weights=str(tmp_path / "out")), seed=0)
    trained = task.module.state_dict()
    counters = {name for name in trained if name.endswith("num_batches_tracked")}
    assert again.module.state_dict().keys() == trained.keys()
    assert all(
        torch.equal(tensor, trained[name]) for name, tensor in again.module.state_dict().items() if name not in counters
    )


def test_state_of_another_model_is_not_exported(tmp_path: Path) -> None:
    state = learner().module.state_dict()
    state.popitem()
    with pytest.raises(WeightsError, match="1 missing"):
        learner().export(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What learns


@pytest.mark.slow
def test_loss_falls_and_masks_fit(samples: list[Sample]) -> None:
    task = learner(box_jitter=0.02)
    before = task.validate(task.module, samples, device=CPU)
    losses = train(task, samples, steps=60, lr=4e-3)
    print(losses[0], losses[-1])
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    after = task.validate(task.module, samples, device=CPU)
    print(before, after)
    assert after["val/miou"] > max(0.6, before["val/miou"] + 0.2)


def test_gradient_reaches_every_unfrozen_parameter(samples: list[Sample]) -> None:
    task = learner()
    train(task, samples, steps=1)  # the zeros that some layers start with stop the gradient once
    batch = task.collate(samples, np.random.default_rng(1))
    task.module.zero_grad()
    task.loss(forward(task, batch), batch)["loss"].backward()
    learning = {name: value for name, value in task.module.named_parameters() if value.requires_grad}
    # Only one of the three masks learns from an object; with few objects one mask may never be the best.
    silent = [name for name, value in learning.items() if value.grad is None or not value.grad.any()]
    assert all("output_hypernetworks_mlps" in name and "mlps.0." not in name for name in silent), silent
    assert not [name for name, value in learning.items() if value.grad is None]
    grouped = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(value) for value in learning.values()}
    assert len(grouped) == len(learning)


def test_only_matrices_decay() -> None:
    task = learner(encoder_lr_scale=0.1)
    groups = {group["name"]: group for group in task.parameter_groups()}
    assert set(groups) == {"encoder", "encoder without decay", "decoder", "decoder without decay"}
    assert all(("weight_decay" in group) == name.endswith("without decay") for name, group in groups.items())
    assert {name: group["lr_scale"] for name, group in groups.items() if name.startswith("encoder")} == {
        "encoder": 0.1,
        "encoder without decay": 0.1,
    }
    decoder = task.module.parts.mask_decoder
    stays = {id(parameter) for parameter in groups["decoder without decay"]["params"]}
    assert {id(decoder.mask_tokens.weight), id(decoder.iou_token.weight)} <= stays
    assert id(decoder.upscale_conv1.weight) not in stays


@pytest.mark.parametrize("freeze", [{"freeze_encoder": True}, {"freeze_prompt_encoder": True}])
def test_what_is_frozen_keeps_its_bits(freeze: dict[str, bool], samples: list[Sample]) -> None:
    task = learner(**freeze)
    before = {name: tensor.clone() for name, tensor in task.module.state_dict().items()}
    train(task, samples, steps=2)
    task.validate(task.module, samples, device=CPU)
    train(task, samples, steps=1)
    prefixes = ("parts.encoder.", "parts.neck.") if "freeze_encoder" in freeze else ("parts.prompt_encoder.",)
    after = task.module.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert not {name for name in moved if name.startswith(prefixes)}
    assert {name for name in moved if not name.startswith(prefixes)}


def test_single_and_best_masks_learn_and_every_iou(samples: list[Sample]) -> None:
    """The loss against plain formulas, object by object."""
    task = learner(focal_weight=3.0, dice_weight=2.0, iou_weight=5.0, focal_gamma=1.5)
    batch = task.collate(samples, np.random.default_rng(2))
    print("seed 8")
    random = torch.Generator().manual_seed(8)
    count = len(batch["boxes"])
    low_res = 3 * torch.randn(count, 4, 16, 16, generator=random)
    quality = torch.rand(count, 4, generator=random)
    parts = task.loss((low_res, quality), batch)

    expected = []
    for index in range(count):
        target = batch["targets"][index].float()
        values = logits_at(low_res[index : index + 1], batch["points"][index : index + 1])[0]
        losses, error = [], 0.0
        for mask in range(4):
            chance = values[mask].sigmoid()
            right = torch.where(target > 0, chance, 1 - chance)
            focal = (-(right.log()) * (1 - right) ** 1.5).mean()
            near, wanted = chance[:NEAR_POINTS], target[:NEAR_POINTS]
            dice = 1 - (2 * (near * wanted).sum() + 1) / (near.sum() + wanted.sum() + 1)
            losses.append(float(3 * focal + 2 * dice))
            found = values[mask] > 0
            pixels = batch["point_pixels"][index]
            iou = pixels[found & (target > 0)].sum() / pixels[found | (target > 0)].sum()
            error += float((quality[index, mask] - iou) ** 2) / 4
        expected.append(losses[0] + min(losses[1:]) + 5 * error)
    assert parts["loss"].item() == pytest.approx(np.mean(expected), rel=1e-4)
    assert not any(value.requires_grad for name, value in parts.items() if name != "loss")


def test_bf16_changes_the_encoder_only(samples: list[Sample]) -> None:
    task = learner()
    batch = task.collate(samples, np.random.default_rng(0))
    with torch.autocast("cpu", torch.bfloat16):
        logits, quality = forward(task, batch)
        parts = task.loss((logits, quality), batch)
    assert {logits.dtype, quality.dtype, parts["loss"].dtype} == {torch.float32}
    parts["loss"].backward()
    reference, _ = forward(task, batch)
    assert 0 < (logits - reference).abs().max() < 0.2


# Batches


def test_batch_without_objects_gives_zero_gradients() -> None:
    task = learner()
    empty = [drawn(1, objects=0), drawn(2, objects=0)]
    batch = task.collate(empty, np.random.default_rng(0))
    assert (batch["image_ids"], batch["boxes"].shape) == ([1, 2], (0, 4))
    assert batch["points"].shape == (0, NEAR_POINTS + FAR_POINTS, 2)
    outputs = forward(task, batch)
    assert outputs[0].shape == (0, 4, 16, 16)
    loss = task.loss(outputs, batch)["loss"]
    loss.backward()
    assert loss.item() == 0
    learning = [value for value in task.module.parameters() if value.requires_grad]
    assert all(value.grad is not None and not value.grad.any() for value in learning)


def test_batch_of_empty_and_full_images() -> None:
    task = learner(max_boxes_per_image=2)
    three = drawn(4)
    batch = task.collate([drawn(1, objects=0), three], np.random.default_rng(0))
    assert batch["image_index"].tolist() == [1, 1]
    assert (batch["image_index"].dtype, batch["boxes"].dtype, batch["targets"].dtype) == (
        torch.int64,
        torch.float32,
        torch.bool,
    )
    assert np.isfinite(task.loss(forward(task, batch), batch)["loss"].item())


def test_every_object_is_drawn_in_time() -> None:
    task = learner(max_boxes_per_image=1, box_jitter=0.0)
    sample = drawn(4)
    boxes = {tuple(task.collate([sample], np.random.default_rng(seed))["boxes"][0].tolist()) for seed in range(30)}
    assert len(boxes) == len(sample.boxes_xyxy) == 3


def test_collate_depends_on_its_generator_only(samples: list[Sample]) -> None:
    first, again, other = (learner().collate(samples, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["points"], again["points"])
    assert torch.equal(first["boxes"], again["boxes"])
    assert not torch.equal(first["boxes"], other["boxes"])


def test_objects_that_a_cutout_hid_are_no_objects() -> None:
    sample = drawn(4)
    assert sample.masks is not None
    sample.masks[1] = False
    batch = learner(box_jitter=0.0).collate([sample], np.random.default_rng(0))
    assert len(batch["boxes"]) == 2


def test_sample_without_masks_is_refused() -> None:
    sample = Sample(7, np.zeros((8, 8, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64), None)
    with pytest.raises(ValueError, match="image 7 was loaded without"):
        learner().collate([sample], np.random.default_rng(0))


def test_prompt_boxes_move_by_their_share_and_no_further() -> None:
    size = (150, 300)  # halves the height: no rounding in the sam frame
    masks = np.zeros((2, *size), bool)
    masks[0, 90:110, 100:140] = True
    masks[1, 0:140, 0:300] = True
    boxes = np.array([tight_box(mask) for mask in masks], np.float32)
    sample = Sample(0, np.zeros((*size, 3), np.uint8), boxes, np.zeros(2, np.int64), masks)
    task = learner(box_jitter=0.1, box_jitter_px=15.0)
    scale = 300 / 64
    moved = np.stack(
        [task.collate([sample], np.random.default_rng(seed))["boxes"].numpy() * scale - boxes for seed in range(300)]
    )
    assert moved[:, 0].std(axis=0) == pytest.approx([4, 2, 4, 2], rel=0.15)
    assert np.abs(moved[:, 0].mean(axis=0)).max() < 1
    assert np.abs(moved[:, 1]).max() <= 15.01
    assert (moved[:, 1, :2] >= -0.01).all(), "the picture ends there"
    assert moved[:, 1, 2].max() <= 0.01
    still = learner(box_jitter=0.0).collate([sample], np.random.default_rng(0))["boxes"].numpy() * scale
    assert still == pytest.approx(boxes, rel=1e-5)


# Points


def test_logits_at_pixel_centres_equal_upsampled_ones() -> None:
    print("seed 6")
    low_res = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(6))
    full = interpolate(low_res, (64, 64), mode="bilinear", align_corners=False)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    points = (torch.stack([x, y], dim=-1).reshape(1, -1, 2) + 0.5) / 32 - 1
    torch.testing.assert_close(logits_at(low_res, points), full.flatten(2), rtol=0, atol=1e-5)


def test_points_agree_with_inference_at_the_original_size(samples: list[Sample]) -> None:
    """A sample's frame, scales and offsets: the logits at its points are those that inference thresholds."""
    task = learner()
    print("seed 7")
    for sample in samples:
        batch = task.collate([sample], np.random.default_rng(7))
        size_hw = (sample.pixels.shape[0], sample.pixels.shape[1])
        low_res = torch.randn(len(batch["boxes"]), 1, 16, 16, generator=torch.Generator().manual_seed(7))
        low_res = interpolate(interpolate(low_res, (4, 4), mode="area"), (16, 16), mode="bilinear")
        full = upsample_logits(low_res[:, 0], size_hw=size_hw, input_hw=input_size_hw(size_hw, 64), image_size=64)
        ours = logits_at(low_res, batch["points"])[:, 0]
        filled = torch.tensor(input_size_hw(size_hw, 64)[::-1])
        cells = ((batch["points"] + 1) * 32 / filled * torch.tensor(size_hw[::-1])).long()
        theirs = torch.stack([one[cell[:, 1], cell[:, 0]] for one, cell in zip(full, cells, strict=True)])
        assert (ours - theirs).abs().mean() < 0.02 * theirs.std()
        assert sample.masks is not None
        wanted = np.stack(
            [mask[cell[:, 1], cell[:, 0]] for mask, cell in zip(sample.masks, cells.numpy(), strict=True)]
        )
        assert np.array_equal(batch["targets"].numpy(), wanted)


def masks_of(*areas: tuple[slice, slice], size_hw: tuple[int, int] = (100, 150)) -> NDArray[np.bool_]:
    masks = np.zeros((len(areas), *size_hw), bool)
    for mask, area in zip(masks, areas, strict=True):
        mask[area] = True
    return masks


def test_points_weigh_as_many_pixels_as_there_are() -> None:
    masks = masks_of(np.s_[40:52, 60:75], np.s_[0:100, 0:150], np.s_[98:100, 149:150])
    boxes = np.array([tight_box(mask) for mask in masks], np.float32)
    print("seed 0 … 29")
    areas, totals = [], []
    for seed in range(30):
        drawn_points = draw_points(masks, boxes, np.random.default_rng(seed))
        assert drawn_points.centres_xy.shape == (3, NEAR_POINTS + FAR_POINTS, 2)
        areas.append((drawn_points.targets * drawn_points.pixels).sum(axis=1))
        totals.append(drawn_points.pixels.sum(axis=1))
    assert np.mean(areas, axis=0) == pytest.approx(masks.sum(axis=(1, 2)), rel=0.02)
    assert np.mean(totals, axis=0) == pytest.approx([15000] * 3, rel=0.02)


def test_points_reach_every_pixel_of_a_small_object_and_its_rim() -> None:
    masks = masks_of(np.s_[40:52, 60:72])
    points = draw_points(masks, np.array([[60, 40, 72, 52]], np.float32), np.random.default_rng(1))
    near = {(x, y) for x, y in points.centres_xy[0, :NEAR_POINTS].tolist()}
    assert near == {(x + 0.5, y + 0.5) for x in range(58, 74) for y in range(38, 54)}


def test_no_mask_no_points() -> None:
    points = draw_points(np.zeros((0, 5, 7), bool), np.zeros((0, 4), np.float32), np.random.default_rng(0))
    assert points.targets.shape == (0, NEAR_POINTS + FAR_POINTS)


def test_losses_of_right_and_wrong_masks() -> None:
    targets = (torch.arange(100) < 30).float()[None, None]
    logits = torch.stack([20 * (2 * targets[0, 0] - 1), -20 * (2 * targets[0, 0] - 1), torch.zeros(100)])[None]
    assert focal_loss(logits, targets, gamma=2.0)[0].tolist() == pytest.approx([0, 20, np.log(2) / 4], abs=1e-4)
    assert dice_loss(logits, targets)[0].tolist() == pytest.approx([0, 100 / 101, 1 - 31 / 81], abs=1e-4)
    iou = estimated_iou(logits, targets, torch.ones(1, 1, 100))
    assert iou[0].tolist() == pytest.approx([1, 0, 0])
    assert estimated_iou(-logits[:, :1].abs(), 0 * targets, torch.ones(1, 1, 100)).item() == 0


# Metrics, starts, settings


def test_metrics_are_those_of_the_masks(samples: list[Sample]) -> None:
    task = learner()
    train(task, samples, steps=5)
    task.module.train()
    samples = [*samples, drawn(5, size_hw=(240, 320))]
    metrics = task.validate(task.module, [*samples, drawn(9, objects=0)], device=CPU)
    assert task.module.training
    ious = []
    task.module.eval()
    for sample in samples:
        batch = learner(box_jitter=0.0).collate([sample], np.random.default_rng(0))
        with torch.no_grad():
            logits = forward(task, batch)[0]
        size_hw = (sample.pixels.shape[0], sample.pixels.shape[1])
        full = upsample_logits(logits[:, 0], size_hw=size_hw, input_hw=input_size_hw(size_hw, 64), image_size=64)
        assert sample.masks is not None
        found = (full > 0).numpy()
        ious += list((found & sample.masks).sum((1, 2)) / (found | sample.masks).sum((1, 2)))
    assert metrics["val/miou"] == pytest.approx(np.mean(ious))
    assert metrics["val/dice"] == pytest.approx(np.mean([2 * iou / (1 + iou) for iou in ious]))
    assert task.best_metric in metrics
    sides = [np.sqrt(np.prod(box[2:] - box[:2])) for sample in samples for box in sample.boxes_xyxy]
    small = np.array(sides) < 32
    assert 0 < small.sum() < len(small)
    assert metrics["val/miou_small"] == pytest.approx(np.mean(np.array(ious)[small]))
    assert metrics["val/miou_large"] == pytest.approx(np.mean(np.array(ious)[~small]))


def test_validation_needs_an_object() -> None:
    task = learner()
    with pytest.raises(TrainingError, match="no object with a mask"):
        task.validate(task.module, [drawn(1, objects=0)], device=CPU)


def test_random_start_is_undecided(samples: list[Sample]) -> None:
    task = learner()
    logits, quality = forward(task, task.collate(samples, np.random.default_rng(0)))
    assert logits.std() < 1
    assert logits.mean().abs() < 0.5
    assert (quality - 0.5).abs().max() < 0.3
    frequencies = task.module.parts.prompt_encoder.shared_embedding.positional_embedding
    assert 0.5 < frequencies.std() < 2


def test_random_start_depends_on_its_seed_only() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = random_parts(LEARNER, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), state), "the global state is left alone"
    torch.manual_seed(2)
    again, other = (random_parts(LEARNER, seed=seed).state_dict() for seed in (4, 5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("both", [{}, {"weights": "x.pt", "architecture": LEARNER}])
def test_one_start_is_needed(both: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="either weights"):
        SegmenterSettings(**both)


def test_a_training_goes_on_with_larger_pictures(tmp_path: Path, samples: list[Sample]) -> None:
    task = learner()
    task.export(task.module.state_dict(), tmp_path / "small")
    larger = SegmenterTask(SegmenterSettings(weights=str(tmp_path / "small"), image_size=96), seed=0)
    train(larger, samples, steps=1)
    larger.export(larger.module.state_dict(), tmp_path / "large")
    model = MobileSam.load(str(tmp_path / "large"), device=CPU, dtype=torch.float32)
    assert model.image_size == 96
    batch = larger.collate(samples, np.random.default_rng(0))
    larger.module.eval()
    with torch.no_grad():
        logits, _ = forward(larger, batch)
    single, _ = model.decode(model.encode(batch["pixels"]), batch["image_index"], batch["boxes"], multimask=False)
    assert single.shape[-1] == 24
    torch.testing.assert_close(logits[:, :1], single, rtol=0, atol=1e-4)


@pytest.mark.parametrize("image_size", [100, 0])
def test_side_that_the_encoder_does_not_take_is_refused(image_size: int) -> None:
    with pytest.raises(ValidationError, match="image_size"):
        SegmenterSettings(weights="x.pt", image_size=image_size)


def test_an_architecture_has_its_own_side() -> None:
    with pytest.raises(ValidationError, match="image_size goes with weights"):
        SegmenterSettings(architecture=LEARNER, image_size=96)


def test_missing_weights_are_told() -> None:
    with pytest.raises(WeightsError, match="no segmenter weights at nowhere"):
        SegmenterTask(SegmenterSettings(weights="nowhere.pt"), seed=0)
