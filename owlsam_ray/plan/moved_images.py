"""Check a sample of a hundred files to confirm that a moved dataset is the one that was planned."""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from owlsam_ray import storage
from owlsam_ray.errors import GuardError, OwlsamError, shown
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.run import Run
from owlsam_ray.schema import Container
from owlsam_ray.sources.listing import address_of
from owlsam_ray.storage.secrets import masked

_LOOKED_AT = 100
_THREADS = 16
_MAY_MISS = 0.05
"""Share of the sampled files that may be missing, because a dataset may have lacked some files before the move."""
_log = logging.getLogger(__name__)


def with_checked_moves(run: Run) -> Run:
    """Return the run with URIs under the new roots, after checking a sample of its files there.

    Raises:
        GuardError: too many files are missing there, or one has a different size than at its old path or in the plan.
    """
    if not run.moves:
        return run
    moved = run.with_moves()
    rows = [
        (old, new)
        for old, new in _sample(run.manifest, moved.manifest)
        if old["uri"] != new["uri"] and old["container"] != Container.BAD
    ]
    if not rows:
        return moved
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda pair: _problem(*pair), rows))
    missing = [uri for uri, problem in found if problem == "missing"]
    other = [f"{uri} {problem}" for uri, problem in found if problem not in (None, "missing")]
    roots = ", ".join(f"{shown(masked(move.old))} -> {shown(masked(move.new))}" for move in run.moves)
    if other or len(missing) > _MAY_MISS * len(rows):
        first = masked(other[0] if other else f"{missing[0]} is missing")
        raise GuardError(
            f"the dataset that data.images, data.files and data.annotations now point to ({roots}) is not the one that "
            f"{run.url} was planned with: of {len(rows)} sampled files, {len(missing)} are missing and "
            f"{len(other)} differ; the first: {first}. Copy the files there, set the old paths, or use another "
            "--run directory."
        )
    if missing:
        _log.warning("%d of %d sampled files are missing under %s", len(missing), len(rows), roots)
    _log.info("the dataset has moved: %s", roots)
    return moved


def _sample(manifest: Manifest, moved: Manifest) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Sample evenly spread rows; return pairs of each row before and after the move."""
    count = min(_LOOKED_AT, manifest.num_images)
    ordinals = 1 + np.linspace(0, manifest.num_images - 1, count).round().astype(np.int64)
    pairs = []
    shards = manifest.shard_of(ordinals)
    for shard in np.unique(shards).tolist():
        first, _ = manifest.shard_span(shard)
        old, new = manifest.read_shard(shard), moved.read_shard(shard)
        for ordinal in ordinals[shards == shard].tolist():
            pairs.append((old.slice(ordinal - first, 1).to_pylist()[0], new.slice(ordinal - first, 1).to_pylist()[0]))
    return pairs


def _problem(old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str | None]:
    """URI of a file at its new path, and what is wrong with it; None if nothing is."""
    size = _size(address_of(new))
    if size is None:
        return new["uri"], "missing"
    if size < 0:
        return new["uri"], None
    before = _size(address_of(old))
    if before is not None and before >= 0 and size != before:
        return new["uri"], f"has {size} bytes, but {before} at its old path"
    if new["container"] in (None, Container.ESCAPED) and new["length"] not in (None, size):
        return new["uri"], f"has {size} bytes, but had {new['length']} when it was planned"
    if new["container"] == Container.TAR and size < new["offset"] + new["length"]:
        return new["uri"], f"has {size} bytes, but one of its images ends at byte {new['offset'] + new['length']}"
    return new["uri"], None


def _size(uri: str) -> int | None:
    """Size of a file in bytes; -1 if the storage reports no sizes, None if the file does not exist."""
    try:
        return storage.num_bytes(uri)
    except FileNotFoundError:
        return None
    except (OSError, OwlsamError):
        pass
    try:
        return -1 if storage.exists(uri) else None
    except (OSError, OwlsamError):
        return None
