"""SAM ViT-B, L and H through transformers, from directories in Hugging Face layout.

Preprocessing is that of the installed transformers; tests compare with its `SamModel` and `SamProcessor`. Prompts and
masks are handled by `sam_decoder`. Shapes as in `protocols`; the sam frame is that of `sam_frame`.

Source: Kirillov et al., Segment Anything (2023); facebook/sam-vit-base, -large, -huge.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import SamConfig, SamImageProcessor, SamModel

from owlsam_ray.errors import WeightsError, shown
from owlsam_ray.models.sam_decoder import BoxDecoder
from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.models.weights import (
    check_layout,
    check_sizes,
    check_statistics,
    find_safetensors,
    read_config,
    read_json,
    read_safetensors_shapes,
    refused_as_weights,
)

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# One tensor under two names; files contain one of them, or both.
_FREQUENCIES = ("shared_image_embedding.positional_embedding", "prompt_encoder.shared_embedding.positional_embedding")


class Sam(BoxDecoder):
    """SAM as a `protocols.Segmenter`."""

    def __init__(
        self, model: SamModel, processor: SamImageProcessor, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take a loaded model; see `load`."""
        self._dtype = dtype
        # Rescaling and normalisation become one step on the byte values.
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        self._mean = torch.tensor(processor.image_mean)[:, None, None] * (1.0 / scale)
        self._std = torch.tensor(processor.image_std)[:, None, None] * (1.0 / scale)
        model.eval().requires_grad_(False).to(device)
        self._vision = model.vision_encoder.to(dtype)
        super().__init__(model.prompt_encoder, model.mask_decoder, image_size=model.config.vision_config.image_size)

    @staticmethod
    def load(path: Path, *, device: torch.device, dtype: torch.dtype) -> "Sam":
        """Load weights strictly.

        Args:
            path: a directory in Hugging Face layout.
            device: where to run.
            dtype: dtype of the image encoder; prompt encoder and mask decoder stay in float32.

        Raises:
            WeightsError: see `check_weights`.
        """
        check_weights(path)
        model = _build_empty(path)
        with refused_as_weights(path / _WEIGHTS, "cannot be loaded"):
            state = {name: tensor.float() for name, tensor in load_file(path / _WEIGHTS).items()}
            frequencies = next(state[name] for name in _FREQUENCIES if name in state)
            model.load_state_dict(state | dict.fromkeys(_FREQUENCIES, frequencies), assign=True)
        return Sam(model, _load_processor(path, model.config), device=device, dtype=dtype)

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32: long side resized to S, normalised, zeros at the right and bottom.

        Source: transformers' `SamImageProcessor` (bilinear on uint8, by torchvision).
        """
        height, width = input_size_hw(pixels.shape[:2], self._image_size)
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        resized = resize(tensor, [height, width], interpolation=InterpolationMode.BILINEAR, antialias=True)
        frame = torch.zeros(3, self._image_size, self._image_size)
        frame[:, :height, :width] = (resized.float() - self._mean) / self._std
        return frame

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) from `preprocess` to image embeddings (B, C, h, w) float32, h = w = S / 16.

        Runs in the model's dtype and returns float32 on the model's device.
        """
        embeddings: Tensor = self._vision(batch.to(self.device, self._dtype)).last_hidden_state.float()
        return embeddings


def check_weights(path: Path) -> None:
    """Refuse weights that `load` would refuse, by the names and shapes of the file's tensors, without reading them.

    Raises:
        WeightsError: files are missing or damaged, the directory holds another model, or tensors do not fit (names the
            first).
    """
    file = find_safetensors(path, "SamModel")
    found = read_safetensors_shapes(file)
    check_sizes(read_config(path), path / _CONFIG, num_tensors=len(found))
    model = _build_empty(path)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if any(name in found for name in _FREQUENCIES):
        expected = {name: shape for name, shape in expected.items() if name in found or name not in _FREQUENCIES}
    check_layout(expected, found, source=str(file), hint=f"Expected: SamModel as {path / _CONFIG} describes it.")
    _load_processor(path, model.config)


def _build_empty(path: Path) -> SamModel:
    """The model without values, on the meta device."""
    config = _load_config(path)
    with refused_as_weights(path / _CONFIG, "describes a SAM that cannot be built"), torch.device("meta"):
        return SamModel(config)


def _load_config(path: Path) -> SamConfig:
    file = path / _CONFIG
    fields = read_config(path)
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind == "mobile_sam":
        raise WeightsError(f"{path} holds a mobile_sam model, and segment.model is sam: set segment.model: mobile_sam")
    if kind != "sam":
        raise WeightsError(f"{file} describes a {shown(kind)} model, and segment.model: sam needs SAM ViT-B, L or H")
    with refused_as_weights(file, "does not describe a SAM"):
        config = SamConfig.from_dict(fields)
        _check_sizes(config, file)
    return config


def _check_sizes(config: SamConfig, file: Path) -> None:
    """Check that the three parts fit each other and the inference around them."""
    vision, prompts, decoder = config.vision_config, config.prompt_encoder_config, config.mask_decoder_config
    width = vision.output_channels
    for name, value, wanted in (
        ("vision_config.patch_size", vision.patch_size, 16),
        ("prompt_encoder_config.patch_size", prompts.patch_size, 16),
        ("prompt_encoder_config.image_size", prompts.image_size, vision.image_size),
        ("prompt_encoder_config.hidden_size", prompts.hidden_size, width),
        ("mask_decoder_config.hidden_size", decoder.hidden_size, width),
        ("vision_config.num_pos_feats", 2 * vision.num_pos_feats, width),
        ("mask_decoder_config.num_multimask_outputs", decoder.num_multimask_outputs, 3),
    ):
        if value != wanted:
            raise WeightsError(f"{file} does not describe a SAM: {name} is {value}, and must be {wanted}")
    if not isinstance(vision.image_size, int) or vision.image_size % 16:
        raise WeightsError(f"{file}: vision_config.image_size {vision.image_size} is not an integer multiple of 16")


def _load_processor(path: Path, config: SamConfig) -> SamImageProcessor:
    """How images become model inputs: from the directory's processor file if there is one, else SAM's own settings."""
    side = config.vision_config.image_size
    for name in _PROCESSOR_FILES:
        file = path / name
        if file.is_file():
            with refused_as_weights(file, "does not describe SAM's preprocessing"):
                fields: dict[str, Any] = read_json(file)
                processor = SamImageProcessor(**fields.get("image_processor", fields))
                asks = {
                    "size.longest_edge": (processor.size["longest_edge"], side),
                    "resample": (int(processor.resample), 2),
                    "do_resize": (processor.do_resize, True),
                    "do_normalize": (processor.do_normalize, True),
                }
            check_statistics(file, processor.image_mean, processor.image_std)
            for field, (value, wanted) in asks.items():
                if value != wanted:
                    raise WeightsError(f"{file} sets {field} to {value}, and SAM needs {wanted}: change it")
            return processor
    return SamImageProcessor()
