"""A part of a list, by name, id and frequency group."""

import logging
from typing import Any

import pytest
from pydantic import ValidationError

from owlsam_ray.config.vocabulary import Category, VocabularyConfig
from owlsam_ray.errors import InputError
from owlsam_ray.vocabulary import resolve_vocabulary
from owlsam_ray.vocabulary.builtin import builtin


def chosen(*source: Any, **fields: Any) -> tuple[Category, ...]:
    return resolve_vocabulary(VocabularyConfig.model_validate(fields), list(source)).categories


def test_names_and_ids_keep_the_lists_order_and_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = chosen(categories="coco", only=["Traffic  LIGHT", 90, "person", "potted_plant", 1])
    assert [(each.id, each.name) for each in found] == [
        (1, "person"), (10, "traffic light"), (64, "potted plant"), (90, "toothbrush"),
    ]  # fmt: skip
    assert "4 of 80 categories are selected" in caplog.text
    assert [each.id for each in chosen(categories="lvis", only="aerosol can")] == [1]
    assert [each.name for each in chosen(categories="objects365", only=["Bakset", "Monitor/TV"])] == [
        "Monitor/TV", "Basket",
    ]  # fmt: skip


def test_names_that_only_an_underscore_tells_apart() -> None:
    both = ["red_cup", "red cup", "blue cup"]
    assert [each.id for each in chosen(categories=both, only="red cup")] == [2]
    assert [each.id for each in chosen(categories=both, only=["red_cup", "Blue_Cup"])] == [1, 3]
    with pytest.raises(InputError, match="'a_b c', which could be any of 'a_b_c', 'a b_c': write one of them"):
        chosen(categories=["a_b_c", "a b_c", "d"], only="a_b c")


def test_groups_of_lvis(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for group, number in (("r", 337), ("c", 461), ("f", 405)):
        found = chosen(categories="lvis", frequency=group)
        assert [each.id for each in found] == [each.id for each in builtin("lvis") if each.frequency == group]
        assert len(found) == number
        assert {each.frequency for each in found} == {group}
    assert len(chosen(categories="lvis", frequency=["r", "c"])) == 798
    caplog.clear()
    assert len(chosen(categories="lvis", frequency=["r", "c", "f"])) == 1203
    assert not caplog.records
    assert [each.id for each in chosen(categories="lvis", only=[1, 2, 3], frequency=["f"])] == [2, 3]


def test_groups_of_a_dataset_and_of_a_list() -> None:
    source = [{"id": 4, "name": "a", "frequency": "r"}, {"id": 2, "name": "b", "frequency": "f"}]
    assert [each.id for each in chosen(*source, frequency=["f"])] == [2]
    assert [each.id for each in chosen(*source, only="A")] == [4]
    assert [each.id for each in chosen(categories=source, frequency=["r"])] == [4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"categories": "coco", "only": "persom"}, "'persom', and no category has that name. Did you mean 'person'"),
        ({"categories": "coco", "only": "qqqq"}, "no category has that name (there are 80)"),
        (
            {"categories": "coco", "only": 12},
            "names the id 12, which is not in the list: its 80 ids are between 1 and 90",
        ),
        ({"categories": "lvis", "only": "spray can"}, "It is a synonym of 'aerosol_can'"),
        ({"categories": "lvis", "only": "spray can", "synonyms": True}, "It is a synonym of 'aerosol_can'"),
        ({"categories": "lvis", "only": "aerosolcan"}, "Did you mean 'aerosol_can'"),
        ({"categories": "lvis", "only": "bus"}, "Did you mean 'bus_(vehicle)'"),
        ({"categories": "lvis", "only": "Bow"}, "Did you mean 'bow_(weapon)' or 'bow_(decorative_ribbons)'"),
        ({"categories": "lvis", "only": 1, "frequency": "f"}, "no category in vocabulary.only is in a group"),
        ({"categories": ["cat"], "frequency": "r"}, "1 of 1 have none; the first is 'cat' (id 1)"),
        (
            {"categories": [{"id": 1, "name": "cat", "frequency": "r"}], "frequency": "f"},
            "no category is left: no category is in a group of vocabulary.frequency, ['f']",
        ),
        (
            {"categories": "coco", "only": "dog", "exemplars": [{"category": "cat", "image": "c.jpg"}]},
            "vocabulary.exemplars[0] shows 'cat', and no category has that name. The categories are: 'dog'",
        ),
    ],
)
def test_what_the_list_lacks_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        chosen(**fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"only": []}, "only is empty: leave it out (null)"),
        ({"frequency": []}, "frequency is empty"),
        ({"only": [1.5]}, "only holds 1.5, which is neither a name nor an id"),
        ({"only": ["cat", False]}, "only holds False, which is neither a name nor an id (put names in quotes"),
        ({"only": [" "]}, "at least 1 character"),
        ({"only": {"a": 1}}, "valid tuple"),
        ({"frequency": ["x"]}, "'r', 'c' or 'f'"),
        ({"categories": "coco", "frequency": ["r"]}, "needs categories with frequency groups, and coco has none"),
        ({"categories": "names.txt", "frequency": ["r"]}, "and names.txt has none"),
        ({"categories": "objects365", "synonyms": True}, "categories is neither `lvis` nor `dataset`"),
    ],
)
def test_settings_that_choose_nothing_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        VocabularyConfig.model_validate(fields)
    assert words in str(caught.value)
