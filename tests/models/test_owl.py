"""Tiny OwlViTs and OWLv2s against the installed transformers: heads, other image sizes, objectness, bf16, batches."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.errors import ConfigError
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_weights import Family, ready
from tests.drawn_images import draw_image
from tests.models.owl_reference import CPU, Official, Picture, bf16_deviation
from tests.seeded_owlvit import TINY_PATCH, TINY_SIDE, write_tiny

PROMPTS = ["a cat", "a traffic light", "a remote control", "a red ball", "a couch"]
FAMILIES: tuple[Family, ...] = ("owlvit", "owlv2")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Family:
    family: Family = request.param
    return family


@pytest.fixture(scope="module")
def directory(model: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(model)
    write_tiny(path, seed=1, family=model)
    return path


def load(directory: Path, model: Family, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Owl:
    return Owl.load(directory, DetectorConfig(model=model, weights="-", **settings), device=CPU, dtype=dtype)


def pictures() -> list[Picture]:
    """Landscape, portrait, square, tiny, and larger than the model's input."""
    sizes = ((90, 60), (50, 77), (TINY_SIDE, TINY_SIDE), (5, 3), (300, 200))
    return [np.array(draw_image(seed).resize(size)) for seed, size in enumerate(sizes)]


def test_equals_transformers(directory: Path, model: Family) -> None:
    official, mine = Official(directory, model), load(directory, model)
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    for row, picture in enumerate(pictures()):
        wanted, queries = official.detect(picture, PROMPTS)
        boxes, scores = mine.detect(batch, ready(queries))
        corners = mine.unscale(boxes[row], (picture.shape[0], picture.shape[1]))
        assert wanted["scores"].std() > 0.05
        torch.testing.assert_close(corners, wanted["boxes"], rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[row].amax(dim=-1), wanted["scores"], rtol=0, atol=1e-5)
        assert torch.equal(scores[row].argmax(dim=-1), wanted["labels"])


def official_outputs(directory: Path, model: Family, batch: Tensor, *, interpolate: bool = False) -> Any:
    official = Official(directory, model)
    tokens = official.processor(text=[PROMPTS] * len(batch), return_tensors="pt")
    with torch.inference_mode():
        return official.model(**tokens, pixel_values=batch, interpolate_pos_encoding=interpolate)


