"""`calibrate` on a small run: the thresholds do in `reduce` what they promise, and every bad input is told."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from owlsam_ray.calibrate.curves import Target
from owlsam_ray.calibrate.points import Fitting
from owlsam_ray.calibrate.run import MatchRule, calibrate_run
from owlsam_ray.calibrate.table import operating_points_table
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.errors import ConfigError, GuardError, IncompleteError, InputError
from owlsam_ray.evaluate.run import evaluate_files
from owlsam_ray.reduce.run import reduce_run
from tests.calibrate.small_run import FAILED, SHARD, SmallRun, label, plan

IMAGES = 48
QUICK = Fitting(min_examples=20, resamples=50)
MASKS = MatchRule("mask")


@pytest.fixture
def small(tmp_path: Path) -> SmallRun:
    made = plan(tmp_path, num_images=IMAGES)
    label(made)
    return made


def rows_of(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in result["categories"]}


@pytest.mark.parametrize("target", [Target(), Target("precision", 0.7), Target("recall", 0.6)], ids=str)
@pytest.mark.parametrize("matching", [MatchRule(), MASKS], ids=str)
def test_reduce_keeps_what_was_promised(small: SmallRun, target: Target, matching: MatchRule) -> None:
    result = calibrate_run(small.config(), target, matching=matching, fitting=QUICK)
    file = small.run / "operating_points.json"
    assert json.loads(file.read_text()) == result
    assert (small.run / "operating_points.png").read_bytes().startswith(b"\x89PNG")
    assert result["counts"]["images_failed"] == IMAGES // SHARD
    assert result["counts"]["images_used"] == IMAGES - IMAGES // SHARD
    assert [row["category_id"] for row in result["categories"]] == [3, 9, 12]
    assert rows_of(result)["cat"]["reached"]

    reduce_run(small.config(f"reduce.operating_points={file}", "reduce.out=" + str(small.root / "strict")))
    labels = json.loads((small.root / "strict" / "annotations.json").read_text())
    told = labels["info"]["owlsam_ray"]["operating_points"]
    assert told["target"] == result["target"]
    for row in result["categories"]:
        kept = [each for each in labels["annotations"] if each["category_id"] == row["category_id"]]
        assert len(kept) == row["num_kept"]
    # An independent count of what is right among them.
    truth = small.write_truth("labelled.json", **small.part([image for number, image in enumerate(
        small.truth["images"]) if number % SHARD != FAILED]))  # fmt: skip
    evaluation = evaluate_files(
        truth, str(small.root / "strict" / "annotations.json"), "bbox" if matching.shape == "box" else "segm",
        EvaluateConfig(score_threshold=0.0, iou_threshold=0.5),
    )  # fmt: skip
    measured = {row["name"]: row["sizes"]["all"] for row in evaluation["categories"]}
    for name in ("cat", "dog"):
        row = rows_of(result)[name]
        assert (row["num_right"], row["num_objects"]) == (measured[name]["num_matched"], measured[name]["num_objects"])
        assert row["num_kept"] - row["num_right"] == measured[name]["num_false"]
        assert row["pool"] is None
        assert row["precision"] == pytest.approx(measured[name]["precision"])
        assert row["recall"] == pytest.approx(measured[name]["recall"])
    assert rows_of(result)["owl"]["pool"]["name"] == "all categories"
    after = result["overall"]["after"]
    assert after["detections"] == len(labels["annotations"])
    assert after["precision"] > result["overall"]["before"]["precision"] or target.name == "recall"


def test_the_same_call_gives_the_same_bytes(small: SmallRun) -> None:
    written: list[bytes] = []
    for seed in (0, 0, 1):
        out = small.root / f"{len(written)}.json"
        calibrate_run(small.config(), Target(), fitting=Fitting(seed=seed, resamples=50), out=str(out))
        written.append(out.read_bytes())
    assert written[0] == written[1] != written[2]
    assert b"hostname" not in written[0]


def test_a_labelled_subset(small: SmallRun, caplog: pytest.LogCaptureFixture) -> None:
    """Other ids, the same names; shards without a listed image are not opened, one is missing, a stranger is listed."""
    shards = sorted((small.run / "predictions").glob("*.parquet"))
    shards[0].write_bytes(b"not opened")
    shards[2].unlink()
    images = small.truth["images"][SHARD : 3 * SHARD]
    part = small.part(images)
    part["images"] = [image | {"id": image["id"] - 500} for image in images]
    part["annotations"] = [each | {"image_id": each["image_id"] - 500} for each in part["annotations"]]
    part["images"].append({"id": 77_777, "file_name": "elsewhere.jpg", "height": 5, "width": 5})
    truth = small.write_truth("subset.json", **part)
    seen: list[tuple[int, int | None]] = []
    result = calibrate_run(
        small.config(), Target(), truth, fitting=QUICK, show=lambda _, done, total: seen.append((done, total))
    )
    counts = result["counts"]
    assert (counts["images_listed"], counts["images_used"], counts["images_failed"]) == (17, 7, 1)
    assert (counts["images_not_labelled"], counts["images_not_in_the_run"]) == (8, 1)
    assert seen == [(0, 1), (1, 1)]
    for words in ("8 of the ground truth's 17 images are not labelled yet", "1 of the ground truth's 17 images failed",
                  "1 of the ground truth's 17 images are not in the run"):  # fmt: skip
        assert words in caplog.text
    found = {each["image_id"] for each in part["annotations"]}
    expected = [image for number, image in enumerate(images[:SHARD]) if number != FAILED]
    objects = sum(each["image_id"] + 500 in {image["id"] for image in expected} for each in part["annotations"])
    assert found
    assert counts["objects"] == objects


def test_names_without_folders_and_other_ids(small: SmallRun, caplog: pytest.LogCaptureFixture) -> None:
    """The ids are the run's, of other images: by these, hardly anything would be right."""
    expected = calibrate_run(small.config(), Target(), fitting=QUICK)
    images = small.truth["images"]
    other = {image["id"]: turned["id"] for image, turned in zip(images, reversed(images), strict=True)}
    parts = {
        "images": [image | {"id": other[image["id"]], "file_name": f"val/{image['file_name']}"} for image in images],
        "annotations": [each | {"image_id": other[each["image_id"]]} for each in small.truth["annotations"]],
    }
    result = calibrate_run(small.config(), Target(), small.write_truth("turned.json", **parts), fitting=QUICK)
    assert (result["categories"], result["counts"]) == (expected["categories"], expected["counts"])
    assert f"{IMAGES} images of {small.run} are matched by the ends of their names" in caplog.text


