"""Turn images into the square input of OwlViT and OWLv2, and boxes back; shared by inference and training.

Three ways exist, and a model's accuracy depends on using the one it was made for: transformers squashes images for
OwlViT and pads them for OWLv2, the original code pads them for both.

Shapes: H, W the image, S the side of the square.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import Tensor
from torchvision.ops import box_convert
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize
from transformers import Owlv2ImageProcessor, OwlViTImageProcessor

from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.errors import ConfigError, WeightsError, one_line
from owlsam_ray.models.owl_weights import family_of, load_config
from owlsam_ray.models.weights import check_statistics, read_json

Processor: TypeAlias = OwlViTImageProcessor | Owlv2ImageProcessor

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_INTERPOLATION = {
    0: InterpolationMode.NEAREST,
    1: InterpolationMode.LANCZOS,
    2: InterpolationMode.BILINEAR,
    3: InterpolationMode.BICUBIC,
}
_COLUMNS_PER_STEP = 1024
"""Columns resampled at a time, which bounds the memory for large images."""


class Preprocessing(ABC):
    """Converts pixels to model input, and boxes from the model to pixels. Called from many threads at once."""

    def __init__(self, processor: Processor, side: int) -> None:
        self.side = side
        """S in pixels."""
        self._mean = torch.tensor(processor.image_mean)[:, None, None]
        self._std = torch.tensor(processor.image_std)[:, None, None]

    @abstractmethod
    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """(H, W, 3) RGB uint8 to (3, S, S) float32, normalised."""

    @abstractmethod
    def frame_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in original pixels that the whole square covers."""

    def unscale(self, boxes_cxcywh: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Convert boxes from the model to boxes in the image.

        Args:
            boxes_cxcywh: (N, 4) in units of the square.
            size_hw: (H, W) of the image.

        Returns:
            (N, 4) xyxy float32 in original pixels, not clipped.
        """
        height, width = self.frame_hw(size_hw)
        corners: Tensor = box_convert(boxes_cxcywh, "cxcywh", "xyxy")
        return corners * torch.tensor([width, height, width, height], dtype=torch.float32)


class Squashed(Preprocessing):
    """transformers' OwlViT: both sides resized to S, whatever the aspect ratio; bitwise equal to its processor."""

    def __init__(self, processor: OwlViTImageProcessor, side: int) -> None:
        super().__init__(processor, side)
        self._interpolation = _INTERPOLATION[int(processor.resample)]
        # Rescaling and normalisation become one step on the byte values.
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        self._mean, self._std = self._mean * (1.0 / scale), self._std * (1.0 / scale)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """See `Preprocessing`."""
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        resized = resize(tensor, [self.side, self.side], interpolation=self._interpolation, antialias=True)
        return (resized.float() - self._mean) / self._std

    def frame_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The image itself."""
        return size_hw


class Padded(Preprocessing):
    """transformers' OWLv2: zeros at right and bottom make a square, blurred by a Gaussian if it shrinks, then resized.

    The resize is bilinear without antialiasing. Both steps are linear and separable into rows and columns, so they
    become one sparse matrix per axis that reads only the image's own pixels. Equal to the processor, which blurs in two
    dimensions at full size, up to rounding (1e-5).
    """

    def __init__(self, processor: Owlv2ImageProcessor, side: int) -> None:
        super().__init__(processor, side)
        self._rescale_factor = processor.rescale_factor

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """See `Preprocessing`."""
        height, width, _ = pixels.shape
        index, weight = _blurred_taps(max(height, width), self.side)
        values = _resample(pixels, _matrix(index, weight, height), _matrix(index, weight, width))
        values *= self._rescale_factor
        return (values - self._mean) / self._std

    def frame_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The square whose side is the longer side of the image."""
        return max(size_hw), max(size_hw)


class Scenic(Preprocessing):
    """The original code: bilinear without antialiasing to fit into the square, then grey at the right and bottom.

    The order matters: the grey is not blended into the image's border. Values are in 0…1 up to here; then CLIP's
    normalisation is applied (from the processor's file, which has CLIP's values for every published model), to the grey
    as well. The original evaluator pads with 0, its training with 0.5. It computes the fitted sides in float32 and
    truncates them to integers, so that even the longer one is a pixel short for some sizes (640 becomes 960, but 130
    becomes 959 of 960); this code does the same. Boxes are in units of the whole square nevertheless.

    Source: google-research/scenic 4a38d475, projects/owl_vit: `ResizeWithPad` in preprocessing/image_ops.py,
    `get_dataset` and `unpad_box` in evaluator.py, `normalize_image` in clip/model.py. Its notebooks pad first and
    resize with scikit-image, which is different.
    """

    def __init__(self, processor: Processor, side: int, pad_value: float) -> None:
        super().__init__(processor, side)
        self._pad_value = pad_value

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        """See `Preprocessing`."""
        size_hw = (pixels.shape[0], pixels.shape[1])
        fit_hw = self.fit_hw(size_hw)
        rows, columns = (_matrix(*_bilinear_taps(size, fit), size) for size, fit in zip(size_hw, fit_hw, strict=True))
        square = torch.full((3, self.side, self.side), self._pad_value)
        square[:, : fit_hw[0], : fit_hw[1]] = _resample(pixels, rows, columns) / 255
        return (square - self._mean) / self._std

    def fit_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of an image inside the square, at least one pixel each."""
        side = np.float32(self.side)
        height, width = (np.float32(size) for size in size_hw)
        ratio = max(height / side, width / side)
        return max(1, int(min(height / ratio, side))), max(1, int(min(width / ratio, side)))

    def frame_hw(self, size_hw: tuple[int, int]) -> tuple[int, int]:
        """The square whose side is the longer side of the image."""
        return max(size_hw), max(size_hw)


def make_preprocessing(path: Path, settings: DetectorConfig) -> Preprocessing:
    """The preprocessing that `detector.preprocess` names, for a model.

    Args:
        path: a directory in Hugging Face layout.
        settings: `preprocess`, `pad_value` and `image_size` are read.

    Raises:
        WeightsError: there is no processor file, or it asks for something other than the model's preprocessing.
        ConfigError: `image_size` is not a multiple of the patch size.
    """
    processor = load_processor(path)
    vision = load_config(path).vision_config
    side = settings.image_size or vision.image_size
    if side % vision.patch_size:
        lower = side // vision.patch_size * vision.patch_size
        raise ConfigError(
            f"detector.image_size {side} is not a multiple of the patch size {vision.patch_size} of {path}: take "
            f"{lower or lower + vision.patch_size} or {lower + vision.patch_size}"
        )
    if settings.preprocess == "scenic":
        return Scenic(processor, side, settings.pad_value or 0.0)
    return hf_preprocessing(processor, side)


def hf_preprocessing(processor: Processor, side: int) -> Preprocessing:
    """What the installed transformers does for the processor's model, to squares of `side` pixels."""
    return Padded(processor, side) if isinstance(processor, Owlv2ImageProcessor) else Squashed(processor, side)


def load_processor(path: Path) -> Processor:
    """The processor of a model. Its size is ignored in favour of the model's own.

    Raises:
        WeightsError: there is no such file, or it asks for something that is not supported here.
    """
    owlv2 = family_of(path) == "owlv2"
    for file in (path / name for name in _PROCESSOR_FILES):
        if file.is_file():
            try:
                fields: dict[str, Any] = read_json(file)
                kind = Owlv2ImageProcessor if owlv2 else OwlViTImageProcessor
                processor: Processor = kind(**fields.get("image_processor", fields))
            except Exception as error:  # transformers has no common base class for its errors
                raise WeightsError(f"{file} does not describe an image processor: {one_line(error)}") from error
            check_statistics(file, processor.image_mean, processor.image_std)
            if processor.do_center_crop:
                raise WeightsError(f"{file} sets do_center_crop, which would cut objects off: set it to false")
            for name in ("do_resize", "do_normalize", *(("do_pad", "do_rescale") if owlv2 else ())):
                if not getattr(processor, name):
                    raise WeightsError(f"{file} sets {name} to false, and the model needs it: set it to true")
            return processor
    raise WeightsError(f"{path} holds no {' or '.join(_PROCESSOR_FILES)}")


def _bilinear_taps(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Pixels that a resized axis reads: index (side, 2) int64 and weight (side, 2) float32.

    Half-pixel centres, no antialiasing. Positions are rounded as torch rounds them, once, in float32: on long axes this
    shifts weights by 1e-5 to 1e-4.
    """
    scale = torch.tensor(float(size)) / torch.tensor(float(side))
    source = ((torch.arange(side) + 0.5).double() * scale.double() - 0.5).float().clamp(min=0)
    low = source.floor().long().clamp(max=size - 1)
    part = source - low
    return torch.stack([low, (low + 1).clamp(max=size - 1)], dim=1), torch.stack([1 - part, part], dim=1)


def _blurred_taps(size: int, side: int) -> tuple[Tensor, Tensor]:
    """Like `_bilinear_taps`, for an axis first blurred by a Gaussian, as transformers' OWLv2 does when it shrinks.

    Deviation (size / side - 1) / 2, cut off at three deviations, reflected at both ends without repeating the last
    pixel.
    """
    index, weight = _bilinear_taps(size, side)
    sigma = 0.5 * (torch.tensor(float(size)) / torch.tensor(float(side)) - 1)
    if sigma <= 0:
        return index, weight
    radius = int(torch.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    around = (index[:, :, None] + offsets).abs()
    around = torch.where(around >= size, 2 * (size - 1) - around, around)
    return around.flatten(1), (weight[:, :, None] * kernel).flatten(1)


def _matrix(index: Tensor, weight: Tensor, size: int) -> Any:
    """Taps as a sparse (side, size) float32 matrix; taps beyond `size` are dropped, which equals zero padding."""
    row = torch.arange(len(index))[:, None].expand_as(index)
    inside = index < size
    values = weight[inside].numpy()
    return csr_array((values, (row[inside].numpy(), index[inside].numpy())), shape=(len(index), size))


def _resample(pixels: NDArray[np.uint8], rows: Any, columns: Any) -> Tensor:
    """(H, W, 3) bytes through a matrix per axis, (h, H) and (w, W), to (3, h, w) float32, in units of bytes."""
    height, width, _ = pixels.shape
    parts = [
        rows @ pixels[:, start : start + _COLUMNS_PER_STEP].reshape(height, -1).astype(np.float32)
        for start in range(0, width, _COLUMNS_PER_STEP)
    ]
    half = np.concatenate(parts, axis=1).reshape(-1, width, 3)  # (h, W, 3)
    turned = np.ascontiguousarray(half.transpose(1, 2, 0)).reshape(width, -1)  # (W, 3h)
    full = (columns @ turned).reshape(-1, 3, len(half))  # (w, 3, h)
    return torch.from_numpy(np.ascontiguousarray(full.transpose(1, 2, 0)))
