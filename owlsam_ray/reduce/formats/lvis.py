"""Write LVIS: COCO with the fields that its API and evaluation need, claiming no more than the labels support."""

import logging
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats.coco import category_entry, write_document
from owlsam_ray.reduce.formats.json_rows import (
    annotation_lines,
    box_outline_pieces,
    image_lines,
    provenance_pieces,
    rle_pieces,
)
from owlsam_ray.reduce.formats.loops import rows_of_all_but
from owlsam_ray.reduce.formats.protocol import Head, Parts, Rendered
from owlsam_ray.reduce.formats.text_rows import Piece, text_bytes
from owlsam_ray.reduce.labels import ShardLabels
from owlsam_ray.vocabulary.builtin import builtin

MOST_DETECTIONS = 300
"""Most detections of an image that the LVIS challenge allows."""
_OWN_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")
_FREQUENCIES = (("r", 10), ("c", 100))
"""LVIS's own upper limits, by number of images."""
_log = logging.getLogger(__name__)

Pairs = NDArray[np.int64]
"""(P, 2) row of an image among those that did not fail, and index of a category: unique, ascending."""


@dataclass(frozen=True, slots=True)
class LvisOutput:
    """Write `lvis.json`.

    Images have `neg_category_ids`, the categories that were queried and not found, and `not_exhaustive_category_ids`,
    found categories of which a limit may have dropped detections. The limits are the 300 best detections of an image
    (by score, ties by ascending id), `reduce.max_per_image` and `detector.max_detections`. In an image that reached one
    of the latter two, with scores above a threshold, no category is listed as negative. `coco_url` and the source's
    other fields are kept, except its own two lists. A detection without a mask gets its box as the polygon, as LVIS's
    reader of results does.
    """

    categories: tuple[Category, ...]
    """(C,) categories of the output."""
    asked: tuple[bool, ...]
    """(C,) whether the run queried the category and no setting leaves it out."""
    least_score: float = -np.inf
    """The lowest threshold of any category: detections that inference cut below it do not matter."""
    max_per_image: int | None = None
    prompts: tuple[str, ...] | None = None
    """See `CocoOutput`."""
    name: str = "lvis"

    @staticmethod
    def of(decisions: Decisions, prompts: tuple[str, ...] | None = None) -> "LvisOutput":
        """Create the output for a reduce with these decisions."""
        asked = np.isin(np.arange(len(decisions.categories)), decisions.target).tolist()
        thresholds = decisions.thresholds[decisions.target >= 0]
        least = float(thresholds.min()) if len(thresholds) else np.inf
        return LvisOutput(decisions.categories, tuple(asked), least, decisions.max_per_image, prompts)

    def render(self, labels: ShardLabels) -> Rendered:
        """Render the lines of images and annotations, and count each category."""
        row_of = np.cumsum(labels.is_labelled) - 1
        images, category = (
            each.astype(np.int64)
            for each in (row_of[labels.annotations["image"].to_numpy()], labels.annotations["category"].to_numpy())
        )
        found = self._pairs(images, category)
        limits = labels.images["limit_score"].to_numpy()[labels.is_labelled]  # NaN where no limit was reached
        is_full = limits > self.least_score
        if self.max_per_image is not None:
            is_full = is_full | (np.bincount(images, minlength=len(is_full)) >= self.max_per_image)
        best = _best(labels.annotations, images)
        cut = self._pairs(images[~best], category[~best])
        if not best.all():
            labels = replace(labels, annotations=labels.annotations.filter(pa.array(best)).combine_chunks())
        table = labels.annotations
        has_no_mask = pc.is_null(table["rle_counts"]).combine_chunks()
        lines = annotation_lines(
            labels,
            segmentation=[*rle_pieces(table), *box_outline_pieces(table, has_no_mask)],
            more=[] if self.prompts is None else provenance_pieces(labels, self.prompts),
        )
        partly = np.unique(np.concatenate([found[is_full[found[:, 0]]], cut]), axis=0)
        return Rendered(
            {
                "images": text_bytes(
                    image_lines(labels, self._about_categories(found, partly, is_full), without=_OWN_FIELDS)
                ),
                "annotations": text_bytes(lines),
                "counts": self._counts(images[best], category[best]).tobytes(),
            },
            counts={"over_300": int(np.count_nonzero(~best)), "box_for_mask": pc.sum(has_no_mask).as_py() or 0},
        )

    def assemble(self, parts: Parts) -> list[str]:
        """Write one file for each span; category counts cover all files."""
        totals = np.zeros((len(parts.head.categories), 2), np.int64)

        def add(file: IO[bytes]) -> None:
            rows = np.frombuffer(file.read(), np.int64).reshape(-1, 3)
            np.add.at(totals, rows[:, 0], rows[:, 1:])

        parts.read("counts", add)
        categories = category_entries(parts.head, totals)
        names = []
        for span in parts.spans:
            names.append(span.name("lvis", ".json"))
            with parts.open(names[-1]) as out:
                write_document(out, parts, span, output=self.name, categories=categories)
        counts = parts.head.format_counts.get(self.name, {})
        if any(counts.values()):
            _log.info(
                "lvis: left out %d annotations beyond the best %d of an image; %d without a mask got their box as mask",
                counts["over_300"],
                MOST_DETECTIONS,
                counts["box_for_mask"],
            )
        return names

    def _pairs(self, images: NDArray[np.int64], categories: NDArray[np.int64]) -> Pairs:
        count = max(1, len(self.categories))
        return np.stack(np.divmod(np.unique(images * count + categories), count), axis=1)

    def _counts(self, images: NDArray[np.int64], categories: NDArray[np.int64]) -> NDArray[np.int64]:
        """(categories that occur, 3) index, number of images, number of annotations."""
        present, instances = np.unique(categories, return_counts=True)
        _, with_it = np.unique(self._pairs(images, categories)[:, 1], return_counts=True)
        return np.stack([present, with_it, instances], axis=1).astype(np.int64)

    def _about_categories(self, found: Pairs, partly: Pairs, is_full: NDArray[np.bool_]) -> list[Piece]:
        """The fields `neg_category_ids` and `not_exhaustive_category_ids` of each image."""
        asked = np.flatnonzero(self.asked)
        place = np.full(len(self.asked), -1)
        place[asked] = np.arange(len(asked))
        found = found[place[found[:, 1]] >= 0]
        num_images = len(is_full)
        ids = [str(category.id) for category in self.categories]
        absent = rows_of_all_but(
            [ids[category] for category in asked],
            place[found[:, 1]],
            np.searchsorted(found[:, 0], np.arange(num_images + 1)),
            is_blank=is_full,
        )
        starts = np.searchsorted(partly[:, 0], np.arange(num_images + 1))
        lists = pa.ListArray.from_arrays(
            pa.array(starts, pa.int32()), pa.array(ids, pa.string()).take(pa.array(partly[:, 1]))
        )
        return [
            Piece(', "neg_category_ids": [', absent, "]"),
            Piece(', "not_exhaustive_category_ids": [', pc.binary_join(lists, ", "), "]"),
        ]


