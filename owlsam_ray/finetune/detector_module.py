"""Wrap OwlViT and OWLv2 as one trainable module: images and prompts in, logits and boxes out.

Shapes: B images, Q prompts, L tokens of a prompt, P patches, S side of the detector's square input.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from owlsam_ray.finetune.scratch import OwlVitArchitecture, build_owlvit
from owlsam_ray.models import owl_weights
from owlsam_ray.models.owl_preprocess import Preprocessing, Processor, hf_preprocessing, load_processor
from owlsam_ray.models.owl_text import tokenize
from owlsam_ray.models.owl_weights import OwlModel

_UNUSED = ("logit_scale", "visual_projection.weight")
"""Parameters of the contrastive pretraining, which detection never reads."""


class DetectorModule(nn.Module):
    """Image tower, text tower and heads, with OWLv2's objectness head if there is one."""

    def __init__(self, model: OwlModel) -> None:
        super().__init__()
        self.model = model
        for name in _UNUSED:
            self.backbone.get_parameter(name).requires_grad_(False)

    @property
    def backbone(self) -> nn.Module:
        """The two towers and their projections."""
        return owl_weights.backbone(self.model)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Run the whole model.

        Args:
            pixels: (B, 3, S, S) float32.
            input_ids: (Q, L) int64.
            attention_mask: (Q, L) int64.

        Returns:
            `logits` (B, P, Q), `boxes` (B, P, 4) cxcywh in units of S, both float32; for OWLv2 also `objectness` (B,
            P).
        """
        return self.propose(pixels, self.embed(input_ids, attention_mask))

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed (Q, L) tokens as (Q, D) float32 queries of length 1."""
        backbone: Any = self.backbone
        pooled = backbone.text_model(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return nn.functional.normalize(backbone.text_projection(pooled).float(), dim=-1)

    def propose(self, pixels: Tensor, queries: Tensor) -> dict[str, Tensor]:
        """Run image tower and heads; the same steps as `models.owl.Owl.detect`."""
        backbone: Any = self.backbone
        model: Any = self.model
        hidden = backbone.vision_model(pixel_values=pixels).last_hidden_state
        embeddings = backbone.vision_model.post_layernorm(hidden)
        patches = model.layer_norm(embeddings[:, 1:] * embeddings[:, :1]).float()  # (B, P, hidden)
        # Heads in float32, as at inference: they cost little, and boxes need the precision.
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
    """A module and what converts images and names to its inputs."""

    module: DetectorModule
    tokenizer: Any
    processor: Processor
    preprocessing: Preprocessing

    @staticmethod
    def of(model: OwlModel, tokenizer: Any, processor: Processor) -> "DetectorParts":
        """Combine a model with the image preprocessing that the installed transformers uses for it."""
        preprocessing = hf_preprocessing(processor, model.config.vision_config.image_size)
        return DetectorParts(DetectorModule(model), tokenizer, processor, preprocessing)

    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Convert prompts to ids and mask, (Q, L) int64 each.

        Raises:
            InputError: a prompt is longer than the text tower accepts; it is never truncated.
        """
        limit = self.module.model.config.text_config.max_position_embeddings
        return tokenize(self.tokenizer, prompts, limit, way_out="shorten the category's name or detector.template")


def load_parts(weights: Path) -> DetectorParts:
    """Load a detector to continue from.

    Args:
        weights: a directory in Hugging Face layout with safetensors.

    Raises:
        WeightsError: a part is missing or does not fit.
    """
    owl_weights.check_weights(weights, owl_weights.family_of(weights))
    model, tokenizer = owl_weights.load_model(weights), owl_weights.load_tokenizer(weights)
    return DetectorParts.of(model, tokenizer, load_processor(weights))


def scratch_parts(architecture: OwlVitArchitecture, prompts: Iterable[str], *, seed: int) -> DetectorParts:
    """Build a detector with random weights and a tokenizer that knows the words of the prompts."""
    words = [word for prompt in prompts for word in prompt.lower().split()]
    return DetectorParts.of(*build_owlvit(architecture, words, seed=seed))
