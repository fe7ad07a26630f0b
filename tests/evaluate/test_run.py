"""`owlsam evaluate` on runs and on files: what is written and said, and every bad input."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from owlsam_ray.cli import main as cli
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailureClass, IncompleteError, InputError
from owlsam_ray.evaluate.run import _ground_truth_url, evaluate_files, evaluate_run
from owlsam_ray.evaluate.table import evaluation_table
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.records import Detections, Prediction, Segment
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.guard import fingerprint_parts, guard_labels
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import predictions_to_table
from tests.drawn_images import draw_coco

STAGES = {"decode": 1.0, "detect": 4.0, "suppress": 0.1, "segment": 8.0, "encode": 0.5}
NUM_IMAGES = 4
KEYS = {"box_ap", "box_ap50", "mask_ap", "mask_ap50", "miou", "dice", "precision", "recall", "num_objects"}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Four images with one 20 × 10 object each, of two categories in two groups."""
    content: dict[str, Any] = draw_coco(tmp_path / "data", NUM_IMAGES)
    content["annotations"] = [
        {
            "id": number, "image_id": image["id"], "category_id": 3 if number % 2 else 9, "iscrowd": 0,
            "bbox": [4, 6, 20, 10], "area": 200, "segmentation": [[4, 6, 24, 6, 24, 16, 4, 16]],
        }
        for number, image in enumerate(content["images"])
    ]  # fmt: skip
    (tmp_path / "data" / "instances.json").write_text(json.dumps(content))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"detector")
    (tmp_path / "sam.pt").write_bytes(b"segmenter")
    tree = {
        "run": str(tmp_path / "run"),
        "data": {
            "source": "coco",
            "images": str(tmp_path / "data" / "images"),
            "annotations": str(tmp_path / "data" / "instances.json"),
        },
        "detector": {"weights": str(tmp_path / "weights")},
        "segment": {"weights": str(tmp_path / "sam.pt")},
        "resources": {"shard_size": 2},
        "reduce": {"min_mask_area": 0},
        "evaluate": {"size_edges_px": [32]},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def label(config: RunConfig, *, masks: bool = True, failed: int = 0) -> None:
    """Shards as an attempt leaves them: each object found with a mask of half its area, and one stranger an image.

    The first images may have failed.
    """
    planned = plan_run(config).run
    run = Path(str(config.run))
    (run / QUERY_FILE).write_bytes(b"queries")
    weights = {"detector": Path(config.detector.weights), "segmenter": Path(config.segment.weights)}
    record = guard_labels(planned, fingerprint_parts(planned, weights=weights)).record
    assert record.fingerprint is not None
    labels = {category.id: index for index, category in enumerate(record.categories)}
    ordinal = 0
    for shard in planned.manifest.iter_shards():
        rows = []
        for source in planned.manifest.read_shard(shard).to_pylist():
            size = (source["height"], source["width"])
            row = _prediction(source["image_id"], size, labels[3 if ordinal % 2 else 9], masks=masks)
            if ordinal < failed:
                row = Prediction(source["image_id"], failure=("truncated", FailureClass.PERMANENT))
            rows.append(row)
            ordinal += 1
        write_shard(
            str(run), shard, predictions_to_table(rows), fingerprint=record.fingerprint, numerics="n", stage_s=STAGES
        )


def _prediction(image_id: int, size_hw: tuple[int, int], label: int, *, masks: bool) -> Prediction:
    mask = np.zeros(size_hw, np.bool_)
    mask[6:16, 4:19] = True  # 15 of 20 columns
    segment = Segment(encode_rle(mask), 150, (4, 6, 19, 16), predicted_iou=0.9, stability=0.9)
    scores = np.array([0.9, 0.2], np.float32)
    return Prediction(
        image_id=image_id,
        size_hw=size_hw,
        detections=Detections(
            boxes_xyxy=np.array([[4, 6, 24, 16], [30, 30, 40, 40]], np.float32),
            scores=scores,
            raw_scores=scores,
            labels=np.array([label, label]),
            prompt_ids=np.array([label, label]),
            num_merged=np.ones(2, np.int64),
        ),
        segments=(segment, segment) if masks else (None, None),
    )


def reduced(run_file: Path, *overrides: str, masks: bool = True) -> RunConfig:
    config = load_config([run_file], overrides=overrides)
    label(config, masks=masks)
    reduce_run(config)
    return config


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, summary, log."""
    capsys.readouterr()
    code = cli.main(["evaluate", *arguments])
    captured = capsys.readouterr()
    (line,) = captured.out.splitlines()
    summary = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the summary"))
    assert summary["exit_code"] == code
    return code, summary, captured.err


def test_a_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = reduced(run_file)
    (Path(str(config.run)) / "progress.json").write_text(json.dumps({"images_per_s": 0.25}))
    evaluation = evaluate_run(config)
    assert json.loads((run_file.parent / "run" / "evaluation.json").read_text()) == evaluation
    assert list(evaluation["groups"]) == ["all", "(none)", "animal"]
    row = evaluation["groups"]["animal"]["<32"]
    assert set(row) >= KEYS
    assert (row["box_ap"], row["box_ap50"], row["num_objects"], row["precision"], row["recall"]) == (1, 1, 2, 1, 1)
    assert row["miou"] == pytest.approx(0.75)
    assert row["dice"] == pytest.approx(2 * 150 / 350)
    assert row["mask_ap"] == pytest.approx(0.6)  # thresholds 0.50 … 0.75 of ten
    assert row["mask_ap50"] == 1
    large = evaluation["groups"]["all"][">=32"]
    assert {large[key] for key in KEYS - {"num_objects"}} == {None}
    assert large["num_objects"] == 0
    assert evaluation["counts"]["images_not_labelled"] == 0
    speed = evaluation["speed"]
    assert (speed["images"], speed["wall_images_per_s"]) == (NUM_IMAGES, 0.25)
    assert speed["stage_s"] == {stage: 2 * seconds for stage, seconds in STAGES.items()}  # two shards
    assert (speed["detector_s_per_image"], speed["segmenter_s_per_image"]) == (2.0, 4.0)
    assert (speed["models_s_per_image"], speed["images_per_s_per_actor"]) == (6.0, pytest.approx(1 / 6))

    code, summary, log = call(capsys, str(run_file))
    assert code == 0
    assert (summary["box"]["AP"], summary["miou"], summary["models_s_per_image"]) == (1.0, row["miou"], 6.0)
    assert summary["evaluation"] == str(run_file.parent / "run" / "evaluation.json")
    assert "detector 2.0000 + segmenter 4.0000 = 6.0000" in log
    assert "animal" in log
    assert "–" in log
    code, summary, log = call(capsys, str(run_file), "--json")
    assert code == 0
    assert summary["groups"] == evaluation["groups"]
    assert "animal" not in log


def test_a_run_with_lvis_prompts_is_scored_on_coco(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = run_file.parent / "data" / "instances.json"
    tree = json.loads(truth.read_text())
    tree["categories"] = [{"id": 3, "name": "airplane"}, {"id": 9, "name": "hot dog"}]
    truth.write_text(json.dumps(tree))
    reduced(run_file, "vocabulary.categories=lvis")  # finds LVIS's 3, airplane, and 9, amplifier
    settings = ("--set", "vocabulary.categories=lvis", "--set", "evaluate.mapping=lvis_to_coco")
    code, _, log = call(capsys, str(run_file), *settings)
    assert code == 0
    evaluation = json.loads((run_file.parent / "run" / "evaluation.json").read_text())
    assert evaluation["mapping"] == {
        "name": "lvis_to_coco",
        "categories_without_counterpart": ["hot dog"],
        "predictions_left_out": NUM_IMAGES,
        "left_out_by_category": {"amplifier": NUM_IMAGES},
    }
    assert list(evaluation["groups"]) == ["all", "(mapped)"]
    assert [rows["all"]["box_ap"] for rows in evaluation["groups"].values()] == [0.5, 1.0]
    assert f"lvis_to_coco: {NUM_IMAGES} predictions left out, of categories without a counterpart; 1 of" in log
    labels = json.loads((run_file.parent / "run" / "coco" / "annotations.json").read_text())
    assert labels["categories"][2] == {"id": 3, "name": "airplane", "supercategory": "", "frequency": "f"}


def test_settings_may_change_and_precision_follows(run_file: Path) -> None:
    reduced(run_file)
    config = load_config([run_file], overrides=["evaluate.score_threshold=0.1", "evaluate.iou_threshold=0.8"])
    row = evaluate_run(config)["groups"]["all"]["all"]
    # Masks overlap by 0.75 only, boxes wholly; the strangers take part.
    assert (row["precision"], row["recall"], row["miou"], row["num_false"]) == (0.0, 0.0, None, 8)
    assert (row["box_precision"], row["box_recall"], row["box_miou"]) == (0.5, 1.0, 1.0)


def test_boxes_only(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reduced(run_file, masks=False)
    code, summary, log = call(capsys, str(run_file), "--json")
    assert code == 0
    assert "no label of the run has a mask: boxes only" in log
    assert (summary["mask"], summary["box"]["AP"], summary["settings"]["matched_by"]) == (None, 1.0, "box")
    row = summary["groups"]["all"]["all"]
    assert (row["miou"], row["mask_ap"], row["precision"], row["box_miou"]) == (None, None, 1.0, 1.0)


def test_ids_may_differ_where_names_agree(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reduced(run_file)
    tree = json.loads((run_file.parent / "data" / "instances.json").read_text())
    other = {3: 9, 9: 3}
    for category in tree["categories"]:
        category["id"] = other[category["id"]]
    for image in tree["images"]:
        image["id"] += 5
    for annotation in tree["annotations"]:
        annotation["category_id"] = other[annotation["category_id"]]
        annotation["image_id"] += 5
    truth = run_file.parent / "other.json"
    truth.write_text(json.dumps(tree))
    code, summary, log = call(capsys, str(run_file), "--set", f"evaluate.ground_truth={truth}")
    assert (code, summary["box"]["AP"]) == (0, 1.0)
    assert "are matched by name" in log

    tree["categories"][0]["name"] = "puma"
    truth.write_text(json.dumps(tree))
    code, summary, _ = call(capsys, str(run_file), "--set", f"evaluate.ground_truth={truth}")
    assert code == 2
    assert "has category 3 ('cat'), which the ground truth does not list" in summary["error"]


def test_images_that_the_run_does_not_have_are_left_out(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reduced(run_file)
    tree = json.loads((run_file.parent / "data" / "instances.json").read_text())
    tree["images"].append({"id": 1, "file_name": "more.jpg", "height": 50, "width": 50})
    tree["annotations"] += [tree["annotations"][0] | {"image_id": 1} for _ in range(4)]
    truth = run_file.parent / "other.json"
    truth.write_text(json.dumps(tree))
    code, summary, log = call(capsys, str(run_file), "--set", f"evaluate.ground_truth={truth}")
    assert (code, summary["recall"]) == (0, 1.0)
    assert (summary["images"], summary["images_not_labelled"]) == (NUM_IMAGES, 1)
    assert (summary["images_failed"], summary["images_not_in_the_ground_truth"]) == (0, 0)
    assert "1 of the ground truth's 5 images are not labelled: scored without them" in log
    assert "1 more images of the ground truth are not labelled: not scored" in log


def test_failed_images_count_as_missed(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the run's images, those that failed are scored: to leave out what is hard would flatter."""
    config = load_config([run_file])
    label(config, failed=1)
    reduce_run(config.model_copy(update={"reduce": config.reduce.model_copy(update={"max_failed": 1.0})}))
    evaluation = evaluate_run(config)
    counts = evaluation["counts"]
    assert (counts["images"], counts["images_failed"], counts["images_not_labelled"]) == (NUM_IMAGES, 1, 0)
    row = evaluation["groups"]["all"]["all"]
    assert (row["num_objects"], row["recall"]) == (NUM_IMAGES, 1 - 1 / NUM_IMAGES)
    assert "1 of the 4 images that are scored failed: their objects count as missed" in caplog.text


def test_a_truth_of_a_part_of_the_run(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    reduced(run_file)
    tree = json.loads((run_file.parent / "data" / "instances.json").read_text())
    kept = [image["id"] for image in tree["images"][:2]]
    tree["images"] = [image for image in tree["images"] if image["id"] in kept]
    tree["annotations"] = [each for each in tree["annotations"] if each["image_id"] in kept]
    truth = run_file.parent / "part.json"
    truth.write_text(json.dumps(tree))
    evaluation = evaluate_run(load_config([run_file], overrides=[f"evaluate.ground_truth={truth}"]))
    counts = evaluation["counts"]
    assert (counts["images"], counts["images_not_in_the_ground_truth"], counts["predictions_left_out"]) == (2, 2, 4)
    row = evaluation["groups"]["all"]["all"]
    assert (evaluation["box"]["AP"], row["num_objects"], row["precision"]) == (1.0, 2, 1.0)
    assert "2 images of" in caplog.text
    assert "are not in the ground truth: left out, with 4 predictions" in caplog.text


def test_a_run_that_is_not_ready(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, summary, _ = call(capsys, str(run_file))
    assert code == 2
    assert "holds no run" in summary["error"]
    config = load_config([run_file])
    label(config)
    code, summary, _ = call(capsys, str(run_file))
    assert code == 5
    assert "is not reduced yet" in summary["error"]
    reduce_run(config)
    assert call(capsys, str(run_file))[0] == 0
    assert call(capsys, str(run_file), "--set", "detector.score_floor=0.4")[0] == 3
    annotations = run_file.parent / "run" / "coco" / "annotations.json"
    tree = json.loads(annotations.read_text())
    tree["info"]["owlsam_ray"]["fingerprint"] = "other"
    annotations.write_text(json.dumps(tree))
    with pytest.raises(IncompleteError, match="not made from this run's labels: run `owlsam reduce` again"):
        evaluate_run(config)
    annotations.write_text(annotations.read_text()[:-40])
    with pytest.raises(InputError, match="not valid JSON"):
        evaluate_run(config)


def test_no_ground_truth(run_file: Path, tmp_path: Path) -> None:
    config = reduced(run_file)
    truth = tmp_path / "data" / "instances.json"
    tree = json.loads(truth.read_text())
    truth.write_text(json.dumps(tree | {"annotations": []}))
    with pytest.raises(InputError, match="holds no annotations: give a ground truth"):
        evaluate_run(config)
    folder = config.data.model_copy(update={"source": "folder", "annotations": None})
    with pytest.raises(InputError, match=r"no ground truth: set evaluate\.ground_truth"):
        _ground_truth_url(config.model_copy(update={"data": folder}))


TRUTH: dict[str, Any] = {
    "images": [{"id": 1, "height": 20, "width": 30}],
    "categories": [{"id": 1, "name": "cat"}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0,
         "segmentation": [[1, 1, 10, 1, 10, 10, 1, 10]]},
    ],
}  # fmt: skip
FOUND: dict[str, Any] = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "score": 0.5}


def evaluate(tmp_path: Path, truth: Any, results: Any, kind: str = "bbox", **options: Any) -> dict[str, Any]:
    for name, tree in (("gt.json", truth), ("dt.json", results)):
        (tmp_path / name).write_text(tree if isinstance(tree, str) else json.dumps(tree))
    return evaluate_files(
        str(tmp_path / "gt.json"),
        str(tmp_path / "dt.json"),
        "segm" if kind == "segm" else "bbox",
        EvaluateConfig(),
        **options,
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("{", r"dt\.json is not valid JSON"),
        ("3", r"dt\.json is neither a list of COCO results nor a COCO file"),
        ([3], r"dt\.json: \[0\] is a int, not an object"),
        (
            [FOUND | {"image_id": 7}],
            r"none of the 1 images of .*dt\.json is one of the 1 of .*\(the first ids: 7 against 1\)",
        ),
        ([FOUND | {"image_id": "1"}], r"\[0\] has image '1'"),
        ([FOUND | {"category_id": 8}], r"\[0\] has category 8, which the ground truth does not list"),
        ([FOUND | {"score": math.nan}], r"\[0\]: score nan is not a finite number"),
        ([{key: FOUND[key] for key in FOUND if key != "score"}], r"\[0\]: score None"),
        ([FOUND | {"bbox": [1, 1, math.inf, 1]}], r"\[0\]: bbox \[1, 1, inf, 1\] is not four finite numbers"),
        ([FOUND | {"bbox": [1, 1, -3, 1]}], r"\[0\]: bbox \[1, 1, -3, 1\] has a negative side"),
        ([FOUND | {"bbox": [1, 1]}], r"\[0\]: bbox \[1, 1\] is not four"),
        ([FOUND | {"bbox": None}], r"\[0\]: neither bbox nor segmentation"),
        (TRUTH, r"annotations\[0\]: score None is not a finite number, and every prediction needs one"),
        (TRUTH | {"categories": [{"id": 5, "name": "dog"}]}, r"annotations\[0\] has category 1"),
    ],
)
def test_bad_predictions_are_named(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, TRUTH, change)


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        ({"size": [20, 31], "counts": "0"}, r"its mask has the size \[20, 31\], its image \[20, 30\]"),
        ({"size": [20, 30], "counts": "PPPP\x7f"}, "is not a compressed RLE"),
        ({"size": [20, 30], "counts": "0000"}, "does not describe a mask of 20×30"),
        ({"size": [20, 30], "counts": [100, 20]}, "RLE of 2 runs does not describe a mask"),
        ({"size": [20, 30], "counts": [700, -100]}, "RLE of 2 runs does not describe a mask"),
        ({"size": [20, 30], "counts": 5}, "neither a text nor a list"),
        ([[1, 2, 3, 4]], "no polygon of three or more points"),
        ([[1, 2, 3, 4, 5]], "not an even number of finite coordinates"),
        ([[1, 2, 3, 4, 5, math.nan]], "not an even number of finite coordinates"),
        ([[1, 2, 3, 4, 5, 1e30]], "has a coordinate beyond 1000000 pixels"),
        ("mask", "neither polygons nor RLE"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, segmentation: Any, words: str) -> None:
    with pytest.raises(InputError, match=r"dt\.json: \[0\]: .*" + words):
        evaluate(tmp_path, TRUTH, [FOUND | {"segmentation": segmentation}], "segm")
    truth = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"segmentation": segmentation}]}
    in_truth = r"gt\.json: annotations\[0\] \(id 1\): .*" + words
    if words.startswith("no polygon"):  # nothing is drawn of it: ordinary in a ground truth
        in_truth = r"gt\.json has no segmentations: evaluate boxes"
    with pytest.raises(InputError, match=in_truth):
        evaluate(tmp_path, truth, [], "segm")
    assert evaluate(tmp_path, truth, [FOUND])["box"]["AP"] == 1.0  # boxes do not need it


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("", "is not valid JSON"),
        ([], "has no list `images`"),
        ({"annotations": []}, "holds no annotations"),
        ({"annotations": None}, "holds no annotations"),
        ({"categories": []}, "has no `categories`"),
        ({"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, r"categories\[1\] has the id 1"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] \(id 1\) has no name"),
        ({"images": [{"id": 1}, {"id": 1}]}, r"images\[1\] has the id 1"),
        ({"images": [{"id": True}]}, r"images\[0\] has the id True"),
        ({"images": [{"id": 1, "neg_category_ids": []}]}, r"LVIS needs a frequency of r, c or f, not None"),
        ({"annotations": [{"image_id": 1, "category_id": 1}]}, r"annotations\[0\] \(id None\): bbox None"),
        ({"annotations": [TRUTH["annotations"][0] | {"area": math.nan}]}, "area nan is not a finite number"),
        ({"annotations": [TRUTH["annotations"][0] | {"image_id": 2}]}, "has image 2, which the ground truth"),
    ],
)
def test_bad_ground_truths_are_named(tmp_path: Path, change: Any, words: str) -> None:
    truth = TRUTH | change if isinstance(change, dict) else change
    with pytest.raises(InputError, match=r"gt\.json.*" + words):
        evaluate(tmp_path, truth, [FOUND])


