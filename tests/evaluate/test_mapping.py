"""Predictions of one dataset's categories on another's ground truth."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.config.vocabulary import MappingName
from owlsam_ray.errors import InputError
from owlsam_ray.evaluate.average_precision import Kind
from owlsam_ray.evaluate.run import evaluate_files
from owlsam_ray.vocabulary.builtin import builtin
from owlsam_ray.vocabulary.mapping import category_mapping

COCO_TO_LVIS = category_mapping("coco_to_lvis").ids
LVIS_TO_COCO = category_mapping("lvis_to_coco").ids
COCO_OF = {each.name: LVIS_TO_COCO[each.id] for each in builtin("lvis") if each.id in LVIS_TO_COCO}
"""COCO id by LVIS name."""
HOT_DOG = 58
AEROSOL_CAN, MINIVAN = 1, 692


def lvis_categories() -> list[dict[str, Any]]:
    return [{"id": each.id, "name": each.name, "frequency": each.frequency} for each in builtin("lvis")]


def coco_categories() -> list[dict[str, Any]]:
    return [{"id": each.id, "name": each.name, "supercategory": each.supercategory} for each in builtin("coco")]


def as_predictions(truth: dict[str, Any], ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """Every object of a ground truth, found as it stands, under other ids."""
    return [
        {
            "image_id": each["image_id"], "category_id": ids[each["category_id"]], "bbox": each["bbox"],
            "segmentation": each["segmentation"], "score": 0.9,
        }
        for each in truth["annotations"]
        if not each.get("iscrowd") and each["category_id"] in ids
    ]  # fmt: skip


def evaluate(
    folder: Path, truth: Any, found: Any, mapping: MappingName | None, kind: Kind = "bbox", **options: Any
) -> dict[str, Any]:
    for name, tree in (("gt.json", truth), ("dt.json", found)):
        (folder / name).write_text(json.dumps(tree))
    settings = EvaluateConfig(mapping=mapping)
    return evaluate_files(str(folder / "gt.json"), str(folder / "dt.json"), kind, settings, **options)


@pytest.fixture(scope="session")
def coco_mini(shared: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((shared / "data" / "coco_mini" / "instances.json").read_text())
    return tree


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("listed", [False, True])
def test_lvis_labels_on_coco(
    tmp_path: Path, coco_mini: dict[str, Any], kind: Kind, listed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Real objects under LVIS's ids; as a list of results, and as a COCO file as `reduce` writes it."""
    caplog.set_level(logging.INFO)
    results = as_predictions(coco_mini, COCO_TO_LVIS)
    image = coco_mini["images"][0]["id"]
    strangers = [
        {"image_id": image, "category_id": each, "bbox": [1, 1, 9, 9], "score": 0.99}
        for each in (AEROSOL_CAN, MINIVAN, MINIVAN)
    ]
    found: Any = [*results, *strangers]
    if listed:
        found = {
            "images": coco_mini["images"],
            "annotations": [{"id": number} | each for number, each in enumerate(found)],
            "categories": lvis_categories(),
        }
    evaluation = evaluate(tmp_path, coco_mini, found, "lvis_to_coco", kind)
    assert evaluation["style"] == "coco"
    assert evaluation["mapping"] == {
        "name": "lvis_to_coco",
        "categories_without_counterpart": ["hot dog"],
        "predictions_left_out": 3,
        "left_out_by_category": {"minivan": 2, "aerosol_can": 1},
    }
    assert evaluation["counts"]["predictions"] == len(results)
    what = "box" if kind == "bbox" else "mask"
    objects = [each for each in coco_mini["annotations"] if not each["iscrowd"]]
    present = {each["category_id"] for each in objects}
    assert HOT_DOG in present
    assert len(present) == 68
    row = evaluation["groups"]["(mapped)"]["all"]
    assert row[f"{what}_ap"] == pytest.approx(1.0)
    assert (row["recall"], row["precision"]) == (1.0, 1.0)
    assert evaluation[what]["AP"] == pytest.approx(67 / 68)  # nobody looked for hot dogs
    scores = {each["name"]: each["sizes"]["all"][f"{what}_ap"] for each in evaluation["categories"]}
    assert scores.pop("hot dog") == 0.0
    assert [score for score in scores.values() if score is not None] == [pytest.approx(1.0)] * 67
    assert "lvis_to_coco: 1 of the ground truth's categories have no counterpart: hot dog" in caplog.text
    assert "lvis_to_coco: 3 of" in caplog.text
    assert "2 categories have no counterpart: 'minivan' (2), 'aerosol_can' (1)" in caplog.text


