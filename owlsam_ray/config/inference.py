"""Sections that can change labels: image decoding, detector, tiling, suppression and segmentation.

The rest of a run, where and how fast, is in the other modules of `config`. A default of None means a value that only
some choices use; the field's docstring names it.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from owlsam_ray.config import rules
from owlsam_ray.config.base import Added, Fraction, Name, PositiveInt, Section

Grey16 = Literal["full", "auto", 8, 9, 10, 11, 12, 13, 14, 15, 16]


class DecodeConfig(Section):
    """Decoding of image files to pixels."""

    max_pixels: PositiveInt = 200_000_000
    """Larger images fail with the reason `too_large` before their pixels are read."""
    max_file_mb: PositiveInt = 512
    """Larger files fail with the reason `too_large` and are not read to their end."""
    grey16: Annotated[Grey16, Added("full")] = "full"
    """White point of 16-bit greyscale images: `full`: 65535; 8 to 16: the largest value of that many bits, as needed
    for 12-bit cameras; `auto`: the largest value of as many bits as the image uses. A remark in the row reports images
    that are mostly dark, clipped values, and what `auto` chose."""


def _without_weights(fields: Any) -> Any:
    """Fill in the `weights` of a fake model, which its name implies."""
    if isinstance(fields, dict) and fields.get("model") == "fake":
        return {"weights": "fake"} | fields
    return fields


class DetectorConfig(Section):
    """Detection of boxes from prompts."""

    RULES: ClassVar = rules.DETECTOR

    model: Literal["owlvit", "owlv2", "fake"] = "owlvit"
    """Architecture; `fake`: computes boxes from the pixels without a model, for tests at scale."""
    weights: Name
    """A directory in Hugging Face layout (safetensors), or a hub name, `org/model` or `org/model@revision`. Not needed
    for a fake."""
    preprocess: Literal["hf", "scenic"] = "hf"
    """`hf`: as the installed transformers prepares images for this model (squashed to a square for OwlViT, padded to
    one for OWLv2); `scenic`: as the original code does, padded on the right and at the bottom for both."""
    pad_value: Fraction | None = None
    """Grey level of scenic's padding, from 0 (the default, as in its evaluator) to 1; its training used 0.5."""
    image_size: PositiveInt | None = None
    """Side of the square input in pixels, a multiple of the patch size; default: the model's own. For other sizes the
    position embeddings are interpolated."""
    objectness: Literal["ignore", "multiply"] = "ignore"
    """OWLv2's estimate that a box holds any object at all: ignored, as in transformers and scenic, or multiplied into
    every score."""
    score_floor: Fraction = 0.05
    """Boxes are kept when their score is greater. Low on purpose: `reduce` decides."""
    labels: Literal["multi", "best"] = "multi"
    """`multi`: every label above the floor makes a detection; `best`: only the best label of a box."""
    max_candidates: PositiveInt = 1000
    """Maximum number of detections of an image (or tile) that enter suppression, by score."""
    max_detections: PositiveInt = 100
    """Maximum number of detections of an image that are kept after suppression, by score."""
    clip_boxes: bool = True
    """Clip boxes to the image border; boxes with no area left are dropped."""

    _fake_has_no_weights = model_validator(mode="before")(_without_weights)


class TilingConfig(Section):
    """Splitting of large images into overlapping tiles, so that small objects are seen at full resolution."""

    RULES: ClassVar = rules.TILING

    size: Annotated[int, Field(ge=32)] | None = None
    """Side of a tile in original pixels; default: no tiles. Images that fit into one tile are not split."""
    overlap: Annotated[float, Field(ge=0.0, le=0.9, allow_inf_nan=False)] = 0.25
    """Minimum share of a tile's side that neighbours have in common; choose it larger than the largest object that only
    tiles can find. If a tile border cuts an object, nms with `suppress.overlap: ios` keeps the higher-scoring one of
    the piece and the whole object; with `iou` both often remain."""
    full_image: bool = True
    """Also run on the whole image: large objects do not fit into a tile."""


DEFAULT_THRESHOLD = 0.7
DEFAULT_SIGMA = 0.5


class SuppressConfig(Section):
    """Suppression of overlapping boxes."""

    RULES: ClassVar = rules.SUPPRESS

    strategy: Literal["nms", "soft_nms", "merge", "none"] = "nms"
    """`nms`: the best box stays, boxes that overlap it more than the threshold are removed; `soft_nms`: their scores
    decay; `merge`: they become one box, weighted by score; `none`: all stay."""
    overlap: Literal["iou", "ios"] = "iou"
    """Intersection over union, or intersection over the smaller of the two boxes (for parts and tiles)."""
    threshold: Fraction | None = None
    """Overlap above which two boxes are taken for one object; default 0.7. Not used by exponential decay."""
    thresholds: dict[Name, Fraction] = Field(default_factory=dict)
    """Thresholds of single categories, by name; they take precedence over `threshold`."""
    across_labels: bool = False
    """Boxes of different labels compete as well: one object gets one label. Default: each label separately."""
    decay: Literal["exponential", "linear"] | None = None
    """For soft_nms: `exponential` (the default): score · exp(-overlap² / sigma); `linear`: score · (1 - overlap) above
    the threshold. Boxes whose score falls to detector.score_floor are dropped."""
    sigma: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """For exponential decay; default 0.5. Smaller values decay more."""

    @field_validator("thresholds", mode="before")
    @classmethod
    def _null_unsets_them(cls, value: Any) -> Any:
        return {} if value is None else value

    @property
    def common_threshold(self) -> float:
        """The threshold of categories without their own."""
        return DEFAULT_THRESHOLD if self.threshold is None else self.threshold

    @property
    def decay_sigma(self) -> float:
        """The sigma of exponential decay."""
        return DEFAULT_SIGMA if self.sigma is None else self.sigma


class SegmentConfig(Section):
    """Segmentation of boxes into masks."""

    model: Literal["mobile_sam", "sam", "fake"] = "mobile_sam"
    """Architecture; `sam`: ViT-B, L or H; `fake`: computes masks without a model, for tests at scale."""
    weights: Name
    """MobileSAM: `mobile_sam.pt`, a `.safetensors` file of the same layout, or a directory with `config.json` and
    `model.safetensors`. SAM: a directory in Hugging Face layout (safetensors), or a hub name. Not needed for a fake."""
    score_floor: Fraction = 0.0
    """Boxes get a mask when their score is at least this."""
    prompt: Literal["box", "box_and_center"] = "box"
    """The prompt: the box, or the box and its centre as a foreground point."""
    masks: Literal["single", "best_of_three", "most_stable"] = "single"
    """SAM's single mask, or one of its three: the one with the highest predicted IoU, or the most stable one."""
    min_area: Annotated[int, Field(ge=0)] = 0
    """Detections whose mask has fewer pixels are dropped for good; `reduce.min_mask_area` decides later instead."""
    fill_holes: Annotated[int, Field(ge=0)] = 0
    """Holes in a mask with fewer pixels are filled."""
    remove_islands: Annotated[int, Field(ge=0)] = 0
    """Parts of a mask with fewer pixels are removed; its largest part always stays."""

    _fake_has_no_weights = model_validator(mode="before")(_without_weights)


class FakesConfig(Section):
    """Side effects of the models called `fake`, for tests. They change no labels."""

    delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that each call of the detector sleeps."""
    poison: bool = False
    """Images whose first pixel says so kill the process, as a broken decoder would: see `models/fakes.py`."""
