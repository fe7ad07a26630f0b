"""Match the categories of two lists by name, so that their ids may differ."""

from collections.abc import Callable, Mapping, Sequence


def fold_category(name: str) -> str:
    """Fold a name: equal for names that differ only in case, spaces and underscores."""
    return " ".join(name.casefold().replace("_", " ").split())


def by_name(
    theirs: Mapping[int, str], ours: Mapping[int, Sequence[str]], *, fold: Callable[[str], str]
) -> dict[int, int]:
    """Map their ids to ours by name.

    Args:
        theirs: names by id.
        ours: names by id, several per category if needed; if a name repeats, the first id wins, unless another id of
            ours with that name equals theirs.
        fold: two names are the same if this makes them equal.

    Returns:
        Their id → our id, without ids that have no match, and without empty names, which only equal ids could match.
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