def test_names_and_ids_that_contradict_each_other_are_refused(small: SmallRun) -> None:
    images = [image | {"file_name": f"frame{image['id']}.jpg"} for image in small.truth["images"]]
    words = rf"{IMAGES} images of .* have ids that .* lists under other names .*against 'frame"
    with pytest.raises(InputError, match=words):
        calibrate_run(small.config(), Target(), small.write_truth("a.json", images=images))
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "horse"}]
    words = r"1 categories of the run have ids that .* lists under other names .*'dog' against 'horse'"
    with pytest.raises(InputError, match=words):
        calibrate_run(small.config(), Target(), small.write_truth("b.json", categories=categories))


@pytest.mark.parametrize("flag", [1, "1", True])
def test_crowds_only(small: SmallRun, flag: Any) -> None:
    crowds = [each | {"iscrowd": flag} for each in small.truth["annotations"]]
    with pytest.raises(InputError, match=rf"all {len(crowds)} objects of .* are crowd regions"):
        calibrate_run(small.config(), Target(), small.write_truth("a.json", annotations=crowds))
    singles = [each | {"iscrowd": str(each["iscrowd"])} for each in small.truth["annotations"]]
    result = calibrate_run(small.config(), Target(), small.write_truth("b.json", annotations=singles), fitting=QUICK)
    assert result["counts"]["objects"] > IMAGES / 2


def test_what_reduce_would_not_show_is_not_there(small: SmallRun) -> None:
    every = calibrate_run(small.config(), Target(), fitting=QUICK)
    none = calibrate_run(small.config("reduce.only=[dog]"), Target(), fitting=QUICK)
    assert [row["name"] for row in none["categories"]] == ["dog"]
    assert none["categories"][0] == rows_of(every)["dog"]
    one = calibrate_run(small.config("reduce.max_per_image=1"), Target(), fitting=QUICK)
    assert one["counts"]["detections"] <= one["counts"]["images_used"] < every["counts"]["detections"]
    late = calibrate_run(
        small.config("reduce.score_threshold=0.9", "reduce.score_thresholds={cat: 0.9}"), Target(), fitting=QUICK
    )
    assert late["categories"] == every["categories"]
    with pytest.raises(InputError, match="none of the 0 detections"):
        calibrate_run(small.config("reduce.min_mask_area=1000"), Target(), fitting=QUICK)


def test_lvis_looks_only_where_it_was_asked(small: SmallRun) -> None:
    """Cats are looked for in images that have one or are negative; where not all are listed, strangers do not count."""
    everywhere = calibrate_run(small.config(), Target(), fitting=QUICK)
    categories = [each | {"frequency": letter} for each, letter in zip(small.truth["categories"], "rff", strict=True)]

    def result(**lists: list[int]) -> dict[str, Any]:
        images = [image | {"neg_category_ids": [], "not_exhaustive_category_ids": []} | lists
                  for image in small.truth["images"]]  # fmt: skip
        return calibrate_run(
            small.config(), Target(), small.write_truth("lvis.json", images=images, categories=categories),
            fitting=Fitting(min_examples=10**4, resamples=5),
        )  # fmt: skip

    all_of_them, positive, open_ended = (
        result(neg_category_ids=[3, 9, 12]), result(), result(not_exhaustive_category_ids=[3, 9])
    )  # fmt: skip
    assert all_of_them["counts"]["detections"] == everywhere["counts"]["detections"]
    assert positive["counts"]["detections_false"] < everywhere["counts"]["detections_false"]
    assert positive["counts"]["detections_right"] == everywhere["counts"]["detections_right"]
    assert open_ended["counts"]["detections_false"] == 0
    assert open_ended["counts"]["detections_ignored"] > positive["counts"]["detections_ignored"]
    assert rows_of(positive)["owl"]["num_detections"] == 0
    assert rows_of(positive)["cat"]["pool"]["name"] == "all categories"


