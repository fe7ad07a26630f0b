"""Map the categories of one dataset to another's, so that labels of one can be scored on the other.

**COCO and LVIS** categories are matched if they have the same WordNet synset: 79 of COCO's 80 (LVIS v1 has no
`hot dog`), one to one. The sense is the same, but what was annotated as it may differ: LVIS's `flowerpot` is COCO's
`potted plant`, and objects with a narrower name in LVIS (`minivan`, `polar_bear`) may be a COCO `car` or `bear`, and
have no counterpart here.

**Objects365 → COCO** uses a table of names, `data/objects365_to_coco.tsv`, made by reading both lists. Every COCO class
gets the Objects365 class of the same meaning, plus the kinds of it that Objects365 lists separately (`SUV` is a `car`,
`Swan` a `bird`, `Bow Tie` a `tie`, `Soccer`, the ball, a `sports ball`): 104 classes map to COCO's 80. Where an
Objects365 class is wider, the nearest one was taken: `Handbag/Satchel`, `Bowl/Basin`, `Orange/Tangerine`,
`Monitor/TV`, `Luggage` (suitcase), `Stuffed Toy` (teddy bear). Left out, since their objects may belong to several
COCO classes or to none: `Van`, `Ambulance` and `Machinery Vehicle` (car, truck), `Scooter`, `Chicken` (or a dish),
`Billards` (balls, or the table), `Stool`, `Wheelchair`, `Desk`, `Coffee Table`, `Side Table`, `Urinal`, `Gas stove`,
`Watch`, `Briefcase`, `Wallet/Purse`.

Where several categories map to one, an object that was detected as two of them appears twice afterwards: nothing
suppresses across them, and all but one count as false positives.
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
"""Source and target list of each mapping."""


@dataclass(frozen=True, slots=True)
class CategoryMapping:
    """A mapping from the ids of one built-in list to the ids of another."""

    name: MappingName
    source: tuple[BuiltinCategory, ...]
    target: tuple[BuiltinCategory, ...]
    ids: Mapping[int, int]
    """Source id → target id. Ids that are not keys have no counterpart; several ids may map to the same one."""


@cache
def category_mapping(name: MappingName) -> CategoryMapping:
    """The mapping with this name."""
    source, target = (builtin(end) for end in ENDS[name])
    ids = _by_table(source, target) if name == "objects365_to_coco" else _by_synset(source, target)
    return CategoryMapping(name, source, target, ids)


def _by_synset(source: tuple[BuiltinCategory, ...], target: tuple[BuiltinCategory, ...]) -> dict[int, int]:
    """Match by synset, which is unique within each of the two lists."""
    of_synset = {each.synset: each.id for each in target}
    return {each.id: of_synset[each.synset] for each in source if each.synset in of_synset}


def _by_table(source: tuple[BuiltinCategory, ...], target: tuple[BuiltinCategory, ...]) -> dict[int, int]:
    source_ids, target_ids = ({each.name: each.id for each in end} for end in (source, target))
    ids: dict[int, int] = {}
    for row in read_table("objects365_to_coco.tsv"):
        for name in split_list(row["objects365"]):
            ids[source_ids[name]] = target_ids[row["coco"]]
    return dict(sorted(ids.items()))
