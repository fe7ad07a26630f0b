"""Weights of OwlViT and OWLv2: find the family, check that files fit, load the whole model and its tokenizer.

Both families have the same encoders and heads under different names; OWLv2 also has an objectness head. No other module
distinguishes the families by transformers' classes.
"""

from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Owlv2Config, Owlv2ForObjectDetection, OwlViTConfig, OwlViTForObjectDetection

from owlsam_ray.errors import WeightsError, shown
from owlsam_ray.models.weights import (
    check_layout,
    check_sizes,
    find_safetensors,
    read_config,
    read_safetensors_shapes,
    refused_as_weights,
)

Family = Literal["owlvit", "owlv2", "fake"]
OwlModel: TypeAlias = OwlViTForObjectDetection | Owlv2ForObjectDetection
OwlConfig: TypeAlias = OwlViTConfig | Owlv2Config

_WEIGHTS = "model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_FAMILIES: dict[Family, tuple[type[OwlConfig], type[OwlModel]]] = {
    "owlvit": (OwlViTConfig, OwlViTForObjectDetection),
    "owlv2": (Owlv2Config, Owlv2ForObjectDetection),
}
_NORM_FLOOR = 1e-6


def family_of(path: Path) -> Family:
    """Which of the two families a directory in Hugging Face layout holds.

    Raises:
        WeightsError: there is no readable `config.json`, or it describes another model.
    """
    return _read_config(path)[0]


def load_config(path: Path) -> OwlConfig:
    """Sizes of both encoders, from `config.json`.

    Raises:
        WeightsError: there is no readable `config.json`, or it describes another model.
    """
    family, fields = _read_config(path)
    with refused_as_weights(path / "config.json", f"does not describe an {family} model"):
        return _FAMILIES[family][0].from_dict(fields)


def check_weights(path: Path, model: Family) -> None:
    """Compare the file's tensors with the model's, by name and shape, without reading them.

    Args:
        path: a directory in Hugging Face layout.
        model: the expected family, `detector.model`.

    Raises:
        WeightsError: files are missing, the directory holds the other family, or tensors do not fit (names the first).
    """
    family = family_of(path)
    if family != model:
        raise WeightsError(
            f"{path} holds an {family} model, and detector.model is {model}: set `detector.model: {family}`"
        )
    name = _FAMILIES[family][1].__name__
    file = find_safetensors(path, name)
    if not any((path / tokenizer).is_file() for tokenizer in _TOKENIZER_FILES):
        raise WeightsError(f"{path} holds no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    found = read_safetensors_shapes(file)
    check_sizes(_read_config(path)[1], path / "config.json", num_tensors=len(found))
    expected = {name: tuple(tensor.shape) for name, tensor in _build_empty(path).state_dict().items()}
    check_layout(
        expected,
        found,
        source=str(file),
        hint=f"Expected: {name} as {path / 'config.json'} describes it.",
        ignored=_optional(family),
    )


def load_model(path: Path) -> OwlModel:
    """Load the whole model, including the text encoder, in float32 on the CPU; call `check_weights` first."""
    model = _build_empty(path)
    optional = _optional(family_of(path))
    with refused_as_weights(path / _WEIGHTS, "cannot be loaded"):
        state = {name: tensor.float() for name, tensor in load_file(path / _WEIGHTS).items() if name not in optional}
        _materialise_buffers(model)
        model.load_state_dict(state, assign=True)
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of the text encoder, from a directory that `check_weights` accepts.

    Raises:
        WeightsError: it is damaged, or has no padding token.
    """
    with refused_as_weights(path, "holds a tokenizer that cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        filling = tokenizer.pad_token_id
    if not isinstance(filling, int):
        raise WeightsError(f"{path} holds a tokenizer without a pad_token: use the one that came with the model")
    return tokenizer


def backbone(model: OwlModel) -> nn.Module:
    """The two encoders and their projections."""
    return model.owlv2 if isinstance(model, Owlv2ForObjectDetection) else model.owlvit


def ready(queries: Tensor) -> Tensor:
    """(…, D) queries as `protocols.Detector.detect` takes them: divided by length + 1e-6, as in the class head."""
    return queries / (torch.linalg.norm(queries, dim=-1, keepdim=True) + _NORM_FLOOR)


def _read_config(path: Path) -> tuple[Family, dict[str, Any]]:
    fields = read_config(path)
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise WeightsError(f"{path / 'config.json'} describes a {shown(kind)} model, not an owlvit or owlv2 one")
    return kind, fields


def _build_empty(path: Path) -> OwlModel:
    """The model without values, on the meta device."""
    family, config = family_of(path), load_config(path)
    with (
        refused_as_weights(path / "config.json", f"describes an {family} model that cannot be built"),
        torch.device("meta"),
    ):
        return _FAMILIES[family][1](config)


def _optional(family: Family) -> tuple[str, ...]:
    """Tensors that old files contain although they follow from the sizes: position ids and box bias."""
    towers = (f"{family}.{tower}_model.embeddings.position_ids" for tower in ("text", "vision"))
    return (*towers, "box_bias")


def _materialise_buffers(model: OwlModel) -> None:
    """Compute the buffers that are not stored: after building on the meta device they have no values."""
    towers: Any = backbone(model)
    grid = model.config.vision_config.image_size // model.config.vision_config.patch_size
    model.box_bias = nn.Buffer(model.compute_box_bias(grid, grid), persistent=False)
    vision = towers.vision_model.embeddings
    vision.register_buffer("position_ids", torch.arange(vision.num_positions)[None], persistent=False)
    text = towers.text_model.embeddings
    positions = model.config.text_config.max_position_embeddings
    text.register_buffer("position_ids", torch.arange(positions)[None], persistent=False)
