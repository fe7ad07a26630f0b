"""Wrap MobileSAM as a trainable module: all four masks of each box in one pass, random initial weights.

Shapes: B images, M boxes, S side of the sam frame, m = S / 4.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from owlsam_ray.models.mobile_sam_layout import MobileSamConfig, MobileSamModules
from owlsam_ray.models.sam_decoder import image_positions

_HEAD_SCALE = 0.1
_START_IOU = 0.5
_POSITION_STD = 1.0
"""Standard deviation of SAM's random frequencies; transformers draws them hundreds of times larger, which turns
positions into noise."""


class SegmenterModule(nn.Module):
    """MobileSAM's parts under the names of `MobileSamModules`, with what training needs around them."""

    def __init__(
        self, parts: MobileSamModules, *, image_size: int, freeze_encoder: bool, freeze_prompt_encoder: bool
    ) -> None:
        """Take over the parts.

        Args:
            parts: parts with random or loaded weights.
            image_size: S.
            freeze_encoder: keep the image encoder and its neck fixed, batch statistics included.
            freeze_prompt_encoder: keep the embeddings of box corners, and of the missing mask prompt, fixed.
        """
        super().__init__()
        self.parts = parts
        self.image_size = image_size
        self.freeze_encoder = freeze_encoder
        for layer in parts.encoder.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0  # as in MobileSAM's own training
        for frozen in (parts.encoder, parts.neck) if freeze_encoder else ():
            frozen.requires_grad_(False)
        prompts = parts.prompt_encoder
        # A box prompt uses neither points nor masks; SAM's frequencies are constants.
        unused = (prompts.shared_embedding, prompts.mask_embed, prompts.not_a_point_embed, *prompts.point_embed[:2])
        for frozen in (prompts,) if freeze_prompt_encoder else unused:
            frozen.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder stays in evaluation mode, or its batch statistics would change."""
        super().train(mode)
        if self.freeze_encoder:
            self.parts.encoder.eval()
        return self

    def forward(self, pixels: Tensor, image_index: Tensor, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Decode all four masks per box.

        Args:
            pixels: (B, 3, S, S) float32 as `image_to_sam_frame` returns it.
            image_index: (M,) int64, the image that a box belongs to.
            boxes_xyxy: (M, 4) float32 in the sam frame; M may be 0.

        Returns:
            logits: (M, 4, m, m) float32, the single mask first, then SAM's three; predicted_iou: (M, 4) float32.
        """
        return self.decode(self.encode(pixels), image_index, boxes_xyxy)

    def encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, S, S) as image embeddings (B, C, h, w) float32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_encoder):
            embeddings: Tensor = self.parts.neck(self.parts.encoder.forward_features(pixels))
        return embeddings.float()

    def decode(self, embeddings: Tensor, image_index: Tensor, boxes_xyxy: Tensor) -> tuple[Tensor, Tensor]:
        """Decode as `forward` does, from embeddings (B, C, h, w). In float32 under autocast too, as in `MobileSam`."""
        count = len(boxes_xyxy)
        if count == 0:  # decode a padding box: DDP needs a gradient (of zero) for every parameter
            image_index, boxes_xyxy = image_index.new_zeros(1), boxes_xyxy.new_zeros(1, 4)
        with torch.autocast(embeddings.device.type, enabled=False):
            sparse, dense = self.parts.prompt_encoder(None, None, boxes_xyxy[:, None].float(), None)
            logits, predicted_iou = _all_masks(
                self.parts.mask_decoder,
                image_embeddings=embeddings[image_index],
                image_positional_embeddings=image_positions(self.parts.prompt_encoder).expand(
                    len(boxes_xyxy), -1, -1, -1
                ),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
            )
        return logits[:count], predicted_iou[:count]


def _all_masks(decoder: nn.Module, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the single mask and the three, from one call of a decoder that returns only one of the two kinds.

    The three are what it returns. The single one is the product of the first hypernetwork's output and the upscaled
    features, which the decoder computes in any case; hooks capture them.
    """
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = output  # of the last call

        return hook

    watched: dict[str, Any] = {
        "features": decoder.activation,
        "weights": decoder.output_hypernetworks_mlps[0],  # type: ignore[index]
        "predicted_iou": decoder.iou_prediction_head,
    }
    # Hooks are removed afterwards: a copy of the module, such as an average, would write into the original's table.
    handles = [module.register_forward_hook(keep(name)) for name, module in watched.items()]
    try:
        three, _ = decoder(**inputs, multimask_output=True)
    finally:
        for handle in handles:
            handle.remove()
    single = torch.einsum("mkc,mcyx->mkyx", seen["weights"], seen["features"])
    return torch.cat([single, three[:, 0]], dim=1), seen["predicted_iou"][:, 0]


def random_parts(config: MobileSamConfig, *, seed: int) -> MobileSamModules:
    """Build parts with random weights that train: undecided masks, predicted IoU near a half.

    Equal seeds give equal weights; the global random state is unchanged.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        parts = MobileSamModules(config)
        nn.init.normal_(parts.prompt_encoder.shared_embedding.positional_embedding, std=_POSITION_STD)
        head = parts.mask_decoder.iou_prediction_head.proj_out
        head.weight *= _HEAD_SCALE
        nn.init.constant_(head.bias, _START_IOU)
    return parts
