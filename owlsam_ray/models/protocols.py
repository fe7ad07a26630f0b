"""Interfaces of the detector and the segmenter that inference uses.

Shapes: B images of one call, P boxes that a detector proposes per image, Q queries, M box prompts of one decoder call,
C embedding channels, h w the embedding grid, K masks per box, m low-resolution mask side.
Every call has a fixed shape: the caller pads (law 7), so that a row's result does not depend on the rest of its batch.
"""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Detector(Protocol):
    """Finds boxes in images for embedded queries."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to one model input (3, S, S), on the CPU. Called from many threads at once."""

    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Run the image encoder and the heads.

        Args:
            batch: (B, 3, S, S) from `preprocess`, on any device.
            query_embeddings: (Q, D) float32, ready to be multiplied with the embedding of a box: already of length 1,
                or shorter where logits are averaged (`queries`). They are not normalised again.

        Returns:
            boxes_cxcywh: (B, P, 4) float32 on the CPU, in units of the detector's square input, so around 0…1.
            scores: (B, P, Q) float32 on the CPU, in [0, 1].
        """

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(N, 4) boxes from `detect` to (N, 4) xyxy float32 in original pixels, not clipped."""


class Segmenter(Protocol):
    """Computes low-resolution mask logits for boxes in images."""

    @property
    def device(self) -> torch.device:
        """Where the model runs."""

    @property
    def image_size(self) -> int:
        """Long side of the sam frame in pixels."""

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to one model input (3, S, S), on the CPU. Called from many threads at once."""

    def encode(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) from `preprocess` to image embeddings (B, C, h, w), on the model's device."""

    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Decode the masks of boxes, for many images at once.

        Args:
            embeddings: (B, C, h, w) from `encode`.
            image_index: (M,) int64, the row of `embeddings` that each box belongs to.
            boxes_xyxy: (M, 4) float32 in the sam frame.
            multimask: return SAM's three masks (K = 3) instead of its single one (K = 1).
            center_point: also prompt with the centre of each box as a foreground point.

        Returns:
            logits: (M, K, m, m) float32 on the model's device; predicted_iou: (M, K) float32, in SAM's own order.
        """
