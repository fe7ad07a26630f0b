"""Find and load the detector and the segmenter that the settings describe.

Model classes are imported only when needed: transformers and timm take seconds, and a fake needs neither.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from owlsam_ray.config.inference import DetectorConfig, FakesConfig, SegmentConfig
from owlsam_ray.models.weights import ModelPaths, sha256_of

if TYPE_CHECKING:
    import torch

    from owlsam_ray.models.protocols import Detector, Segmenter

FAKES = Path(__file__).parent / "fakes.py"
"""File that takes the place of a fake's weights."""
_FAKES_SHA256 = "d315f962bdf96aab2284ce30306e1e03b3842a5d6f9f1c7fc0d79d8dab358d24"
"""Hash of the file's first version. It is changed when a fake labels differently, not when its text is edited, so that
earlier runs can continue."""


def weights_sha256(path: Path) -> str:
    """Hex SHA-256 in the label fingerprint for weights that `find_models` found.

    Raises:
        WeightsError: they cannot be read.
    """
    return _FAKES_SHA256 if path == FAKES else sha256_of(path)


def find_models(detector: DetectorConfig, segment: SegmentConfig) -> ModelPaths:
    """Resolve hub names and refuse weights that would not load, without loading them.

    Raises:
        WeightsError: something is missing, damaged, or does not fit the settings.
        ConfigError: `detector.image_size` is not a multiple of the model's patch size.
    """
    return ModelPaths(_find_detector(detector), _find_segmenter(segment))


def _find_detector(settings: DetectorConfig) -> Path:
    if settings.model == "fake":
        return FAKES
    from owlsam_ray.models import owl_weights
    from owlsam_ray.models.hub import resolve_weights
    from owlsam_ray.models.owl_preprocess import make_preprocessing

    path = resolve_weights(settings.weights, setting="detector.weights")
    owl_weights.check_weights(path, settings.model)
    make_preprocessing(path, settings)
    return path


def _find_segmenter(settings: SegmentConfig) -> Path:
    if settings.model == "fake":
        return FAKES
    if settings.model == "sam":
        from owlsam_ray.models import sam
        from owlsam_ray.models.hub import resolve_weights

        path = resolve_weights(settings.weights, setting="segment.weights")
        sam.check_weights(path)
        return path
    from owlsam_ray.models import mobile_sam

    mobile_sam.check_weights(settings.weights)
    return Path(settings.weights)


def load_detector(
    settings: DetectorConfig,
    path: Path,
    *,
    device: "torch.device",
    dtype: "torch.dtype",
    fakes: FakesConfig = FakesConfig(),  # noqa: B008 (frozen)
) -> "Detector":
    """Load the detector that the settings describe, without its text encoder.

    Raises:
        WeightsError: weights and settings do not fit.
    """
    if settings.model == "fake":
        from owlsam_ray.models.fakes import FakeDetector

        return FakeDetector(delay_s=fakes.delay_s, poison=fakes.poison)
    from owlsam_ray.models.owl import Owl

    return Owl.load(path, settings, device=device, dtype=dtype)


def load_segmenter(settings: SegmentConfig, path: Path, *, device: "torch.device", dtype: "torch.dtype") -> "Segmenter":
    """Load the segmenter that the settings describe.

    Raises:
        WeightsError: weights and settings do not fit.
    """
    if settings.model == "fake":
        from owlsam_ray.models.fakes import FakeSegmenter

        return FakeSegmenter()
    if settings.model == "sam":
        from owlsam_ray.models.sam import Sam

        return Sam.load(path, device=device, dtype=dtype)
    from owlsam_ray.models.mobile_sam import MobileSam

    return MobileSam.load(str(path), device=device, dtype=dtype)
