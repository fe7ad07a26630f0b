"""One dataset's ids in terms of another's."""

import json
from pathlib import Path

import pytest

from owlsam_ray.config.vocabulary import MappingName
from owlsam_ray.vocabulary.builtin import builtin, read_table
from owlsam_ray.vocabulary.mapping import CategoryMapping, category_mapping


def names(mapping: MappingName) -> list[tuple[str, str]]:
    found = category_mapping(mapping)
    source, target = ({each.id: each.name for each in end} for end in (found.source, found.target))
    return [(source[each], target[other]) for each, other in found.ids.items()]


def unmatched_source(mapping: CategoryMapping) -> tuple[str, ...]:
    return tuple(each.name for each in mapping.source if each.id not in mapping.ids)


def unmatched_target(mapping: CategoryMapping) -> tuple[str, ...]:
    reached = set(mapping.ids.values())
    return tuple(each.name for each in mapping.target if each.id not in reached)


def test_coco_and_lvis_meet_by_synset(shared: Path) -> None:
    synsets = json.loads((shared / "data" / "lvis" / "coco_to_synset.json").read_text())
    lvis = json.loads((shared / "data" / "lvis" / "lvis_v1_categories.json").read_text())
    expected = {
        entry["id"]: of["coco_cat_id"] for entry in lvis for of in synsets.values() if of["synset"] == entry["synset"]
    }
    to_coco, to_lvis = category_mapping("lvis_to_coco"), category_mapping("coco_to_lvis")
    assert to_coco.ids == expected
    assert to_lvis.ids == {coco: of for of, coco in expected.items()}
    assert len(to_coco.ids) == len(to_lvis.ids) == 79
    assert unmatched_target(to_coco) == unmatched_source(to_lvis) == ("hot dog",)
    assert len(unmatched_source(to_coco)) == len(unmatched_target(to_lvis)) == 1203 - 79
    pairs = dict(names("lvis_to_coco"))
    assert [pairs[name] for name in ("person", "mouse_(computer_equipment)", "sofa", "hair_dryer", "bear")] == [
        "person", "mouse", "couch", "hair drier", "bear",
    ]  # fmt: skip
    assert "polar_bear" not in pairs


def test_objects365_has_all_of_coco() -> None:
    mapping = category_mapping("objects365_to_coco")
    assert unmatched_target(mapping) == ()
    assert len(mapping.ids) == 104
    table = read_table("objects365_to_coco.tsv")
    assert [row["coco"] for row in table] == [each.name for each in builtin("coco")]
    listed = [name for row in table for name in row["objects365"].split("|")]
    assert len(listed) == len(set(listed)) == len(mapping.ids)


def test_equal_names_are_mapped_onto_each_other() -> None:
    """A slip of a line in the table would show here: all but these ten are called the same in both."""
    coco = {each.name.lower() for each in builtin("coco")}
    pairs = names("objects365_to_coco")
    by_coco: dict[str, list[str]] = {}
    for ours, theirs in pairs:
        by_coco.setdefault(theirs, []).append(ours)
        if ours.lower() in coco:
            assert ours.lower() == theirs
    assert {name: found for name, found in by_coco.items() if name not in {each.lower() for each in found}} == {
        "bird": ["Wild Bird", "Duck", "Pigeon", "Goose", "Penguin", "Swan", "Parrot"],
        "handbag": ["Handbag/Satchel"],
        "suitcase": ["Luggage"],
        "skis": ["Skiboard"],
        "sports ball": [
            "Soccer", "Other Balls", "Baseball", "Basketball", "American Football", "Tennis", "Volleyball", "Golf Ball",
            "Table Tennis",
        ],
        "bowl": ["Bowl/Basin"],
        "orange": ["Orange/Tangerine"],
        "tv": ["Monitor/TV"],
        "teddy bear": ["Stuffed Toy"],
        "hair drier": ["Hair Dryer"],
    }  # fmt: skip


@pytest.mark.parametrize("name", ["lvis_to_coco", "coco_to_lvis", "objects365_to_coco"])
def test_a_mapping_leads_from_ids_of_one_list_to_the_other(name: MappingName) -> None:
    mapping = category_mapping(name)
    assert set(mapping.ids) <= {each.id for each in mapping.source}
    assert set(mapping.ids.values()) <= {each.id for each in mapping.target}
