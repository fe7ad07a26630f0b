"""`owlsam verify`: check that all files of a run directory are intact, and move damaged shards aside.

It needs only the run directory: no run file, no model, no Ray. Every shard file is read whole and proven by the rules
that `reduce` uses, on all cores. A missing shard is remaining work, not damage.
"""

import contextlib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from owlsam_ray import storage
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import GuardError, IncompleteError
from owlsam_ray.parallel.processes import in_order
from owlsam_ray.run.attempts import Slice
from owlsam_ray.run.claim import claim
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import DAMAGED, PREDICTIONS, QUERY_FILE, RUN_FILE
from owlsam_ray.run.proof import ShardRules, prove_shard
from owlsam_ray.run.record import canonical_hash
from owlsam_ray.run.run import StoredRun, open_stored_run
from owlsam_ray.run.shards import shard_name, shard_of, shard_url
from owlsam_ray.terminal import Show, silent

_NAMED = 20
"""Maximum number of bad files in the summary; the log names all."""
_SHARDS_AT_ONCE = 16
"""Shards handed to a process together."""
_READ_AT_ONCE = 4
"""Shards that a process reads concurrently from remote storage."""
_WORTH_PROCESSES = 20_000
"""Number of images from which worker processes are started; starting them takes a second."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardFinding:
    """Result of the check of one shard file."""

    shard: int
    state: Literal["good", "bad", "unread", "gone"]
    """`unread`: storage failed, which says nothing about the file; `gone`: the file vanished after the listing."""
    num_rows: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    has_checksum: bool = True
    error: str | None = None


@dataclass(slots=True)
class _Totals:
    """Results so far."""

    counts: Counter[str] = field(default_factory=Counter)
    """Rows of good shards by status; shards by state; good shards without a checksum as `without_checksum`."""
    findings: list[ShardFinding] = field(default_factory=list)
    """Findings of shards that are not good."""

    def add(self, found: ShardFinding) -> None:
        self.counts[found.state] += 1
        if found.state != "good":
            self.findings.append(found)
            if found.error is not None:
                _log.error("shard %d: %s", found.shard, found.error)
            return
        self.counts["images"] += found.num_rows
        self.counts.update(found.counts)
        self.counts["without_checksum"] += not found.has_checksum

    def errors(self, state: str) -> list[dict[str, Any]]:
        """The first shards in a state, for the summary."""
        chosen = [found for found in self.findings if found.state == state]
        return [{"shard": found.shard, "error": found.error} for found in chosen[:_NAMED]]


def verify_run(
    run_url: str, *, repair: bool = False, workers: int | None = None, show: Show = silent
) -> dict[str, Any]:
    """Check a run directory: run.json, manifest, query embeddings, and every shard file.

    Args:
        run_url: the run directory.
        repair: move bad shard files to `RUN/damaged`, so that the next `annotate` redoes exactly these. No attempt may
            be working on the run, and none can start meanwhile.
        workers: number of processes; default: one per CPU.
        show: called with the progress.

    Returns:
        Counts: `images`, `shards` of the run; `images_done`, `ok`, `empty`, `failed` in `good` shards; `left` shards
        without a file; `bad`, `unread` and the first of each; `without_checksum`; `temporary_files`, `other_files`;
        `moved`; `problems` with other files of the run.

    Raises:
        InputError: the directory holds no run.
        IncompleteError: there are problems that were not repaired; the counts are its second argument.
        AttemptLiveError: `repair` is set and an attempt works on the run.
    """
    run = _open(run_url)
    manifest = run.manifest
    with _alone(run) if repair else contextlib.nullcontext():
        names = storage.list_names(storage.join(run_url, PREDICTIONS))
        shards = [shard for name in names if (shard := shard_of(name)) is not None]
        others = [name for name in names if shard_of(name) is None]
        totals = _Totals()
        total = sum(manifest.shard_span(shard)[1] for shard in shards if shard < manifest.num_shards)
        seen = 0
        for found in _check_all(run, shards, workers):
            totals.add(found)
            seen += found.num_rows
            show("verified", seen, total)
        problems = _other_problems(run)
        for problem in problems:
            _log.error("%s", problem)
        moved = _move_aside(run_url, totals) if repair else []
        temporaries = storage.temporary_files(storage.join(run_url, PREDICTIONS))
        summary = _summary(manifest, totals, shards, moved) | {
            "problems": problems,
            "temporary_files": len(temporaries),
            "other_files": others[:_NAMED],
        }
        if repair:
            storage.remove_stale_temporaries(storage.join(run_url, PREDICTIONS))
    if others:
        _log.warning("%d files in %s/%s are not shards: %s", len(others), run_url, PREDICTIONS, ", ".join(others[:5]))
    _judge(run_url, summary)
    return summary


def _open(run_url: str) -> StoredRun:
    """Open the run, and check the manifest's hashes."""
    try:
        return open_stored_run(run_url)
    except GuardError as error:
        raise IncompleteError(f"{error}. Nothing else was checked: shards cannot be verified without it.") from None


def _alone(run: StoredRun) -> contextlib.AbstractContextManager[Any]:
    """Claim the whole run, so that no attempt works on it meanwhile."""
    stored = run.record.config.get("resources", {})
    defaults = ResourcesConfig()
    return claim(
        run.url,
        scope="label",
        part=Slice(),
        heartbeat_s=float(stored.get("heartbeat_s", defaults.heartbeat_s)),
        takeover_s=float(stored.get("takeover_s", defaults.takeover_s)),
    )


