"""Categories → queries."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from owlsam_ray.config.base import KINDS
from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.errors import InputError
from owlsam_ray.vocabulary import Query, Vocabulary, resolve_vocabulary
from owlsam_ray.vocabulary.canonical import canonical
from owlsam_ray.vocabulary.templates import TEMPLATES


def config(**fields: Any) -> VocabularyConfig:
    return VocabularyConfig.model_validate(fields)


def resolve(*source: Any, **fields: Any) -> Vocabulary:
    return resolve_vocabulary(config(**fields), list(source))


def asked(vocabulary: Vocabulary) -> list[tuple[int, str]]:
    return [(query.label, query.text) for query in vocabulary.queries]


def lvis(shared: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads((shared / "data" / "lvis" / "lvis_v1_categories.json").read_text())
    return entries


def reference_tokens(shared: Path) -> list[dict[str, Any]]:
    datasets = json.loads((shared / "data" / "clip_bpe" / "reference_tokens.json").read_text())
    return [entry for entries in datasets.values() for entry in entries]


# Categories


def test_coco_has_80_categories_with_their_own_ids(shared: Path) -> None:
    vocabulary = resolve(categories="coco")
    annotations = json.loads(next((shared / "data" / "coco_mini").glob("*.json")).read_text())
    assert [category.model_dump(exclude_defaults=True) for category in vocabulary.categories] == [
        {key: entry[key] for key in ("id", "name", "supercategory")} for entry in annotations["categories"]
    ]
    assert asked(vocabulary)[0] == (0, "a photo of a person")
    assert vocabulary.query_labels == tuple(range(80))


def test_own_names_count_from_one() -> None:
    vocabulary = resolve(categories=["red ball", "Hütte"], templates="none")
    assert [(category.id, category.name) for category in vocabulary.categories] == [(1, "red ball"), (2, "Hütte")]
    assert asked(vocabulary) == [(0, "red ball"), (1, "Hütte")]


def test_dataset_categories_keep_ids() -> None:
    vocabulary = resolve({"id": 7, "name": "cat"}, {"id": 3, "name": "dog", "frequency": "r"})
    assert [category.id for category in vocabulary.categories] == [7, 3]


def test_null_means_not_stated() -> None:
    source = [
        {"id": 1, "name": "cat", "supercategory": None, "synonyms": None, "frequency": None},
        {"id": 2**53 - 1, "name": "dog", "synonyms": ["hound"]},
    ]
    found = resolve(*source, synonyms=True).categories
    assert [(each.id, each.supercategory, each.synonyms) for each in found] == [
        (1, "", ()),
        (2**53 - 1, "", ("hound",)),
    ]


@pytest.mark.parametrize("wrong", ["1", True, 1.0, -1, 2**53, 2**70, None])
def test_ids_are_integers_that_json_keeps(wrong: Any) -> None:
    entries = [{"id": 3, "name": "cat"}, {"id": wrong, "name": "dog"}]
    with pytest.raises(InputError, match=r"categories\[1\] of the dataset needs an integer id \(0 ≤ id < 2\^53\)"):
        resolve(*entries)
    with pytest.raises(ValidationError) as caught:
        config(categories=entries)
    assert [part for part in caught.value.errors()[0]["loc"] if part not in KINDS] == ["categories", 1, "id"]


@pytest.mark.parametrize(
    ("fields", "source", "words"),
    [
        ({"categories": []}, [], "is empty"),
        ({"categories": ["cat", "dog", "Cat "]}, [], "1 name(s) given more than once: 'cat'"),
        ({"categories": ["red  ball", "red ball"]}, [], "given more than once"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, [], "1 id(s) given more than once: 1"),
        ({"categories": ["a", {"id": 1, "name": "b"}]}, [], "mixes plain names"),
        ({}, [], "names no categories"),
        ({}, [{"name": "a"}], "categories[0] of the dataset needs"),
        ({}, ["a"], "categories[0] of the dataset needs"),
        ({}, [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "given more than once: 'a'"),
        ({"synonyms": True}, [{"id": 1, "name": "a"}], "no category of the dataset lists `synonyms`"),
        ({"synonyms": True}, [{"id": 1, "name": "a", "synonyms": "b"}], "and synonyms as a list of texts"),
        ({"synonyms": True}, [{"id": 1, "name": "a", "synonyms": [""]}], "and synonyms as a list of texts"),
        (
            {
                "categories": ["cat", "dog"],
                "exemplars": [{"category": "dog", "image": "x"}, {"category": "cow", "image": "y"}],
            },
            [],
            "vocabulary.exemplars[1] shows 'cow', and no category has that name. The categories are: 'cat', 'dog'",
        ),
        ({"categories": ["cat", "猫"], "canonical": True}, [], "the name '猫' is empty in canonical form"),
        (
            {"categories": [{"id": 1, "name": "cat", "synonyms": ["猫"]}], "canonical": True, "templates": "none"},
            [],
            "'猫' (a synonym of 'cat')",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], source: list[Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_vocabulary(config(**fields), source)
    assert words in str(caught.value)


# Templates and canonical form


def test_a_name_with_braces_is_no_template() -> None:
    assert asked(resolve(categories=["{x} {}"])) == [(0, "a photo of a {x} {}")]


def test_templates_are_scenics(shared: Path) -> None:
    published = json.loads((shared / "data" / "prompts" / "scenic_clip_prompts.json").read_text())
    assert list(TEMPLATES["clip_best7"]) == published["best7"]
    assert all(sentence.count("{}") == 1 for sentences in TEMPLATES.values() for sentence in sentences)
    query = resolve(categories=["cat"], templates="clip_best7").queries[0]
    assert query.prompts == tuple(template.format("cat") for template in published["best7"])
    assert query.text == "itap of a cat. (+6)"


def test_own_templates() -> None:
    vocabulary = resolve(categories=["cat", "dog"], templates=["the {}", "{} seen from above"])
    assert [query.prompts for query in vocabulary.queries] == [
        ("the cat", "cat seen from above"),
        ("the dog", "dog seen from above"),
    ]


def test_canonical_form_of_every_published_name(shared: Path) -> None:
    entries = reference_tokens(shared)
    assert len(entries) == 80 + 1203 + 365
    assert [canonical(entry["name"]) for entry in entries] == [entry["canonical"] for entry in entries]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hot-Dog_(food)", "hot-dog food"),
        ("a -- b", "a - b"),
        ("x---y", "x-y"),
        ("\tTwo\n lines ", "two lines"),
        ("a photo of a #1 cap.", "a photo of a 1 cap"),
        ("#1 cap", "#1 cap"),
        ("##1##", "#1"),
        ("###", "#"),
        ("a # b", "a  b"),  # so the original: hashes go last
        ("Hütte", "h tte"),
        ("\u212aelvin", "elvin"),  # the sign for kelvin, whose lower case is k; but not in ASCII
        ("猫", ""),
        ("", ""),
    ],
)
def test_canonical_form(text: str, expected: str) -> None:
    assert canonical(text) == expected


def test_the_whole_prompt_becomes_canonical() -> None:
    query = resolve(categories=["Pan_(for_cooking)"], templates="clip_best7", canonical=True).queries[0]
    assert query.prompts[0] == "itap of a pan for cooking"
    assert len(query.prompts) == 7


def test_canonical_lvis_has_no_clashes(shared: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = {"templates": "clip_best7", "canonical": True, "synonyms": True}
    vocabulary = resolve_vocabulary(config(**fields), lvis(shared))
    assert len(vocabulary.categories) == 1203
    assert list(vocabulary.query_labels) == sorted(vocabulary.query_labels)
    assert set(vocabulary.query_labels) == set(range(1203))
    assert not caplog.records


# Several queries of one label


def test_lvis_synonyms(shared: Path) -> None:
    plain = resolve_vocabulary(config(templates="none"), lvis(shared))
    assert asked(plain)[0] == (0, "aerosol_can")  # underscores stay
    assert len(plain.queries) == 1203
    assert all(not category.synonyms for category in plain.categories)
    more = resolve_vocabulary(config(templates="none", synonyms=True), lvis(shared))
    assert asked(more)[:2] == [(0, "aerosol_can"), (0, "spray_can")]
    # The list of synonyms holds the name itself; it is asked once.
    expected = sum(len({entry["name"], *entry["synonyms"]}) for entry in lvis(shared))
    assert len(more.queries) == expected > 1203


def test_order_of_queries() -> None:
    categories = [
        {"id": 5, "name": "cat", "synonyms": ["kitty", "Cat ", "house  cat", "house cat"]},
        {"id": 2, "name": "cup", "prompts": ["a cup of TEA.", "mug"]},
        {"id": 9, "name": "dog"},
    ]
    exemplars = [
        {"category": "Dog", "image": "d.jpg"},
        {"category": "cat", "image": "c.jpg", "box": [1, 2, 3.5, 4]},
        {"category": "cat", "image": "c.jpg"},
        {"category": "cat", "image": "c.jpg"},
    ]
    vocabulary = resolve(categories=categories, exemplars=exemplars, canonical=True)
    assert asked(vocabulary) == [
        (0, "a photo of a cat"),
        (0, "a photo of a kitty"),
        (0, "a photo of a house cat"),
        (0, "c.jpg [1, 2, 3.5, 4]"),
        (0, "c.jpg"),
        (1, "a cup of TEA."),  # as it stands
        (1, "mug"),
        (2, "a photo of a dog"),
        (2, "d.jpg"),
    ]
    assert [query.prompts for query in vocabulary.queries if query.exemplar] == [(), (), ()]
    replaced = resolve(categories=categories, exemplars=exemplars, exemplars_replace_text=True)
    assert asked(replaced) == [
        (0, "c.jpg [1, 2, 3.5, 4]"),
        (0, "c.jpg"),
        (1, "a cup of TEA."),
        (1, "mug"),
        (2, "d.jpg"),
    ]


def test_one_query_in_two_categories_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    vocabulary = resolve(
        categories=[
            {"id": 1, "name": "cat", "synonyms": ["Pet"]},
            {"id": 2, "name": "dog", "synonyms": ["pet"]},
            {"id": 3, "name": "sofa"},
        ],
        templates="none",
    )
    assert len(vocabulary.queries) == 5
    assert len(caplog.records) == 1
    assert "1 query is shared by two categories" in caplog.text
    assert "'pet' of 'dog' equals 'Pet' of 'cat'" in caplog.text


def test_a_query_is_frozen_and_survives_json() -> None:
    query = resolve(categories=["cat"], exemplars=[{"category": "cat", "image": "c.jpg", "box": [0, 0, 1, 2]}]).queries[
        1
    ]
    assert Query.model_validate_json(query.model_dump_json()) == query
    with pytest.raises(ValidationError, match="extra"):
        Query.model_validate({"label": 0, "prompts": ["x"], "text": "x"})
