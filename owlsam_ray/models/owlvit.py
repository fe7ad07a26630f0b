"""OwlViT through transformers: the text tower once per run, image tower and heads in the actors.

Preprocessing and box scaling are those of the installed transformers; tests compare with its
`post_process_grounded_object_detection`. Letters as in `protocols`; S is the detector's square input.

Source: Minderer et al., Simple Open-Vocabulary Object Detection with Vision Transformers (2022); google/owlvit-*.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import AutoTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor

from owlsam_ray.errors import InputError, WeightsError
from owlsam_ray.models.weights import check_layout, read_safetensors_shapes

_WEIGHTS = "model.safetensors"
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_PROMPTS_PER_CALL = 64
# Remembered positions and a projection that detection does not use: old files have them.
_OPTIONAL = (
    "owlvit.text_model.embeddings.position_ids",
    "owlvit.vision_model.embeddings.position_ids",
    "box_bias",
)
_INTERPOLATION = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}


class Preprocessing:
    """Pixels → model input, as the processor's file says; inference and training share it."""

    def __init__(self, processor: OwlViTImageProcessor) -> None:
        self._side = (processor.size["height"], processor.size["width"])
        self._interpolation = _INTERPOLATION[int(processor.resample)]
        # One step for rescale and normalisation, on the values of bytes.
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        self._mean = torch.tensor(processor.image_mean)[:, None, None] * (1.0 / scale)
        self._std = torch.tensor(processor.image_std)[:, None, None] * (1.0 / scale)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32: squashed to the square, normalised."""
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        resized = resize(tensor, list(self._side), interpolation=self._interpolation, antialias=True)
        return (resized.float() - self._mean) / self._std


class OwlVit:
    """The detector of `protocols.Detector`."""

    def __init__(
        self,
        model: OwlViTForObjectDetection,
        processor: OwlViTImageProcessor,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Take over a loaded model; see `load`."""
        self._device, self._dtype = device, dtype
        model.owlvit.text_model = None
        model.owlvit.text_projection = None
        self._model = model.eval().requires_grad_(False).to(device)
        # Heads and box decoding stay in float32: they cost little, and boxes need the bits.
        self._model.owlvit.vision_model.to(dtype)
        self._preprocessing = Preprocessing(processor)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self._device

    @staticmethod
    def load(path: Path, *, device: torch.device, dtype: torch.dtype) -> "OwlVit":
        """Load image tower and heads; the text tower is not kept.

        Args:
            path: a directory in Hugging Face layout.
            device: where to run.
            dtype: of the image tower.

        Raises:
            WeightsError: something is missing, or does not fit.
        """
        check_weights(path)
        return OwlVit(load_model(path), load_processor(path), device=device, dtype=dtype)

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32: squashed to the square, normalised."""
        return self._preprocessing(pixels)

    @torch.inference_mode()
    def detect(self, batch: Tensor, query_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Run image tower and heads; see `protocols.Detector`."""
        model = self._model
        hidden = model.owlvit.vision_model(pixel_values=batch.to(self._device, self._dtype)).last_hidden_state
        embeddings = model.owlvit.vision_model.post_layernorm(hidden)
        # The class token scales every patch token.
        patches = model.layer_norm((embeddings[:, 1:] * embeddings[:, :1]).float())  # (B, P, hidden)
        boxes = model.box_predictor(patches, patches)
        logits, _ = model.class_predictor(patches, query_embeddings.expand(len(batch), -1, -1))
        return boxes.float().cpu(), logits.float().sigmoid().cpu()

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """(N, 4) boxes of `detect` to xyxy float32 in original pixels, not clipped: the input was squashed."""
        height, width = size_hw
        cx, cy, w, h = boxes_cxcywh.unbind(-1)
        corners = torch.stack([cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h], dim=-1)
        return corners * torch.tensor([width, height, width, height], dtype=torch.float32)


def resolve_weights(weights: str) -> Path:
    """A local directory as it is; a hub name through the hub's cache.

    Raises:
        WeightsError: there is no such directory, and the hub cannot be reached or knows no such name.
    """
    path = Path(weights)
    if path.is_dir():
        return path
    if weights.startswith(("/", ".", "~")) or path.exists():
        raise WeightsError(f"detector.weights {weights} is not a directory in Hugging Face layout")
    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.txt", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise WeightsError(
            f"detector.weights {weights!r} is neither a directory here nor to be had from the hub ({reason}). Download "
            "it once where there is a network, and name the directory."
        ) from None


