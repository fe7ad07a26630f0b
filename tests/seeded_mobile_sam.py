"""MobileSAM weights without training: the official layout from the shared recipe, and a tiny model."""

import importlib.util
import json
import zlib
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from owlsam_ray.models.mobile_sam import save_mobile_sam
from owlsam_ray.models.mobile_sam_layout import MobileSamConfig, official_shapes

TINY = MobileSamConfig(
    image_size=128,
    embed_dims=(8, 16, 24, 32),
    depths=(1, 1, 1, 1),
    num_heads=(1, 2, 2, 2),
    window_sizes=(7, 7, 7, 7),
    prompt_dim=64,
    decoder_layers=1,
    decoder_heads=2,
    decoder_mlp_dim=64,
    iou_head_dim=64,
)


def load_recipe(shared: Path) -> ModuleType:
    """The module that makes the tensors which the goldens were computed with."""
    spec = importlib.util.spec_from_file_location("seeded_weights", shared / "golden" / "seeded_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_full(path: Path, shared: Path) -> None:
    """Write a `.pt` file in the official layout."""
    shapes = json.loads((shared / "golden" / "mobile_sam_keys.json").read_text())
    state = load_recipe(shared).seeded_state_dict(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: torch.from_numpy(value.copy()) for name, value in state.items()}, path)


def write_tiny(directory: Path, seed: int = 0) -> None:
    """Write a directory with a tiny model whose masks differ from box to box."""
    state = {name: _tensor(name, shape, seed) for name, shape in official_shapes(TINY).items()}
    save_mobile_sam(state, TINY, directory)


def _tensor(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    random = np.random.default_rng([zlib.crc32(name.encode()), seed])
    values = random.standard_normal(shape)
    if name.endswith("running_var"):
        values = np.ones(shape)
    elif len(shape) <= 1:
        values = 0.05 * values + (1.0 if name.endswith("weight") else 0.0)  # a 1-d weight is a norm's gain
    elif "gaussian" not in name:
        values = values / np.sqrt(np.prod(shape[1:]))
    if "output_hypernetworks_mlps" in name and ".layers.2." in name:
        values = 12 * values  # logits of several units, or the stability at ±1 would always be 0
    return torch.from_numpy(np.asarray(values, np.float32))
