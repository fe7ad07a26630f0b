"""Read the file that `calibrate` writes and `reduce` applies: a score threshold for each category."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from owlsam_ray import storage
from owlsam_ray.errors import GuardError, InputError


class OperatingPoint(BaseModel):
    """The threshold of one category. Further fields of the file are kept, but not interpreted."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    category_id: int
    name: str
    threshold: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
    """Annotations are kept when their score is greater."""


class OperatingPoints(BaseModel):
    """The thresholds of a run."""

    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)

    version: Literal[1] = 1
    fingerprint: str
    """Label fingerprint of the run that the scores are from."""
    target: dict[str, Any]
    """What the thresholds were optimized for."""
    settings: dict[str, Any] | None = None
    """Settings of `reduce` under which they were fitted, as `settings_in_use` returns them; None: not known."""
    categories: tuple[OperatingPoint, ...]


def load_operating_points(url: str, *, fingerprint: str) -> OperatingPoints:
    """Read a file written by `calibrate`.

    Args:
        url: path or fsspec URL.
        fingerprint: label fingerprint of the run that it is to be applied to.

    Raises:
        InputError: the file cannot be read, or was not written by `calibrate`.
        GuardError: it was fitted to another run's scores.
    """
    try:
        points = OperatingPoints.model_validate(json.loads(storage.read_bytes(url)))
    except OSError as error:
        raise InputError(
            f"cannot read reduce.operating_points {url}: {error.strerror or error}. `owlsam calibrate` writes it."
        ) from None
    except (ValidationError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0]
        raise InputError(f"reduce.operating_points {url} was not written by `owlsam calibrate`: {first}") from None
    if points.fingerprint != fingerprint:
        raise GuardError(
            f"{url} was calibrated on other labels (fingerprint {points.fingerprint[:16]}, here {fingerprint[:16]}): "
            "calibrate this run, or leave reduce.operating_points out (null)"
        )
    return points
