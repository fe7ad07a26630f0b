"""Match a run's shards against a ground truth, shard by shard, to collect a sample for each category.

Only columns of scores and flags stay in memory, besides the ground truth. Shards without an image of it are not read.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray.calibrate.partners import listed_categories, listed_images
from owlsam_ray.calibrate.samples import Sample
from owlsam_ray.coco_files.regions import Region
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.evaluate.average_precision import federated
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.evaluate.matching import FALSE, IGNORED, Shape, pair_cell
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.labels import ShardLabels, read_labels
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules
from owlsam_ray.run.shards import done_shards

_log = logging.getLogger(__name__)
_BOX = ("x0", "y0", "x1", "y1")
_COUNTED = (
    "images_listed",
    "images_used",
    "images_not_in_the_run",
    "images_not_labelled",
    "images_failed",
    "objects",
    "detections",
    "detections_right",
    "detections_false",
    "detections_ignored",
    "detections_without_mask",
)


@dataclass(frozen=True, slots=True)
class Collected:
    """The data that thresholds are fitted to."""

    samples: tuple[Sample, ...]
    """One sample for each category of the decisions."""
    num_images: int
    """Number of images that are in the ground truth and labelled."""
    counts: dict[str, int]
    """Counts for the report: images of the ground truth by outcome, objects, detections."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How shards are read and detections matched."""

    shards: ShardRules
    decisions: Decisions
    shape: Shape
    iou_threshold: float


