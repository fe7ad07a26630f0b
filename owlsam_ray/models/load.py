"""Which class holds which model: from settings to a detector and a segmenter."""

from pathlib import Path

import torch

from owlsam_ray.models import mobile_sam, owl_weights, sam
from owlsam_ray.models.hub import resolve_weights
from owlsam_ray.models.mobile_sam import MobileSam
from owlsam_ray.models.owl import Owl
from owlsam_ray.models.owl_preprocess import make_preprocessing
from owlsam_ray.models.protocols import Detector, Segmenter
from owlsam_ray.models.sam import Sam
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.settings import DetectorConfig, SegmentConfig


def find_models(detector: DetectorConfig, segment: SegmentConfig) -> ModelPaths:
    """Resolve hub names and refuse weights that would not load, without loading them.

    Raises:
        WeightsError: something is missing, damaged, or does not fit the settings.
        ConfigError: `detector.image_size` is no multiple of the model's patch size.
    """
    detector_path = resolve_weights(detector.weights, setting="detector.weights")
    owl_weights.check_weights(detector_path, detector.model)
    make_preprocessing(detector_path, detector)
    if segment.model == "sam":
        segmenter_path = resolve_weights(segment.weights, setting="segment.weights")
        sam.check_weights(segmenter_path)
    else:
        segmenter_path = Path(segment.weights)
        mobile_sam.check_weights(segment.weights)
    return ModelPaths(detector_path, segmenter_path)


def load_detector(settings: DetectorConfig, path: Path, *, device: torch.device, dtype: torch.dtype) -> Detector:
    """The detector that the settings describe, without its text tower.

    Raises:
        WeightsError: weights and settings do not fit.
    """
    return Owl.load(path, settings, device=device, dtype=dtype)


def load_segmenter(settings: SegmentConfig, path: Path, *, device: torch.device, dtype: torch.dtype) -> Segmenter:
    """The segmenter that the settings describe.

    Raises:
        WeightsError: weights and settings do not fit.
    """
    if settings.model == "sam":
        return Sam.load(path, device=device, dtype=dtype)
    return MobileSam.load(str(path), device=device, dtype=dtype)
