"""Guard a run: refuse a call whose weights, prompts or numerics do not match `run.json` (law 3).

Three hashes guard a run. The label fingerprint covers everything that can change labels; the layout hash covers which
images are in which shard (`run.open_run` compares it, and the settings); the numerics id covers what may change the
last bits of a result.
"""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from owlsam_ray import __version__, storage
from owlsam_ray.config.added_settings import without_added
from owlsam_ray.config.load import differing_fields
from owlsam_ray.errors import GuardError, IncompleteError, InputError, shown
from owlsam_ray.models.load import weights_sha256
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.run.moved_data import without_places
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.record import canonical_hash, load_record, save_record
from owlsam_ray.run.run import Run
from owlsam_ray.schema import SCHEMA_VERSION
from owlsam_ray.vocabulary import Vocabulary

_COMPUTING = ("torch", "torchvision", "transformers", "timm", "pillow", "numpy", "scipy", "opencv-python-headless")
"""Packages whose versions may change the last bits of results."""


def check_same_vocabulary(vocabulary: Vocabulary, run: Run) -> None:
    """Refuse a dataset or vocabulary file whose categories or queries differ from the run's.

    Raises:
        GuardError: the message names the first category or query that differs.
    """
    for what, ours, theirs in (
        ("categories", vocabulary.categories, run.record.categories),
        ("queries", vocabulary.queries, run.record.queries),
    ):
        if tuple(ours) != tuple(theirs):
            pairs = zip_longest(theirs, ours)
            there, here = next((a, b) for a, b in pairs if a != b)
            raise GuardError(
                f"{run.url} was planned with other {what} ({len(theirs)} -> {len(ours)}); the first that differs: "
                f"{shown(there)} -> {shown(here)}. Use another --run directory, or go back to the old ones."
            )


def fingerprint_parts(run: Run, *, weights: Mapping[str, Path]) -> dict[str, Any]:
    """Collect everything that the label fingerprint covers, the run's query embeddings included.

    Args:
        run: the run.
        weights: local paths of the weights by role.

    Raises:
        IncompleteError: the query embeddings are missing.
    """
    query_url = storage.join(run.url, QUERY_FILE)
    try:
        queries = storage.read_bytes(query_url)
    except FileNotFoundError:
        raise IncompleteError(f"{query_url} is missing: restore it, or start again in another directory") from None
    return {
        "schema_version": SCHEMA_VERSION,
        "config": run.config.label_fields(),
        "categories": [without_added(category) for category in run.record.categories],
        "queries": [without_added(query) for query in run.record.queries],
        "weights": {role: weights_sha256(path) for role, path in sorted(weights.items())},
        "query_embeddings": hashlib.sha256(queries).hexdigest(),
    }


def guard_labels(run: Run, parts: dict[str, Any]) -> Run:
    """Set the fingerprint in the first attempt; refuse a different one in later attempts.

    Args:
        run: the run.
        parts: see `fingerprint_parts`.

    Returns:
        The run, with its fingerprint.

    Raises:
        GuardError: the fingerprint differs; the message has one line per part.
    """
    record = run.record
    if record.fingerprint is None:
        libraries = {name: version(name) for name in ("torch", "torchvision", "transformers", "timm", "ray")}
        return _with_recorded(
            run,
            fingerprint=canonical_hash(parts),
            fingerprint_parts=parts,
            libraries=libraries | {"python": platform.python_version(), "owlsam-ray": __version__},
        )
    stored = record.fingerprint_parts or {}
    then, now = without_places(stored.get("config", {}), parts["config"], any_data=True)
    same = canonical_hash(stored) == record.fingerprint and {**stored, "config": then} == {**parts, "config": now}
    if canonical_hash(parts) != record.fingerprint and not same:
        lines = differing_fields({**parts, "config": now}, {**stored, "config": then})
        raise GuardError(
            "\n  ".join(
                [
                    f"the labels in {run.url} were made with other weights or settings (there -> here):",
                    *lines,
                    "Use another --run directory, or bring back the old weights and settings. A run that was labelled "
                    "by an earlier version can be reduced and evaluated, but not continued.",
                ]
            )
        )
    return run


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


def guard_numerics(run: Run, numerics: dict[str, Any], *, allow_change: bool) -> Run:
    """Record the numerics of this attempt; refuse a change without `allow_change`.

    Args:
        run: the run.
        numerics: see `numerics_of`.
        allow_change: record different numerics instead of refusing them.

    Returns:
        The run, with these numerics as its most recent ones.

    Raises:
        GuardError: the numerics differ; the message has one line per part.
    """
    # Reloaded: an attempt that opened the run at the same time may have recorded its numerics since.
    run = replace(run, record=load_record(run.url) or run.record)
    recorded = run.record.numerics
    if recorded and recorded[-1] == numerics:
        return run
    if recorded and not allow_change:
        raise GuardError(
            "\n  ".join(
                [
                    f"shards in {run.url} were computed with other numerics (there -> here):",
                    *differing_fields(numerics, recorded[-1]),
                    "Results would agree within the tolerance that the README states, but not byte for byte. Restore "
                    "these under `resources`, or allow the change with --allow-numerics-change.",
                ]
            )
        )
    return _with_recorded(run, numerics=(*recorded, numerics))


def _with_recorded(run: Run, **fields: Any) -> Run:
    """Set fields of `run.json`; the others are kept as they are there, because a call may have extended the plan."""
    record = (load_record(run.url) or run.record).model_copy(update=fields)
    save_record(run.url, record)
    return replace(run, record=record)


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
