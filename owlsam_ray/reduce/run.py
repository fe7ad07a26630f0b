"""Reduce a labelled run to its label files, and prove that every image is accounted for."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from owlsam_ray import __version__, storage
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.parallel.executors import map_in_order, num_workers
from owlsam_ray.parallel.lost_ray import SUFFIX, LossCount
from owlsam_ray.reduce.corrections.report import log_outcome, summary_of
from owlsam_ray.reduce.folder import (
    begin_files,
    check_foreign,
    check_inputs,
    claimed_folder,
    end_files,
    plain_url,
    remove_output,
)
from owlsam_ray.reduce.formats.coco import FailuresOutput
from owlsam_ray.reduce.formats.json_rows import without_nan
from owlsam_ray.reduce.formats.protocol import FileSpan, Head
from owlsam_ray.reduce.formats.registry import file_names, outputs_of
from owlsam_ray.reduce.fragments import Chunk, ChunkResult, Fragments, ReduceJob, write_chunk
from owlsam_ray.reduce.labels import LabelCounts
from owlsam_ray.reduce.operating_points import load_operating_points
from owlsam_ray.reduce.resolve import resolve_decisions, settings_in_use
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.paths import ANNOTATIONS, ATTEMPTS, COCO_FOLDER, CORRECTIONS, FAILURES
from owlsam_ray.run.proof import ShardRules, check_all_present
from owlsam_ray.run.run import Run, open_labelled_run
from owlsam_ray.run.shards import done_shards
from owlsam_ray.storage.secrets import masked_tree, published
from owlsam_ray.terminal import Show, silent

_CHUNKS_PER_WORKER = 8
"""Several for each worker, so that the last chunks end at about the same time."""
_MOST_SHARDS = 64
"""Most shards in a chunk: a worker reports progress after each chunk."""
_SMALL = 20_000
"""Number of images up to which starting processes takes longer than the work."""
_log = logging.getLogger(__name__)


def _nothing() -> None:
    """Do nothing."""


def reduce_run(config: RunConfig, *, partial: bool = False, show: Show = silent) -> dict[str, Any]:
    """Merge the shards of a run into the files of `reduce.formats`, under `reduce.out`.

    Args:
        config: configuration of the run; its section `reduce` applies.
        partial: reduce what is labelled so far. `info` says so, and an error is raised at the end if images were
            missing.
        show: called with ("reduced", images so far, images of the run).

    Returns:
        Counts: images, ok, empty, failed, unlabelled, num_annotations, num_masks, left_out (by step), failed_by_reason,
        flagged_by_reason, and the files.

    Raises:
        InputError: there is no run, or a setting does not fit it.
        GuardError: the run was made with other settings.
        AttemptLiveError: another reduce writes to the same directory.
        IncompleteError: shards are missing or damaged, or the proof does not add up; then no file appears. With
            `partial`, missing shards raise it only after everything is written.
        OSError: storage refused.
    """
    run = open_labelled_run(config)
    shards: Sequence[int] = range(run.manifest.num_shards)
    if partial:
        done = done_shards(run.url)
        shards = [shard for shard in shards if shard in done]
    else:
        check_all_present(run.manifest)
    out_url = plain_url(config.reduce.out or storage.join(run.url, COCO_FOLDER))
    check_inputs(config, out_url)
    if config.reduce.executor == "ray" and "memory://" in (run.url[:9], out_url[:9]):
        raise InputError("reduce.executor: ray cannot read memory://, which exists only in this process: set local")
    with claimed_folder(config, out_url) as (attempt, scratch):
        reduction = prepare(run, scratch, out_url)
        names = [name for output in reduction.job.outputs for name in file_names(output.name, reduction.spans)]
        if out_url != plain_url(storage.join(run.url, COCO_FOLDER)):  # the default is the run's own folder
            check_foreign(out_url, names)
        counts = reduction.work(shards, partial=partial, show=show, raise_if_taken_over=attempt.raise_if_taken_over)
    if counts["unlabelled"]:
        raise IncompleteError(
            f"{counts['unlabelled']} of {counts['images']} images of {run.url} are not labelled yet: the files cover "
            "only the others, and their info says `partial`. Call `owlsam annotate` again, then reduce again.",
            counts,
        )
    return counts


@dataclass(frozen=True, slots=True)
class Reduction:
    """One call of `reduce`, with its settings resolved."""

    settings: ReduceConfig
    resources: ResourcesConfig
    job: ReduceJob
    spans: tuple[FileSpan, ...]
    out_url: str
    provenance: dict[str, Any]
    corrections: Counter[str] = field(default_factory=Counter)
    """Counts of reviewers' corrections that no shard sees."""

    @property
    def workers(self) -> int:
        """Number of processes or tasks that run at a time."""
        manifest, settings = self.job.manifest, self.settings
        if any(url.startswith("memory://") for url in (manifest.run_url, self.out_url)):
            return 1  # other processes cannot see it
        return num_workers(settings.workers, num_images=manifest.num_images, small=_SMALL, executor=settings.executor)

    def work(
        self,
        shards: Sequence[int],
        *,
        partial: bool,
        show: Show = silent,
        raise_if_taken_over: Callable[[], None] = _nothing,
    ) -> dict[str, Any]:
        """Write everything; return the counts."""
        manifest, settings, workers = self.job.manifest, self.settings, self.workers
        chunks = list(_chunks(self.job, self.spans, shards, workers))
        results: list[ChunkResult] = []
        counts, images = LabelCounts(corrections=Counter(self.corrections)), 0
        show("reduced", 0, manifest.num_images)
        losses = LossCount(
            storage.join(manifest.run_url, ATTEMPTS, f"reduce{SUFFIX}"),
            progress=lambda: 0,
            state=lambda: "no file was written",
        )
        for result in map_in_order(write_chunk, chunks, workers, settings.executor, self.resources, losses):
            results.append(result)
            counts.add(result.counts)
            images += result.num_images
            show("reduced", images, manifest.num_images)
        unlabelled = manifest.num_images - images
        _check_sum(counts, images)
        proof = _proof(manifest.num_images, counts, unlabelled, partial=partial)
        source = without_nan(manifest.parts[0].source)
        head = Head(
            info=masked_tree(source["info"], published) | {"owlsam_ray": self.provenance | {"proof": proof}},
            licenses=masked_tree(source["licenses"], published),
            categories=self.job.decisions.categories,
            counts=counts,
            format_counts=_format_counts(results),
        )
        files = self._assemble(head, results, raise_if_taken_over)
        if counts.corrections:
            log_outcome(counts.corrections, storage.join(self.out_url, CORRECTIONS))
        if counts.left_out["small_mask"]:
            _log.info(
                "left out %d annotations whose masks have fewer than %d pixels (reduce.min_mask_area)",
                counts.left_out["small_mask"],
                settings.min_mask_area,
            )
        return _summary(manifest.num_images, counts, unlabelled) | {
            "annotations": storage.join(self.out_url, ANNOTATIONS) if ANNOTATIONS in files else None,
            "failures": storage.join(self.out_url, FAILURES),
            "out": self.out_url,
            "files": files,
            **({"told": head.format_counts} if head.format_counts else {}),
        }

    def _assemble(self, head: Head, results: list[ChunkResult], raise_if_taken_over: Callable[[], None]) -> list[str]:
        """Assemble the files; `reduce.json`, removed first and written last, says that they are complete."""
        summary: dict[str, Any] = {"info": head.info["owlsam_ray"]} | (
            {"told": head.format_counts} if head.format_counts else {}
        )
        parts = [
            (output, Fragments(self.job, output.name, self.out_url, head, self.spans, results))
            for output in self.job.outputs
        ]
        raise_if_taken_over()
        before = begin_files(self.out_url)
        files: list[str] = []
        for output, fragments in parts:
            raise_if_taken_over()
            files += output.assemble(fragments)
        raise_if_taken_over()
        for name in sorted(before - set(files)):
            remove_output(self.out_url, name)
        summary["files"] = files
        end_files(self.out_url, msgspec.json.format(msgspec.json.encode(summary, order="deterministic"), indent=1))
        return files


