"""Images and categories of two files are the same by their names, so that ids may differ."""

import logging
from collections.abc import Callable, Mapping, Sequence

_log = logging.getLogger(__name__)


def fold_category(name: str) -> str:
    """Equal for names that differ in case, spaces and underscores only."""
    return " ".join(name.casefold().replace("_", " ").split())


def by_name(
    theirs: Mapping[int, str], ours: Mapping[int, Sequence[str]], *, fold: Callable[[str], str]
) -> dict[int, int]:
    """Their ids → ours.

    Args:
        theirs: names by id.
        ours: names by id, several for one thing if need be; of a name that repeats, the first id counts, unless the ids
            agree as well.
        fold: names are the same when this makes them equal.

    Returns:
        Without those that have no partner, and without empty names that only their ids could tell.
    """
    first: dict[str, int] = {}
    for each, names in ours.items():
        for name in names:
            first.setdefault(fold(name), each)
    found: dict[int, int] = {}
    for each, name in theirs.items():
        if fold(name) in {fold(our_name) for our_name in ours.get(each, ())}:
            found[each] = each
        elif name and fold(name) in first:
            found[each] = first[fold(name)]
    return found


def same_things(
    theirs: Mapping[int, str], ours: Mapping[int, str], *, fold: Callable[[str], str], what: str
) -> dict[int, int]:
    """Their ids → ours, by name.

    Args:
        theirs: names by id.
        ours: names by id; of a name that repeats, the first id counts.
        fold: names are the same when this makes them equal.
        what: words for the log.

    A name that we lack goes by its id, unless another name showed that the ids differ. What has no partner is absent.
    """
    found = by_name(theirs, {each: (name,) for each, name in ours.items()}, fold=fold)
    if any(their_id != our_id for their_id, our_id in found.items()):
        _log.info("%s go by their names: the ids are not the ground truth's", what)
        return found
    renamed = [each for each in theirs if each not in found and each in ours]
    if renamed:
        _log.warning(
            "%d %s go by their ids: the ground truth has other names (id %d is %r there and %r here)",
            len(renamed), what, renamed[0], ours[renamed[0]], theirs[renamed[0]],
        )  # fmt: skip
    return found | {each: each for each in renamed}
