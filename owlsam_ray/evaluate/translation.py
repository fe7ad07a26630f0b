"""Map predictions of one dataset's categories to the ground truth of another's.

Two steps by name and one by the mapping: the predictions' categories → the built-in list that the mapping starts from →
the list that it leads to → the ground truth's categories. Where several categories are merged, an object found under
two of them appears twice, and all but one of its predictions count as false.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from owlsam_ray.config.vocabulary import BuiltinVocabulary, MappingName
from owlsam_ray.errors import InputError, shown
from owlsam_ray.evaluate.ground_truth import GroundTruth
from owlsam_ray.vocabulary.builtin import BuiltinCategory, builtin
from owlsam_ray.vocabulary.mapping import ENDS, category_mapping
from owlsam_ray.vocabulary.names import by_name, fold_category

_log = logging.getLogger(__name__)
_NAMED = 5
"""Most names in a log line."""
_STRANGERS = 0.1
"""Largest fraction of unknown names with which categories still count as those of a built-in list."""
_TELLING = 3
"""Fewest categories that cannot agree with a list in name and id by chance."""


@dataclass(slots=True)
class Translation:
    """How the predictions' categories are mapped."""

    name: MappingName
    ids: dict[int, int]
    """The predictions' category ids → the ground truth's."""
    without: dict[int, str]
    """Names by id of the predictions' categories without a counterpart in the ground truth."""
    lister: str
    """Name of the source that lists the predictions' categories."""
    unreached: dict[int, str]
    """Names by id of the ground truth's categories that no category of the predictions maps to."""
    hint: str = ""
    """For a prediction of an unlisted category: which mapping fits."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of predictions left out, by the name of their category; filled while reading."""

    def report(self) -> dict[str, Any]:
        """Return counts for the evaluation's JSON, and names by descending frequency."""
        return {
            "name": self.name,
            "categories_without_counterpart": list(self.unreached.values()),
            "predictions_left_out": self.left_out.total(),
            "left_out_by_category": dict(sorted(self.left_out.items(), key=lambda entry: (-entry[1], entry[0]))),
        }

    def log_left_out(self, url: str, *, num_kept: int) -> None:
        """Log what was left out."""
        if self.unreached:
            _log.info(
                "%s: %d of the ground truth's categories have no counterpart: %s",
                self.name, len(self.unreached), _some(list(self.unreached.values())),
            )  # fmt: skip
        if self.left_out:
            _log.warning(
                "%s: %d of %d predictions of %s are left out, because their %d categories have no counterpart: %s",
                self.name, self.left_out.total(), self.left_out.total() + num_kept, url, len(self.left_out),
                _some([f"{shown(name)} ({count})" for name, count in self.left_out.most_common(_NAMED + 1)]),
            )  # fmt: skip


def translation(
    name: MappingName, listed: Mapping[int, str] | frozenset[int], truth: GroundTruth, url: str
) -> Translation:
    """Map the categories of a file of predictions to those of a ground truth.

    Args:
        name: name of the mapping.
        listed: the file's own categories, names by id; for a bare list of results the ids in it, which are those of the
            dataset that the mapping starts from.
        truth: the ground truth; its categories are matched by name.
        url: URL of the predictions, for messages.

    A name that the built-in list lacks has no counterpart. Only an empty name is matched by its id, when all others
    agree in name and id.

    Raises:
        InputError: the file's categories are not of the list that the mapping starts from, or are the ground truth's
            already; or the ground truth's are not of the list that it leads to. Categories are not of a list if none of
            them is in it; if more than a tenth are not, and another built-in list has more of them or this one less
            than half; or if all agree with another list in name and id and none with this one's ids. Names the mapping
            that fits.
    """
    mapping = category_mapping(name)
    start, end = ENDS[name]
    names = _names(truth)
    if isinstance(listed, frozenset):
        strangers = listed - {each.id for each in mapping.source}
        hint = _way_out(_start_of_ids(listed, names), names) if strangers else ""
        lister, listed = f"{start}'s list", {each.id: each.name for each in mapping.source}
    else:
        lister, hint = "the file", ""
        if not _all_of(listed, mapping.source) and listed.items() <= names.items():
            raise InputError(
                f"evaluate.mapping is {name}, but the categories of {url} are the ground truth's already, not those of "
                f"{start}: leave the mapping out (null)"
            )
    way_out = _way_out(_likely_list(listed), names)
    if fault := _misfit(names, end):
        raise InputError(f"evaluate.mapping {name} leads to categories of {end}, but {truth.url} has {fault}{way_out}")
    if fault := _misfit(listed, start):
        raise InputError(f"evaluate.mapping {name} starts from categories of {start}, but {url} has {fault}{way_out}")
    to_truth = _partners({each.id: each.name for each in mapping.target}, {each: (of,) for each, of in names.items()})
    to_source = _partners(listed, {each.id: each.spellings for each in mapping.source})
    ids = {}
    for each, source_id in to_source.items():
        target_id = mapping.ids.get(source_id)
        if target_id in to_truth:
            ids[each] = to_truth[target_id]
    reached = set(ids.values())
    return Translation(
        name,
        ids=ids,
        lister=lister,
        without={each: of for each, of in listed.items() if each not in ids},
        unreached={each: of for each, of in names.items() if each not in reached},
        hint=hint,
    )


