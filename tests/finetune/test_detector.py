"""The detector's task: the same model as inference, prompts of a batch, targets, frozen parts, OWLv2."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessor

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import InputError, WeightsError
from owlsam_ray.finetune.data import Sample
from owlsam_ray.finetune.detector import DetectorTask, DetectorTraining
from owlsam_ray.finetune.scratch import word_tokenizer
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_text import embed_texts
from owlsam_ray.models.owl_weights import ready
from tests.seeded_owlvit import write_tiny

CPU = torch.device("cpu")
NAMES = ["cat", "dog", "traffic light", "red ball", "cup"]
CATEGORIES = tuple(Category(id=index + 1, name=name) for index, name in enumerate(NAMES))


def make_sample(seed: int = 0, labels: tuple[int, ...] = (0, 2, 2), size_hw: tuple[int, int] = (60, 90)) -> Sample:
    random = np.random.default_rng(seed)
    height, width = size_hw
    low = random.uniform(0, 0.4, (len(labels), 2)) * (width, height)
    sides = random.uniform(0.2, 0.5, (len(labels), 2)) * (width, height)
    return Sample(
        image_id=seed,
        pixels=random.integers(0, 256, (height, width, 3), dtype=np.uint8),
        boxes_xyxy=np.concatenate([low, low + sides], axis=1).astype(np.float32),
        labels=np.array(labels, np.int64),
        masks=None,
    )


def make_task(directory: Path, **settings: Any) -> DetectorTask:
    write_tiny(directory, seed=1)
    return DetectorTask(DetectorTraining(weights=str(directory), template="a {}", **settings), CATEGORIES, seed=0)


def write_owlv2(directory: Path) -> None:
    """A tiny OWLv2 with random weights and a tokenizer of its own."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    tokenizer = word_tokenizer(["a", *(word for name in NAMES for word in name.split())], positions=12)
    text = sizes | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 12,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    vision = sizes | {"image_size": 64, "patch_size": 16}
    torch.manual_seed(3)
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    for parameter in [*model.box_head.parameters(), *model.class_head.parameters()]:
        torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    Owlv2ImageProcessor(size={"height": 64, "width": 64}).save_pretrained(directory)