def check_weights(path: Path) -> None:
    """Compare the file's tensors with the model's, by name and shape, without reading them.

    Raises:
        WeightsError: files are missing, or tensors do not fit (names the first).
    """
    config = _load_config(path)
    file = path / _WEIGHTS
    if not file.is_file():
        other = (
            "pytorch_model.bin is not loaded, it may hold code: convert it once with "
            "OwlViTForObjectDetection.from_pretrained(…).save_pretrained(…)"
            if (path / "pytorch_model.bin").is_file()
            else "is it a directory that save_pretrained wrote?"
        )
        raise WeightsError(f"{path} holds no {_WEIGHTS}; {other}")
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise WeightsError(f"{path} holds no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    with torch.device("meta"):
        model = OwlViTForObjectDetection(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_layout(
        expected,
        read_safetensors_shapes(file),
        source=str(file),
        hint=f"Wanted: OwlViTForObjectDetection as {path / 'config.json'} describes it.",
        ignored=_OPTIONAL,
    )


def embed_prompts(path: Path, prompts: Sequence[str], *, device: torch.device | None = None) -> Tensor:
    """Run the text tower, once per run.

    Args:
        path: a directory in Hugging Face layout.
        prompts: Q texts.
        device: where to run; default: the CPU.

    Returns:
        (Q, D) float32 on the CPU, of length 1 each.

    Raises:
        InputError: a prompt has more tokens than the text tower takes; it is never cut.
    """
    config = _load_config(path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    limit = config.text_config.max_position_embeddings
    tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if len(ids) > limit:
            raise InputError(
                f"the prompt {prompt!r} has {len(ids)} tokens with start and end, and the text tower takes {limit}: "
                "shorten the category's name or vocabulary.template"
            )
    model = load_model(path).eval().to(device or torch.device("cpu"))
    padding = tokenizer.pad_token_id
    embeddings = []
    for start in range(0, len(tokens), _PROMPTS_PER_CALL):
        rows = tokens[start : start + _PROMPTS_PER_CALL]
        input_ids = torch.tensor([ids + [padding] * (limit - len(ids)) for ids in rows])
        attention_mask = torch.tensor([[1] * len(ids) + [0] * (limit - len(ids)) for ids in rows])
        embeddings.append(_text_forward(model, input_ids, attention_mask))
    return torch.cat(embeddings)


@torch.inference_mode()
def _text_forward(model: OwlViTForObjectDetection, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """(Q, limit) token ids and mask to (Q, D) float32: the only place that calls the text tower."""
    device = model.owlvit.text_projection.weight.device
    pooled = model.owlvit.text_model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device)
    ).pooler_output
    projected = model.owlvit.text_projection(pooled).float()
    normalised: Tensor = (projected / torch.linalg.norm(projected, dim=-1, keepdim=True)).cpu()
    return normalised.clone()


def _load_config(path: Path) -> OwlViTConfig:
    try:
        fields: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} is no model directory: cannot read config.json ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{path / 'config.json'} is not valid JSON: {error}") from None
    if fields.get("model_type") != "owlvit":
        raise WeightsError(f"{path / 'config.json'} describes a {fields.get('model_type')!r} model, not an owlvit one")
    return OwlViTConfig.from_dict(fields)


def load_model(path: Path) -> OwlViTForObjectDetection:
    """The whole model, text tower included, in float32 on the CPU; `check_weights` comes first."""
    config = _load_config(path)
    with torch.device("meta"):
        model = OwlViTForObjectDetection(config)
    state = {name: tensor.float() for name, tensor in load_file(path / _WEIGHTS).items() if name not in _OPTIONAL}
    _materialise_buffers(model, config)
    model.load_state_dict(state, assign=True)
    return model


def _materialise_buffers(model: OwlViTForObjectDetection, config: OwlViTConfig) -> None:
    """Buffers that are computed, not stored, have no values after building on the meta device."""
    grid = config.vision_config.image_size // config.vision_config.patch_size
    model.box_bias = nn.Buffer(model.compute_box_bias(grid, grid), persistent=False)
    vision = model.owlvit.vision_model.embeddings
    vision.register_buffer("position_ids", torch.arange(vision.num_positions)[None], persistent=False)
    text = model.owlvit.text_model.embeddings
    text.register_buffer(
        "position_ids", torch.arange(config.text_config.max_position_embeddings)[None], persistent=False
    )


def load_processor(path: Path) -> OwlViTImageProcessor:
    """How pictures become model inputs.

    Raises:
        WeightsError: there is no such file, or it asks for a centre crop.
    """
    for name in _PROCESSOR_FILES:
        if (path / name).is_file():
            fields = json.loads((path / name).read_text(encoding="utf-8"))
            processor = OwlViTImageProcessor(**fields.get("image_processor", fields))
            if processor.do_center_crop:
                raise WeightsError(
                    f"{path / name} asks for a centre crop, which would cut objects off: set it to false"
                )
            return processor
    raise WeightsError(f"{path} holds no {' or '.join(_PROCESSOR_FILES)}")
