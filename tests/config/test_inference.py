"""Settings that contradict each other are refused, with what to do; those that agree are taken."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from owlsam_ray.config.base import Section
from owlsam_ray.config.inference import DetectorConfig, SegmentConfig, SuppressConfig, TilingConfig
from owlsam_ray.config.vocabulary import Category, Exemplar, VocabularyConfig

CAT: dict[str, Any] = {"category": "cat", "image": "cat.jpg"}


@pytest.mark.parametrize(
    ("section", "fields", "words"),
    [
        (DetectorConfig, {"pad_value": 0.5}, "pad_value 0.5 belongs to preprocess: scenic"),
        (DetectorConfig, {"objectness": "multiply"}, "objectness: multiply needs model: owlv2"),
        (DetectorConfig, {"preprocess": "scenic", "pad_value": 1.5}, "less than or equal to 1"),
        (DetectorConfig, {"preprocess": "nanoowl"}, "'hf' or 'scenic'"),
        (SuppressConfig, {"sigma": 0.5}, "sigma 0.5 belongs to strategy: soft_nms with decay: exponential"),
        (SuppressConfig, {"strategy": "soft_nms", "decay": "linear", "sigma": 0.5}, "sigma 0.5 belongs to"),
        (SuppressConfig, {"strategy": "soft_nms", "sigma": 0}, "greater than 0"),
        (SuppressConfig, {"strategy": "merge", "decay": "linear"}, "decay: linear belongs to strategy: soft_nms"),
        (SuppressConfig, {"strategy": "soft_nms", "threshold": 0.5}, "exponential decay has no threshold"),
        (SuppressConfig, {"strategy": "soft_nms", "thresholds": {"cat": 0.5}}, "so thresholds would have no effect"),
        (SuppressConfig, {"strategy": "none", "threshold": 0.5}, "strategy: none suppresses nothing"),
        (SuppressConfig, {"strategy": "none", "across_labels": True}, "so across_labels would have no effect"),
        (SuppressConfig, {"thresholds": {"cat": 0.5}, "across_labels": True}, "thresholds are per category"),
        (SuppressConfig, {"thresholds": {"cat": 1.5}}, "less than or equal to 1"),
        (SuppressConfig, {"strategy": "none", "overlap": "ios"}, "so overlap: ios would have no effect"),
        (SuppressConfig, {"strategy": "merge", "overlap": "ios"}, "so the mean box would fit neither"),
        (TilingConfig, {"full_image": False}, "full_image: False without size"),
        (TilingConfig, {"overlap": 0.5}, "overlap: 0.5 without size"),
        (TilingConfig, {"size": 8}, "greater than or equal to 32"),
        (TilingConfig, {"size": 100, "overlap": 1}, "less than or equal to 0.9"),
        (VocabularyConfig, {"categories": ["cat", False]}, "a name (in quotes where YAML would read something else)"),
        (VocabularyConfig, {"templates": []}, "templates is empty"),
        (VocabularyConfig, {"templates": ["a {}", "a {}"]}, "the same template twice"),
        (VocabularyConfig, {"templates": ["a thing"]}, "must contain {} exactly once"),
        (VocabularyConfig, {"templates": "a {} {x}"}, "must contain {} exactly once"),
        (VocabularyConfig, {"categories": "coco", "synonyms": True}, "categories is neither `lvis` nor `dataset`"),
        (VocabularyConfig, {"exemplars_replace_text": True}, "exemplars_replace_text without exemplars"),
        (Category, {"id": 1, "name": "cat", "synonyms": ["kitty"], "prompts": ["a cat"]}, "has prompts and synonyms"),
        (Exemplar, CAT | {"box": [5, 5, 5, 9]}, "with x1 > x0 and y1 > y0"),
        (Exemplar, CAT | {"box": [0, 0, float("nan"), 9]}, "finite number"),
        (SegmentConfig, {"min_area": -1}, "greater than or equal to 0"),
        (SegmentConfig, {"masks": "best"}, "'single', 'best_of_three' or 'most_stable'"),
    ],
)
def test_contradictions_are_refused(section: type[Section], fields: dict[str, Any], words: str) -> None:
    needed = {"weights": "w"} if section in (DetectorConfig, SegmentConfig) else {}
    with pytest.raises(ValidationError) as caught:
        section.model_validate(needed | fields)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        DetectorConfig(weights="w", model="owlv2", objectness="multiply", preprocess="scenic", pad_value=0.5),
        DetectorConfig(weights="w", image_size=1024),
        SuppressConfig(strategy="soft_nms", sigma=0.3),
        SuppressConfig(strategy="soft_nms", decay="linear", threshold=0.4, thresholds={"cat": 0.5}),
        SuppressConfig(strategy="merge", across_labels=True),
        SuppressConfig(strategy="none"),
        TilingConfig(size=512, full_image=False),
        VocabularyConfig(categories=("cat",), templates=("a {}", "the {}"), ensemble="logits", canonical=True),
        VocabularyConfig(categories="dataset", synonyms=True, exemplars=(Exemplar(**CAT),)),
        VocabularyConfig(categories=(Category(id=3, name="cat", synonyms=("kitty",)),)),
        SegmentConfig(weights="w", model="sam", prompt="box_and_center", masks="most_stable", fill_holes=10),
    ],
)
def test_what_a_run_stores_loads_again(section: Section) -> None:
    stored = json.loads(json.dumps(section.model_dump(mode="json")))
    assert type(section).model_validate(stored) == section


def test_one_template_may_stand_without_a_list() -> None:
    assert VocabularyConfig.model_validate({"templates": "a {}"}).templates == ("a {}",)