def test_masks_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dt\.json has no segmentations: evaluate boxes"):
        evaluate(tmp_path, TRUTH, [FOUND], "segm")
    boxes = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"segmentation": []}]}
    with pytest.raises(InputError, match=r"gt\.json has no segmentations: evaluate boxes"):
        evaluate(tmp_path, boxes, [FOUND], "segm")
    no_size = TRUTH | {"images": [{"id": 1}]}
    with pytest.raises(InputError, match="masks need the height and width"):
        evaluate(tmp_path, no_size, [FOUND], "segm")
    assert evaluate(tmp_path, no_size, [FOUND])["box"]["AP"] == 1.0
    with pytest.raises(InputError, match="LVIS needs a frequency"):
        evaluate(tmp_path, TRUTH, [FOUND], lvis=True)


@pytest.mark.parametrize("nothing", [[], [[]], [[1, 2, 3, 4]], [[], [5, 5]], None, "absent"])
@pytest.mark.parametrize("lvis", [False, True])
def test_an_object_of_which_nothing_is_drawn_counts_for_boxes_only(
    tmp_path: Path, nothing: Any, lvis: bool, caplog: pytest.LogCaptureFixture
) -> None:
    other = TRUTH["annotations"][0] | {"id": 7, "bbox": [15, 1, 9, 9], "segmentation": nothing}
    if nothing == "absent":
        del other["segmentation"]
    second = other | {"id": 8}
    categories = [category | {"frequency": "f"} for category in TRUTH["categories"]]
    truth = TRUTH | {"annotations": [TRUTH["annotations"][0], other], "categories": categories}
    found = [
        FOUND | {"segmentation": TRUTH["annotations"][0]["segmentation"]},
        FOUND | {"bbox": [15, 1, 9, 9], "segmentation": [[15, 1, 24, 1, 24, 10, 15, 10]], "score": 0.4},
    ]
    boxes = evaluate(tmp_path, truth, found, lvis=lvis)
    assert (boxes["box"]["AP"], boxes["groups"]["all"]["all"]["num_objects"]) == (1.0, 2)
    assert boxes["counts"]["annotations_without_mask"] is None
    assert caplog.messages == []
    masks = evaluate(tmp_path, truth, found, "segm", lvis=lvis)
    alone = evaluate(tmp_path, truth | {"annotations": truth["annotations"][:1]}, found, "segm", lvis=lvis)
    assert (masks["mask"], masks["groups"], masks["categories"]) == (
        alone["mask"], alone["groups"], alone["categories"],
    )  # fmt: skip
    assert masks["mask"]["AP"] == 1.0
    assert masks["groups"]["all"]["all"]["num_false"] == 1
    assert (masks["counts"]["objects"], masks["counts"]["annotations_without_mask"]) == (2, 1)
    (warning,) = caplog.messages
    assert "gt.json: the segmentations of 1 of 2 annotations are empty (the first: id 7)" in warning
    caplog.clear()
    evaluate(tmp_path, truth | {"annotations": [TRUTH["annotations"][0], second, other]}, found, "segm", lvis=lvis)
    assert len(caplog.messages) == 1
    assert "id 8" in caplog.messages[0]


