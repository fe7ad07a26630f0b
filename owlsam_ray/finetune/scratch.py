"""Build an OwlViT of any size with random weights: configuration, tokenizer and an initialization that trains.

transformers' own initialization makes the detection heads far too wide (box outputs of ±500), so the heads are
initialized here.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor

from owlsam_ray.config.base import PositiveInt, Section

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
_HEAD_STD = 0.05
_PRIOR_SCALE, _PRIOR_SHIFT = 10.0, -0.45
"""Initial (cosine + shift) · scale: a logit near -4.5, a probability of 0.01, for a patch and prompt that do not match.
"""


class OwlVitArchitecture(Section):
    """Sizes of an OwlViT with random initial weights."""

    image_size: PositiveInt = 256
    """Side of the detector's square input in pixels; a multiple of `patch_size`."""
    patch_size: PositiveInt = 16
    """Side of a patch; each patch proposes one box."""
    width: PositiveInt = 128
    """Channels of the image tower."""
    layers: PositiveInt = 4
    """Layers of the image tower."""
    heads: PositiveInt = 4
    """Attention heads of the image tower; divides `width`."""
    mlp_ratio: PositiveInt = 4
    """Hidden channels of an MLP relative to `width`, in both towers."""
    activation: Literal["quick_gelu", "gelu", "relu"] = "quick_gelu"
    """Activation of the image tower's MLPs; `relu` saves a sixth of the time on a CPU."""
    text_width: PositiveInt = 64
    """Channels of the text tower, and of the space in which patches and prompts are compared."""
    text_layers: PositiveInt = 1
    """Layers of the text tower."""
    text_positions: Annotated[int, Field(ge=4)] = 16
    """Most tokens of a prompt, including start and end."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """How images are resized to the square."""

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.text_width % max(1, self.text_width // 32):
            raise ValueError(f"text_width {self.text_width} is not a multiple of 32")
        return self


def word_tokenizer(words: Iterable[str], *, positions: int) -> CLIPTokenizer:
    """Make a CLIP tokenizer in which each of `words` is one token, and any other text falls apart into bytes.

    Args:
        words: lower case; repetitions are harmless.
        positions: most tokens of a prompt.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = _apply_merges([*word[:-1], f"{word[-1]}</w>"], merges)
        # Later merges rank lower, so earlier words still come out whole.
        for part in parts[1:]:
            merges.append((parts[0], part))
            parts[0] += part
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=PAD, model_max_length=positions)


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte pair encoding of one word: apply the earliest merge first, until none fits."""
    for left, right in merges:
        joined: list[str] = []
        for part in parts:
            if joined and (joined[-1], part) == (left, right):
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return parts


def build_owlvit(
    architecture: OwlVitArchitecture, words: Iterable[str], *, seed: int
) -> tuple[OwlViTForObjectDetection, CLIPTokenizer, OwlViTImageProcessor]:
    """Build a model with random weights, its tokenizer and its preprocessing.

    Args:
        architecture: the sizes.
        words: words of all prompts; each becomes one token.
        seed: seed of the weights; the global random state is unchanged.
    """
    tokenizer = word_tokenizer(words, positions=architecture.text_positions)
    text = {
        "hidden_size": architecture.text_width,
        "num_hidden_layers": architecture.text_layers,
        "num_attention_heads": max(1, architecture.text_width // 32),
        "intermediate_size": architecture.mlp_ratio * architecture.text_width,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": architecture.text_positions,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vision = {
        "hidden_size": architecture.width,
        "num_hidden_layers": architecture.layers,
        "num_attention_heads": architecture.heads,
        "intermediate_size": architecture.mlp_ratio * architecture.width,
        "hidden_act": architecture.activation,
        "image_size": architecture.image_size,
        "patch_size": architecture.patch_size,
    }
    config = OwlViTConfig(text_config=text, vision_config=vision, projection_dim=architecture.text_width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OwlViTForObjectDetection(config)
        _start_heads(model)
        _start_vision(model, architecture)
    side = {"height": architecture.image_size, "width": architecture.image_size}
    resample = {"bilinear": 2, "bicubic": 3}[architecture.resample]
    processor = OwlViTImageProcessor(size=side, resample=resample, do_center_crop=False)
    return model, tokenizer, processor


@torch.no_grad()
def _start_heads(model: OwlViTForObjectDetection) -> None:
    for name, parameter in [*model.box_head.named_parameters(), *model.class_head.named_parameters()]:
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            # The last layer starts near zero, so that boxes start as their patch.
            nn.init.normal_(parameter, std=0.1 * _HEAD_STD if name.startswith("dense2") else _HEAD_STD)
    for layer, value in ((model.class_head.logit_scale, _PRIOR_SCALE), (model.class_head.logit_shift, _PRIOR_SHIFT)):
        nn.init.zeros_(layer.weight)
        # The scale is elu(x) + 1.
        nn.init.constant_(layer.bias, value - 1 if value > 0 else value)


@torch.no_grad()
def _start_vision(model: OwlViTForObjectDetection, architecture: OwlVitArchitecture) -> None:
    """Initialize the image tower with what it would first have to learn: low frequencies, and that neighbours matter.

    Positions start as sines and cosines of row and column, patches as their lowest cosine transform coefficients.
    Queries and keys start equal, so that a patch first attends to patches of similar position and content.

    Source: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers (2023), for queries and keys.
    """
    embeddings = model.owlvit.vision_model.embeddings
    grid = architecture.image_size // architecture.patch_size
    embeddings.position_embedding.weight[1:] = 0.5 * _positions(grid, architecture.width)
    embeddings.position_embedding.weight[0] = 0
    embeddings.patch_embedding.weight.copy_(_cosines(architecture.patch_size, architecture.width))
    for layer in model.owlvit.vision_model.encoder.layers:
        nn.init.orthogonal_(layer.self_attn.q_proj.weight)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _positions(grid: int, width: int) -> Tensor:
    """(grid², width): a quarter of the channels each for sine and cosine of row and column; leftovers are zero."""
    count = width // 4
    rates = (0.5 * grid) ** -(torch.arange(count) / max(1, count - 1))
    angles = torch.arange(grid)[:, None] * rates  # (grid, count)
    one = torch.cat([angles.sin(), angles.cos()], dim=-1)
    rows, columns = one[:, None].expand(-1, grid, -1), one[None].expand(grid, -1, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, 4 * count)
    return nn.functional.pad(table, (0, width - 4 * count))


def _cosines(patch: int, width: int) -> Tensor:
    """(width, 3, patch, patch): brightness and two colour differences at the lowest frequencies.

    Filters are stronger the higher their frequency. Images have less of the higher frequencies, so all channels come
    out about equally strong.
    """
    places = (torch.arange(patch) + 0.5) / patch
    waves = torch.cos(torch.pi * torch.arange(patch)[:, None] * places)  # (frequency, place)
    waves = waves / waves.norm(dim=1, keepdim=True)
    colours = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    colours = colours / colours.norm(dim=1, keepdim=True)
    order = sorted((u + v, u, v) for u in range(patch) for v in range(patch))
    filters = [
        0.04 * (1 + u + v) * colour[:, None, None] * waves[u][:, None] * waves[v]
        for _, u, v in order[: -(-width // 3)]
        for colour in colours
    ]
    return torch.stack(filters[:width])