def prepare(run: Run, scratch: str, out_url: str) -> Reduction:
    """Resolve the settings; refuse settings that do not fit the run, before a shard is read.

    Raises:
        InputError: a setting does not fit the run.
        GuardError: a file that a setting names belongs to another run.
    """
    settings, record, manifest = run.config.reduce, run.record, run.manifest
    parts, fingerprint = record.fingerprint_parts or {}, record.fingerprint or ""
    score_floor = parts["config"]["detector"]["score_floor"]
    points = None
    if settings.operating_points is not None:
        points = load_operating_points(settings.operating_points, fingerprint=fingerprint)
    decisions = resolve_decisions(settings, record, score_floor, points)
    rules = ShardRules.of(record)
    corrections = None
    if settings.corrections is not None:
        # Imported here: other reduces need neither OpenCV nor pycocotools.
        from owlsam_ray.reduce.corrections.corrections import load_corrections

        corrections = load_corrections(
            settings, manifest, rules, decisions, categories=record.categories, scratch=scratch
        )
    job = ReduceJob(
        manifest=manifest,
        rules=rules,
        decisions=decisions,
        outputs=(
            FailuresOutput(),
            *([corrections.output] if corrections is not None else []),
            *outputs_of(run, decisions),
        ),
        scratch=scratch,
        overlay=corrections.overlay if corrections is not None else None,
    )
    provenance = {
        "version": __version__,
        "fingerprint": fingerprint,
        "image_list": manifest.images_digest(),
        "detector": parts["config"]["detector"]["model"],
        "segmenter": parts["config"]["segment"]["model"],
        "weights_sha256": parts["weights"],
        "queries": [query.model_dump(mode="json", exclude_defaults=True) for query in record.queries],
        "ids_per_image": record.ids_per_image,
        "score_floor": score_floor,
        **settings_in_use(settings, points),
        **({"corrections": corrections.provenance} if corrections is not None else {}),
    }
    return Reduction(
        settings,
        run.config.resources,
        job,
        spans_of(manifest, settings.images_per_file),
        out_url,
        provenance,
        corrections.counts if corrections is not None else Counter(),
    )