def category_entries(head: Head, totals: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The list `categories` in LVIS's form.

    Args:
        head: what is known once all shards are counted.
        totals: (C, 2) images with each category, and its annotations.

    `synset` is present where the built-in lists know the category, by id and name. `frequency` is the one that LVIS
    states, else LVIS's rule applied to the images counted here. Definitions are not known.
    """
    synsets = {
        (each.id, name): each.synset
        for vocabulary in (builtin("coco"), builtin("lvis"))
        for each in vocabulary
        for name in each.spellings
        if each.synset
    }
    entries = []
    for category, (num_images, num_instances) in zip(head.categories, totals.tolist(), strict=True):
        synset = synsets.get((category.id, category.name))
        others = [synonym for synonym in category.synonyms if synonym != category.name]
        counted = next((letter for letter, most in _FREQUENCIES if num_images <= most), "f")
        entries.append(
            category_entry(category)
            | ({"synset": synset} if synset else {})
            | {
                "synonyms": [category.name, *others],
                "frequency": category.frequency or counted,
                "image_count": num_images,
                "instance_count": num_instances,
            }
        )
    return entries


def _best(table: pa.Table, images: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(annotations,) whether the limit of 300 keeps each."""
    best = np.ones(len(images), np.bool_)
    starts = np.flatnonzero(np.diff(images, prepend=-1))
    ends = np.append(starts[1:], len(images))
    scores = table["score"].to_numpy()
    for start, end in zip(starts, ends, strict=False):
        if end - start > MOST_DETECTIONS:
            best[start + np.argsort(-scores[start:end], kind="stable")[MOST_DETECTIONS:]] = False
    return best
