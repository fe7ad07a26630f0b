"""MobileSAM: timm's TinyViT with SAM's neck; prompts and masks are handled by `sam_decoder`.

Loads the official `mobile_sam.pt` layout strictly, from a pickle without code or from safetensors. Shapes as in
`protocols`; the sam frame is that of `sam_frame`.

Source: ChaoningZhang/MobileSAM (Apache-2.0); tests compare with outputs of that code.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from owlsam_ray.errors import WeightsError, one_line
from owlsam_ray.models.mobile_sam_layout import (
    UNUSED,
    MobileSamConfig,
    MobileSamModules,
    module_name,
    official_name,
    official_shapes,
)
from owlsam_ray.models.sam_decoder import BoxDecoder
from owlsam_ray.models.sam_frame import input_size_hw
from owlsam_ray.models.weights import (
    check_layout,
    check_sizes,
    read_json,
    read_safetensors_shapes,
    refused_as_weights,
)
from owlsam_ray.storage import write_atomic

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_MEAN = torch.tensor([123.675, 116.28, 103.53])[:, None, None]
_STD = torch.tensor([58.395, 57.12, 57.375])[:, None, None]
_HINT = (
    "Expected: the official mobile_sam.pt (vit_t), a .safetensors file with the same tensor names, or a directory with "
    f"{CONFIG_FILE} and {WEIGHTS_FILE}; for SAM ViT-B, L or H set segment.model: sam."
)


class MobileSam(BoxDecoder):
    """MobileSAM as a `protocols.Segmenter`."""

    def __init__(
        self, modules: MobileSamModules, config: MobileSamConfig, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Take loaded modules; see `load`."""
        self._config, self._dtype = config, dtype
        self._modules = modules.to(device).requires_grad_(False)
        for part in (modules.encoder, modules.neck):
            part.to(dtype)
        modules.eval()
        super().__init__(modules.prompt_encoder, modules.mask_decoder, image_size=config.image_size)

    @staticmethod
    def load(weights: str, *, device: torch.device, dtype: torch.dtype) -> "MobileSam":
        """Load weights strictly.

        Args:
            weights: a file in the official layout (`.pt`, `.pth`, `.safetensors`), or a directory written by
                `save_mobile_sam`.
            device: where to run.
            dtype: dtype of the image encoder; prompt encoder and mask decoder stay in float32.

        Raises:
            WeightsError: the file is missing, damaged, contains code, or its tensors do not fit (names the first).
        """
        config, state = read_mobile_sam(Path(weights))
        modules = MobileSamModules(config)
        modules.load_state_dict({module_name(name): tensor for name, tensor in state.items()})
        return MobileSam(modules, config, device=device, dtype=dtype)

    def preprocess(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32, see `image_to_sam_frame`."""
        return image_to_sam_frame(pixels, image_size=self.image_size)

    @torch.inference_mode()
    def encode(self, batch: Tensor) -> Tensor:
        """(B, 3, S, S) from `preprocess` to image embeddings (B, C, h, w) float32, h = w = S / 16.

        Runs in the model's dtype and returns float32 on the model's device.
        """
        features = self._modules.encoder.forward_features(batch.to(self.device, self._dtype))
        embeddings: Tensor = self._modules.neck(features).float()
        return embeddings

    def export(self, directory: Path) -> None:
        """Write a directory that `load` accepts; for a bf16 model the encoder lacks the digits that bf16 drops."""
        state = {official_name(name): tensor for name, tensor in self._modules.state_dict().items()}
        save_mobile_sam(state, self._config, directory)


def check_weights(weights: str) -> None:
    """Refuse weights that `load` would refuse.

    Raises:
        WeightsError: see `load`.
    """
    read_mobile_sam(Path(weights))


def save_mobile_sam(state: Mapping[str, Tensor], config: MobileSamConfig, directory: Path) -> None:
    """Write a directory that `load` accepts.

    Args:
        state: tensors under their official names, on any device; floating ones are written as float32.
        config: the model's sizes.
        directory: created if it does not exist.

    Raises:
        WeightsError: the tensors do not fit the sizes; nothing is written.
    """
    _check_state(state, config, source="the state to be saved")
    tensors = {
        name: tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    # The config is written last: without it a loader refuses the directory, so a half-written one is never used.
    write_atomic(str(directory / WEIGHTS_FILE), save(tensors))
    write_atomic(str(directory / CONFIG_FILE), (config.model_dump_json(indent=1) + "\n").encode())


def read_mobile_sam(path: Path) -> tuple[MobileSamConfig, dict[str, Tensor]]:
    """Read sizes and tensors, the latter under their official names, and check them against each other.

    Args:
        path: a file or directory that `MobileSam.load` accepts.

    Raises:
        WeightsError: see `MobileSam.load`.
    """
    config = MobileSamConfig()
    if path.is_dir():
        config, file = _read_config(path / CONFIG_FILE), path / WEIGHTS_FILE
    else:
        file = path
    if not file.is_file():
        raise WeightsError(f"there are no segmenter weights at {file}. {_HINT}")
    state = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    check_sizes(config.model_dump(mode="json"), path / CONFIG_FILE, num_tensors=len(state))
    counters = _check_state(state, config, source=str(file))
    used = {name: tensor for name, tensor in state.items() if name not in UNUSED}
    return config, dict.fromkeys(counters, torch.zeros((), dtype=torch.int64)) | used


def _check_state(state: Mapping[str, Tensor], config: MobileSamConfig, *, source: str) -> list[str]:
    """Check names and shapes; return the names of the model's batch counters, which inference does not read."""
    with refused_as_weights(Path(source), "comes with model sizes that are not possible"):
        shapes = official_shapes(config)
    counters = [name for name in shapes if name.endswith(".num_batches_tracked")]
    check_layout(
        {name: shape for name, shape in shapes.items() if name not in counters},
        {name: tuple(tensor.shape) for name, tensor in state.items() if name not in counters},
        source=source,
        hint=_HINT,
        ignored=UNUSED,
    )
    return counters


def _read_config(path: Path) -> MobileSamConfig:
    try:
        fields: Any = read_json(path)
        if isinstance(fields, dict) and fields.get("model_type") == "sam":
            raise WeightsError(
                f"{path} has model_type sam, and segment.model is mobile_sam: set segment.model: sam for it"
            )
        return MobileSamConfig.model_validate(fields)
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}. {_HINT}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(one_line(part, 60) for part in first["loc"])
        problem = first["msg"].removeprefix("Value error, ")
        described = f"{where}: {problem}" if where else problem
        raise WeightsError(f"{path} does not describe a MobileSAM: {one_line(described)}") from None
    except ValueError as error:
        raise WeightsError(f"{path} does not describe a MobileSAM: {one_line(error)}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    read_safetensors_shapes(path)  # refuses the usual damage with clearer messages
    with refused_as_weights(path, "is not a safetensors file, export the weights again"):
        return dict(load_file(path))


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` file; code in it is refused, never run."""
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = one_line((str(error).strip().splitlines() or ["no reason"])[0])
        raise WeightsError(
            f"{path} was refused: it is damaged, or it holds more than tensors, and code in a weight file is never "
            f"run ({reason}). {_HINT}"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # torch has no common base class for its errors on a damaged file
        raise WeightsError(
            f"{path} is not a weight file: {type(error).__name__}: {one_line(error)}. {_HINT}"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(state[key], Tensor) for key in state):
        raise WeightsError(f"{path} does not hold a plain dict of tensors. {_HINT}")
    return state


def image_to_sam_frame(pixels: NDArray[np.uint8], *, image_size: int) -> Tensor:
    """(H, W, 3) RGB uint8 to (3, S, S) float32: long side resized to S, normalised, zeros at the right and bottom.

    Source: segment-anything, `ResizeLongestSide.apply_image` (bilinear on uint8) and `Sam.preprocess`.
    """
    height, width = input_size_hw(pixels.shape[:2], image_size)
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    tensor = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
    frame = torch.zeros(3, image_size, image_size)
    frame[:, :height, :width] = (tensor - _MEAN) / _STD
    return frame