def test_scenic_equals_transformers_on_the_same_input(directory: Path, model: Family) -> None:
    """The square differs from transformers', the model does not; boxes are in units of the padded square."""
    mine = load(directory, model, preprocess="scenic", pad_value=0.5)
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    outputs = official_outputs(directory, model, batch)
    boxes, scores = mine.detect(batch, ready(outputs.text_embeds[0]))
    torch.testing.assert_close(boxes, outputs.pred_boxes, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, outputs.logits.sigmoid(), rtol=0, atol=1e-5)
    cx, cy, w, h = outputs.pred_boxes[0].unbind(-1)
    expected = 90 * torch.stack([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], dim=-1)  # 90 × 60 pixels
    torch.testing.assert_close(mine.unscale(boxes[0], (60, 90)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("side", [TINY_SIDE - TINY_PATCH, 2 * TINY_SIDE])
def test_other_image_sizes_equal_interpolated_positions(directory: Path, model: Family, side: int) -> None:
    mine = load(directory, model, image_size=side)
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    assert batch.shape == (5, 3, side, side)
    outputs = official_outputs(directory, model, batch, interpolate=True)
    boxes, scores = mine.detect(batch, ready(outputs.text_embeds[0]))
    assert boxes.shape == (5, (side // TINY_PATCH) ** 2, 4)
    torch.testing.assert_close(boxes, outputs.pred_boxes, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, outputs.logits.sigmoid(), rtol=0, atol=1e-5)


def test_the_models_own_image_size_changes_nothing(directory: Path, model: Family) -> None:
    default, named = load(directory, model), load(directory, model, image_size=TINY_SIDE)
    batch = default.preprocess(pictures()[0])[None]
    assert torch.equal(named.preprocess(pictures()[0])[None], batch)
    queries = torch.eye(5, 32)
    for one, other in zip(default.detect(batch, queries), named.detect(batch, queries), strict=True):
        assert torch.equal(one, other)


def test_image_sizes_that_patches_do_not_fill_are_refused(directory: Path, model: Family) -> None:
    with pytest.raises(ConfigError, match=r"detector\.image_size 100 is not .* patch size 16 .*: take 96 or 112"):
        load(directory, model, image_size=100)
    with pytest.raises(ConfigError, match="take 16 or 16"):
        load(directory, model, image_size=9)


def test_objectness_multiplies_scores(tmp_path: Path) -> None:
    write_tiny(tmp_path, seed=2, family="owlv2")
    plain, multiplied = (load(tmp_path, "owlv2", objectness=way) for way in ("ignore", "multiply"))
    batch = torch.stack([plain.preprocess(picture) for picture in pictures()])
    outputs = official_outputs(tmp_path, "owlv2", batch)
    queries = ready(outputs.text_embeds[0])
    expected = outputs.logits.sigmoid() * outputs.objectness_logits.sigmoid()[..., None]
    boxes, scores = multiplied.detect(batch, queries)
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    assert torch.equal(boxes, plain.detect(batch, queries)[0])
    assert (plain.detect(batch, queries)[1] - scores).mean() > 0.01


def test_class_embeddings_equal_transformers(directory: Path, model: Family) -> None:
    mine = load(directory, model)
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    embeddings, boxes, objectness = mine.class_embeddings(batch)
    outputs = official_outputs(directory, model, batch)
    # transformers hands them out after normalisation.
    torch.testing.assert_close(ready(embeddings), outputs.class_embeds, rtol=0, atol=1e-6)
    assert (embeddings.norm(dim=-1) - 1).abs().max() > 0.1
    torch.testing.assert_close(boxes, outputs.pred_boxes, rtol=0, atol=1e-6)
    if model == "owlvit":
        assert objectness is None
    else:
        torch.testing.assert_close(objectness, outputs.objectness_logits, rtol=0, atol=1e-5)


def test_queries_are_not_normalised_again(directory: Path, model: Family) -> None:
    """So that the logit of a mean of queries is the mean of their logits."""
    mine = load(directory, model)
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    templates = ready(torch.randn(7, 32, generator=torch.Generator().manual_seed(4)))
    each = mine.detect(batch, templates)[1].double().logit().mean(dim=-1)
    mean = mine.detect(batch, templates.mean(dim=0, keepdim=True))[1].double().logit()[..., 0]
    assert templates.mean(dim=0).norm() < 0.7
    torch.testing.assert_close(mean, each, rtol=0, atol=1e-4)


def test_bf16_deviates_as_rounding_explains(directory: Path, model: Family) -> None:
    bf16_deviation(directory, model, pictures()[4])


def test_bf16_equals_transformers_with_its_tower_in_bf16(directory: Path, model: Family) -> None:
    """The tower rounds as transformers' own does; heads and box decoding do not round."""
    mine, official = load(directory, model, dtype=torch.bfloat16), Official(directory, model).model
    batch = torch.stack([mine.preprocess(picture) for picture in pictures()])
    queries = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    towers = official.owlv2 if model == "owlv2" else official.owlvit
    towers.vision_model.to(torch.bfloat16)
    with torch.inference_mode():
        hidden = towers.vision_model(pixel_values=batch.bfloat16())[0]
        tokens = towers.vision_model.post_layernorm(hidden)
        patches = official.layer_norm((tokens[:, 1:] * tokens[:, :1]).float())
        wanted = official.box_predictor(patches, patches)
        logits, _ = official.class_predictor(patches, queries.expand(len(batch), -1, -1))
    boxes, scores = mine.detect(batch, ready(queries))
    torch.testing.assert_close(boxes, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores, logits.sigmoid(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model", "objectness"), [("owlvit", "ignore"), ("owlv2", "ignore"), ("owlv2", "multiply")])
def test_same_bits_in_any_batch(tmp_path: Path, model: Family, objectness: str) -> None:
    """64 patches: a multiple of 16, as of every published model. With 36, AVX-512 treats the last ones apart."""
    write_tiny(tmp_path, side=128, family=model)
    mine = load(tmp_path, model, objectness=objectness)
    batch = torch.stack([mine.preprocess(np.array(draw_image(seed))) for seed in range(4)])
    queries = ready(torch.randn(5, 32, generator=torch.Generator().manual_seed(4)))
    boxes, scores = mine.detect(batch, queries)
    order = [2, 0, 3, 1]
    permuted = mine.detect(batch[order], queries)
    assert torch.equal(permuted[0], boxes[order])
    assert torch.equal(permuted[1], scores[order])
    for row in range(4):
        padded = torch.cat([batch[row : row + 1], torch.zeros_like(batch[1:])])  # a call of the same shape
        alone = mine.detect(padded, queries)
        assert torch.equal(alone[0][0], boxes[row])
        assert torch.equal(alone[1][0], scores[row])


def test_the_text_tower_is_not_kept(directory: Path, model: Family) -> None:
    names = [name for name, _ in load(directory, model)._model.named_parameters()]
    assert names
    assert not [name for name in names if "text" in name]


def test_boxes_of_an_image_are_where_it_stands(directory: Path, model: Family) -> None:
    """The same object gives the same box in original pixels, whatever is padded."""
    mine = load(directory, model)
    height, width = 60, 90
    side = max(height, width)
    frame = (side, side) if model == "owlv2" else (height, width)
    box = torch.tensor([[0.5, 0.25, 0.5, 0.5]])
    expected = [[0.25 * frame[1], 0.0, 0.75 * frame[1], 0.5 * frame[0]]]
    assert mine.unscale(box, (height, width)).tolist() == expected
    assert mine.unscale(torch.zeros(0, 4), (height, width)).shape == (0, 4)
