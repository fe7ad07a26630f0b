"""The models that ship with the package, as settings of a run."""

from pathlib import Path
from typing import Any

from owlsam_ray.errors import WeightsError

WEIGHTS = Path(__file__).parents[1] / "demo" / "weights"
"""Checkpoints trained on the demo's drawn training split: `detector/` and `segmenter/`."""


def model_settings() -> dict[str, dict[str, Any]]:
    """Sections of a run file that choose these models, which know only the bare names of coloured shapes."""
    return {
        "vocabulary": {"templates": "none"},
        "detector": {"weights": str(WEIGHTS / "detector"), "score_floor": 0.05, "labels": "multi"},
        "suppress": {"strategy": "nms", "threshold": 0.6},
        "segment": {"weights": str(WEIGHTS / "segmenter")},
    }


def check_shipped(*weights: str) -> None:
    """Check that paths which belong to the package exist; other paths are ignored.

    Raises:
        WeightsError: names one that does not.
    """
    for path in map(Path, weights):
        if path.parent == WEIGHTS and not (path / "model.safetensors").is_file():
            raise WeightsError(
                f"{path} does not hold the demo's checkpoint: install the package again, or give your own with "
                "--set detector.weights=DIR --set segment.weights=DIR"
            )