def spans_of(manifest: Manifest, images_per_file: int | None) -> tuple[FileSpan, ...]:
    """Split shards into files: each has as many whole shards as fit into `images_per_file`.

    Raises:
        InputError: a single shard has more images.
    """
    if images_per_file is None:
        return (FileSpan(0, 1, 0, manifest.num_shards),)
    starts, images = [0], 0
    for shard in manifest.iter_shards():
        _, size = manifest.shard_span(shard)
        if size > images_per_file:
            raise InputError(
                f"reduce.images_per_file {images_per_file} is less than the {size} images of a shard, and files are "
                "split only between shards: set a larger number"
            )
        if images + size > images_per_file:
            starts.append(shard)
            images = 0
        images += size
    ends = [*starts[1:], manifest.num_shards]
    return tuple(
        FileSpan(number, len(starts), start, end - start)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    )


def _chunks(job: ReduceJob, spans: tuple[FileSpan, ...], shards: Sequence[int], workers: int) -> Iterator[Chunk]:
    """Split shards into chunks, each within one span, in manifest order."""
    size = max(1, min(_MOST_SHARDS, len(shards) // (workers * _CHUNKS_PER_WORKER)))
    number, position = 0, 0
    for span in spans:
        end = span.first_shard + span.num_shards
        own = []
        while position < len(shards) and shards[position] < end:
            own.append(shards[position])
            position += 1
        for start in range(0, len(own), size):
            yield Chunk(job, number, span.number, tuple(own[start : start + size]))
            number += 1


def _check_sum(counts: LabelCounts, images: int) -> None:
    """Check law 1: every image and every detection is counted exactly once.

    Raises:
        IncompleteError: the images or the detections do not add up.
    """
    counted = sum(counts.status.values())
    left_out = sum(counts.left_out.values())
    if counted != images:
        raise IncompleteError(f"{counted} images are ok, empty or failed, but the shards hold {images}")
    kept = counts.annotations - counts.corrections["added"]
    if counts.detections != kept + left_out:
        raise IncompleteError(
            f"{kept} annotations and {left_out} detections left out do not add up to the {counts.detections} "
            "detections of the shards"
        )


def _format_counts(results: list[ChunkResult]) -> dict[str, dict[str, int]]:
    """Sum each output's own counts, by output."""
    sums: dict[str, Counter[str]] = {}
    for result in results:
        for output, counts in result.format_counts.items():
            sums.setdefault(output, Counter()).update(counts)
    return {output: dict(sorted(counts.items())) for output, counts in sums.items() if counts}


def _proof(num_images: int, counts: LabelCounts, unlabelled: int, *, partial: bool) -> dict[str, Any]:
    return {
        "images": num_images,
        **{status: counts.status[status] for status in ("ok", "empty", "failed")},
        **({"unlabelled": unlabelled, "partial": True} if partial else {}),
        "failed_by_reason": dict(sorted(counts.failed.items())),
        "flagged_by_reason": dict(sorted(counts.flagged.items())),
        "detections": counts.detections,
        "annotations": counts.annotations,
        "left_out": {step: count for step, count in sorted(counts.left_out.items()) if count},
        **_corrections(counts),
    }


def _corrections(counts: LabelCounts) -> dict[str, Any]:
    return {"corrections": summary_of(counts.corrections)} if counts.corrections else {}


def _summary(num_images: int, counts: LabelCounts, unlabelled: int) -> dict[str, Any]:
    return {
        "images": num_images,
        **{status: counts.status[status] for status in ("ok", "empty", "failed")},
        "unlabelled": unlabelled,
        "num_annotations": counts.annotations,
        "num_masks": counts.masks,
        "num_small": counts.left_out["small_mask"],
        "left_out": {step: count for step, count in counts.left_out.items() if count},
        **_corrections(counts),
        "failed_by_reason": dict(sorted(counts.failed.items())),
        "flagged_by_reason": dict(sorted(counts.flagged.items())),
    }
