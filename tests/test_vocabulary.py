"""Categories → prompts."""

from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.errors import InputError
from owlsam_ray.settings import VocabularyConfig
from owlsam_ray.vocabulary import resolve_vocabulary


def config(**fields: Any) -> VocabularyConfig:
    return VocabularyConfig.model_validate(fields)


def test_coco_has_80_categories_with_their_own_ids(shared: Path) -> None:
    import json

    vocabulary = resolve_vocabulary(config(categories="coco"), [])
    annotations = json.loads(next((shared / "data" / "coco_mini").glob("*.json")).read_text())
    assert [category.model_dump() for category in vocabulary.categories] == [
        {key: entry[key] for key in ("id", "name", "supercategory")} for entry in annotations["categories"]
    ]
    assert vocabulary.prompts[0] == "a photo of a person"
    assert vocabulary.prompt_labels == tuple(range(80))


def test_own_names_count_from_one() -> None:
    vocabulary = resolve_vocabulary(config(categories=["red ball", "Hütte"], template="{}"), [])
    assert [(category.id, category.name) for category in vocabulary.categories] == [(1, "red ball"), (2, "Hütte")]
    assert vocabulary.prompts == ("red ball", "Hütte")


def test_dataset_categories_keep_ids() -> None:
    vocabulary = resolve_vocabulary(config(), [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "frequency": "r"}])
    assert [category.id for category in vocabulary.categories] == [7, 3]


def test_a_name_with_braces_is_no_template() -> None:
    assert resolve_vocabulary(config(categories=["{x} {}"]), []).prompts == ("a photo of a {x} {}",)


@pytest.mark.parametrize(
    ("categories", "source", "words"),
    [
        ([], [], "is empty"),
        (["cat", "dog", "Cat "], [], "1 name(s) given more than once: 'cat'"),
        (["red  ball", "red ball"], [], "given more than once"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], [], "1 id(s) given more than once: 1"),
        (["a", {"id": 1, "name": "b"}], [], "mixes plain names"),
        ("dataset", [], "names no categories"),
        ("dataset", [{"name": "a"}], "categories[0] of the dataset needs"),
        ("dataset", ["a"], "categories[0] of the dataset needs"),
        ("dataset", [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "given more than once: 'a'"),
    ],
)
def test_bad_lists_are_refused(categories: Any, source: list[Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_vocabulary(config(categories=categories), source)
    assert words in str(caught.value)
