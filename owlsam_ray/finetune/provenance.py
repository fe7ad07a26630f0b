"""Record where a trained model comes from."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from owlsam_ray import __version__, storage
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.finetune.config import FinetuneConfig
from owlsam_ray.finetune.store import PROVENANCE
from owlsam_ray.models.weights import sha256_of

_LIBRARIES = ("torch", "torchvision", "transformers", "timm", "numpy", "pillow")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that compute."""
    return {name: version(name) for name in _LIBRARIES}


def write_provenance(
    directory: Path,
    config: FinetuneConfig,
    *,
    best: dict[str, Any],
    categories: Sequence[Category],
    data_sha256: dict[str, str],
) -> None:
    """Write `provenance.json`: config, data, versions and scores; no path, host or time.

    Args:
        directory: directory of the model.
        config: configuration of the training.
        best: step and scores of the model.
        categories: the categories that it learned.
        data_sha256: result of `annotations_sha256`, by set.
    """
    fields = config.result_fields()
    model = fields["detector"] or fields["segmenter"]
    started_from = _weights(model.pop("weights"))
    record = {
        "owlsam_version": __version__,
        "versions": library_versions(),
        "config": fields,
        "started_from": started_from,
        "data_sha256": data_sha256,
        "categories": [category.name for category in categories],
        "best": best,
    }
    (directory / PROVENANCE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _weights(name: str | None) -> dict[str, Any] | None:
    """Hash of the weights that a training started from, and their own provenance; None: random weights."""
    if name is None:
        return None
    path = Path(name)
    if not path.exists():
        return {"hub": name}
    try:
        theirs = json.loads((path / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        theirs = None
    return {"sha256": sha256_of(path), "provenance": theirs}


def annotations_sha256(url: str) -> str:
    """Hex SHA-256 of an annotation file."""
    return hashlib.sha256(storage.read_bytes(url)).hexdigest()