@dataclass(slots=True)
class _Columns:
    """Columns of one category's sample while they grow."""

    score: list[NDArray[np.float32]] = field(default_factory=list)
    right: list[NDArray[np.bool_]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    """Image of each entry of `score`."""
    objects: list[int] = field(default_factory=list)

    def sample(self) -> Sample:
        lengths = [len(each) for each in self.score]
        return Sample.of(
            np.concatenate([np.empty(0, np.float32), *self.score]),
            np.concatenate([np.empty(0, np.bool_), *self.right]),
            np.repeat(np.array(self.image, np.int32), np.array(lengths, np.int64)),
            np.array(self.objects, np.int32),
        )


def collect(
    manifest: Manifest, truth: GroundTruth, rules: Rules, show: Callable[[str, int, int | None], None]
) -> Collected:
    """Match the labels of every listed image with its objects.

    Args:
        manifest: manifest of the run.
        truth: the ground truth, with masks if masks are matched.
        rules: rules of reading and matching; their decisions have all thresholds at the score floor.
        show: called with ("calibrated", shards so far, shards with a listed image).

    Images and categories are matched by name, so that ids may differ, and where names say nothing, by id. Detections of
    a category that the ground truth does not list are left out. So are, as in LVIS, detections of a category that was
    not annotated in their image.

    Raises:
        InputError: the ground truth has no image or no category of the run, or nothing to compare.
        IncompleteError: none of its images is labelled, or a shard cannot be trusted.
        OSError: storage gave up.
    """
    if rules.shape == "mask":
        truth = truth.with_masks()
    by_shard = listed_images(manifest, truth)
    collector = _Collector(truth, rules, listed_categories(rules.decisions.categories, truth))
    done = done_shards(manifest.run_url)
    counts = collector.counts
    counts["images_listed"] = len(truth.images)
    counts["images_not_in_the_run"] = len(truth.images) - sum(len(listed) for listed in by_shard.values())
    counts["images_not_labelled"] = sum(len(by_shard[shard]) for shard in by_shard.keys() - done)
    wanted = sorted(by_shard.keys() & done)
    for number, shard in enumerate(wanted):
        show("calibrated", number, len(wanted))
        labels = read_labels(manifest, shard, rules.shards, rules.decisions)
        collector.add(labels, by_shard[shard])
    show("calibrated", len(wanted), len(wanted))
    _check_counts(counts, truth, manifest, rules.shape)
    return Collected(
        tuple(each.sample() for each in collector.columns),
        counts["images_used"],
        {name: counts[name] for name in _COUNTED},
    )


class _Collector:
    """Samples while they grow."""

    def __init__(self, truth: GroundTruth, rules: Rules, partners: Sequence[int | None]) -> None:
        self._truth, self._rules, self._partners = truth, rules, partners
        self._objects: dict[int, list[Region]] = defaultdict(list)
        for each in truth.objects:
            self._objects[each.image_id].append(each)
        self.columns = [_Columns() for _ in partners]
        self._of_category = {
            partner: column for partner, column in zip(partners, self.columns, strict=True) if partner is not None
        }
        self.counts: Counter[str] = Counter()

    def add(self, labels: ShardLabels, listed: dict[int, int]) -> None:
        """Add the labels of one shard; `listed` maps its image ids to the ground truth's."""
        image_ids = labels.images["image_id"].to_pylist()
        is_labelled = labels.is_labelled
        rows = {row: listed[each] for row, each in enumerate(image_ids) if each in listed}
        used = {row: truth_id for row, truth_id in rows.items() if is_labelled[row]}
        self.counts["images_failed"] += len(rows) - len(used)
        if not used:
            return
        found = list(self._regions(labels, used))
        objects = [each for truth_id in used.values() for each in self._objects.get(truth_id, ())]
        images = {truth_id: self._truth.images[truth_id] for truth_id in used.values()}
        kept = federated(replace(self._truth, images=images, objects=objects), found)
        self.counts["detections_ignored"] += len(found) - len(kept)
        cells: dict[tuple[int, int], tuple[list[Region], list[Region]]] = defaultdict(lambda: ([], []))
        for side, regions in enumerate((objects, kept)):
            for each in regions:
                cells[each.image_id, each.category_id][side].append(each)
        numbers = {truth_id: self.counts["images_used"] + place for place, truth_id in enumerate(images)}
        self.counts["images_used"] += len(images)
        for (image_id, category_id), (right, given) in cells.items():
            if category_id in self._of_category:
                exhaustive = category_id not in images[image_id].not_exhaustive
                self._add_cell(self._of_category[category_id], numbers[image_id], right, given, exhaustive=exhaustive)

    def _add_cell(
        self, column: _Columns, image: int, objects: list[Region], found: list[Region], *, exhaustive: bool
    ) -> None:
        """Match one image and category."""
        real = sum(not each.is_crowd for each in objects)
        column.objects += [image] * real
        self.counts["objects"] += real
        if not found:
            return
        found.sort(key=lambda region: -region.score)
        outcomes, _ = pair_cell(
            objects, found, self._rules.shape, iou_threshold=self._rules.iou_threshold, exhaustive=exhaustive
        )
        counted = outcomes != IGNORED
        column.score.append(np.array([each.score for each in found], np.float32)[counted])
        column.right.append(outcomes[counted] != FALSE)
        column.image.append(image)
        for name, flags in (
            ("detections_ignored", ~counted),
            ("detections", counted),
            ("detections_right", outcomes >= 0),
            ("detections_false", outcomes == FALSE),
        ):
            self.counts[name] += int(np.count_nonzero(flags))

    def _regions(self, labels: ShardLabels, used: dict[int, int]) -> Iterator[Region]:
        """Yield the annotations of the given rows whose category the ground truth lists."""
        known = np.array([partner is not None for partner in self._partners], np.bool_)
        with_masks = self._rules.shape == "mask"
        table = labels.annotations
        chosen = np.isin(table["image"].to_numpy(), list(used)) & known[table["category"].to_numpy()]
        table = table.filter(pa.array(chosen))
        boxes = np.stack([table[name].to_numpy() for name in _BOX], axis=1)
        boxes[:, 2:] -= boxes[:, :2]
        masks = table["rle_counts"].to_pylist() if with_masks else [None] * table.num_rows
        sizes = self._sizes(labels, used) if with_masks else {}
        columns = [table[name].to_pylist() for name in ("image", "category", "score")]
        for row, category, score, box, mask in zip(*columns, boxes.tolist(), masks, strict=True):
            partner = self._partners[category]
            if partner is None or (with_masks and mask is None):
                self.counts["detections_without_mask"] += 1
                continue
            rle = {"size": list(sizes[row]), "counts": mask} if with_masks else None
            yield Region(used[row], partner, tuple(box), area=0.0, rle=rle, score=score)

    def _sizes(self, labels: ShardLabels, used: dict[int, int]) -> dict[int, tuple[int, int]]:
        """(H, W) by row.

        Raises:
            InputError: the ground truth states another size.
        """
        sizes = {}
        heights, widths = (labels.images[side].to_pylist() for side in ("height", "width"))
        for row, truth_id in used.items():
            sizes[row] = (heights[row], widths[row])
            stated = self._truth.images[truth_id].size_hw
            if stated != sizes[row]:
                raise InputError(
                    f"{self._truth.url}: image {truth_id} has size {stated} (height, width), but {sizes[row]} in the "
                    "run, so masks cannot be compared: calibrate on boxes (--kind box)"
                )
        return sizes


def _check_counts(counts: Counter[str], truth: GroundTruth, manifest: Manifest, shape: Shape) -> None:
    if not counts["images_used"]:
        if counts["images_not_labelled"]:
            raise IncompleteError(
                f"none of the {counts['images_not_labelled']} images that {truth.url} and {manifest.run_url} share is "
                "labelled yet: run `owlsam annotate`"
            )
        raise InputError(
            f"all {counts['images_failed']} images that {truth.url} and {manifest.run_url} share failed: name a ground "
            "truth of images that were labelled"
        )
    if shape == "mask" and counts["detections_without_mask"] and not counts["detections"]:
        raise InputError(f"no label of {manifest.run_url} has a mask in these images: calibrate on boxes (--kind box)")
    if not counts["objects"] and truth.objects and all(each.is_crowd for each in truth.objects):
        raise InputError(
            f"all {len(truth.objects)} objects of {truth.url} are crowd regions (iscrowd), in which detections are "
            "neither right nor wrong: set iscrowd to 0 for single objects, such as the brush masks that some tools "
            "export as crowds"
        )
    if not counts["detections_right"]:
        raise InputError(
            f"none of the {counts['detections']} detections in {counts['images_used']} images matches one of the "
            f"{counts['objects']} objects of {truth.url}: is it the ground truth of these images?"
        )
    for what, words in (
        ("images_not_in_the_run", "are not in the run"),
        ("images_not_labelled", "are not labelled yet"),
        ("images_failed", "failed"),
    ):
        if counts[what]:
            _log.warning("%d of the ground truth's %d images %s: calibrated without them",
                         counts[what], counts["images_listed"], words)  # fmt: skip
