"""Write review lists (`owlsam review-list`): a COCO file of some annotations, and a table of the reasons.

The shards are read twice: once to choose, keeping no more of each shard than the list may hold, and once more to write,
reading only shards with a chosen annotation. `info.owlsam_ray.review` in the file records what was shown, so that the
file, once changed in a tool, can be given to `reduce.corrections`.
"""

import csv
import io
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray import storage
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import InputError
from owlsam_ray.parallel.executors import map_in_order
from owlsam_ray.reduce.folder import claimed_folder, plain_url
from owlsam_ray.reduce.formats.coco import category_entry
from owlsam_ray.reduce.formats.json_rows import LINE_END, annotation_lines, dump_json, image_lines
from owlsam_ray.reduce.formats.text_rows import text_bytes
from owlsam_ray.reduce.fragments import ReduceJob
from owlsam_ray.reduce.labels import ShardLabels, read_labels
from owlsam_ray.reduce.run import Reduction, prepare
from owlsam_ray.reduce.sampling import Picks, SampleOptions, pick, why
from owlsam_ray.run.paths import COCO_FOLDER, REVIEW_FOLDER
from owlsam_ray.run.run import open_labelled_run
from owlsam_ray.run.shards import done_shards
from owlsam_ray.storage.secrets import masked_tree, published
from owlsam_ray.terminal import Show, silent, table_cell

REVIEW_FILE, REVIEW_TABLE = "review.json", "review.csv"
_SHARDS = 16
"""Shards that a worker reads between progress reports."""
_COLUMNS = ("id", "image_id", "file_name", "category", "score", "why")
_log = logging.getLogger(__name__)


def review_list(
    config: RunConfig, options: SampleOptions, *, out: str | None = None, show: Show = silent
) -> dict[str, Any]:
    """Choose annotations of a run, after the decisions of `reduce`, and write them for reviewers.

    Args:
        config: configuration of the run; its section `reduce` applies.
        options: which annotations to choose.
        out: directory of the files; None: `review` in the run directory.
        show: called with ("chosen", images so far, images of the run).

    Returns:
        images, annotations (with `whole_images`, including the other annotations of the same images), chosen, out,
        files. A run that is only partly labelled is sampled as far as it is.

    Raises:
        InputError: there is no run, or a setting does not fit it.
        GuardError: the run was made with other settings.
        AttemptLiveError: another call writes to the same directory.
        IncompleteError: nothing was labelled, or a shard is damaged.
        OSError: storage refused.
    """
    run = open_labelled_run(config)
    done, num_shards = done_shards(run.url), run.manifest.num_shards
    shards = [shard for shard in run.manifest.iter_shards() if shard in done]
    if len(shards) < num_shards:
        _log.warning("%d of %d shards are labelled: the list covers only these", len(shards), num_shards)
    out_url = plain_url(out or storage.join(run.url, REVIEW_FOLDER))
    if out_url == plain_url(config.reduce.out or storage.join(run.url, COCO_FOLDER)):
        raise InputError(f"{out_url} is where reduce writes: choose another --out for the review list")
    with claimed_folder(config, out_url) as (attempt, scratch):
        reviewing = _Reviewing(prepare(run, scratch, out_url), options, tuple(shards))
        if options.by == "uncertain" and not np.isfinite(reviewing.reduction.job.decisions.thresholds).any():
            raise InputError(
                "--by uncertain chooses the annotations nearest to a threshold, and none is set: set "
                "reduce.score_threshold or reduce.operating_points"
            )
        picks = reviewing.choose(show)
        attempt.raise_if_taken_over()
        return reviewing.write(picks)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Shards to choose from."""

    job: ReduceJob
    options: SampleOptions
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Chosen annotations of a shard."""

    job: ReduceJob
    options: SampleOptions
    shard: int
    ids: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Written:
    """Output for one shard."""

    images: bytes
    annotations: bytes
    ids: NDArray[np.int64]
    """Ids of the annotations."""
    rows: list[tuple[Any, ...]]
    """Rows of the table."""
    num_images: int


def choose_shards(choice: _Choice) -> tuple[Picks, int]:
    """Choose the first annotations of each cell from some shards; also return the number of images in them."""
    pa.set_cpu_count(1)  # each worker has a core of its own
    picks, images = Picks.joined([]), 0
    for shard in choice.shards:
        labels = _labels_of(choice.job, shard)
        images += labels.images.num_rows
        table = labels.annotations
        if len(labels.confirmed):
            table = table.filter(pc.invert(pc.is_in(table["id"], pa.array(labels.confirmed)))).combine_chunks()
        found = pick(table, shard, choice.options, choice.job.decisions.thresholds)
        picks = Picks.joined([picks, found]).first(choice.options.per_cell)
    return picks, images


