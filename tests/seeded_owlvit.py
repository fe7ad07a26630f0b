"""OwlViT and OWLv2 directories without training: the published sizes from the shared recipe, and tiny ones."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer, Owlv2Config, Owlv2ForObjectDetection, OwlViTConfig, OwlViTForObjectDetection

from owlsam_ray.models.owl_weights import Family, OwlConfig, OwlModel
from tests.seeded_mobile_sam import load_recipe

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
TINY_SIDE, TINY_PATCH, TINY_POSITIONS = 96, 16, 48
_CONFIGS: dict[Family, type[OwlConfig]] = {"owlvit": OwlViTConfig, "owlv2": Owlv2Config}
_MODELS: dict[Family, type[OwlModel]] = {"owlvit": OwlViTForObjectDetection, "owlv2": Owlv2ForObjectDetection}
_OWLV2_SIDES = {"owlv2-base-patch16": 960, "owlv2-large-patch14": 1008}
_CLIP_COLOURS: dict[str, Any] = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_PROCESSORS: dict[Family, dict[str, Any]] = {
    "owlvit": {"image_processor_type": "OwlViTImageProcessor", "do_center_crop": False, "resample": 3},
    "owlv2": {"image_processor_type": "Owlv2ImageProcessor", "do_pad": True, "resample": 2},
}


def write_full(directory: Path, shared: Path, name: str = "owlvit-base-patch32", *, box_spread: float = 1.0) -> None:
    """Write a published model's sizes and tokenizer with tensors of the shared recipe.

    Args:
        directory: where to.
        shared: the reference data.
        name: a key of `golden/hf_owlvit_keys.json`; OWLv2 has the towers of OwlViT at larger pictures.
        box_spread: factor on the last layer of the box head; with the recipe's own, boxes hardly depend on the picture.
    """
    layouts: Any = json.loads((shared / "golden" / "hf_owlvit_keys.json").read_text())
    family: Family = "owlv2" if name.startswith("owlv2") else "owlvit"
    sizes = layouts[name.replace("owlv2", "owlvit")]["config"]
    side = _OWLV2_SIDES.get(name, sizes["vision"]["image_size"])
    config = _CONFIGS[family](
        text_config=sizes["text"],
        vision_config=sizes["vision"] | {"image_size": side},
        projection_dim=sizes["projection_dim"],
    )
    shapes = _shapes(family, config)
    published = {tensor: tuple(shape) for tensor, shape in layouts[name]["tensors"].items()}
    assert shapes == published, "the installed transformers names or shapes tensors otherwise"
    recipe = load_recipe(shared)
    state = {
        tensor: torch.from_numpy(np.asarray(recipe.seeded_tensor(tensor, shape))) for tensor, shape in shapes.items()
    }
    state["box_head.dense2.weight"] *= box_spread
    _write(directory, config, state, family=family, side=side)
    full_tokenizer(shared).save_pretrained(directory)


def write_tiny(directory: Path, seed: int = 0, *, side: int = TINY_SIDE, family: Family = "owlvit") -> None:
    """Write a tiny model whose scores and boxes depend on the picture; needs no shared data."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = tiny_tokenizer()
    config = _CONFIGS[family](
        text_config=sizes
        | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": TINY_POSITIONS,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        vision_config=sizes | {"image_size": side, "patch_size": TINY_PATCH},
        projection_dim=32,
    )
    shapes = _shapes(family, config)
    state = {name: torch.from_numpy(_tiny_tensor(name, shape, seed)) for name, shape in shapes.items()}
    _write(directory, config, state, family=family, side=side)
    tokenizer.save_pretrained(directory)


def _shapes(family: Family, config: OwlConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in _MODELS[family](config).state_dict().items()}


def full_tokenizer(shared: Path) -> CLIPTokenizer:
    """CLIP's tokenizer from its published merges."""
    with gzip.open(shared / "data" / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz", "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")
    return _tokenizer([tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]], positions=16)


def tiny_tokenizer() -> CLIPTokenizer:
    """Bytes only: every letter is a token."""
    return _tokenizer([], positions=TINY_POSITIONS)


def _tokenizer(merges: list[tuple[str, ...]], *, positions: int) -> CLIPTokenizer:
    # CLIP's byte alphabet: printable bytes stand for themselves, the others for characters from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)},
        merges=merges,
        pad_token=PAD,
        model_max_length=positions,
    )


def _tiny_tensor(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    random = np.random.default_rng([zlib.crc32(name.encode()), seed])
    values = random.standard_normal(shape)
    if name == "class_head.logit_scale.bias":
        values = np.full(shape, 3.0)
    elif name == "class_head.logit_shift.bias":
        values = np.full(shape, -0.4)
    elif name.startswith("class_head.logit"):
        values = 0.1 * values
    elif len(shape) <= 1:
        values = 0.1 * values + (1.0 if name.endswith("weight") else 0.0)
    elif "embedding" not in name or "patch_embedding" in name:
        values = (1.3 if name.startswith("box_head") else 1.0) * values / np.sqrt(np.prod(shape[1:]))
    return np.asarray(values, np.float32)


def _write(directory: Path, config: OwlConfig, state: dict[str, torch.Tensor], *, family: Family, side: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    config.architectures = [_MODELS[family].__name__]
    config.save_pretrained(directory)
    processor = _PROCESSORS[family] | _CLIP_COLOURS | {"size": {"height": side, "width": side}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
