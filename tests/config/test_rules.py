"""Every rule of the run file is broken by a case, reported with its message, and kept by a sensible neighbour."""

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from owlsam_ray.config import rules
from owlsam_ray.config.base import Section
from owlsam_ray.config.data import ColumnsConfig, DataConfig, PlanConfig
from owlsam_ray.config.inference import DetectorConfig, SuppressConfig, TilingConfig
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Category, VocabularyConfig

COCO: dict[str, Any] = {"source": "coco", "annotations": "a.json", "images": "images"}
SECTIONS: dict[str, Any] = {"data": COCO, "detector": {"weights": "d"}, "segment": {"weights": "s"}}
STRICT: dict[str, Any] = {"suppress": {"threshold": 0.5}}

# For each section: cases in the order of its rules. Each breaks one rule, and none before it.
CASES: dict[type[Section], list[tuple[dict[str, Any], str]]] = {
    ColumnsConfig: [
        ({"height": "h"}, "columns.height and columns.width go together"),
        ({"uri": "u", "bytes": "b"}, "both say where the image is"),
    ],
    DataConfig: [
        ({"source": "lvis", "images": "i"}, "source: lvis needs data.annotations"),
        ({"source": "folder", "images": "i", "annotations": "a"}, "source: folder takes no data.annotations"),
        ({"source": "table"}, "source: table needs data.files, the tables"),
        ({"source": "webdataset"}, "source: webdataset needs data.files, the tar files"),
        (COCO | {"files": ["f"]}, "source: coco takes no data.files"),
        ({"source": "folder"}, "source: folder needs data.images"),
        ({"source": "webdataset", "files": ["f.tar"], "images": "i"}, "source: webdataset takes no data.images"),
        (COCO | {"columns": {"id": "key"}}, "data.columns is for source: table, not for coco"),
    ],
    PlanConfig: [({"limit": 3, "sample": 3}, "plan.limit and plan.sample both choose")],
    Category: [
        ({"id": 1, "name": "cat", "synonyms": ["kitty"], "prompts": ["a cat"]}, "'cat' has prompts and synonyms")
    ],
    VocabularyConfig: [
        ({"categories": "coco", "synonyms": True}, "categories is neither `lvis` nor `dataset`"),
        (
            {"categories": "coco", "frequency": ["r"]},
            "frequency: ['r'] needs categories with frequency groups, and coco",
        ),
        ({"exemplars_replace_text": True}, "exemplars_replace_text without exemplars"),
    ],
    DetectorConfig: [
        ({"weights": "w", "pad_value": 0.5}, "pad_value 0.5 belongs to preprocess: scenic"),
        ({"weights": "w", "objectness": "multiply"}, "needs model: owlv2; owlvit does not estimate objectness"),
    ],
    TilingConfig: [
        ({"overlap": 0.5}, "overlap: 0.5 without size"),
        ({"full_image": False}, "full_image: False without size"),
    ],
    SuppressConfig: [
        ({"strategy": "merge", "decay": "linear"}, "decay: linear belongs to strategy: soft_nms, not to merge"),
        ({"sigma": 0.5}, "sigma 0.5 belongs to strategy: soft_nms"),
        ({"strategy": "none", "threshold": 0.5}, "so threshold 0.5 would have no effect"),
        ({"strategy": "soft_nms", "thresholds": {"cat": 0.5}}, "exponential decay has no threshold, so thresholds"),
        ({"thresholds": {"cat": 0.5}, "across_labels": True}, "thresholds are per category"),
        ({"strategy": "merge", "overlap": "ios"}, "the mean box would fit neither"),
        ({"strategy": "none", "across_labels": True}, "so across_labels would have no effect"),
        ({"strategy": "none", "overlap": "ios"}, "so overlap: ios would have no effect"),
    ],
    ResourcesConfig: [({"heartbeat_s": 10, "takeover_s": 15}, "takeover_s 15 is less than twice heartbeat_s 10")],
    RunConfig: [
        (SECTIONS | {"reduce": {"score_thresholds": {"cat": 0.01}}}, "reduce.score_thresholds.cat 0.01 is below"),
        (SECTIONS | STRICT | {"reduce": {"suppress": {}}}, "reduce.suppress.threshold 0.7 is looser than"),
        (SECTIONS | {"tiling": {"size": 64}, "suppress": {"strategy": "none"}}, "once for every tile"),
    ],
}


def cases() -> Iterator[Any]:
    for section, its_cases in CASES.items():
        for rule, (fields, words) in zip(section.RULES, its_cases, strict=True):
            yield pytest.param(section, rule, fields, words, id=words)


@pytest.mark.parametrize(("section", "rule", "fields", "words"), list(cases()))
def test_a_broken_rule_is_reported(
    section: type[Section], rule: rules.Rule, fields: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValidationError) as caught:
        section.model_validate(fields)
    (error,) = caught.value.errors()
    assert words in error["msg"]
    assert "{" not in error["msg"]
    monkeypatch.setattr(section, "RULES", tuple(each for each in section.RULES if each is not rule))
    section.model_validate(fields)  # it breaks no other rule


def test_every_table_of_rules_belongs_to_a_section() -> None:
    tables = [value for name, value in vars(rules).items() if name.isupper() and not name.startswith("_")]
    assert sorted(map(id, tables)) == sorted(id(section.RULES) for section in CASES)


def test_stricter_settings_of_reduce_are_taken() -> None:
    """Equal and smaller thresholds, another kind of suppression, and a mapping, which may join categories."""
    for late in (
        {"threshold": 0.5},
        {"threshold": 0.4},
        {"strategy": "soft_nms"},
        {"overlap": "ios"},
        {"strategy": "none"},
    ):
        RunConfig.model_validate(SECTIONS | STRICT | {"reduce": {"suppress": late}})
    RunConfig.model_validate(SECTIONS | STRICT | {"reduce": {"suppress": {}, "mapping": "lvis_to_coco"}})
    RunConfig.model_validate(SECTIONS | {"reduce": {"suppress": {}}})
    with pytest.raises(ValidationError, match=r"reduce\.suppress\.thresholds\.cat 0\.9 is looser than"):
        RunConfig.model_validate(SECTIONS | {"reduce": {"suppress": {"thresholds": {"cat": 0.9}}}})