def test_a_run_whose_ground_truth_lacks_an_outline(run_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    instances = run_file.parent / "data" / "instances.json"
    tree = json.loads(instances.read_text())
    tree["annotations"][1]["segmentation"] = [[]]
    instances.write_text(json.dumps(tree))
    evaluation = evaluate_run(reduced(run_file))
    row = evaluation["groups"]["all"]["all"]
    assert (evaluation["box"]["AP"], evaluation["counts"]["objects"]) == (1.0, NUM_IMAGES)
    assert (row["num_objects"], row["num_matched"], row["num_false"]) == (NUM_IMAGES - 1, NUM_IMAGES - 1, 1)
    assert evaluation["counts"]["annotations_without_mask"] == 1
    assert sum("are empty (the first: id 1)" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("results", ["bare", "listed"])
def test_predictions_of_other_images_are_left_out(
    tmp_path: Path, results: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the ground truth lacks their category; of a bare list, only entries tell which images there are."""
    found: Any = [FOUND, FOUND | {"image_id": 7}, FOUND | {"image_id": 8, "category_id": 9}, FOUND | {"image_id": 7}]
    if results == "listed":
        images = [{"id": each, "file_name": f"{each}.png"} for each in (1, 7, 8, 9)]
        categories = [{"id": 1, "name": "cat"}, {"id": 9, "name": "owl"}]
        found = {"images": images, "categories": categories, "annotations": found}
    evaluation = evaluate(tmp_path, TRUTH, found)
    counts = evaluation["counts"]
    assert (evaluation["box"]["AP"], counts["predictions"], counts["predictions_left_out"]) == (1.0, 1, 3)
    assert counts["images_not_in_the_ground_truth"] == (2 if results == "bare" else 3)
    assert counts["images_not_labelled"] == (None if results == "bare" else 0)
    assert "images of" in caplog.text
    assert "are not in the ground truth: left out, with 3 predictions" in caplog.text


def test_images_without_a_result_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A list of results of a sample does not say that it is one."""
    images = TRUTH["images"] + [{"id": each, "file_name": f"{each}.png"} for each in (5, 6)]
    evaluate(tmp_path, TRUTH | {"images": images}, [FOUND])
    assert "2 of the ground truth's 3 images have no result in" in caplog.text
    caplog.clear()
    evaluate(tmp_path, TRUTH, [FOUND])
    assert "no result" not in caplog.text


def test_a_ground_truth_of_other_images_is_refused(tmp_path: Path) -> None:
    truth = TRUTH | {"images": [TRUTH["images"][0] | {"file_name": "mine.png"}]}
    found = {"categories": TRUTH["categories"], "annotations": [FOUND | {"image_id": 5}]}
    words = r"none of the 1 images of .*dt\.json is one of the 1 of .*gt\.json \(id 5 'a\.png' against id 1 '"
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, truth, found | {"images": [{"id": 5, "file_name": "a.png"}]})
    with pytest.raises(InputError, match=r"id 1: 'a\.png' against 'mine\.png'"):
        evaluate(tmp_path, truth, found | {"images": [{"id": 1, "file_name": "a.png"}]})


def test_names_with_folders_meet_names_without(tmp_path: Path) -> None:
    """The same ids mean other images: by these, every box would lie on the wrong picture."""
    boxes = {"a.png": [1, 1, 9, 9], "b.png": [12, 5, 7, 8], "c.png": [2, 9, 20, 5]}
    truth = TRUTH | {
        "images": [{"id": place, "file_name": name} for place, name in enumerate(boxes)],
        "annotations": [
            TRUTH["annotations"][0] | {"id": place, "image_id": place, "bbox": box, "area": box[2] * box[3]}
            for place, box in enumerate(boxes.values())
        ],
    }
    for folder in ("val/", "/data/set/val/", "sub\\"):
        found = {
            "images": [{"id": place, "file_name": folder + name} for place, name in enumerate(reversed(boxes))],
            "annotations": [
                FOUND | {"image_id": place, "bbox": boxes[name]} for place, name in enumerate(reversed(boxes))
            ],
            "categories": TRUTH["categories"],
        }
        assert evaluate(tmp_path, truth, found)["box"]["AP"] == 1.0


def test_a_category_under_the_id_of_another_one_is_refused(tmp_path: Path) -> None:
    categories = [
        {"id": 1, "name": "dog"},
        {"id": 2, "name": "bird"},
        {"id": 3, "name": "fish"},
        {"id": 4, "name": "bee"},
    ]
    others = [{"id": 1, "name": "cat"}, {"id": 2, "name": "horse"}, {"id": 3, "name": "cow"}, {"id": 4, "name": "owl"}]
    truth = TRUTH | {"categories": categories}
    found = {
        "images": TRUTH["images"],
        "categories": others,
        "annotations": [FOUND | {"category_id": each} for each in (1, 2, 3, 4)],
    }
    words = (
        r"4 categories of .*dt\.json have ids that .* lists under other names "
        r".*id 1: 'cat' against 'dog'; .*; id 3: 'cow'"
    )
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, truth, found)
    # What nothing was found of does no harm.
    found["annotations"] = []
    assert evaluate(tmp_path, truth, found)["box"]["AP"] == 0.0


def test_nothing_found_and_crowds_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    evaluation = evaluate(tmp_path, TRUTH, [])
    row = evaluation["groups"]["all"]["all"]
    assert (evaluation["box"]["AP"], row["recall"], row["precision"], row["box_miou"]) == (0.0, 0.0, None, None)
    crowd = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"iscrowd": 1}]}
    evaluation = evaluate(tmp_path, crowd, [FOUND, FOUND | {"bbox": [20, 1, 5, 5]}])
    row = evaluation["groups"]["all"]["all"]
    assert set(evaluation["box"].values()) == {None}
    # The one inside the crowd region is ignored, the other one is false.
    assert (row["num_objects"], row["num_false"], row["precision"], row["recall"]) == (0, 1, 0.0, None)
    assert (evaluation["counts"]["objects"], evaluation["counts"]["crowd_regions"]) == (0, 1)
    assert "all 1 objects of" in caplog.text
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(evaluation_table(evaluation))
    assert "all 1 objects are crowd regions" in console.export_text()


