"""Find the images and categories that two files have in common.

Names take precedence. Ids count only where no name contradicts them: two files that both number their images from 1
share all ids, but may not share a single image.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from owlsam_ray.errors import InputError, shown
from owlsam_ray.vocabulary.names import by_name, fold_category

_log = logging.getLogger(__name__)
_EXAMPLES = 3
"""Number of examples in a message."""

Parts = tuple[str, ...]
"""A path split at its slashes."""


def path_parts(name: str) -> Parts:
    """Split a path at slashes of either kind; `.` is dropped."""
    return tuple(part for part in name.replace("\\", "/").split("/") if part not in ("", "."))


@dataclass(frozen=True, slots=True)
class ImagePairs:
    """Images of one file, paired with those of another."""

    ids: dict[int, int]
    """Theirs → ours, one to one."""
    num_repeated: int
    """Number of their images that come after another one of the same name."""


def pair_images(
    theirs: Mapping[int, Sequence[str]], ours: Mapping[int, Sequence[str]], *, what: str, lister: str
) -> ImagePairs:
    """Pair images by name; by id only where no name contradicts it.

    Args:
        theirs: spellings of each image's name by id; an image without a name has none.
        ours: the same for our images.
        what: description of theirs, for messages.
        lister: name of the source that lists ours, for messages.

    Names are paired in this order. First, equal names (if several are equal, the one with the same id, else the first).
    Then a path with a path that it ends in, if there is exactly one such pair. Then paths that share the longest end,
    or at least the last part, if no other path of either side has that end, and neither path's folder occurs on the
    other side (there it would have its partner, if any). An image without a name, or whose name fits several, is paired
    by its id, unless a pair of names showed that the ids differ.

    Returns:
        The pairs. Images without a partner are absent.

    Raises:
        InputError: images with the same id have names that do not fit, and no pair of names shows that the ids differ;
            or a name fits several images, and no id decides which. Names three of them.
    """
    pairs = _Pairs(theirs, ours)
    pairs.pair_equal()
    pairs.pair_ends()
    if pairs.by_end:
        their_id, our_id = pairs.by_end[0]
        _log.warning(
            "%d %s are matched by the ends of their names: the ground truth has other folders (%s against %s)",
            len(pairs.by_end), what, shown(theirs[their_id][0]), shown(ours[our_id][0]),
        )  # fmt: skip
    if any(their_id != our_id for their_id, our_id in pairs.ids.items()):
        _log.info("%s are matched by name: their ids are not the ground truth's", what)
    else:
        pairs.pair_ids()
        if same := pairs.contradictions():
            raise InputError(contradiction(
                [(each, theirs[each][0], ours[each][0]) for each in same], what=what, lister=lister,
                way_out="give both the same file names, or ids that differ",
            ))  # fmt: skip
    if unclear := pairs.ambiguous():
        examples = "; ".join(
            f"{shown(name, 80)} may be {' or '.join(shown(each, 80) for each in others[:2])}"
            + (f" or {len(others) - 2} more" if len(others) > 2 else "")
            for name, others in unclear[:_EXAMPLES]
        )
        raise InputError(
            f"{what} and the images of {lister} are matched by name, but {len(unclear)} names fit several images "
            f"({examples}): give the names with their folders in both"
        )
    return ImagePairs(pairs.ids, pairs.num_repeated)


class _Pairs:
    """Pairs while they are found."""

    def __init__(self, theirs: Mapping[int, Sequence[str]], ours: Mapping[int, Sequence[str]]) -> None:
        self._theirs, self._ours = theirs, ours
        self.ids: dict[int, int] = {}
        self.by_end: list[tuple[int, int]] = []
        self._taken: set[int] = set()
        self._repeated: set[int] = set()
        self._fitting: dict[int, list[int]] = {}
        """Our images without a partner → their images without one whose names fit."""

    def pair_equal(self) -> None:
        """Pair equal names."""
        first: dict[str, int] = {}
        for each, names in self._ours.items():
            for name in names:
                first.setdefault(name, each)
        equal: dict[int, int] = {}
        for each, names in self._theirs.items():
            if not set(names).isdisjoint(self._ours.get(each, ())):
                self._add(each, each)
            elif known := [name for name in names if name in first]:
                equal[each] = first[known[0]]
        for their_id, our_id in equal.items():
            if our_id in self._taken:
                self._repeated.add(their_id)
            else:
                self._add(their_id, our_id)

    @property
    def num_repeated(self) -> int:
        """Number of their images that come after another one of the same name."""
        return sum(each not in self.ids for each in self._repeated)

    def pair_ends(self) -> None:
        """Pair names of which one ends in the other, then names with the longest common end."""
        left, right = self._left(), self._right()
        lasts = {parts[-1] for parts in _paths(self._theirs, left)} & {parts[-1] for parts in _paths(self._ours, right)}
        if not lasts:
            return
        # All names take part, including those with a partner: an end that two images share does not identify either.
        their_ends, our_ends = _Ends(self._theirs, lasts), _Ends(self._ours, lasts)
        for each in left:
            fitting = our_ends.fitting(each, their_ends)
            if len(fitting) == 1:
                (partner,) = fitting
                if their_ends.fitting(partner, our_ends) == {each}:
                    self._add_end(each, partner)
        their_folders, our_folders = _folders(self._theirs), _folders(self._ours)
        for each in left:
            sharing = our_ends.sharing(each, their_ends) if each not in self.ids else None
            if sharing is None or not our_folders.isdisjoint(_folders({each: self._theirs[each]})):
                continue
            if their_folders.isdisjoint(_folders({sharing: self._ours[sharing]})):
                self._add_end(each, sharing)
        for each in right:
            if each not in self._taken:
                fitting = {other for other in their_ends.fitting(each, our_ends) if other not in self.ids}
                if fitting:
                    self._fitting[each] = sorted(fitting)

    def pair_ids(self) -> None:
        """Pair images with the same id if one has no name, or if the names fit but are not the only ones that do."""
        for each in self._same_ids():
            if not self._theirs[each] or not self._ours[each] or each in self._fitting.get(each, ()):
                self._add(each, each)

    def contradictions(self) -> list[int]:
        """Ids that stand for images of different names."""
        return [each for each in self._same_ids() if each not in self._repeated]

    def ambiguous(self) -> list[tuple[str, list[str]]]:
        """Our names that fit several of their images, or of which several fit one; each with these names."""
        found: list[tuple[str, list[str]]] = []
        several: dict[int, list[int]] = defaultdict(list)
        for our_id, their_ids in self._fitting.items():
            open_ids = [each for each in their_ids if each not in self.ids]
            if our_id in self._taken or not open_ids:
                continue
            if len(open_ids) > 1:
                found.append((self._ours[our_id][0], [self._theirs[each][0] for each in open_ids]))
            else:
                several[open_ids[0]].append(our_id)
        return found + [
            (self._theirs[their_id][0], [self._ours[each][0] for each in our_ids])
            for their_id, our_ids in several.items()
            if len(our_ids) > 1
        ]

    def _same_ids(self) -> list[int]:
        return [each for each in self._left() if each in self._ours and each not in self._taken]

    def _left(self) -> list[int]:
        return [each for each in self._theirs if each not in self.ids]

    def _right(self) -> list[int]:
        return [each for each in self._ours if each not in self._taken]

    def _add(self, their_id: int, our_id: int) -> None:
        self.ids[their_id] = our_id
        self._taken.add(our_id)

    def _add_end(self, their_id: int, our_id: int | None) -> None:
        if our_id is not None and their_id not in self.ids and our_id not in self._taken:
            self._add(their_id, our_id)
            self.by_end.append((their_id, our_id))


class _Ends:
    """Names of one side, indexed by their ends."""

    def __init__(self, names: Mapping[int, Sequence[str]], lasts: set[str]) -> None:
        """Index the names whose last part is in `lasts`."""
        self._paths: dict[int, list[Parts]] = {}
        self._whole: dict[Parts, set[int]] = defaultdict(set)
        self._ends: dict[Parts, set[int]] = defaultdict(set)
        for each, spellings in names.items():
            for parts in map(path_parts, spellings):
                if parts and parts[-1] in lasts:
                    self._paths.setdefault(each, []).append(parts)
                    self._whole[parts].add(each)
                    for start in range(len(parts)):
                        self._ends[parts[start:]].add(each)

    def fitting(self, each: int, others: "_Ends") -> set[int]:
        """Return the images of this side whose name ends in the other's, or the other way round."""
        found: set[int] = set()
        for parts in others._paths.get(each, ()):
            found |= self._ends.get(parts, set())
            for start in range(len(parts)):
                found |= self._whole.get(parts[start:], set())
        return found

    def sharing(self, each: int, others: "_Ends") -> int | None:
        """Return the one image of this side that shares the longest end with the other's; None: there are several."""
        for parts in others._paths.get(each, ()):
            for start in range(len(parts)):
                end = parts[start:]
                if end in self._ends:
                    if len(self._ends[end]) == 1 and others._ends[end] == {each}:
                        return next(iter(self._ends[end]))
                    break
        return None


