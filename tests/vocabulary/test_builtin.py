"""The built-in lists against the datasets' own."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from owlsam_ray.config.vocabulary import Category, VocabularyConfig
from owlsam_ray.reduce.formats.coco import category_entry
from owlsam_ray.vocabulary import Vocabulary, resolve_vocabulary
from owlsam_ray.vocabulary.builtin import builtin


def read(shared: Path, *names: str) -> Any:
    return json.loads(shared.joinpath("data", *names).read_text(encoding="utf-8"))


def resolve(**fields: Any) -> Vocabulary:
    return resolve_vocabulary(VocabularyConfig.model_validate(fields), [])


def test_coco(shared: Path) -> None:
    synsets = {entry["coco_cat_id"]: entry["synset"] for entry in read(shared, "lvis", "coco_to_synset.json").values()}
    assert [(each.id, each.name, each.supercategory, each.synset) for each in builtin("coco")] == [
        (entry["id"], entry["name"], entry["supercategory"], synsets[entry["id"]])
        for entry in read(shared, "coco_categories_80of91.json")
    ]
    assert len(builtin("coco")) == 80


def test_lvis(shared: Path) -> None:
    entries = read(shared, "lvis", "lvis_v1_categories.json")
    assert len(builtin("lvis")) == len(entries) == 1203
    for each, entry in zip(builtin("lvis"), entries, strict=True):
        assert (each.id, each.name, each.frequency, each.synset) == (
            entry["id"], entry["name"], entry["frequency"], entry["synset"],
        )  # fmt: skip
        assert each.synonyms == tuple(name for name in entry["synonyms"] if name != entry["name"])
        assert each.spellings == (entry["name"],)


def test_objects365(shared: Path) -> None:
    entries = read(shared, "objects365", "objects365_v2_categories.json")
    assert [(each.id, each.name, each.raw_name) for each in builtin("objects365")] == [
        (entry["id"], entry["name_fixed"], entry["name"]) for entry in entries
    ]
    assert len(entries) == 365
    assert sum(len(each.spellings) == 2 for each in builtin("objects365")) == 13


def test_lvis_as_a_vocabulary_equals_the_datasets_own_list(shared: Path) -> None:
    entries = read(shared, "lvis", "lvis_v1_categories.json")
    for synonyms in (False, True):
        own = VocabularyConfig(categories="dataset", synonyms=synonyms, canonical=True)
        expected = resolve_vocabulary(own, entries)
        found = resolve(categories="lvis", synonyms=synonyms)
        assert [query.model_dump() for query in found.queries] == [query.model_dump() for query in expected.queries]
        assert [(each.id, each.name, each.frequency) for each in found.categories] == [
            (each.id, each.name, each.frequency) for each in expected.categories
        ]
    assert found.queries[1].text == "a photo of a spray can"


def test_only_lvis_is_canonical_unless_told() -> None:
    assert resolve(categories="lvis", only="Bible").queries[0].text == "a photo of a bible"
    assert resolve(categories="lvis", only="aerosol_can", canonical=False).queries[0].text == "a photo of a aerosol_can"
    assert resolve(categories="objects365", only=38).queries[0].text == "a photo of a Monitor/TV"
    assert resolve(categories="objects365", only=38, canonical=True).queries[0].text == "a photo of a monitor tv"
    for categories in ("coco", "objects365", "dataset", "names.txt", ["Cat"]):
        assert VocabularyConfig.model_validate({"categories": categories}).canonical is False
        assert VocabularyConfig.model_validate({"categories": categories, "canonical": None}).canonical is False
    # What a run stores says so, whatever a later version takes for the default.
    assert VocabularyConfig(categories="lvis").model_dump()["canonical"] is True


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("lvsi", "is not a list of categories: choose coco, lvis, objects365, dataset, a text file"),
        ("lvsi", "Did you mean lvis?"),
        ("COCO", "Did you mean coco?"),
        ("names", "its path holds a / or ends in .txt"),
        (7, "Input should be `coco`, `lvis`, `objects365`, `dataset`, a text file, or a list of names"),
    ],
)
def test_a_typo_is_no_file(value: Any, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        VocabularyConfig.model_validate({"categories": value})
    assert words in str(caught.value)


def test_frequency_and_synonyms_stand_in_the_output() -> None:
    bare = Category(id=1, name="cat")
    assert category_entry(bare) == {"id": 1, "name": "cat", "supercategory": ""}
    (rare,) = resolve(categories="lvis", only="bull", synonyms=True).categories
    assert category_entry(rare) == {
        "id": 162, "name": "bull", "supercategory": "", "synonyms": ["horned_cow"], "frequency": "c",
    }  # fmt: skip


def test_a_frequency_of_another_kind_is_not_read() -> None:
    entries = [{"id": 1, "name": "a", "frequency": 0.25}, {"id": 2, "name": "b", "frequency": ["r"]}]
    found = resolve_vocabulary(VocabularyConfig(), entries)
    assert [category.frequency for category in found.categories] == [None, None]


def test_what_earlier_runs_stored_loads() -> None:
    stored = VocabularyConfig.model_validate({"categories": "dataset", "canonical": False, "dataset_synonyms": True})
    assert stored == VocabularyConfig(synonyms=True)
    assert Category.model_validate({"id": 1, "name": "a", "supercategory": "", "synonyms": [], "prompts": []})
    with pytest.raises(ValidationError, match="Extra inputs"):
        VocabularyConfig.model_validate({"synonyms": False, "dataset_synonyms": True})
