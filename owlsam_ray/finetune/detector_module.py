"""OwlViT and OWLv2 as one trainable module: pictures and prompts in, logits and boxes out.

Letters: B images, Q prompts, L tokens of a prompt, P patches, S side of the detector's square input.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    OwlViTForObjectDetection,
)

from owlsam_ray.errors import WeightsError
from owlsam_ray.finetune.scratch import OwlVitArchitecture, build_owlvit
from owlsam_ray.models.owl_text import tokenize
from owlsam_ray.models.owlvit import Preprocessing, check_weights, load_model, load_processor

_UNUSED = ("logit_scale", "visual_projection.weight")
"""Of the contrastive pretraining; detection never reads them."""


class DetectorModule(nn.Module):
    """Image tower, text tower and heads; OWLv2's objectness head where there is one."""

    def __init__(self, model: OwlViTForObjectDetection | Owlv2ForObjectDetection) -> None:
        super().__init__()
        self.model = model
        for name in _UNUSED:
            self.backbone.get_parameter(name).requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """The two towers and their projections."""
        backbone: nn.Module = self.model.owlv2 if hasattr(self.model, "owlv2") else self.model.owlvit
        return backbone

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run everything.

        Args:
            pixels: (B, 3, S, S) float32.
            input_ids: (Q, L) int64.
            attention_mask: (Q, L) int64.

        Returns:
            `logits` (B, P, Q), `boxes` (B, P, 4) cxcywh in units of S, both float32; of OWLv2 also `objectness`
            (B, P).
        """
        return self.propose(pixels, self.embed(input_ids, attention_mask))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(Q, L) tokens to (Q, D) float32 queries of length 1."""
        backbone: Any = self.backbone
        pooled = backbone.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(backbone.text_projection(pooled).float(), dim=-1)

    def propose(self, pixels: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Image tower and heads; the same steps as `models.owlvit.OwlVit.detect`."""
        backbone: Any = self.backbone
        model: Any = self.model
        hidden = backbone.vision_model(pixel_values=pixels).last_hidden_state
        embeddings = backbone.vision_model.post_layernorm(hidden)
        patches = model.layer_norm(embeddings[:, 1:] * embeddings[:, :1]).float()  # (B, P, hidden)
        # Heads in float32, as at inference: they cost little, and boxes need the bits.
        with torch.autocast(pixels.device.type, enabled=False):
            side = round(patches.shape[1] ** 0.5)
            boxes = model.box_predictor(patches, patches.unflatten(1, (side, side)))
            logits, _ = model.class_predictor(patches, queries.float().expand(len(pixels), -1, -1))
            outputs = {"logits": logits, "boxes": boxes}
            if hasattr(model, "objectness_predictor"):
                outputs["objectness"] = model.objectness_predictor(patches)
        return outputs


@dataclass(frozen=True, slots=True)
class DetectorParts:
    """A module and what turns pictures and names into its inputs."""

    module: DetectorModule
    tokenizer: Any
    processor: Any

    @property
    def is_owlv2(self) -> bool:
        """Whether pictures are padded to the square instead of squashed."""
        return isinstance(self.module.model, Owlv2ForObjectDetection)

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32, as inference does it."""
        if self.is_owlv2:
            values: Tensor = self.processor(images=[pixels], return_tensors="pt")["pixel_values"][0]
            return values
        return Preprocessing(self.processor)(pixels)

    def frame_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in original pixels that the whole square stands for."""
        return (max(size_hw), max(size_hw)) if self.is_owlv2 else size_hw

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Prompts to ids and mask, (Q, L) int64 each.

        Raises:
            InputError: a prompt is longer than the text tower takes; it is never cut.
        """
        limit = self.module.model.config.text_config.max_position_embeddings
        return tokenize(self.tokenizer, prompts, limit, way_out="shorten the category's name or detector.template")


def load_parts(weights: Path) -> DetectorParts:
    """A detector to go on with.

    Args:
        weights: a directory in Hugging Face layout with safetensors.

    Raises:
        WeightsError: something is missing or does not fit.
    """
    if _model_type(weights) == "owlv2":
        return _load_owlv2(weights)
    check_weights(weights)
    module = DetectorModule(load_model(weights))
    return DetectorParts(module, AutoTokenizer.from_pretrained(weights, local_files_only=True), load_processor(weights))


def scratch_parts(architecture: OwlVitArchitecture, prompts: Iterable[str], *, seed: int) -> DetectorParts:
    """A detector with random weights whose tokenizer knows the words of the prompts."""
    words = [word for prompt in prompts for word in prompt.lower().split()]
    model, tokenizer, processor = build_owlvit(architecture, words, seed=seed)
    return DetectorParts(DetectorModule(model), tokenizer, processor)


def _model_type(weights: Path) -> str:
    try:
        return str(json.loads((weights / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(f"{weights} is no model directory: cannot read config.json ({error})") from None


def _load_owlv2(weights: Path) -> DetectorParts:
    try:
        model, info = Owlv2ForObjectDetection.from_pretrained(
            weights,
            config=Owlv2Config.from_pretrained(weights, local_files_only=True),
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        processor = Owlv2ImageProcessor.from_pretrained(weights, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(weights, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(f"{weights} does not load as an OWLv2: {str(error).strip().splitlines()[0]}") from None
    missing = [name for name in info["missing_keys"] if not name.endswith(("position_ids", "box_bias"))]
    if missing or info["mismatched_keys"]:
        raise WeightsError(f"{weights} does not fit an OWLv2: missing or misshapen {sorted(missing)[:5]}")
    return DetectorParts(DetectorModule(model), tokenizer, processor)