def _check_all(run: StoredRun, shards: Sequence[int], workers: int | None) -> Iterator[ShardFinding]:
    """Check all shards; yield findings in the order of the shards."""
    manifest = run.manifest
    small = replace(manifest, parts=tuple(replace(part, source={}) for part in manifest.parts))
    numerics = frozenset(canonical_hash(each)[:16] for each in run.record.numerics)
    rules = ShardRules.of(run.record, numerics=numerics)
    if workers is None:
        few = len(shards) * manifest.num_images < _WORTH_PROCESSES * manifest.num_shards
        workers = 1 if few else len(os.sched_getaffinity(0))
    chunks = [shards[start : start + _SHARDS_AT_ONCE] for start in range(0, len(shards), _SHARDS_AT_ONCE)]
    check = partial(check_shards, small, rules)
    for findings in in_order(check, chunks, workers, apart=not run.url.startswith("memory:")):
        yield from findings


def check_shards(manifest: Manifest, rules: ShardRules, shards: Sequence[int]) -> list[ShardFinding]:
    """Read and prove some shard files; called in worker processes."""
    check = partial(_check_shard, manifest, rules)
    if "://" not in manifest.run_url or len(shards) < 2:
        return [check(shard) for shard in shards]
    with ThreadPoolExecutor(min(_READ_AT_ONCE, len(shards))) as pool:
        return list(pool.map(check, shards))


def _check_shard(manifest: Manifest, rules: ShardRules, shard: int) -> ShardFinding:
    url = shard_url(manifest.run_url, shard)
    if shard >= manifest.num_shards:
        return ShardFinding(shard, "bad", error=f"{url} is not a shard of this run, which has {manifest.num_shards}")
    if not rules.fingerprint:
        return ShardFinding(shard, "bad", error=f"{url} was not written by this run, which has labelled nothing yet")
    try:
        image_ids = manifest.read_shard(shard)["image_id"].to_pylist()
        footer, _ = prove_shard(manifest.run_url, shard, image_ids, rules)
    except FileNotFoundError:
        return ShardFinding(shard, "gone")
    except IncompleteError as error:
        return ShardFinding(shard, "bad", manifest.shard_span(shard)[1], error=str(error))
    except OSError as error:
        return ShardFinding(shard, "unread", manifest.shard_span(shard)[1], error=f"{url} cannot be read: {error}")
    return ShardFinding(
        shard, "good", footer.num_rows, counts=footer.counts, has_checksum=footer.data_sha256 is not None
    )


def _other_problems(run: StoredRun) -> list[str]:
    """Problems with the fingerprint and the query embeddings, one sentence each."""
    record = run.record
    if record.fingerprint is None:
        return []
    parts = record.fingerprint_parts or {}
    problems = []
    if canonical_hash(parts) != record.fingerprint:
        problems.append(f"{run.url}/{RUN_FILE}: the label fingerprint is not the hash of its parts")
    url = storage.join(run.url, QUERY_FILE)
    try:
        found = hashlib.sha256(storage.read_bytes(url)).hexdigest()
    except FileNotFoundError:
        problems.append(f"{url} is missing: restore it; without it the run can be reduced, but not continued")
    else:
        if found != parts.get("query_embeddings"):
            problems.append(f"{url} is not the file that the labels were made with: restore it")
    return problems


def _move_aside(run_url: str, totals: _Totals) -> list[int]:
    """Move bad shard files to `RUN/damaged` without replacing files there; return their shard numbers."""
    folder = storage.join(run_url, DAMAGED)
    taken = set(storage.list_names(folder))
    moved = []
    for found in totals.findings:
        if found.state != "bad":
            continue
        name = shard_name(found.shard)
        number = 0
        while name in taken:
            number += 1
            name = f"{shard_name(found.shard)}.{number}"
        taken.add(name)
        storage.move(shard_url(run_url, found.shard), storage.join(folder, name))
        moved.append(found.shard)
    if moved:
        _log.warning("moved %d shard files to %s: `owlsam annotate` redoes them", len(moved), folder)
    return moved


def _summary(manifest: Manifest, totals: _Totals, shards: Sequence[int], moved: Sequence[int]) -> dict[str, Any]:
    counts = totals.counts
    there = sum(shard < manifest.num_shards for shard in shards) - sum(shard < manifest.num_shards for shard in moved)
    return {
        "images": manifest.num_images,
        "shards": manifest.num_shards,
        "images_done": counts["images"],
        "ok": counts["ok"],
        "empty": counts["empty"],
        "failed": counts["failed"],
        "good": counts["good"],
        "left": manifest.num_shards - there + counts["gone"],
        "without_checksum": counts["without_checksum"],
        "bad": counts["bad"],
        "bad_shards": totals.errors("bad"),
        "unread": counts["unread"],
        "unread_shards": totals.errors("unread"),
        "moved": len(moved),
    }


def _judge(run_url: str, summary: dict[str, Any]) -> None:
    """Refuse a run that still has problems.

    Raises:
        IncompleteError: there are problems; the summary is its second argument.
    """
    lines = list(summary["problems"])
    if summary["bad"] > summary["moved"]:
        lines.append(
            f"{summary['bad']} shard files of {run_url} cannot be trusted (the first: "
            f"{summary['bad_shards'][0]['error']}). `owlsam verify --repair` moves them aside, and `owlsam annotate` "
            "then labels only the images of these shards again."
        )
    if summary["unread"]:
        lines.append(
            f"{summary['unread']} shard files could not be read (the first: {summary['unread_shards'][0]['error']}): "
            "fix the storage and run this again"
        )
    if lines:
        raise IncompleteError("\n  ".join(lines), summary)