def test_coco_labels_on_lvis(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """The same objects as an LVIS file; what COCO has no name for counts as missed, but not in the row (mapped)."""
    annotations = [
        each | {"category_id": COCO_TO_LVIS.get(each["category_id"], AEROSOL_CAN)}
        for each in coco_mini["annotations"]
        if not each["iscrowd"]
    ]
    images = [each | {"neg_category_ids": [], "not_exhaustive_category_ids": []} for each in coco_mini["images"]]
    truth = {"images": images, "annotations": annotations, "categories": lvis_categories()}
    results = as_predictions(coco_mini, {each: each for each in COCO_TO_LVIS})
    results.append(results[0] | {"category_id": HOT_DOG})
    evaluation = evaluate(tmp_path, truth, results, "coco_to_lvis")
    assert evaluation["style"] == "lvis"
    assert evaluation["groups"]["(mapped)"]["all"]["box_ap"] == pytest.approx(1.0)
    assert evaluation["box"]["AP"] == pytest.approx(67 / 68)
    assert evaluation["mapping"]["left_out_by_category"] == {"hot dog": 1}
    assert len(evaluation["mapping"]["categories_without_counterpart"]) == 1203 - 79


def test_real_lvis_records(tmp_path: Path, shared: Path) -> None:
    """LVIS v0.5's own ids, which are not v1's: they go by name, and all that COCO has come back as COCO's."""
    lvis = json.loads((shared / "data" / "lvis" / "lvis_val_100.json").read_text())
    names = {each["id"]: each["name"] for each in lvis["categories"]}
    objects = [each for each in lvis["annotations"] if names[each["category_id"]] in COCO_OF]
    truth = {
        "images": [{"id": each["id"], "file_name": f"{each['id']:012}.jpg"} for each in lvis["images"]],
        "annotations": [each | {"category_id": COCO_OF[names[each["category_id"]]]} for each in objects],
        "categories": coco_categories(),
    }
    found = {
        "images": lvis["images"],
        "annotations": [each | {"score": 0.5} for each in lvis["annotations"]],
        "categories": lvis["categories"],
    }
    evaluation = evaluate(tmp_path, truth, found, "lvis_to_coco")
    assert evaluation["counts"]["predictions"] == len(objects) > 100
    assert evaluation["mapping"]["predictions_left_out"] == len(lvis["annotations"]) - len(objects)
    assert evaluation["box"]["AP"] == pytest.approx(1.0)
    # Without the mapping, names are all there is to go by: only those that both lists spell alike are scored.
    with pytest.raises(InputError, match="which the ground truth does not list"):
        evaluate(tmp_path, truth, found, None)


def test_objects365_labels_on_coco(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """Under the dataset's own spellings; two kinds of one class are false beside each other."""
    ids = {coco: ours for ours, coco in reversed(tuple(category_mapping("objects365_to_coco").ids.items()))}
    results = as_predictions(coco_mini, ids)
    assert evaluate(tmp_path, coco_mini, results, "objects365_to_coco")["box"]["AP"] == pytest.approx(1.0)
    file = {
        "images": coco_mini["images"],
        "annotations": results,
        "categories": [{"id": each.id, "name": each.raw_name} for each in builtin("objects365")],
    }
    assert evaluate(tmp_path, coco_mini, file, "objects365_to_coco")["box"]["AP"] == pytest.approx(1.0)
    file["categories"][62 - 1]["name"] = "Mobile"  # a name that the list lacks may be another thing
    evaluation = evaluate(tmp_path, coco_mini, file, "objects365_to_coco")
    assert list(evaluation["mapping"]["left_out_by_category"]) == ["Mobile"]
    file["categories"][62 - 1]["name"] = ""  # only its id can tell
    assert evaluate(tmp_path, coco_mini, file, "objects365_to_coco")["box"]["AP"] == pytest.approx(1.0)

    car, suv = 6, 35
    assert ids[3] == car
    cars = [each for each in results if each["category_id"] == car]
    twice = results + [each | {"category_id": suv, "score": 0.8} for each in cars]
    evaluation = evaluate(tmp_path, coco_mini, twice, "objects365_to_coco")
    (row,) = [each["sizes"]["all"] for each in evaluation["categories"] if each["name"] == "car"]
    assert (row["num_matched"], row["num_false"]) == (len(cars), len(cars))


def test_a_part_of_a_list_and_other_ids(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """A vocabulary of some LVIS names under its own ids, and a ground truth that counts COCO's from 0."""
    shift = {each["id"]: number for number, each in enumerate(coco_mini["categories"])}
    truth = coco_mini | {
        "categories": [each | {"id": shift[each["id"]]} for each in coco_mini["categories"]],
        "annotations": [each | {"category_id": shift[each["category_id"]]} for each in coco_mini["annotations"]],
    }
    names = {1: "sofa", 2: "television set", 3: "something else", 4: "person"}
    of = {1: 63, 2: 72, 4: 1}
    results = as_predictions(coco_mini, {coco: each for each, coco in of.items()})
    assert {each["category_id"] for each in results} == {1, 2, 4}
    results.append(results[0] | {"category_id": 3})
    found = {
        "images": coco_mini["images"],
        "annotations": results,
        "categories": [{"id": each, "name": name} for each, name in names.items()],
    }
    evaluation = evaluate(tmp_path, truth, found, "lvis_to_coco")
    scores = {each["name"]: each["sizes"]["all"]["box_ap"] for each in evaluation["categories"]}
    assert [scores[name] for name in ("couch", "tv", "person", "dog")] == [1.0, 1.0, pytest.approx(1.0), 0.0]
    assert evaluation["mapping"]["left_out_by_category"] == {"something else": 1}
    # Only what was looked for counts in the row (mapped).
    assert evaluation["groups"]["(mapped)"]["all"]["box_ap"] == pytest.approx(1.0)
    assert len(evaluation["mapping"]["categories_without_counterpart"]) == 80 - 3


def coco_file(truth: dict[str, Any], categories: list[dict[str, Any]], ids: Mapping[int, int]) -> dict[str, Any]:
    return {"images": truth["images"], "annotations": as_predictions(truth, ids), "categories": categories}


def test_an_unknown_name_is_no_other_class_of_the_same_id(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """Id 3 of LVIS is the airplane."""
    names = [{"id": 793, "name": "person"}, {"id": 3, "name": "quadcopter"}]
    found = coco_file(coco_mini, names, {1: 793, 5: 3})
    evaluation = evaluate(tmp_path, coco_mini, found, "lvis_to_coco")
    planes = sum(each["category_id"] == 5 for each in coco_mini["annotations"])
    assert evaluation["mapping"]["left_out_by_category"] == {"quadcopter": planes}
    scores = {each["name"]: each["sizes"]["all"]["box_ap"] for each in evaluation["categories"]}
    assert (scores["person"], scores["airplane"]) == (pytest.approx(1.0), 0.0)


SAME = {each.id: each.id for each in builtin("coco")}
NOT_COCOS = r"leads to categories of lvis, but .*gt\.json has others \(21 of 80 are not in that list\)"
BOTH_COCOS = r"predictions and ground truth are both of coco, leave the mapping out \(null\)"


@pytest.mark.parametrize("shift", [0, 1000])
@pytest.mark.parametrize("mapping", ["coco_to_lvis", "lvis_to_coco", "objects365_to_coco"])
def test_coco_on_coco_takes_no_mapping(
    tmp_path: Path, coco_mini: dict[str, Any], mapping: MappingName, shift: int
) -> None:
    categories = [{"id": each.id + shift, "name": each.name} for each in builtin("coco")]
    found = coco_file(coco_mini, categories, {each: each + shift for each in SAME})
    assert evaluate(tmp_path, coco_mini, found, None)["box"]["AP"] == pytest.approx(1.0)
    with pytest.raises(InputError, match="leave the mapping out"):
        evaluate(tmp_path, coco_mini, found, mapping)


def test_a_mapping_that_starts_or_ends_elsewhere_is_refused(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    objects365 = [{"id": each.id, "name": each.raw_name} for each in builtin("objects365")]
    for categories, wrong, right in (
        (lvis_categories(), "objects365_to_coco", "lvis_to_coco"),
        (lvis_categories(), "coco_to_lvis", "lvis_to_coco"),
        (objects365, "lvis_to_coco", "objects365_to_coco"),
        (lvis_categories()[100:130], "objects365_to_coco", "lvis_to_coco"),
        (objects365[100:130], "lvis_to_coco", "objects365_to_coco"),
    ):
        with pytest.raises(InputError, match=f"{wrong} .*: the mapping that fits is {right}"):
            evaluate(tmp_path, coco_mini, coco_file(coco_mini, categories, {}), wrong)  # type: ignore[arg-type]
        evaluate(tmp_path, coco_mini, coco_file(coco_mini, categories, {}), right)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"{NOT_COCOS}: {BOTH_COCOS}"):
        evaluate(tmp_path, coco_mini, coco_file(coco_mini, coco_categories(), {}), "coco_to_lvis")
    with pytest.raises(InputError, match=f"{NOT_COCOS}: {BOTH_COCOS}"):
        evaluate(tmp_path, coco_mini, as_predictions(coco_mini, SAME), "coco_to_lvis")
    with pytest.raises(InputError, match=f"{NOT_COCOS}: the mapping that fits is objects365_to_coco"):
        evaluate(tmp_path, coco_mini, coco_file(coco_mini, objects365, {}), "coco_to_lvis")


def test_ids_of_another_list_under_names_of_both(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """LVIS knows all three names, but the ids are COCO's."""
    three = [{"id": 1, "name": "person"}, {"id": 2, "name": "bicycle"}, {"id": 17, "name": "cat"}]
    truth = coco_mini | {
        "categories": three,
        "annotations": [each for each in coco_mini["annotations"] if each["category_id"] in (1, 2, 17)],
    }
    with pytest.raises(InputError, match=f"has those of coco, in name and id: {BOTH_COCOS}"):
        evaluate(tmp_path, truth, coco_file(truth, three, SAME), "coco_to_lvis")


def test_without_a_mapping_the_one_that_fits_is_named(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    found = coco_file(coco_mini, lvis_categories(), {3: 207})
    words = (
        r"annotations\[0\] has category 207 \('car_\(automobile\)'\), which the ground truth does not list: its "
        r"categories are another dataset's, set evaluate\.mapping to lvis_to_coco$"
    )
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, coco_mini, found, None)
    found = coco_file(coco_mini, [{"id": 500, "name": "quadcopter"}], {3: 500})
    with pytest.raises(InputError, match=r"category 500 \('quadcopter'\), which the ground truth does not list$"):
        evaluate(tmp_path, coco_mini, found, None)


def test_mappings_that_do_not_fit_are_refused(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    found = {"images": coco_mini["images"], "annotations": [], "categories": coco_mini["categories"]}
    with pytest.raises(InputError, match=r"are the ground truth's already, not those of lvis: leave the mapping out"):
        evaluate(tmp_path, coco_mini, found, "lvis_to_coco")
    with pytest.raises(InputError, match=r"evaluate\.mapping coco_to_lvis leads to categories of lvis, but .*gt\.json"):
        evaluate(tmp_path, coco_mini | {"categories": [{"id": 1, "name": "qux"}], "annotations": [
            coco_mini["annotations"][0] | {"category_id": 1}
        ]}, found, "coco_to_lvis")  # fmt: skip
    other = found | {"categories": [{"id": 5000, "name": "qux"}, {"id": 1, "name": "quux"}]}
    with pytest.raises(InputError, match=r"starts from categories of lvis, but .*dt\.json has none of them"):
        evaluate(tmp_path, coco_mini, other, "lvis_to_coco")
    result = {"image_id": coco_mini["images"][0]["id"], "bbox": [1, 1, 9, 9], "score": 0.5}
    with pytest.raises(InputError, match=r"\[0\] has category 1204, which lvis's list does not list$"):
        evaluate(tmp_path, coco_mini, [result | {"category_id": 1204}], "lvis_to_coco")
    with pytest.raises(InputError, match=r"category 366, .* does not list: the mapping that fits is lvis_to_coco$"):
        evaluate(tmp_path, coco_mini, [result | {"category_id": 366}], "objects365_to_coco")
    listed = found | {"categories": lvis_categories(), "annotations": [result | {"category_id": 1204}]}
    with pytest.raises(InputError, match=r"annotations\[0\] has category 1204, which the file does not list"):
        evaluate(tmp_path, coco_mini, listed, "lvis_to_coco")


def test_categories_of_both_lists_may_be_all_there_are(tmp_path: Path, coco_mini: dict[str, Any]) -> None:
    """Objects365's `Person` is COCO's `person` in name and id: no reason to refuse the mapping."""
    found = {
        "images": coco_mini["images"],
        "annotations": as_predictions(coco_mini, {1: 1}),
        "categories": [{"id": 1, "name": "Person"}],
    }
    evaluation = evaluate(tmp_path, coco_mini, found, "objects365_to_coco")
    assert evaluation["categories"][0]["sizes"]["all"]["box_ap"] == pytest.approx(1.0)