def fitting_mapping(listed: Mapping[int, str], truth: GroundTruth) -> MappingName | None:
    """Find the mapping from the built-in list of the given categories to that of the ground truth's, if any.

    Args:
        listed: names by id.
        truth: the ground truth.
    """
    return _mapping_between(_likely_list(listed), _likely_list(_names(truth)))


def _mapping_between(start: BuiltinVocabulary | None, end: BuiltinVocabulary | None) -> MappingName | None:
    names: tuple[MappingName, ...] = get_args(MappingName)
    return next((name for name in names if ENDS[name] == (start, end)), None)


def _way_out(start: BuiltinVocabulary | None, truth_names: Mapping[int, str]) -> str:
    """Compose the end of a message that refuses a mapping."""
    end = _likely_list(truth_names)
    if start is not None and start == end:
        return f": predictions and ground truth are both of {start}, leave the mapping out (null)"
    fitting = _mapping_between(start, end)
    return f": the mapping that fits is {fitting}" if fitting else ""


def _names(truth: GroundTruth) -> dict[int, str]:
    return {each: category.name for each, category in truth.categories.items()}


def _fits(listed: Mapping[int, str]) -> dict[BuiltinVocabulary, tuple[int, int]]:
    """Count for each built-in list how many categories it has by name, and how many of these also by id."""
    lists: tuple[BuiltinVocabulary, ...] = get_args(BuiltinVocabulary)
    found = {of: _partners(listed, {each.id: each.spellings for each in builtin(of)}) for of in lists}
    return {of: (len(ids), sum(theirs == ours for theirs, ours in ids.items())) for of, ids in found.items()}


def _likely_list(listed: Mapping[int, str]) -> BuiltinVocabulary | None:
    """Return the built-in list that the categories are from; None if there is none."""
    fits = _fits(listed)
    best = max(fits, key=lambda of: fits[of])
    return best if fits[best][0] >= (1 - _STRANGERS) * len(listed) else None


def _start_of_ids(ids: frozenset[int], truth_names: Mapping[int, str]) -> BuiltinVocabulary | None:
    """Return a built-in list that has all the ids, and a mapping to the ground truth's."""
    end = _likely_list(truth_names)
    having = [of for of in get_args(BuiltinVocabulary) if ids <= {each.id for each in builtin(of)}]
    return next((of for of in having if of == end or _mapping_between(of, end)), None)


def _misfit(listed: Mapping[int, str], wanted: BuiltinVocabulary) -> str:
    """Say why categories are not those of a built-in list, or a part of them; empty if they may be."""
    fits = _fits(listed)
    known, same_ids = fits.pop(wanted)
    if not known:
        return "none of them"
    total = len(listed)
    if total - known > _STRANGERS * total and (2 * known < total or any(fit[0] > known for fit in fits.values())):
        return f"others ({total - known} of {total} are not in that list)"
    if total >= _TELLING and not same_ids:
        for other, fit in fits.items():
            if fit == (total, total):
                return f"those of {other}, in name and id"
    return ""


def _partners(theirs: Mapping[int, str], ours: Mapping[int, Sequence[str]]) -> dict[int, int]:
    found = by_name(theirs, ours, fold=fold_category)
    if any(their_id != our_id for their_id, our_id in found.items()):
        return found
    # A name that the other side lacks is a different category, whatever its id.
    unnamed = (each for each, name in theirs.items() if each in ours and not (name.strip() and any(ours[each])))
    return found | {each: each for each in unnamed}


def _all_of(listed: Mapping[int, str], entries: tuple[BuiltinCategory, ...]) -> bool:
    spellings = {each.id: each.spellings for each in entries}
    return all(name in spellings.get(each, ()) for each, name in listed.items())


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
