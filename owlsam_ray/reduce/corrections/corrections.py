"""Read a file of reviewers' corrections and split it into rows for each shard.

The file is a COCO file written by a reduce (or `owlsam review-list`) and changed in a tool. Its annotations are matched
to the model's by id, and by box and category where a tool numbered them anew (`matching.py` states the steps). The id
is fixed by the image and the detection and does not depend on the settings of `reduce`. An annotation with:

- same box, mask and category: confirmed. The annotation stays as the model made it, whatever the settings say;
- another box, mask or category: edited. The file's version replaces it, under the same id;
- no match: a new annotation (`overlay.py` assigns its id);
- `"owlsam_rejected": true`: the model's annotation is removed;
- not in the file: depends on the scope.

Ids may be strings of digits, or floats without a fraction; anything else that is not an integer counts as no id.

The scope is `images` by default, since a file of a reduce shows whole images: each image in the file (or each with
`"owlsam_reviewed": true`, when any image has this field) has exactly the annotations of the file, so a missing one was
deleted. Review lists have the scope `annotations`: reviewers saw only some annotations of an image, so listed ones that
are missing were deleted, and all others stay as the model made them.

An entry that cannot be applied is a conflict: it is left out, and the detection that it names stays as the settings
have it. `corrections_report.json` lists all conflicts.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray import storage
from owlsam_ray.coco_files.annotations import structure_error
from owlsam_ray.coco_files.document import Document
from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import InputError, shown
from owlsam_ray.reduce.corrections.images import ReviewedImages, read_images
from owlsam_ray.reduce.corrections.label_studio_export import open_corrections
from owlsam_ray.reduce.corrections.origin import Origin, check_first_round, is_integer, read_origin
from owlsam_ray.reduce.corrections.overlay import (
    CORRECTION_SCHEMA,
    ENTRY,
    IMAGE,
    LISTED,
    REJECTED,
    SECOND_IDS,
    SPARED,
    StoredOverlay,
    image_of_id,
)
from owlsam_ray.reduce.corrections.report import CorrectionsOutput, conflict_line
from owlsam_ray.reduce.corrections.shapes import pack_shape
from owlsam_ray.reduce.corrections.store import ShardRows
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.run.manifest import Manifest, file_sha256
from owlsam_ray.run.proof import ShardRules
from owlsam_ray.vocabulary.names import by_name, fold_category

REJECTED_FIELD = "owlsam_rejected"
"""Field of an annotation: true if the reviewer says that there is no such object."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corrections:
    """A file of corrections, ready for the shards."""

    overlay: StoredOverlay
    output: CorrectionsOutput
    counts: Counter[str]
    """Number of entries, and the outcome of entries that no shard sees."""
    provenance: dict[str, Any]
    """Entry for `info`."""


def load_corrections(
    settings: ReduceConfig,
    manifest: Manifest,
    rules: ShardRules,
    decisions: Decisions,
    *,
    categories: tuple[Category, ...],
    scratch: str,
) -> Corrections | None:
    """Read `reduce.corrections`, and write the rows of each shard to the scratch folder.

    Args:
        settings: the section `reduce`.
        manifest: manifest of the run.
        rules: the run's fingerprint and K.
        decisions: resolved settings of the output.
        categories: categories of the run.
        scratch: a folder that all workers can reach.

    Returns:
        None when `reduce.corrections` is not set.

    Raises:
        InputError: the file cannot be read, does not say which run it belongs to, or contains nothing of this run.
        GuardError: the file belongs to another run.
    """
    url = settings.corrections
    if url is None:
        return None
    with open_corrections(url) as document:
        if not document.has("images") or not document.has("annotations"):
            raise InputError(f"reduce.corrections {url} is not a COCO file: it lacks `images` or `annotations`")
        origin = read_origin(document, settings, manifest, rules)
        images = read_images(document, manifest)
        if len(images.ids) and not images.ordinals.any():
            raise InputError(f"none of the {len(images.ids)} images of reduce.corrections {url} is one of the run")
        check_first_round(document, origin, images, manifest)
        reading = _Reading(
            images=images,
            origin=origin,
            targets=_targets(document, decisions, categories),
            ids_per_image=rules.ids_per_image,
            conflicts=[],
            counts=Counter(entries=0),  # reported even if the file has none
        )
        rows = ShardRows(storage.join(scratch, f"corrections-{secrets.token_hex(4)}.arrow"), CORRECTION_SCHEMA)
        with rows.spool() as add:
            for batch in reading.batches(document):
                ordinals = batch["ordinal"].to_numpy()
                shards = manifest.shard_of(ordinals)
                add(shards, batch)
    if reading.counts["entries"] and reading.counts["entries"] == len(reading.conflicts):
        raise InputError(f"nothing in reduce.corrections {url} can be applied: {reading.conflicts[0].decode().strip()}")
    conflicts_url = f"{rows.url}.conflicts"
    storage.write_atomic(conflicts_url, b"".join(reading.conflicts))
    provenance = {"sha256": file_sha256(url), "scope": "images" if origin.is_of_images else "annotations"}
    return Corrections(
        overlay=StoredOverlay(rows.url, rules.ids_per_image),
        output=CorrectionsOutput(conflicts_url, provenance),
        counts=reading.counts,
        provenance=provenance,
    )


