"""SAM's prompt encoder and mask decoder on box prompts: the part that MobileSAM and SAM share.

The modules are those of transformers and run in float32. Shapes as in `protocols`; S is the side of the sam frame.

Source: Kirillov et al., Segment Anything (2023); tests compare with transformers' `SamModel` and with outputs of
MobileSAM's official code.
"""

import torch
from torch import Tensor
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

UPSCALING = 4
"""Logit cells per cell of the embedding grid, along each axis: m = 4 h."""


class BoxDecoder:
    """Base of the segmenters: all of `protocols.Segmenter` except `preprocess` and `encode`."""

    def __init__(self, prompt_encoder: SamPromptEncoder, mask_decoder: SamMaskDecoder, *, image_size: int) -> None:
        """Take modules that are in float32, in evaluation mode, and on their device."""
        self._prompt_encoder, self._mask_decoder = prompt_encoder, mask_decoder
        self._image_size = image_size
        with torch.inference_mode():
            self._positions = image_positions(prompt_encoder)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._positions.device

    @property
    def image_size(self) -> int:
        """Long side of the sam frame in pixels."""
        return self._image_size

    @torch.inference_mode()
    def decode(
        self,
        embeddings: Tensor,
        image_index: Tensor,
        boxes_xyxy: Tensor,
        *,
        multimask: bool,
        center_point: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """See `protocols.Segmenter.decode`; m = 4 h. Without boxes the model is not called.

        The centre of a box goes before its corners, as in SAM's own order of points and boxes.
        """
        device = self.device
        if len(boxes_xyxy) == 0:  # the modules cannot reshape an empty batch
            count, side = 3 if multimask else 1, UPSCALING * self._positions.shape[-1]
            return torch.zeros(0, count, side, side, device=device), torch.zeros(0, count, device=device)
        image_index, boxes_xyxy = image_index.to(device), boxes_xyxy.to(device)
        points = labels = None
        if center_point:
            points = ((boxes_xyxy[:, :2] + boxes_xyxy[:, 2:]) / 2)[:, None, None]
            labels = torch.ones(len(boxes_xyxy), 1, 1, dtype=torch.int64, device=device)  # 1: foreground
        sparse, dense = self._prompt_encoder(points, labels, boxes_xyxy[:, None], None)
        masks, quality = self._mask_decoder(
            image_embeddings=embeddings[image_index],
            image_positional_embeddings=self._positions.expand(len(boxes_xyxy), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=multimask,
        )
        return masks[:, 0], quality[:, 0]  # one prompt per "image" of this call


def image_positions(prompt_encoder: SamPromptEncoder) -> Tensor:
    """(1, C, h, w) float32, on the module's device: SAM's random Fourier features of the grid's cell centres."""
    frequencies = prompt_encoder.shared_embedding
    height, width = prompt_encoder.image_embedding_size
    device = frequencies.positional_embedding.device
    rows, columns = torch.meshgrid(
        (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height,
        (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width,
        indexing="ij",
    )
    features: Tensor = frequencies(torch.stack([columns, rows], dim=-1))
    return features.permute(2, 0, 1)[None]