def test_a_results_file_may_be_labels_with_scores(tmp_path: Path) -> None:
    labels = TRUTH | {"annotations": [TRUTH["annotations"][0] | {"score": 0.5}]}
    for kind in ("bbox", "segm"):
        evaluation = evaluate(tmp_path, TRUTH, labels, kind)
        assert evaluation["groups"]["all"]["all"]["recall"] == 1.0
        assert evaluation["speed"] is None


@pytest.mark.parametrize("categories", [1, 60])
def test_table_shows_what_was_evaluated(tmp_path: Path, categories: int) -> None:
    many = [{"id": each, "name": f"[thing] {each}", "supercategory": "all"} for each in range(1, categories + 1)]
    objects = [TRUTH["annotations"][0] | {"category_id": each["id"]} for each in many]
    truth = TRUTH | {"categories": many, "annotations": objects}
    evaluation = evaluate(tmp_path, truth, [FOUND])
    assert list(evaluation["groups"]) == ["all", "all (group)"]
    console = Console(width=160, record=True, file=(tmp_path / "out").open("w"))
    console.print(evaluation_table(evaluation))
    text = console.export_text()
    console.file.close()
    assert ("[thing] 1" in text) == (categories == 1)
    assert ("60 categories: see `categories`" in text) == (categories == 60)
    assert "box AP50" in text
    assert "mask AP" not in text
    assert "nan" not in text
    assert "-1" not in text


