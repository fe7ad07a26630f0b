"""One dataset's categories in terms of another's, so that labels in the one can be scored on the other.

**COCO and LVIS** meet where their categories have the same WordNet synset: 79 of COCO's 80 (there is no `hot dog` in
LVIS v1), one to one. The sense is the same, what was annotated as it may differ: LVIS's `flowerpot` is COCO's
`potted plant`, and what LVIS gives a narrower name (`minivan`, `polar_bear`) may be a COCO `car` or `bear`, and has
no counterpart here.

**Objects365 → COCO** goes by a table of names, `data/objects365_to_coco.tsv`, made by reading both lists. Every COCO
class has the Objects365 class of the same meaning, and beside it the kinds of it that Objects365 lists apart (`SUV` is
a `car`, `Swan` a `bird`, `Bow Tie` a `tie`, `Soccer`, the ball, a `sports ball`): 104 become COCO's 80. Where it draws
a wider circle, the nearest there is was taken: `Handbag/Satchel`, `Bowl/Basin`, `Orange/Tangerine`, `Monitor/TV`,
`Luggage` (suitcase), `Stuffed Toy` (teddy bear). Left out, since their objects may be of several COCO classes or of
none: `Van`, `Ambulance` and `Machinery Vehicle` (car, truck), `Scooter`, `Chicken` (or a dish), `Billards` (balls, or
the table), `Stool`, `Wheelchair`, `Desk`, `Coffee Table`, `Side Table`, `Urinal`, `Gas stove`, `Watch`, `Briefcase`,
`Wallet/Purse`.

Where several categories become one, an object that was found under two of them is there twice afterwards: nothing
suppresses across them, and all but one count as false.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from owlsam_ray.config.vocabulary import BuiltinVocabulary, MappingName
from owlsam_ray.vocabulary.builtin import BuiltinCategory, builtin, read_table, split_list

ENDS: Mapping[MappingName, tuple[BuiltinVocabulary, BuiltinVocabulary]] = {
    "lvis_to_coco": ("lvis", "coco"),
    "coco_to_lvis": ("coco", "lvis"),
    "objects365_to_coco": ("objects365", "coco"),
}
"""The lists that a mapping starts from and leads to."""


@dataclass(frozen=True, slots=True)
class CategoryMapping:
    """From the ids of one built-in list to those of another."""

    name: MappingName
    source: tuple[BuiltinCategory, ...]
    target: tuple[BuiltinCategory, ...]
    ids: Mapping[int, int]
    """Source id → target id. Ids that are not keys have no counterpart; several may have the same one."""

    @property
    def unmatched_source(self) -> tuple[str, ...]:
        """Names that have no counterpart, in the list's order."""
        return tuple(each.name for each in self.source if each.id not in self.ids)

    @property
    def unmatched_target(self) -> tuple[str, ...]:
        """Names that nothing is a counterpart of, in the list's order."""
        reached = set(self.ids.values())
        return tuple(each.name for each in self.target if each.id not in reached)


@cache
def category_mapping(name: MappingName) -> CategoryMapping:
    """A mapping, by its name."""
    source, target = (builtin(end) for end in ENDS[name])
    ids = _by_table(source, target) if name == "objects365_to_coco" else _by_synset(source, target)
    return CategoryMapping(name, source, target, ids)


def _by_synset(source: tuple[BuiltinCategory, ...], target: tuple[BuiltinCategory, ...]) -> dict[int, int]:
    """Within both lists, a synset stands once."""
    of_synset = {each.synset: each.id for each in target}
    return {each.id: of_synset[each.synset] for each in source if each.synset in of_synset}


def _by_table(source: tuple[BuiltinCategory, ...], target: tuple[BuiltinCategory, ...]) -> dict[int, int]:
    source_ids, target_ids = ({each.name: each.id for each in end} for end in (source, target))
    ids: dict[int, int] = {}
    for row in read_table("objects365_to_coco.tsv"):
        for name in split_list(row["objects365"]):
            ids[source_ids[name]] = target_ids[row["coco"]]
    return dict(sorted(ids.items()))
