"""What the stages of the engine hand to each other."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.settings import DecodeConfig, DetectorConfig, SegmentConfig, SuppressConfig, TilingConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.inference.tile import View
from owlsam_ray.records import Detections, EncodedImage, Prediction

STAGES = ("decode", "detect", "suppress", "segment", "encode")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine does, and in which batches."""

    decode: DecodeConfig
    detector: DetectorConfig
    suppress: SuppressConfig
    segment: SegmentConfig
    detector_batch: int
    """Views of one detector call."""
    segmenter_batch: int
    """Images of one encoder call."""
    decoder_batch: int
    """Boxes of one mask decoder call."""
    threads: int
    """Threads that decode images and encode masks."""
    tiling: TilingConfig = field(default_factory=TilingConfig)
    """Large images in tiles; default: none."""
    label_thresholds: NDArray[np.float64] | None = None
    """(L,) suppression threshold of each category; None: the one of the settings."""


@dataclass(slots=True, eq=False)
class Job:
    """The images of one `annotate` call."""

    images: Sequence[EncodedImage]
    results: list[Prediction | None]
    left: int
    done: threading.Event = field(default_factory=threading.Event)
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


@dataclass(slots=True, eq=False)
class Item:
    """One image on its way; model inputs are dropped as soon as they were used."""

    job: Job
    position: int
    size_hw: tuple[int, int] = (0, 0)
    note: str | None = None
    segmenter_input: Tensor | None = None
    views: list[View] = field(default_factory=list)
    found: dict[int, Detections] = field(default_factory=dict)
    """Detections of the views that were looked at so far."""
    failure: ImageError | None = None
    detections: Detections = field(default_factory=Detections.empty)
    masked: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def image(self) -> EncodedImage:
        """Its encoded bytes."""
        return self.job.images[self.position]


@dataclass(slots=True, eq=False)
class DetectorView:
    """One view of an image, ready for the detector."""

    item: Item
    index: int
    input: Tensor