def forward(task: DetectorTask, batch: dict[str, Any]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = task.module(*task.inputs(batch))
    return outputs


@torch.no_grad()
def test_outputs_are_those_of_inference(tmp_path: Path) -> None:
    task = make_task(tmp_path / "weights")
    task.module.eval()
    sample = make_sample()
    batch = task.collate([sample, make_sample(1)], np.random.default_rng(0))
    outputs = forward(task, batch)
    inference = Owl.load(tmp_path / "weights", DetectorConfig(weights="-"), device=CPU, dtype=torch.float32)
    queries = embed_texts(tmp_path / "weights", [f"a {name}" for name in NAMES])
    boxes, scores = inference.detect(torch.stack([inference.preprocess(sample.pixels)] * 2), ready(queries))
    assert len(batch["input_ids"]) == len(NAMES)  # all of them: fewer than max_prompts
    torch.testing.assert_close(outputs["boxes"][0], boxes[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs["logits"][0].sigmoid(), scores[0], atol=1e-6, rtol=0)


def test_export_loads_where_labels_are_made(tmp_path: Path) -> None:
    task = make_task(tmp_path / "weights")
    with torch.no_grad():
        for parameter in task.module.parameters():
            parameter.add_(0.01)
    task.export(task.module.state_dict(), tmp_path / "out")
    inference = Owl.load(tmp_path / "out", DetectorConfig(weights="-"), device=CPU, dtype=torch.float32)
    queries = embed_texts(tmp_path / "out", ["a cat", "a cup"])
    sample = make_sample()
    with torch.no_grad():
        ours = task.module.eval().propose(task.parts.preprocessing(sample.pixels)[None], queries)
    boxes, scores = inference.detect(inference.preprocess(sample.pixels)[None], ready(queries))
    torch.testing.assert_close(ours["boxes"], boxes, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours["logits"].sigmoid(), scores, atol=1e-6, rtol=0)


def test_a_batch_asks_for_what_is_there_and_samples_what_is_not(tmp_path: Path) -> None:
    task = make_task(tmp_path / "weights", max_prompts=4)
    tokens = {tuple(row): index for index, row in enumerate(task.input_ids.tolist())}
    seen: set[int] = set()
    for seed in range(20):
        batch = task.collate([make_sample(0, (2,)), make_sample(1, (4, 4, 0))], np.random.default_rng(seed))
        asked = [tokens[tuple(row)] for row in batch["input_ids"].tolist()]
        assert len(asked) == 4
        assert {0, 2, 4} <= set(asked)
        seen |= set(asked)
        assert [asked[index] for index in batch["prompts"][0].tolist()] == [2]
        assert [asked[index] for index in batch["prompts"][1].tolist()] == [4, 4, 0]
    assert seen == set(range(5))


def test_more_categories_than_prompts_on_an_image_are_all_asked_for(tmp_path: Path) -> None:
    task = make_task(tmp_path / "weights", max_prompts=1)
    assert len(task.collate([make_sample(0, (0, 1, 2))], np.random.default_rng(0))["input_ids"]) == 3


def test_targets_are_in_the_detectors_frame(tmp_path: Path) -> None:
    sample = make_sample(2, (1,), (50, 200))
    x0, y0, x1, y1 = sample.boxes_xyxy[0].tolist()
    squashed = make_task(tmp_path / "v1").collate([sample], np.random.default_rng(0))["boxes"][0][0]
    expected = [(x0 + x1) / 400, (y0 + y1) / 100, (x1 - x0) / 200, (y1 - y0) / 50]
    assert squashed.tolist() == pytest.approx(expected, abs=1e-6)
    write_owlv2(tmp_path / "v2")
    padded = DetectorTask(DetectorTraining(weights=str(tmp_path / "v2"), template="a {}"), CATEGORIES, seed=0)
    target = padded.collate([sample], np.random.default_rng(0))["boxes"][0][0]
    assert target.tolist() == pytest.approx(
        [(x0 + x1) / 400, (y0 + y1) / 400, (x1 - x0) / 200, (y1 - y0) / 200], abs=1e-6
    )


@pytest.mark.parametrize("labels", [(0, 2), ()], ids=["objects", "no object"])
def test_every_parameter_that_learns_gets_a_gradient(tmp_path: Path, labels: tuple[int, ...]) -> None:
    task = make_task(tmp_path / "weights")
    batch = task.collate([make_sample(0, labels)], np.random.default_rng(0))
    parts = task.loss(forward(task, batch), batch)
    parts["loss"].backward()
    learning = [parameter for group in task.parameter_groups() for parameter in group["params"]]
    assert len(learning) == sum(parameter.requires_grad for parameter in task.module.parameters())
    assert all(parameter.grad is not None for parameter in learning)
    assert bool(torch.isfinite(parts["loss"]))


@pytest.mark.parametrize("part", ["text", "vision", "box_head", "class_head"])
def test_frozen_parts_do_not_learn(tmp_path: Path, part: Any) -> None:
    task = make_task(tmp_path / "weights", frozen=(part,))
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    batch = task.collate([make_sample()], np.random.default_rng(0))
    task.loss(forward(task, batch), batch)["loss"].backward()
    groups = task.parameter_groups()
    torch.optim.SGD([parameter for group in groups for parameter in group["params"]], lr=0.1).step()
    changed = {name for name, value in task.module.state_dict().items() if not torch.equal(value, before[name])}
    marks = {"text": ("text_model", "text_projection"), "vision": ("vision_model", "model.layer_norm")}
    mine = marks.get(part, (part,))
    assert changed
    assert not [name for name in changed if any(mark in name for mark in mine)]


def test_groups_have_their_rates_and_no_decay_on_norms(tmp_path: Path) -> None:
    task = make_task(tmp_path / "weights", text_lr_scale=0.25, heads_lr_scale=3.0)
    name_of = {id(parameter): name for name, parameter in task.module.named_parameters()}
    scales = {"text": 0.25, "vision": 1.0, "heads": 3.0}
    for group in task.parameter_groups():
        assert group["lr_scale"] == scales[group["name"]]
        for parameter in group["params"]:
            name = name_of[id(parameter)]
            assert ("text_" in name) == (group["name"] == "text")
            assert (group.get("weight_decay") == 0.0) == (parameter.ndim < 2 or "embedding" in name)
            assert group["hidden_matrices"] == (parameter.ndim == 2 and ".encoder.layers." in name)


def test_validation_scores_perfect_boxes_as_perfect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make_task(tmp_path / "weights")
    samples = [make_sample(seed, (seed % 5, 3)) for seed in range(3)]
    waiting = iter(samples)

    def perfect(pixels: Tensor, queries: Tensor) -> dict[str, Tensor]:
        boxes, logits = torch.zeros(len(pixels), 2, 4), torch.full((len(pixels), 2, 5), -20.0)
        for index in range(len(pixels)):
            sample = next(waiting)
            boxes[index] = task._target_boxes(sample)
            logits[index, torch.arange(2), torch.from_numpy(sample.labels)] = 5.0
        return {"boxes": boxes, "logits": logits}

    monkeypatch.setattr(task.module, "propose", perfect)
    scores = task.validate(task.module, samples, device=CPU)
    assert scores["val/box_ap"] == pytest.approx(1.0)
    assert scores["val/box_ap50"] == pytest.approx(1.0)
    assert task.module.training


def test_owlv2_trains_and_keeps_its_objectness(tmp_path: Path) -> None:
    write_owlv2(tmp_path / "v2")
    task = DetectorTask(DetectorTraining(weights=str(tmp_path / "v2"), template="a {}"), CATEGORIES, seed=0)
    optimizer = torch.optim.AdamW(task.parameter_groups(), lr=2e-3)
    batch = task.collate([make_sample(0, (0, 1)), make_sample(1, ())], np.random.default_rng(0))
    losses = []
    for _ in range(25):
        parts = task.loss(forward(task, batch), batch)
        parts["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(parts["loss"].detach()))
    assert "loss_objectness" in parts
    assert losses[-1] < 0.7 * losses[0]
    assert 0.0 <= task.validate(task.module, [make_sample(0, (0, 1))], device=CPU)["val/box_ap"] <= 1.0
    task.export(task.module.state_dict(), tmp_path / "out")
    again = DetectorTask(DetectorTraining(weights=str(tmp_path / "out"), template="a {}"), CATEGORIES, seed=0)
    state = again.module.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in task.module.state_dict().items())


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        task = make_task(tmp_path / "weights", gradient_checkpointing=checkpointing)
        task.module.train()
        batch = task.collate([make_sample()], np.random.default_rng(0))
        task.loss(forward(task, batch), batch)["loss"].backward()
        gradients.append({name: p.grad for name, p in task.module.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


def test_a_prompt_that_is_too_long_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "weights")
    long = (Category(id=1, name="a very long name " * 5),)
    with pytest.raises(InputError, match="tokens with start and end"):
        DetectorTask(DetectorTraining(weights=str(tmp_path / "weights")), long, seed=0)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="either weights"):
        DetectorTraining()
    with pytest.raises(ValidationError, match="exactly once"):
        DetectorTraining(weights="x", template="a photo")
    with pytest.raises(WeightsError):
        DetectorTask(DetectorTraining(weights=str(tmp_path)), CATEGORIES, seed=0)
