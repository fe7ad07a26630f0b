"""Data classes that the stages of the engine pass to each other."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from owlsam_ray.config.inference import DecodeConfig, DetectorConfig, SegmentConfig, SuppressConfig, TilingConfig
from owlsam_ray.errors import ImageError
from owlsam_ray.inference.tile import View
from owlsam_ray.records import Detections, EncodedImage, Prediction

STAGES = ("decode", "detect", "suppress", "segment", "encode")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Settings of an engine: its steps and batch sizes."""

    decode: DecodeConfig
    detector: DetectorConfig
    suppress: SuppressConfig
    segment: SegmentConfig
    detector_batch: int
    """Views per detector call."""
    segmenter_batch: int
    """Images per encoder call."""
    decoder_batch: int
    """Boxes per mask decoder call."""
    threads: int
    """Threads that decode images and encode masks."""
    tiling: TilingConfig = field(default_factory=TilingConfig)
    """Tiling of large images; default: off."""
    label_thresholds: NDArray[np.float64] | None = None
    """(L,) suppression threshold of each category; None uses the threshold of the settings for all."""


@dataclass(slots=True, eq=False)
class Job:
    """One `annotate` call: its images and their results."""

    images: Sequence[EncodedImage]
    results: list[Prediction | None]
    left: int
    done: threading.Event = field(default_factory=threading.Event)
    stage_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


@dataclass(slots=True, eq=False)
class Item:
    """One image in the pipeline; model inputs are dropped after use."""

    job: Job
    position: int
    size_hw: tuple[int, int] = (0, 0)
    note: str | None = None
    segmenter_input: Tensor | None = None
    views: list[View] = field(default_factory=list)
    found: dict[int, Detections] = field(default_factory=dict)
    """Detections of the views processed so far, by view index."""
    failure: ImageError | None = None
    detections: Detections = field(default_factory=Detections.empty)
    masked: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def image(self) -> EncodedImage:
        """The encoded image."""
        return self.job.images[self.position]


@dataclass(slots=True, eq=False)
class DetectorView:
    """One view of an image, ready for the detector."""

    item: Item
    index: int
    input: Tensor