def _targets(document: Document, decisions: Decisions, categories: tuple[Category, ...]) -> dict[int, int]:
    """Map category ids of the file to indices into the output's categories; -1: left out by the settings.

    Categories are matched by name, since tools renumber them: first the output's names, then the run's, which are
    mapped like the model's labels. If the file has no names, its ids are the output's.
    """
    out = {place: (category.name,) for place, category in enumerate(decisions.categories)}
    theirs = {
        entry["id"]: entry["name"]
        for entry in document.value("categories", list, [])
        if isinstance(entry, dict) and type(entry.get("id")) is int and isinstance(entry.get("name"), str)
    }
    if not theirs:
        return {category.id: place for place, category in enumerate(decisions.categories)}
    by_run = by_name(theirs, {label: (each.name,) for label, each in enumerate(categories)}, fold=fold_category)
    targets = {each: int(decisions.target[label]) for each, label in by_run.items()}
    return targets | by_name(theirs, out, fold=fold_category)


@dataclass(slots=True)
class _Reading:
    """Convert entries to rows of `CORRECTION_SCHEMA`."""

    images: ReviewedImages
    origin: Origin
    targets: dict[int, int]
    ids_per_image: int
    conflicts: list[bytes]
    counts: Counter[str]
    unplaced: list[int] = field(default_factory=list)
    """Ids of entries whose image is not known: these do not count as deleted."""

    def batches(self, document: Document) -> Iterator[pa.Table]:
        """Yield all rows, in no particular order."""
        if self.origin.is_of_images:
            reviewed = self.images.ordinals[self.images.reviewed & (self.images.ordinals > 0)]
            yield _rows_of(reviewed, IMAGE)
        for first, elements in document.batches("annotations"):
            rows = [row for position, entry in enumerate(elements, first) if (row := self._row(position, entry))]
            yield pa.Table.from_pylist(rows, CORRECTION_SCHEMA)
        if self.origin.listed is not None:
            listed = np.setdiff1d(self.origin.listed, np.array(self.unplaced, np.int64))
            listed = listed[listed < SECOND_IDS]
            yield _rows_of(listed // self.ids_per_image, LISTED, listed % self.ids_per_image)

    def _row(self, position: int, entry: Any) -> dict[str, Any] | None:
        """Return the row for the entry's shard; None: the shard needs none."""
        self.counts["entries"] += 1
        entry = with_integers(entry)
        conflict = _problem(entry) or self._unknown(entry)
        if conflict is not None:
            self.counts[f"conflict.{conflict.partition(':')[0]}"] += 1
            own = entry if isinstance(entry, dict) else {}
            self.conflicts.append(conflict_line(position, own.get("id"), own.get("image_id"), conflict))
        place = self._place(entry)
        if place is None:
            if isinstance(entry, dict) and entry.get("id") is not None:
                self.unplaced.append(entry["id"])
                if conflict is not None and conflict.startswith("entry"):
                    return self._spared_by_id(position, entry["id"])
            return None
        if conflict is None and self.origin.is_of_images and not self.images.reviewed[place]:
            self.counts["unreviewed"] += 1
            return None
        ordinal = int(self.images.ordinals[place])
        row = {
            "ordinal": ordinal,
            "kind": SPARED if conflict else REJECTED if _is_rejected(entry) else ENTRY,
            "position": position,
            "file_id": None if conflict else entry.get("id"),
            "det_index": self._det_index(entry.get("id"), ordinal),
            "category": -1,
            "shape": b"",
        }
        if conflict is None:
            row["category"] = self.targets.get(entry.get("category_id"), -1)
            has_shape = bool(entry.get("bbox") or entry.get("segmentation"))
            row["shape"] = pack_shape(entry) if has_shape or row["kind"] == ENTRY else b""
        return row

    def _spared_by_id(self, position: int, own_id: int) -> dict[str, Any] | None:
        """Return the row that protects the detection of an entry whose image cannot be read; None: no such image."""
        ordinal, det_index = image_of_id(own_id, self.ids_per_image)
        if ordinal < 1 or ordinal not in self.images.ordinals:
            return None
        own = {"ordinal": ordinal, "kind": SPARED, "position": position, "file_id": None, "det_index": det_index}
        return own | {"category": -1, "shape": b""}

    def _place(self, entry: Any) -> int | None:
        """Return the position of the entry's image in the file; None: not in the file, or not in the run."""
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        place = self.images.place(image_id) if image_id is not None and is_integer(image_id) else None
        return place if place is not None and self.images.ordinals[place] else None

    def _unknown(self, entry: dict[str, Any]) -> str | None:
        """Return the conflict of an entry that names an unknown image or category; None: both are known."""
        if self._place(entry) is None:
            is_listed = self.images.place(entry["image_id"]) is not None
            return f"image: {'the run has no such image' if is_listed else 'the file does not list its image'}"
        if not _is_rejected(entry) and entry.get("category_id") not in self.targets:
            return f"category: neither the run nor its output has the category {shown(entry.get('category_id'), 40)}"
        return None

    def _det_index(self, own_id: Any, ordinal: int) -> int:
        """Return which detection of its image an id means; -1: none, the id is a number that the tool assigned."""
        if own_id is None:
            return -1
        own_ordinal, det_index = image_of_id(own_id, self.ids_per_image)
        if own_ordinal != ordinal:
            return -1
        listed = self.origin.listed
        if listed is not None:
            place = int(np.searchsorted(listed, own_id))
            if place == len(listed) or listed[place] != own_id:
                return -1
        return det_index


def with_integers(entry: Any) -> Any:
    """Convert ids that a tool wrote as text or as floats to integers; drop an `id` that is not an integer."""
    if not isinstance(entry, dict):
        return entry
    read = {name: _integer(entry[name]) for name in ("id", "image_id", "category_id") if name in entry}
    entry = entry | {name: value for name, value in read.items() if value is not None}
    if read.get("id") is None:
        entry.pop("id", None)
    return entry


def _integer(value: Any) -> int | None:
    """Return a value as an int64 column takes it; None: it is not an integer."""
    is_text = isinstance(value, str) and value.isascii() and value.removeprefix("-").isdigit() and len(value) < 20
    if is_text or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    return value if is_integer(value) else None


def _is_rejected(entry: dict[str, Any]) -> bool:
    return flag_of(entry.get(REJECTED_FIELD)) is True


def _problem(entry: Any) -> str | None:
    """Return what is wrong with an entry, regardless of the run; None: nothing."""
    if isinstance(entry, dict) and entry.get("id") is None:
        entry = entry | {"id": 0}  # a new entry
    wrong = structure_error(entry)
    if wrong is not None:
        return f"entry: {wrong.lstrip(': ')}"
    if not is_integer(entry.get("image_id")) or not is_integer(entry.get("category_id", 0)):
        return "entry: image_id or category_id is not an integer"
    if flag_of(entry.get(REJECTED_FIELD)) is None:
        return f"entry: {REJECTED_FIELD} is neither true nor false"
    if flag_of(entry.get("iscrowd")):
        return "crowd: annotations of a reduce are single objects"
    return None


def _rows_of(ordinals: NDArray[np.int64], kind: int, det_index: NDArray[np.int64] | None = None) -> pa.Table:
    """Rows that belong to no entry of the file."""
    count = len(ordinals)
    fixed = {"ordinal": ordinals, "kind": np.full(count, kind), "position": np.full(count, -1)}
    fixed |= {"det_index": np.full(count, -1) if det_index is None else det_index, "category": np.full(count, -1)}
    return pa.table(
        [
            pa.array(fixed[each.name], each.type) if each.name in fixed else pa.nulls(count, each.type)
            for each in CORRECTION_SCHEMA
        ],
        schema=CORRECTION_SCHEMA,
    )