def test_usage(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        ([], "nothing to evaluate: name a RUNFILE"),
        (["--ground-truth", "a.json", "--kind", "bbox"], "nothing to evaluate"),
        ([str(run_file), "--kind", "bbox"], "for files without a run"),
    ):
        code, summary, _ = call(capsys, *arguments)
        assert code == 2
        assert words in summary["error"]
    (tmp_path / "gt.json").write_text(json.dumps(TRUTH))
    (tmp_path / "dt.json").write_text(json.dumps([FOUND]))
    files = ["--ground-truth", str(tmp_path / "gt.json"), "--predictions", str(tmp_path / "dt.json"), "--kind", "bbox"]
    code, summary, _ = call(capsys, *files)
    assert (code, summary["box"]["AP"], summary["mask"], summary["precision"]) == (0, 1.0, None, 1.0)
    code, summary, _ = call(capsys, *files, "--set", "evaluate.score_threshold=0.6")
    assert (code, summary["recall"]) == (0, 0.0)
    for override, words in (
        ("evaluate.size_edges_px=[96, 32]", "each edge must be greater"),
        ("evaluate.size_edges_px=[-1]", "evaluate.size_edges_px.0"),
        ("evaluate.speed=1", "evaluate.speed"),
        ("reduce.score_threshold=0.3", "only the section `evaluate`"),
    ):
        code, summary, _ = call(capsys, *files, "--set", override)
        assert code == 2
        assert words in summary["error"]
    assert call(capsys, *files, "--run", "somewhere")[0] == 2
    with pytest.raises(SystemExit) as caught:
        cli.main(["evaluate", "--help"])
    assert caught.value.code == 0
    assert "--predictions results.json --kind segm" in capsys.readouterr().out
