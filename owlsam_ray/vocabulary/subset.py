"""Select some of the categories by name, id or frequency group."""

import difflib
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from owlsam_ray.config.vocabulary import Category, Frequency
from owlsam_ray.errors import InputError, shown
from owlsam_ray.vocabulary.fold import fold, fold_loosely

_log = logging.getLogger(__name__)
_SUGGESTED = 3
"""Number of names that a message suggests at most."""


def select_categories(
    categories: Sequence[Category],
    *,
    only: Sequence[str | int] | None,
    frequency: Sequence[Frequency] | None,
    spellings: Mapping[int, Sequence[str]],
    synonyms: Mapping[int, Sequence[str]],
) -> list[Category]:
    """Select categories; they keep the list's order and ids.

    Args:
        categories: the whole list.
        only: names or ids; None selects all. Case, runs of spaces and underscores in a name are ignored, unless two
            categories differ in nothing else.
        frequency: groups; None selects all. With `only`, both conditions must hold.
        spellings: other names that are equivalent to the category's own, by id.
        synonyms: names that an unknown entry may have meant, by id; used for hints only.

    Raises:
        InputError: a name or an id is not in the list, or fits several; a category has no group; nothing is left.
    """
    kept = list(categories)
    if only is not None:
        wanted = _wanted(categories, only, spellings, synonyms)
        kept = [category for category in kept if category.id in wanted]
    if frequency is not None:
        _check_groups(categories)
        kept = [category for category in kept if category.frequency in frequency]
    if not kept:
        whose = "in vocabulary.only " if only is not None else ""
        raise InputError(
            f"no category is left: no category {whose}is in a group of vocabulary.frequency, {list(frequency or ())}"
        )
    if len(kept) < len(categories):
        _log.info("%d of %d categories are selected", len(kept), len(categories))
    return kept


def _wanted(
    categories: Sequence[Category],
    only: Sequence[str | int],
    spellings: Mapping[int, Sequence[str]],
    synonyms: Mapping[int, Sequence[str]],
) -> set[int]:
    names = {category.id: (category.name, *spellings.get(category.id, ())) for category in categories}
    exact, loose = _index(names, fold), _index(names, fold_loosely)
    wanted = set()
    for entry in only:
        if isinstance(entry, int):
            if entry not in names:
                ids = sorted(names)
                raise InputError(
                    f"vocabulary.only names the id {entry}, which is not in the list: its {len(ids)} ids are between "
                    f"{ids[0]} and {ids[-1]}"
                )
            wanted.add(entry)
            continue
        found = exact.get(fold(entry)) or loose.get(fold_loosely(entry)) or []
        if len(found) != 1:
            several = ", ".join(repr(names[each][0]) for each in found)
            raise InputError(
                f"vocabulary.only names {shown(entry)}, which could be any of {several}: write one of them"
                if found
                else f"vocabulary.only names {shown(entry)}, and no category has that "
                f"name{_hint(entry, names, synonyms)}"
            )
        wanted.add(found[0])
    return wanted


def _index(names: Mapping[int, Sequence[str]], key: Callable[[str], str]) -> dict[str, list[int]]:
    """Ids by folded name."""
    index: dict[str, list[int]] = defaultdict(list)
    for each, given in names.items():
        for folded in {key(name) for name in given}:
            index[folded].append(each)
    return index


def _hint(entry: str, names: Mapping[int, Sequence[str]], synonyms: Mapping[int, Sequence[str]]) -> str:
    """Name the category that has the entry as a synonym, or suggest similar names."""
    for each, given in synonyms.items():
        if fold_loosely(entry) in {fold_loosely(synonym) for synonym in given}:
            return f". It is a synonym of {shown(names[each][0])}"
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in (name for given in names.values() for name in given):
        for key in {fold_loosely(name), _without_bracket(name)}:
            by_key[key].append(name)
    close = difflib.get_close_matches(fold_loosely(entry), by_key, n=_SUGGESTED)
    if not close:
        return f" (there are {len(names)})"
    meant = list(dict.fromkeys(name for key in close for name in by_key[key]))[:_SUGGESTED]
    return f". Did you mean {' or '.join(repr(name) for name in meant)}?"


def _without_bracket(name: str) -> str:
    """Remove the brackets with which LVIS distinguishes senses: `bus_(vehicle)`."""
    return fold_loosely(re.sub(r"\([^()]*\)", " ", name))


def _check_groups(categories: Sequence[Category]) -> None:
    without = [category for category in categories if category.frequency is None]
    if without:
        whose = f"{shown(without[0].name)} (id {without[0].id})"
        raise InputError(
            f"vocabulary.frequency needs categories with a `frequency` of r, c or f, as LVIS's have, and "
            f"{len(without)} of {len(categories)} have none; the first is {whose}"
        )
