"""SAM weights without training in Hugging Face layout: ViT-B from the shared recipe, and a tiny model."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from tests.seeded_mobile_sam import load_recipe

TINY_SIDE = 128
# Scales that make logits of several units: with the plain ones every stability of ViT-B's masks is below 0.13.
_TINY_LOGITS = 12.0
_FULL_LOGITS = 8.0


def write_full(directory: Path, shared: Path) -> None:
    """Write a SAM ViT-B."""
    config = SamConfig()
    recipe = load_recipe(shared)
    state = {}
    for name, shape in _shapes(config).items():
        scale = _FULL_LOGITS if _makes_logits(name) else 1.0
        state[name] = scale * torch.from_numpy(recipe.seeded_tensor(name, shape))
    _write(directory, config, state)


def write_tiny(directory: Path, seed: int = 0) -> None:
    """Write a tiny SAM whose masks differ from box to box."""
    config = tiny_config()
    state = {name: _tiny_tensor(name, shape, seed) for name, shape in _shapes(config).items()}
    _write(directory, config, state)


def tiny_config(side: int = TINY_SIDE) -> SamConfig:
    """One layer with windows that do not divide the grid, one without windows."""
    return SamConfig(
        vision_config=SamVisionConfig(
            image_size=side,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            window_size=5,
            global_attn_indexes=[1],
            output_channels=64,
            num_pos_feats=32,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(hidden_size=64, image_size=side),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=64, num_hidden_layers=1, num_attention_heads=2, mlp_dim=64, iou_head_hidden_dim=64
        ),
    )


def processor(side: int) -> SamProcessor:
    """transformers' own, for a square of this side."""
    sizes: dict[str, Any] = {"size": {"longest_edge": side}, "pad_size": {"height": side, "width": side}}
    return SamProcessor(SamImageProcessor(**sizes))


def _shapes(config: SamConfig) -> dict[str, tuple[int, ...]]:
    """Of the tensors that `save_pretrained` writes: the frequencies, which have two names, once."""
    with torch.device("meta"):
        state = SamModel(config).state_dict()
    state.pop("prompt_encoder.shared_embedding.positional_embedding")
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _write(directory: Path, config: SamConfig, state: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["SamModel"]
    config.save_pretrained(directory)
    processor(config.vision_config.image_size).image_processor.save_pretrained(directory)


def _makes_logits(name: str) -> bool:
    """Whether the logits of a mask are proportional to this tensor and its mates."""
    return "output_hypernetworks_mlps" in name and ".proj_out." in name


def _tiny_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    random = np.random.default_rng([zlib.crc32(name.encode()), seed])
    values = random.standard_normal(shape)
    if len(shape) <= 1:
        values = 0.05 * values + (1.0 if name.endswith("weight") else 0.0)  # a 1-d weight is a norm's gain
    elif "positional_embedding" not in name:
        values = values / np.sqrt(np.prod(shape[1:]))
    if _makes_logits(name):
        values = _TINY_LOGITS * values
    return torch.from_numpy(np.asarray(values, np.float32))
