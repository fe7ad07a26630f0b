"""Guard a run: refuse a call whose settings, weights or numerics do not match `run.json` (law 3).

Three hashes guard a run. The label fingerprint covers everything that can change labels; the layout hash covers which
images are in which shard; the numerics id covers what may change the last bits of a result.
"""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from owlsam_ray import __version__, storage
from owlsam_ray.config.added_settings import without_added
from owlsam_ray.config.load import differing_fields
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import GuardError, IncompleteError, InputError, shown
from owlsam_ray.models.load import weights_sha256
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.run.manifest import Manifest, load_manifest
from owlsam_ray.run.moved_data import Move, moves_between, without_places
from owlsam_ray.run.paths import QUERY_FILE, RUN_FILE
from owlsam_ray.run.record import RunRecord, as_stored, canonical_hash, save_record
from owlsam_ray.schema import SCHEMA_VERSION
from owlsam_ray.vocabulary import Vocabulary

_COMPUTING = ("torch", "torchvision", "transformers", "timm", "pillow", "numpy", "scipy", "opencv-python-headless")
"""Packages whose versions may change the last bits of results."""


def forget_plan(run_url: str) -> None:
    """Discard a plan before anything was labelled with it; the next call plans again."""
    storage.remove(storage.join(run_url, RUN_FILE))


def load_run_manifest(run_url: str, record: RunRecord) -> Manifest:
    """Load the manifest of a planned run and verify its hashes.

    Raises:
        GuardError: the manifest is missing, or is not the one that the run was planned with.
    """
    manifest = load_manifest(run_url, verify=True, num_parts=record.num_parts)
    if manifest is None:
        raise missing_manifest(run_url)
    if manifest.layout_hash != record.layout_hash:
        raise GuardError(
            f"the manifest of {run_url} has the layout hash {manifest.layout_hash[:16]}, but the run was planned with "
            f"{record.layout_hash[:16]}: restore {run_url}/manifest, or use another directory"
        )
    return manifest


def missing_manifest(run_url: str) -> GuardError:
    """Error for a planned run without its manifest."""
    return GuardError(f"{run_url}/manifest is missing: restore it, or plan again in another directory")


def check_config(config: RunConfig, record: RunRecord, *, data_too: bool = True, images_matter: bool = True) -> None:
    """Refuse a config whose frozen fields differ from those of the planned run.

    Weights and vocabulary files are compared by content, elsewhere; a dataset may have moved (`moved_data`).

    Args:
        config: this call's config.
        record: the run's record.
        data_too: whether the section `data` must match too; False when a run is extended.
        images_matter: whether the images are read. If not, they may be anywhere.

    Raises:
        GuardError: fields differ; the message has one line per field.
    """
    ours, theirs = with_planned_suffixes(config, record).frozen_fields(), record.stored_config().frozen_fields()
    if not data_too:
        theirs["data"] = ours["data"]
    theirs, ours = without_places(theirs, ours, any_data=not images_matter)
    lines = differing_fields(ours, theirs)
    if lines:
        unused = f" Nothing is labelled there yet: to plan again, delete its {RUN_FILE}."
        raise GuardError(
            "\n  ".join(
                [
                    f"the run directory {config.run} was planned with other settings (there -> here):",
                    *lines,
                    "Use another --run directory for these settings, or go back to the old ones. "
                    "Sections that may change freely: plan, storage, resources, reduce, evaluate, logging."
                    + (unused if record.fingerprint is None else ""),
                ]
            )
        )


def with_planned_suffixes(config: RunConfig, record: RunRecord) -> RunConfig:
    """Use the run's `data.suffixes` if the caller sets none: the default may have been extended since the plan."""
    if "suffixes" in config.data.model_fields_set:
        return config
    data = config.data.model_copy(update={"suffixes": record.stored_config().data.suffixes})
    return config.model_copy(update={"data": data})


def moves_since_plan(config: RunConfig, record: RunRecord) -> tuple[Move, ...]:
    """Moved roots of the dataset: from their location at plan time to their location in this call."""
    return moves_between(record.config.get("data", {}), config.data.model_dump(mode="json"))


def check_same_vocabulary(vocabulary: Vocabulary, record: RunRecord, run_url: str) -> None:
    """Refuse a dataset or vocabulary file whose categories or queries differ from the run's.

    Raises:
        GuardError: the message names the first category or query that differs.
    """
    for what, ours, theirs in (
        ("categories", vocabulary.categories, record.categories),
        ("queries", vocabulary.queries, record.queries),
    ):
        if tuple(ours) != tuple(theirs):
            pairs = zip_longest(theirs, ours)
            there, here = next((a, b) for a, b in pairs if a != b)
            raise GuardError(
                f"{run_url} was planned with other {what} ({len(theirs)} -> {len(ours)}); the first that differs: "
                f"{shown(there)} -> {shown(here)}. Use another --run directory, or go back to the old ones."
            )


