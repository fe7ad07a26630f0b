"""Read and write `run.json`: what a run was planned with, and what labels it."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from owlsam_ray import storage
from owlsam_ray.config.load import config_from_stored
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import ConfigError, GuardError
from owlsam_ray.run.paths import RUN_FILE
from owlsam_ray.vocabulary import Query, Vocabulary


class RunRecord(BaseModel):
    """The content of `run.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    owlsam_version: str
    """Version that planned the run."""
    config: dict[str, Any]
    """The resolved config."""
    categories: tuple[Category, ...]
    """Categories to detect, with the ids of the output."""
    queries: tuple[Query, ...]
    """Queries for the detector, in the order of the query embeddings."""
    ids_per_image: int
    """K: an annotation's id is image ordinal × K + det_index."""
    layout_hash: str
    """Layout hash of the manifest at the plan or at the last extension."""
    num_parts: int | None = None
    """Number of valid manifest parts; None (in runs of version 0.1) means all."""
    fingerprint: str | None = None
    """The label fingerprint, set by the first attempt."""
    fingerprint_parts: dict[str, Any] | None = None
    """The values that the fingerprint is the hash of."""
    numerics: tuple[dict[str, Any], ...] = ()
    """All numerics that this run was computed with; the most recent is last."""
    libraries: dict[str, str] = {}
    """Library versions at the first attempt, for information only."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The categories and their queries."""
        return Vocabulary(self.categories, self.queries)

    @property
    def numerics_id(self) -> str:
        """Short hash of the most recent numerics.

        Raises:
            IndexError: no attempt has started yet.
        """
        return canonical_hash(self.numerics[-1])[:16]

    def stored_config(self) -> RunConfig:
        """Parse the stored config.

        Raises:
            ConfigError: it was written by a version with other fields.
        """
        return config_from_stored(self.config)


def canonical_hash(value: Any) -> str:
    """Hex SHA-256 of a tree of plain values, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def run_directory(config: RunConfig) -> str:
    """Return the run directory of a config.

    Raises:
        ConfigError: neither the run file nor `--run` names one.
    """
    if config.run is None:
        raise ConfigError("no run directory: set `run:` in the run file, or give --run DIR")
    return config.run


def load_record(run_url: str) -> RunRecord | None:
    """Load `run.json` of a run directory; None if there is none.

    Raises:
        GuardError: the file is damaged or was written by an incompatible version.
    """
    try:
        data = storage.read_bytes(storage.join(run_url, RUN_FILE))
    except FileNotFoundError:
        return None
    try:
        return RunRecord.model_validate_json(data)
    except ValidationError as error:
        raise GuardError(
            f"{run_url}/{RUN_FILE} is damaged or was written by another version: {error.errors(include_url=False)[:3]}"
        ) from None


def save_record(run_url: str, record: RunRecord) -> None:
    """Replace `run.json` atomically."""
    data = json.dumps(record.model_dump(mode="json"), indent=1).encode()
    storage.write_atomic(storage.join(run_url, RUN_FILE), data)


def forget_plan(run_url: str) -> None:
    """Discard a plan before anything was labelled with it; the next call plans again."""
    storage.remove(storage.join(run_url, RUN_FILE))
