"""Categories of two lists are the same by their names, so that ids may differ."""

from collections.abc import Callable, Mapping, Sequence


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