def _folders(names: Mapping[int, Sequence[str]]) -> set[Parts]:
    """Folders of the paths that have one."""
    return {parts[:-1] for parts in _paths(names, names)} - {()}


def _paths(names: Mapping[int, Sequence[str]], ids: Iterable[int]) -> Iterable[Parts]:
    return (parts for each in ids for parts in map(path_parts, names[each]) if parts)


def contradiction(same_ids: Sequence[tuple[int, str, str]], *, what: str, lister: str, way_out: str) -> str:
    """Compose the message for images or categories whose ids agree and whose names do not.

    Args:
        same_ids: id, their name, our name; at least one.
        what: description of theirs.
        lister: name of the source that lists ours.
        way_out: the end of the sentence.
    """
    examples = "; ".join(
        f"id {each}: {shown(theirs, 80)} against {shown(ours, 80)}" for each, theirs, ours in same_ids[:_EXAMPLES]
    )
    return (
        f"{len(same_ids)} {what} have ids that {lister} lists under other names ({examples}), so neither ids nor names "
        f"can be trusted: {way_out}"
    )


@dataclass(frozen=True, slots=True)
class CategoryPairs:
    """Categories of one file, paired with those of another."""

    ids: dict[int, int]
    """Theirs → ours; several may map to one."""
    contradictions: dict[int, tuple[int, str, str]] = field(default_factory=dict)
    """Their categories that have the id of one of ours under another name, where no pair of names shows that the ids
    differ; by id, as `contradiction` takes them."""


def pair_categories(theirs: Mapping[int, str], ours: Mapping[int, str], *, what: str) -> CategoryPairs:
    """Pair categories by name, ignoring case and spaces; by id only where one of them has no name.

    Args:
        theirs: names by id; empty without one.
        ours: the same for ours; if a name repeats, the one with the same id counts, else the first.
        what: description of theirs, for messages.

    Categories without a partner are absent. Ids count unless a pair of names shows that they differ.
    """
    found = by_name(theirs, {each: (name,) for each, name in ours.items()}, fold=fold_category)
    if any(their_id != our_id for their_id, our_id in found.items()):
        _log.info("%s are matched by name: their ids are not the ground truth's", what)
        return CategoryPairs(found)
    same = [each for each in theirs if each not in found and each in ours]
    unnamed = {each: each for each in same if not (theirs[each].strip() and ours[each].strip())}
    return CategoryPairs(
        found | unnamed, {each: (each, theirs[each], ours[each]) for each in same if each not in unnamed}
    )
