"""Predictions of one dataset's categories on the ground truth of another's.

Two steps by name and one by the mapping: the predictions' categories → the built-in list that the mapping starts from →
the one it leads to → the ground truth's categories. Where several categories become one, an object that was found under
two of them is there twice, and all but one of its predictions count as false.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.evaluate.names import by_name, fold_category
from owlsam_ray.settings import MappingName
from owlsam_ray.vocabulary.builtin import BuiltinCategory
from owlsam_ray.vocabulary.mapping import category_mapping

_log = logging.getLogger(__name__)
_NAMED = 5
"""As many names a log line tells."""


@dataclass(slots=True)
class Translation:
    """What becomes of the predictions' categories."""

    name: MappingName
    ids: dict[int, int]
    """The predictions' category ids → the ground truth's."""
    without: dict[int, str]
    """Their ids that have no counterpart in the ground truth, with names."""
    lister: str
    """Words for what lists the predictions' categories."""
    unreached: dict[int, str]
    """The ground truth's ids that no category of the mapping's start means, with names."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Predictions that were left out, by the name of their category; filled while they are read."""

    def report(self) -> dict[str, Any]:
        """For the evaluation's JSON: numbers, and names from the most frequent on."""
        return {
            "name": self.name,
            "categories_without_counterpart": list(self.unreached.values()),
            "predictions_left_out": self.left_out.total(),
            "left_out_by_category": dict(sorted(self.left_out.items(), key=lambda entry: (-entry[1], entry[0]))),
        }

    def tell(self, url: str, *, num_kept: int) -> None:
        """Log what was left out."""
        if self.unreached:
            _log.info(
                "%s: %d of the ground truth's categories have no counterpart: %s",
                self.name, len(self.unreached), _some(list(self.unreached.values())),
            )  # fmt: skip
        if self.left_out:
            _log.warning(
                "%s: %d of %d predictions of %s are left out, of %d categories without a counterpart: %s",
                self.name, self.left_out.total(), self.left_out.total() + num_kept, url, len(self.left_out),
                _some([f"{name!r} ({count})" for name, count in self.left_out.most_common(_NAMED + 1)]),
            )  # fmt: skip


def translation(name: MappingName, listed: Mapping[int, str] | None, truth: GroundTruth, url: str) -> Translation:
    """How the categories of a file of predictions become those of a ground truth.

    Args:
        name: of the mapping.
        listed: the file's own categories, names by id; None for a bare list of results, whose ids are those of the
            dataset that the mapping starts from.
        truth: whose categories are asked for; they go by name.
        url: of the predictions, for the messages.

    A few names that the built-in lists lack go by their ids when all others agree in name and id.

    Raises:
        InputError: the file has no category of the mapping's start, or has the ground truth's already; or the ground
            truth has none of its end.
    """
    mapping = category_mapping(name)
    start, end = name.split("_to_")
    names = {each: category.name for each, category in truth.categories.items()}
    to_truth = _partners({each.id: each.name for each in mapping.target}, {each: (of,) for each, of in names.items()})
    if not to_truth:
        raise InputError(f"evaluate.mapping {name} leads to categories of {end}, and {truth.url} has none of them")
    lister = f"{start}'s list" if listed is None else "the file"
    if listed is None:
        listed = {each.id: each.name for each in mapping.source}
    elif not _all_of(listed, mapping.source) and listed.items() <= names.items():
        raise InputError(
            f"evaluate.mapping is {name}, and the categories of {url} are the ground truth's already, not those of "
            f"{start}: leave the mapping out (null)"
        )
    to_source = _partners(listed, {each.id: each.spellings for each in mapping.source})
    if not to_source:
        raise InputError(f"evaluate.mapping {name} starts from categories of {start}, and {url} has none of them")
    ids = {}
    for each, source_id in to_source.items():
        target_id = mapping.ids.get(source_id)
        if target_id in to_truth:
            ids[each] = to_truth[target_id]
    reached = {to_truth[target_id] for target_id in set(mapping.ids.values()) & set(to_truth)}
    return Translation(
        name,
        ids=ids,
        lister=lister,
        without={each: of for each, of in listed.items() if each not in ids},
        unreached={each: of for each, of in names.items() if each not in reached},
    )


def _partners(theirs: Mapping[int, str], ours: Mapping[int, tuple[str, ...]]) -> dict[int, int]:
    found = by_name(theirs, ours, fold=fold_category)
    renamed = [each for each in theirs if each not in found and each in ours]
    if len(renamed) > len(found) or any(their_id != our_id for their_id, our_id in found.items()):
        return found
    return found | {each: each for each in renamed}


def _all_of(listed: Mapping[int, str], entries: tuple[BuiltinCategory, ...]) -> bool:
    spellings = {each.id: each.spellings for each in entries}
    return all(name in spellings.get(each, ()) for each, name in listed.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
