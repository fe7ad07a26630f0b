"""Layout of MobileSAM: sizes, modules, and the tensor names of the official `mobile_sam.pt`.

The encoder is timm's TinyViT without the last downsampling, plus SAM's neck; prompt encoder and mask decoder are those
of transformers' SAM. Names are translated in both directions.
"""

import re
from typing import Annotated, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from timm.models.tiny_vit import TinyVit
from torch import nn
from transformers import SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig
from transformers.models.sam.modeling_sam import SamLayerNorm, SamMaskDecoder, SamPromptEncoder

Positive = Annotated[int, Field(ge=1)]
FourSizes = tuple[Positive, Positive, Positive, Positive]
Window = Annotated[int, Field(ge=1, le=64)]
"""Side of an attention window; limited because the time to build one grows with its fourth power."""


class MobileSamConfig(BaseModel):
    """Sizes of a MobileSAM; the defaults are the official ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_type: Literal["mobile_sam"] = "mobile_sam"
    image_size: Positive = 1024
    """Side of the sam frame in pixels, a multiple of 16."""
    embed_dims: FourSizes = (64, 128, 160, 320)
    depths: FourSizes = (2, 2, 6, 2)
    num_heads: FourSizes = (2, 4, 5, 10)
    window_sizes: tuple[Window, Window, Window, Window] = (7, 7, 14, 7)
    prompt_dim: Positive = 256
    """Channels of image embedding and prompts."""
    decoder_layers: Positive = 2
    decoder_heads: Positive = 8
    decoder_mlp_dim: Positive = 2048
    iou_head_dim: Positive = 256

    @model_validator(mode="after")
    def _sizes_divide(self) -> Self:
        if self.image_size % 16:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 16")
        if any(dim % heads for dim, heads in zip(self.embed_dims, self.num_heads, strict=True)):
            raise ValueError(f"embed_dims {self.embed_dims} are not multiples of num_heads {self.num_heads}")
        # The decoder's cross attention works on half the channels, its upscaling on an eighth.
        if self.prompt_dim % 8 or self.prompt_dim % (2 * self.decoder_heads):
            raise ValueError(f"prompt_dim {self.prompt_dim} is not a multiple of 8 and of {2 * self.decoder_heads}")
        return self


class MobileSamModules(nn.Module):
    """The modules, named as `module_name` returns, with random weights."""

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.encoder = TinyVit(
            num_classes=0,
            embed_dims=config.embed_dims,
            depths=config.depths,
            num_heads=config.num_heads,
            window_sizes=config.window_sizes,
        )
        self.encoder.head = nn.Identity()
        # SAM needs a stride of 16: the last stage keeps its resolution.
        self.encoder.stages[3].downsample.conv2.conv.stride = (1, 1)
        dim = config.prompt_dim
        self.neck = nn.Sequential(
            nn.Conv2d(config.embed_dims[3], dim, 1, bias=False),
            SamLayerNorm(dim, data_format="channels_first"),
            nn.Conv2d(dim, dim, 3, padding=1, bias=False),
            SamLayerNorm(dim, data_format="channels_first"),
        )
        sam = SamConfig(
            vision_config=SamVisionConfig(
                image_size=config.image_size, num_pos_feats=dim // 2, output_channels=dim, patch_size=16
            ),
            prompt_encoder_config=SamPromptEncoderConfig(hidden_size=dim, image_size=config.image_size, patch_size=16),
            mask_decoder_config=SamMaskDecoderConfig(
                hidden_size=dim,
                num_hidden_layers=config.decoder_layers,
                num_attention_heads=config.decoder_heads,
                mlp_dim=config.decoder_mlp_dim,
                iou_head_hidden_dim=config.iou_head_dim,
            ),
        )
        sam.mask_decoder_config._attn_implementation = "sdpa"
        self.prompt_encoder = SamPromptEncoder(sam)
        self.mask_decoder = SamMaskDecoder(sam.mask_decoder_config)


# Heads of the encoder's own classification training: in every official file, never used.
UNUSED = (
    "image_encoder.norm_head.weight",
    "image_encoder.norm_head.bias",
    "image_encoder.head.weight",
    "image_encoder.head.bias",
)

_ENCODER_RULES = (
    (r"^layers\.(\d+)\.downsample\.", lambda match: f"stages.{int(match[1]) + 1}.downsample."),
    (r"^layers\.(\d+)\.", lambda match: f"stages.{match[1]}."),
    (r"^patch_embed\.seq\.0\.", lambda match: "patch_embed.conv1."),
    (r"^patch_embed\.seq\.2\.", lambda match: "patch_embed.conv2."),
    (r"\.c\.", lambda match: ".conv."),
)

_HEAD_LAYERS = {"0": "proj_in", "1": "layers.0", "2": "proj_out"}
_SAM_PARTS = (
    ("output_upscaling.0.", "upscale_conv1."),
    ("output_upscaling.1.", "upscale_layer_norm."),
    ("output_upscaling.3.", "upscale_conv2."),
    ("mask_downscaling.0.", "mask_embed.conv1."),
    ("mask_downscaling.1.", "mask_embed.layer_norm1."),
    ("mask_downscaling.3.", "mask_embed.conv2."),
    ("mask_downscaling.4.", "mask_embed.layer_norm2."),
    ("mask_downscaling.6.", "mask_embed.conv3."),
    ("point_embeddings.", "point_embed."),
    ("norm_final_attn.", "layer_norm_final_attn."),
    ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
)


def module_name(official: str) -> str:
    """Name of an official tensor in our modules (`encoder.…`, `neck.…`, `prompt_encoder.…`, `mask_decoder.…`)."""
    part, _, rest = official.partition(".")
    if part == "image_encoder":
        if rest.startswith("neck."):
            return rest
        for pattern, replacement in _ENCODER_RULES:
            rest = re.sub(pattern, replacement, rest, count=1)
        return f"encoder.{rest}"
    for old, new in _SAM_PARTS:
        rest = rest.replace(old, new)
    rest = re.sub(
        r"^(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.layers\.(\d)\.",
        lambda match: f"{match[1]}.{_HEAD_LAYERS[match[2]]}.",
        rest,
    )
    rest = re.sub(r"\.norm(\d)\.", r".layer_norm\1.", rest)
    return f"{part}.{rest}"


_ENCODER_RULES_BACK = (
    (r"^encoder\.stages\.(\d+)\.downsample\.", lambda match: f"encoder.stages.{int(match[1]) - 1}.downsample."),
    (r"^encoder\.stages\.", lambda match: "encoder.layers."),
    (r"^encoder\.patch_embed\.conv1\.", lambda match: "encoder.patch_embed.seq.0."),
    (r"^encoder\.patch_embed\.conv2\.", lambda match: "encoder.patch_embed.seq.2."),
    (r"\.conv\.", lambda match: ".c."),
    (r"^encoder\.", lambda match: "image_encoder."),
)


def official_name(ours: str) -> str:
    """Official name of a tensor in our modules: the inverse of `module_name`."""
    if ours.startswith("neck."):
        return f"image_encoder.{ours}"
    if ours.startswith("encoder."):
        for pattern, replacement in _ENCODER_RULES_BACK:
            ours = re.sub(pattern, replacement, ours, count=1)
        return ours
    for old, new in _SAM_PARTS:
        ours = ours.replace(f".{new}", f".{old}")
    backwards = {new: old for old, new in _HEAD_LAYERS.items()}
    ours = re.sub(
        r"\.(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.(proj_in|layers\.0|proj_out)\.",
        lambda match: f".{match[1]}.layers.{backwards[match[2]]}.",
        ours,
    )
    return re.sub(r"\.layer_norm(\d)\.", r".norm\1.", ours)


def official_shapes(config: MobileSamConfig) -> dict[str, tuple[int, ...]]:
    """Official name → shape of every tensor that a model of these sizes needs."""
    with torch.device("meta"):
        modules = MobileSamModules(config)
    return {official_name(name): tuple(tensor.shape) for name, tensor in modules.state_dict().items()}