def write_shard(wanted: _Wanted) -> _Written:
    """Render the chosen annotations of a shard, and their images."""
    pa.set_cpu_count(1)
    labels = _labels_of(wanted.job, wanted.shard)
    table = labels.annotations
    chosen = table.filter(pc.is_in(table["id"], pa.array(wanted.ids)))
    rows = chosen["image"].to_numpy()
    shown = table.filter(pc.is_in(table["image"], pa.array(rows))) if wanted.options.whole_images else chosen
    has_one = np.zeros(labels.images.num_rows, np.bool_)
    has_one[rows] = True
    part = replace(
        labels, annotations=shown.combine_chunks(), images=labels.images.filter(pa.array(has_one)).combine_chunks()
    )
    names = [category.name for category in wanted.job.decisions.categories]
    columns = (
        chosen["id"].to_pylist(),
        chosen["image_id"].to_pylist(),
        labels.images["file_name"].take(pa.array(rows)).to_pylist(),
        [names[category] for category in chosen["category"].to_pylist()],
        chosen["score"].to_pylist(),
        why(chosen, wanted.options, wanted.job.decisions.thresholds),
    )
    return _Written(
        images=bytes(text_bytes(image_lines(part))),
        annotations=bytes(text_bytes(annotation_lines(part))),
        ids=shown["id"].to_numpy(),
        rows=list(zip(*columns, strict=True)),
        num_images=part.images.num_rows,
    )


def _labels_of(job: ReduceJob, shard: int) -> ShardLabels:
    return read_labels(job.manifest, shard, job.rules, job.decisions, job.overlay)


@dataclass(frozen=True, slots=True)
class _Reviewing:
    """One call of `review-list`."""

    reduction: Reduction
    options: SampleOptions
    shards: tuple[int, ...]

    def choose(self, show: Show) -> Picks:
        """Choose the first annotations of each cell from the run."""
        job, images, picks = self.reduction.job, 0, Picks.joined([])
        total = job.manifest.num_images
        choices = [
            _Choice(job, self.options, self.shards[start : start + _SHARDS])
            for start in range(0, len(self.shards), _SHARDS)
        ]
        for found, num_images in self._map(choose_shards, choices):
            picks = Picks.joined([picks, found]).first(self.options.per_cell)
            images += num_images
            show("chosen", images, total)
        return picks

    def write(self, picks: Picks) -> dict[str, Any]:
        """Write the two files."""
        job, out_url = self.reduction.job, self.reduction.out_url
        wanted = [
            _Wanted(job, self.options, int(shard), np.sort(picks.id[picks.shard == shard]))
            for shard in np.unique(picks.shard)
        ]
        listed: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        num_images = 0
        with (
            tempfile.TemporaryFile() as images,
            tempfile.TemporaryFile() as annotations,
            storage.open_atomic(storage.join(out_url, REVIEW_TABLE)) as table,
        ):
            text = io.TextIOWrapper(table, "utf-8", errors="replace", newline="")
            writer = csv.writer(text, lineterminator="\n")
            writer.writerow(_COLUMNS)
            for written in self._map(write_shard, wanted):
                images.write(written.images)
                annotations.write(written.annotations)
                listed.append(written.ids)
                writer.writerows([table_cell(value) for value in row] for row in written.rows)
                num_images += written.num_images
            text.flush()
            text.detach()
            ids = np.concatenate(listed)
            with storage.open_atomic(storage.join(out_url, REVIEW_FILE)) as out:
                self._write_document(out, self._review(ids), images, annotations)
        return {
            "images": num_images,
            "annotations": len(ids),
            "chosen": len(picks),
            "out": out_url,
            "files": [REVIEW_FILE, REVIEW_TABLE],
        }

    def _review(self, ids: NDArray[np.int64]) -> dict[str, Any]:
        """Return what `corrections.py` needs to know, and how the annotations were chosen."""
        options = self.options
        choices: dict[str, Any] = {"by": options.by, "per_cell": options.per_cell, "seed": options.seed}
        if options.by == "score":
            choices["bins"] = options.bins
        if options.whole_images:
            return {"scope": "images"} | choices
        return {"scope": "annotations"} | choices | {"listed": ids.tolist()}

    def _write_document(
        self, out: IO[bytes], review: dict[str, Any], images: IO[bytes], annotations: IO[bytes]
    ) -> None:
        source = masked_tree(self.reduction.job.manifest.parts[0].source, published)
        info = source["info"] | {"owlsam_ray": self.reduction.provenance | {"review": review}}
        categories = [category_entry(category) for category in self.reduction.job.decisions.categories]
        out.write(f'{{\n"info": {dump_json(info)},\n"licenses": {dump_json(source["licenses"])},\n'.encode())
        for key, lines, end in (("images", images, "],\n"), ("annotations", annotations, "]\n}\n")):
            out.write(f'"{key}": [\n'.encode())
            size = max(0, lines.tell() - len(LINE_END))
            lines.seek(0)
            while size:
                block = lines.read(min(size, 2**22))
                out.write(block)
                size -= len(block)
            out.write((("\n" if lines.tell() else "") + end).encode())
            if key == "images":
                out.write(f'"categories": {dump_json(categories)},\n'.encode())

    def _map(self, function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        reduction = self.reduction
        executor = reduction.settings.executor
        return map_in_order(function, items, reduction.workers, executor, reduction.resources)