def test_the_table(small: SmallRun) -> None:
    result = calibrate_run(small.config(), Target("precision", 0.7), fitting=QUICK)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(operating_points_table(result))
    text = console.export_text()
    for words in ("precision of at least 0.7, by box IoU of at least 0.5", "cat", "with all categories", "6 failed"):
        assert words in text
    told = {name: result["overall"][name] for name in ("num_reached", "num_reached_only_with_pool")}
    assert told == {"num_reached": 2, "num_reached_only_with_pool": 0}  # nothing is kept of the owls
    owl = result["categories"][2]
    assert (owl["num_kept"], owl["num_right"], owl["reached"], owl["precision"]) == (0, 0, False, None)
    assert "not reached, with all categories" in text
    assert "2 of 3 categories reach the target. Over all" in text
    result["categories"][2] |= {"reached": True, "reached_alone": False}
    result["overall"] |= {"num_reached": 3, "num_reached_only_with_pool": 1}
    console.print(operating_points_table(result))
    text = console.export_text()
    assert "only with all categories" in text
    assert "3 of 3 categories reach the target, 1 of them only with pooled examples. Over all" in text
    rows = [result["categories"][0] | {"name": f"[b]{number}", "reached": number % 2 == 0} for number in range(200)]
    console.print(operating_points_table(result | {"categories": rows}))
    assert "60 of 200 categories, which all miss the target" in console.export_text()


def test_bad_inputs(small: SmallRun, tmp_path: Path) -> None:
    config = small.config()
    other_images = [image | {"id": 10**6 + number, "file_name": f"x{number}"}
                    for number, image in enumerate(small.truth["images"])]  # fmt: skip
    moved = [each | {"image_id": 10**6} for each in small.truth["annotations"]]
    for words, truth in (
        ("holds no annotations", small.write_truth("a.json", annotations=[])),
        ("none of the 48 images", small.write_truth("b.json", images=other_images, annotations=moved)),
        ("lists none of the run's 3 categories", small.write_truth(
            "c.json", categories=[{"id": 1, "name": "chair"}],
            annotations=[each | {"category_id": 1} for each in small.truth["annotations"]])),
        ("cannot read", str(tmp_path / "nowhere.json")),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            calibrate_run(config, Target(), truth)
    sizes = [image | {"height": image["height"] + 1} for image in small.truth["images"]]
    with pytest.raises(InputError, match="masks cannot be compared"):
        calibrate_run(config, Target(), small.write_truth("d.json", images=sizes), matching=MASKS)
    bare = [{key: each[key] for key in each if key != "segmentation"} for each in small.truth["annotations"]]
    with pytest.raises(InputError, match="no segmentations"):
        calibrate_run(config, Target(), small.write_truth("e.json", annotations=bare), matching=MASKS)
    with pytest.raises(GuardError):
        calibrate_run(small.config("detector.score_floor=0.2"), Target())
    for iou in (0.0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="IoU"):
            MatchRule("box", iou)


def test_runs_that_are_not_there_yet(tmp_path: Path) -> None:
    small = plan(tmp_path, num_images=2 * SHARD)
    with pytest.raises(IncompleteError, match="nothing was labelled"):
        calibrate_run(small.config(), Target())
    label(small, shards=range(1), masks=False)
    with pytest.raises(InputError, match="has a mask"):
        calibrate_run(small.config(), Target(), matching=MASKS, fitting=QUICK)
    truth = small.write_truth("late.json", **small.part(small.truth["images"][SHARD:]))
    with pytest.raises(IncompleteError, match=r"none of the 8 images .* is labelled yet"):
        calibrate_run(small.config(), Target(), truth)
    truth = small.write_truth("failed.json", **small.part(small.truth["images"][FAILED : FAILED + 1]))
    with pytest.raises(InputError, match="failed"):
        calibrate_run(small.config(), Target(), truth)
    with pytest.raises(InputError, match="holds no run"):
        calibrate_run(small.config(f"run={tmp_path / 'nothing'}"), Target())


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("suppress={strategy: merge, threshold: 0.5}", "suppress.strategy: merge"),
        ("suppress={across_labels: true}", "suppress.across_labels"),
        ("max_per_image=3", "max_per_image"),
        ("suppress={threshold: 0.5}", ""),
    ],
)
def test_what_thresholds_change_beyond_their_cut_is_told(
    small: SmallRun, caplog: pytest.LogCaptureFixture, setting: str, words: str
) -> None:
    calibrate_run(small.config(f"reduce.{setting}"), Target(), fitting=QUICK)
    assert [word for word in ("strategy: merge", "across_labels", "max_per_image") if word in caplog.text] == [
        word for word in ("strategy: merge", "across_labels", "max_per_image") if word in words
    ]