def fingerprint_parts(
    config: RunConfig, record: RunRecord, *, weights: Mapping[str, Path], run_url: str
) -> dict[str, Any]:
    """Collect everything that the label fingerprint covers.

    Args:
        config: this attempt's config.
        record: the run's record.
        weights: local paths of the weights by role.
        run_url: the run directory; its query embeddings are hashed.

    Raises:
        IncompleteError: the query embeddings are missing.
    """
    query_url = storage.join(run_url, QUERY_FILE)
    try:
        queries = storage.read_bytes(query_url)
    except FileNotFoundError:
        raise IncompleteError(f"{query_url} is missing: restore it, or start again in another directory") from None
    return {
        "schema_version": SCHEMA_VERSION,
        "config": config.label_fields(),
        "categories": [without_added(category) for category in record.categories],
        "queries": [without_added(query) for query in record.queries],
        "weights": {role: weights_sha256(path) for role, path in sorted(weights.items())},
        "query_embeddings": hashlib.sha256(queries).hexdigest(),
    }


def guard_labels(record: RunRecord, parts: dict[str, Any], run_url: str) -> RunRecord:
    """Set the fingerprint in the first attempt; refuse a different one in later attempts.

    Raises:
        GuardError: the fingerprint differs; the message has one line per part.
    """
    if record.fingerprint is None:
        updated = as_stored(record, run_url).model_copy(
            update={
                "fingerprint": canonical_hash(parts),
                "fingerprint_parts": parts,
                "libraries": {name: version(name) for name in ("torch", "torchvision", "transformers", "timm", "ray")}
                | {"python": platform.python_version(), "owlsam-ray": __version__},
            }
        )
        save_record(run_url, updated)
        return updated
    stored = record.fingerprint_parts or {}
    then, now = without_places(stored.get("config", {}), parts["config"], any_data=True)
    same = canonical_hash(stored) == record.fingerprint and {**stored, "config": then} == {**parts, "config": now}
    if canonical_hash(parts) != record.fingerprint and not same:
        lines = differing_fields({**parts, "config": now}, {**stored, "config": then})
        raise GuardError(
            "\n  ".join(
                [
                    f"the labels in {run_url} were made with other weights or settings (there -> here):",
                    *lines,
                    "Use another --run directory, or bring back the old weights and settings. A run that was labelled "
                    "by an earlier version can be reduced and evaluated, but not continued.",
                ]
            )
        )
    return record


def numerics_of(allocation: Allocation, dtype: str) -> dict[str, Any]:
    """Everything that may change the last bits of results."""
    threads = {"torch_threads": allocation.torch_threads} if allocation.device == "cpu" else {}
    return (
        threads
        | {
            "device": allocation.device,
            "dtype": dtype,
            "detector_batch": allocation.detector_batch,
            "segmenter_batch": allocation.segmenter_batch,
            "decoder_batch": allocation.decoder_batch,
        }
        | {name: version(name) for name in _COMPUTING}
    )


def guard_numerics(record: RunRecord, numerics: dict[str, Any], run_url: str, *, allow_change: bool) -> RunRecord:
    """Record the numerics of this attempt; refuse a change without `allow_change`.

    Raises:
        GuardError: the numerics differ; the message has one line per part.
    """
    if record.numerics and record.numerics[-1] == numerics:
        return record
    if record.numerics and not allow_change:
        raise GuardError(
            "\n  ".join(
                [
                    f"shards in {run_url} were computed with other numerics (there -> here):",
                    *differing_fields(numerics, record.numerics[-1]),
                    "Results would agree within the tolerance that the README states, but not byte for byte. Restore "
                    "these under `resources`, or allow the change with --allow-numerics-change.",
                ]
            )
        )
    updated = as_stored(record, run_url).model_copy(update={"numerics": (*record.numerics, numerics)})
    save_record(run_url, updated)
    return updated


def check_writable(run_url: str) -> None:
    """Check that the run directory is writable by writing and deleting a file.

    Raises:
        InputError: it is not writable; the message names the directory and the reason.
    """
    try:
        storage.try_writing(run_url)
    except OSError as error:
        raise InputError(
            f"cannot write to the run directory {run_url}: {error.strerror or error}. Free space or fix its "
            "permissions, or choose another one with --run."
        ) from None
