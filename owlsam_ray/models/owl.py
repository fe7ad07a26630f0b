"""OwlViT and OWLv2 through transformers: image encoder and heads, without the text encoder.

Tests compare with the whole model of the installed transformers and its `post_process_grounded_object_detection`.
Shapes as in `protocols`; S is the detector's square input, D the channels of a query.

Source: Minderer et al., Simple Open-Vocabulary Object Detection with Vision Transformers (2022) and Scaling
Open-Vocabulary Object Detection (2023); google/owlvit-*, google/owlv2-*.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Owlv2ForObjectDetection

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.models.owl_preprocess import Preprocessing, make_preprocessing
from owlsam_ray.models.owl_weights import OwlModel, backbone, check_weights, load_model, ready


class Owl:
    """Either family as a `protocols.Detector`."""

    def __init__(
        self,
        model: OwlModel,
        preprocessing: Preprocessing,
        *,
        objectness: bool,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Take a loaded model; see `load`."""
        self._device, self._dtype = device, dtype
        self._preprocessing = preprocessing
        self._multiply_objectness = objectness
        towers: Any = backbone(model)
        towers.text_model = None
        towers.text_projection = None
        _fit_image_size(model, preprocessing.side)
        self._model = model.eval().requires_grad_(False).to(device)
        # Heads and box decoding stay in float32: they cost little, and boxes need the precision.
        self._vision: Any = towers.vision_model.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @staticmethod
    def load(path: Path, settings: DetectorConfig, *, device: torch.device, dtype: torch.dtype) -> "Owl":
        """Load image encoder and heads; the text encoder is not kept.

        Args:
            path: a directory in Hugging Face layout.
            settings: `model`, `preprocess`, `pad_value`, `image_size` and `objectness` are read.
            device: where to run.
            dtype: dtype of the image encoder.

        Raises:
            WeightsError: something is missing, or does not fit.
            ConfigError: `image_size` is not a multiple of the patch size.
        """
        check_weights(path, settings.model)
        return Owl(
            load_model(path),
            make_preprocessing(path, settings),
            objectness=settings.objectness == "multiply",
            device=device,
            dtype=dtype,
        )

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32, as `detector.preprocess` says."""
        return self._preprocessing(pixels)

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(N, 4) boxes from `detect` to xyxy float32 in original pixels, not clipped."""
        return self._preprocessing.unscale(boxes_cxcywh, size_hw)

    @torch.inference_mode()
    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Run image encoder and heads; see `protocols.Detector`."""
        patches = self._patches(batch)
        logits = class_logits(self._model.class_head, patches, query_embeddings.to(self._device))
        scores = logits.sigmoid()
        objectness = self._objectness(patches) if self._multiply_objectness else None
        if objectness is not None:
            scores = scores * objectness.sigmoid()[..., None]
        return self._boxes(patches).cpu(), scores.cpu()

    @torch.inference_mode()
    def class_embeddings(self, batch: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Class embeddings of the patches of images, so that one of them can become a query.

        Args:
            batch: (B, 3, S, S) from `preprocess`, on any device.

        Returns:
            embeddings: (B, P, D) float32 on the CPU, of any length.
            boxes_cxcywh: (B, P, 4) float32 on the CPU, as from `detect`.
            objectness: (B, P) float32 logits on the CPU; None for OwlViT.
        """
        patches = self._patches(batch)
        embeddings: Tensor = self._model.class_head.dense0(patches)
        objectness = self._objectness(patches)
        return embeddings.cpu(), self._boxes(patches).cpu(), None if objectness is None else objectness.cpu()

    def _patches(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) to (B, P, hidden) float32, the input of the heads."""
        hidden = self._vision(pixel_values=batch.to(self._device, self._dtype)).last_hidden_state
        embeddings = self._vision.post_layernorm(hidden)
        # The class token scales every patch token.
        patches: Tensor = self._model.layer_norm((embeddings[:, 1:] * embeddings[:, :1]).float())
        return patches

    def _boxes(self, patches: Tensor) -> Tensor:
        boxes: Tensor = self._model.box_predictor(patches, patches)
        return boxes.float()

    def _objectness(self, patches: Tensor) -> Tensor | None:
        if not isinstance(self._model, Owlv2ForObjectDetection):
            return None
        objectness: Tensor = self._model.objectness_predictor(patches)
        return objectness


def class_logits(head: nn.Module, patches: Tensor, queries: Tensor) -> Tensor:
    """Class head of transformers for queries that are already normalised, so that it does not normalise them again.

    Shift and scale of a logit depend on the patch alone. The logit of the mean of several normalised queries is
    therefore the mean of their logits.

    Args:
        head: `class_head` of either family.
        patches: (B, P, hidden).
        queries: (Q, D), as returned by `owl_weights.ready`, or shorter.

    Returns:
        (B, P, Q).
    """
    layers: Any = head
    embeddings = ready(layers.dense0(patches))
    # One product per image: a row's bits must not depend on the rest of its batch.
    cosines = torch.bmm(embeddings, queries.T.expand(len(patches), -1, -1))
    logits: Tensor = (cosines + layers.logit_shift(patches)) * (layers.elu(layers.logit_scale(patches)) + 1)
    return logits


@torch.no_grad()
def _fit_image_size(model: OwlModel, side: int) -> None:
    """Make the image encoder accept squares of `side` pixels, by interpolating its position embeddings.

    Source: transformers' `interpolate_pos_encoding`, once instead of in every call: bicubic, without the class token.
    """
    vision_config = model.config.vision_config
    own, grid = (size // vision_config.patch_size for size in (vision_config.image_size, side))
    if grid == own:
        return
    towers: Any = backbone(model)
    embeddings = towers.vision_model.embeddings
    weight = embeddings.position_embedding.weight
    square = weight[1:].reshape(1, own, own, -1).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    table = torch.cat([weight[:1], resized.permute(0, 2, 3, 1).reshape(grid * grid, -1)])
    embeddings.position_embedding = nn.Embedding.from_pretrained(table)
    embeddings.num_patches, embeddings.num_positions = grid * grid, len(table)
    embeddings.register_buffer("position_ids", torch.arange(len(table))[None], persistent=False)
    model.num_patches_height = model.num_patches_width = grid
    model.box_bias = nn.Buffer(model.compute_box_bias(grid, grid), persistent=False)
