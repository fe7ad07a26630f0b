"""An OwlViT of any size without pretrained weights: configuration, tokenizer and a start that trains.

transformers' own initialisation makes the detection heads far too wide (box outputs of ±500); both are drawn anew.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor

from owlsam_ray.config import PositiveInt, Section

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
_HEAD_STD = 0.05
_PRIOR_SCALE, _PRIOR_SHIFT = 10.0, -0.45
"""Of (cosine + shift) · scale: a logit near -4.5, a probability of 0.01, for a patch and prompt that do not match."""


class OwlVitArchitecture(Section):
    """Sizes of an OwlViT that starts from nothing."""

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
    """Hidden channels of an MLP over `width`, both towers."""
    text_width: PositiveInt = 64
    """Channels of the text tower, and of the space where patches and prompts meet."""
    text_layers: PositiveInt = 1
    """Layers of the text tower."""
    text_positions: Annotated[int, Field(ge=4)] = 16
    """Tokens of a prompt, start and end included."""
    resample: Literal["bilinear", "bicubic"] = "bilinear"
    """How pictures are brought to the square."""


def word_tokenizer(words: Iterable[str], *, positions: int) -> CLIPTokenizer:
    """A CLIP tokenizer in which each of `words` is one token, and any other text falls apart into bytes.

    Args:
        words: lower case; repetitions do no harm.
        positions: tokens that a prompt may have.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    merges: list[tuple[str, str]] = []
    for word in dict.fromkeys(words):
        parts = _apply_merges([*word[:-1], f"{word[-1]}</w>"], merges)
        # What is added later ranks lower, so the words before still come out whole.
        for part in parts[1:]:
            merges.append((parts[0], part))
            parts[0] += part
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=PAD, model_max_length=positions)


def _apply_merges(parts: list[str], merges: list[tuple[str, str]]) -> list[str]:
    """Byte pair encoding of one word: the earliest merge first, until none fits."""
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
    """A model with random weights, its tokenizer and its preprocessing.

    Args:
        architecture: the sizes.
        words: of all prompts; each becomes one token.
        seed: of the weights; the global random state is left as it was.
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
            # The last layer near zero: boxes start as their patch.
            nn.init.normal_(parameter, std=0.1 * _HEAD_STD if name.startswith("dense2") else _HEAD_STD)
    for layer, value in ((model.class_head.logit_scale, _PRIOR_SCALE), (model.class_head.logit_shift, _PRIOR_SHIFT)):
        nn.init.zeros_(layer.weight)
        # The scale is elu(x) + 1.
        nn.init.constant_(layer.bias, value - 1 if value > 0 else value)


@torch.no_grad()
def _start_vision(model: OwlViTForObjectDetection, architecture: OwlVitArchitecture) -> None:
    """Give the image tower what it would first have to find out: it starts as a convolutional network.

    The first channels of a patch say where it is, the others hold its lowest cosine transform coefficients. Queries and
    keys of each head are such that a patch attends to the one at a fixed offset: its neighbours in the first layer,
    diagonals in the second, patches further and further away in the next.

    Source: the idea of Zheng, Li and Lucey, Structured Initialization for Attention in Vision Transformers (2024).
    """
    embeddings = model.owlvit.vision_model.embeddings
    grid = architecture.image_size // architecture.patch_size
    rates = _rates(architecture)
    places = 4 * len(rates)
    embeddings.position_embedding.weight.zero_()
    embeddings.position_embedding.weight[1:, :places] = _positions(grid, rates)
    embeddings.patch_embedding.weight.zero_()
    embeddings.patch_embedding.weight[places:] = _cosines(architecture.patch_size, architecture.width - places)
    head = architecture.width // architecture.heads
    for number, layer in enumerate(model.owlvit.vision_model.encoder.layers):
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        for index in range(architecture.heads):
            rows = slice(index * head, index * head + places)
            query[rows, :places] += _shift(rates, *_offset(number, index))
            key[rows, :places] += torch.eye(places)


def _rates(architecture: OwlVitArchitecture) -> Tensor:
    """Angles per patch of the position channels, as many as one head has room for.

    Equally spaced and odd, so that the products of any two positions less than twice their number apart sum to zero.
    """
    count = max(1, architecture.width // architecture.heads // 4)
    return torch.pi * (2 * torch.arange(count) + 1) / (2 * count)


def _positions(grid: int, rates: Tensor) -> Tensor:
    """(grid², 4 · rates): cosine and sine of the row at each rate, then of the column."""
    angles = torch.arange(grid)[:, None] * rates
    one = torch.cat([angles.cos(), angles.sin()], dim=-1)
    rows, columns = one[:, None].expand(-1, grid, -1), one[None].expand(grid, -1, -1)
    return torch.cat([rows, columns], dim=-1).reshape(grid * grid, 4 * len(rates))


def _shift(rates: Tensor, rows: int, columns: int) -> Tensor:
    """The matrix that takes the position of a patch to that of the one at an offset."""
    parts = []
    for offset in (rows, columns):
        cos, sin = torch.diag((offset * rates).cos()), torch.diag((offset * rates).sin())
        parts.append(torch.cat([torch.cat([cos, -sin], dim=1), torch.cat([sin, cos], dim=1)]))
    return torch.block_diag(*parts)


def _offset(layer: int, head: int) -> tuple[int, int]:
    """Rows and columns that a head looks away: a cross, its diagonals, then both again twice as far, and so on."""
    cross, diagonals = [(0, 1), (1, 0), (0, -1), (-1, 0)], [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    near = [*cross, *diagonals] if layer % 2 == 0 else [*diagonals, *cross]
    rows, columns = near[head % len(near)]
    reach = 2 ** (layer // 2)
    return rows * reach, columns * reach


def _cosines(patch: int, width: int) -> Tensor:
    """(width, 3, patch, patch): brightness and two colour differences at the lowest frequencies, the higher the louder.

    Pictures have less of the higher ones, so that all channels come out about as strong.
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
