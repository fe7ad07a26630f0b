"""OwlViT directories without training: B/32 from the shared recipe, and a tiny model with a tokenizer of its own."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection

from tests.seeded_mobile_sam import load_recipe

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "!"
TINY_SIDE, TINY_PATCH, TINY_POSITIONS = 96, 16, 48
_PROCESSOR = {
    "image_processor_type": "OwlViTImageProcessor",
    "do_resize": True,
    "do_center_crop": False,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def write_full(directory: Path, shared: Path) -> None:
    """Write OwlViT B/32: the official sizes and tokenizer, tensors of the shared recipe."""
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    text = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048}
    config = OwlViTConfig(
        text_config=text | {"vocab_size": 49408, "max_position_embeddings": 16},
        vision_config=vision | {"image_size": 768, "patch_size": 32},
        projection_dim=512,
    )
    shapes: Any = json.loads((shared / "golden" / "hf_owlvit_keys.json").read_text())["owlvit-base-patch32"]
    with torch.device("meta"):
        wanted = {name: list(t.shape) for name, t in OwlViTForObjectDetection(config).state_dict().items()}
    published = json.dumps(shapes)
    assert all(name in published for name in wanted), "the installed transformers names tensors otherwise"
    state = load_recipe(shared).seeded_state_dict(wanted)
    _write(directory, config, {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}, side=768)
    full_tokenizer(shared).save_pretrained(directory)


def write_tiny(directory: Path, seed: int = 0, *, side: int = TINY_SIDE) -> None:
    """Write a tiny OwlViT whose scores and boxes depend on the picture; needs no shared data."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = tiny_tokenizer()
    config = OwlViTConfig(
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
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in OwlViTForObjectDetection(config).state_dict().items()}
    state = {name: torch.from_numpy(_tiny_tensor(name, shape, seed)) for name, shape in shapes.items()}
    _write(directory, config, state, side=side)
    tokenizer.save_pretrained(directory)


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


def _write(directory: Path, config: OwlViTConfig, state: dict[str, torch.Tensor], *, side: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, directory / "model.safetensors")
    config.architectures = ["OwlViTForObjectDetection"]
    config.save_pretrained(directory)
    processor = _PROCESSOR | {"size": {"height": side, "width": side}}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=1), encoding="utf-8")
