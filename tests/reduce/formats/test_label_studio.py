"""Label Studio's tasks: what they say, the configuration, and their way back as corrections."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import GuardError, InputError
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.reduce.formats.label_studio import LabelStudioOutput
from owlsam_ray.run.manifest import Manifest
from tests.reduce.everything import keep_everything
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, K, random_run, reduce_shards

Tree = dict[str, Any]
ODD = (Category(id=7, name='a "b"\n<&>'), Category(id=3, name="\x07ü"), Category(id=11, name="dog"))


def written(
    root: Path,
    manifest: Manifest,
    *,
    prefix: str | None = None,
    categories: tuple[Category, ...] = CATEGORIES,
    **settings: Any,
) -> tuple[list[Tree], Tree, str]:
    """The tasks, our COCO file, and the configuration."""
    out = root / f"out-{len(list(root.iterdir()))}"
    run = {"fingerprint": FINGERPRINT, "ids_per_image": K}
    reduce_shards(
        str(root),
        manifest,
        ReduceConfig(out=str(out), **settings),
        decisions=keep_everything(categories),
        categories=categories,
        outputs=(CocoOutput(), LabelStudioOutput(categories, "a b", run, prefix)),
    )
    tasks: list[Tree] = json.loads((out / "label_studio.json").read_text(encoding="ascii"))
    config = (out / "label_studio_config.xml").read_text(encoding="utf-8")
    return tasks, json.loads((out / "annotations.json").read_text()), config


@pytest.mark.parametrize("seed", range(4))
def test_every_annotation_is_a_region(tmp_path: Path, seed: int) -> None:
    manifest = random_run(tmp_path, seed, num_images=20, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest)
    assert [task["data"]["image_id"] for task in tasks] == [image["id"] for image in tree["images"]]
    uris = {row["image_id"]: row["uri"] for row in (
        row for shard in manifest.iter_shards() for row in manifest.read_shard(shard).to_pylist())}  # fmt: skip
    names = {each.id: each.name for each in CATEGORIES}
    annotations = {each["id"]: each for each in tree["annotations"]}
    seen = []
    for image, task in zip(tree["images"], tasks, strict=True):
        assert task["data"] == {
            "image": uris[image["id"]],
            "image_id": image["id"],
            "file_name": image["file_name"],
            "owlsam": {"fingerprint": FINGERPRINT, "ids_per_image": K},
        }
        (prediction,) = task["predictions"]
        assert prediction["model_version"] == "a b"
        scores = []
        for region in prediction["result"]:
            each = annotations[int(region["id"])]
            seen.append(each["id"])
            scores.append(each["score"])
            assert each["image_id"] == image["id"]
            kind = region["from_name"]
            assert (kind == "polygon") == bool("segmentation" in each and each["area"])
            size = (region["original_width"], region["original_height"])
            assert size == (image["width"], image["height"])
            assert (region["type"], region["to_name"], region["image_rotation"]) == (f"{kind}labels", "image", 0)
            assert region["value"][f"{kind}labels"] == [names[each["category_id"]]]
            assert region["score"] == each["score"]
            pixels = np.array(size) / 100
            if kind == "rectangle":
                x, y, w, h = each["bbox"]
                corners = np.clip([[x, y], [x + w, y + h]], 0, size)
                value = region["value"]
                found = np.array([[value["x"], value["y"]], [value["width"], value["height"]]]) * pixels
                np.testing.assert_allclose(found, [corners[0], corners[1] - corners[0]], atol=1e-3)
            else:
                points = np.array(region["value"]["points"]) * pixels
                np.testing.assert_allclose(points, points.round(), atol=1e-3)
                left, top, w, h = each["mask_bbox"]
                assert points.round().min(axis=0).tolist() == [left, top]
                assert points.round().max(axis=0).tolist() == [left + w, top + h]
        assert prediction.get("score") == (pytest.approx(np.mean(scores), abs=1e-6) if scores else None)
    assert seen == list(annotations)


def test_urls_have_a_prefix_and_are_quoted(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 3, num_images=12, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest, prefix="/data/local-files/?d=a/")
    urls = {image["file_name"]: task["data"]["image"] for image, task in zip(tree["images"], tasks, strict=True)}
    assert all(url.startswith("/data/local-files/?d=a/") and url.isascii() and " " not in url for url in urls.values())
    odd = next(name for name in urls if name.startswith("a "))
    assert urls[odd] == f"/data/local-files/?d=a/a%20%22b%22%5C{odd.split(chr(92))[1]}"


def test_the_configuration_names_every_category(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 4, num_images=3, shard_size=6)
    _, _, config = written(tmp_path, manifest, categories=ODD)
    root = ElementTree.fromstring(config)
    for kind in ("RectangleLabels", "PolygonLabels"):
        labels = root.findall(f"{kind}/Label")
        assert [label.get("value") for label in labels] == ['a "b"\n<&>', "\ufffdü", "dog"]
    assert [label.get("category") for label in root.findall("RectangleLabels/Label")] == ["7", "3", "11"]


@pytest.mark.slow
def test_any_number_of_workers_and_files(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 5, num_images=40, shard_size=4)
    whole, _, _ = written(tmp_path, manifest, workers=1)
    assert written(tmp_path, manifest, workers=2)[0] == whole
    out = tmp_path / "parts"
    settings = ReduceConfig(out=str(out), images_per_file=12, min_mask_area=0)
    output = LabelStudioOutput(CATEGORIES, "a b", {"fingerprint": FINGERPRINT, "ids_per_image": K})
    files = reduce_shards(str(tmp_path), manifest, settings, outputs=(output,))["files"]
    parts = [json.loads((out / name).read_text()) for name in files if name.startswith("label_studio-")]
    assert len(parts) == 4
    assert [task for part in parts for task in part] == whole


def export(tasks: list[Tree]) -> list[Tree]:
    """What Label Studio exports when somebody accepts every prediction: an older annotation, and a cancelled one."""
    return [
        {
            "id": number,
            "data": task["data"],
            "annotations": [
                {"created_at": "2026-01-01", "result": []},
                {"created_at": "2026-03-01", "was_cancelled": True, "result": []},
                {"created_at": "2026-02-01", "result": task["predictions"][0]["result"]},
            ],
        }
        for number, task in enumerate(tasks)
    ]


def corrected(root: Path, manifest: Manifest, tasks: Any) -> tuple[list[Tree], Tree]:
    (root / "export.json").write_text(json.dumps(tasks))
    settings = ReduceConfig(out=str(root / "corrected"), corrections=str(root / "export.json"))
    reduce_shards(str(root), manifest, settings, decisions=keep_everything(CATEGORIES))
    report: Tree = json.loads((root / "corrected" / "corrections_report.json").read_text())
    annotations: list[Tree] = json.loads((root / "corrected" / "annotations.json").read_text())["annotations"]
    return annotations, report["counts"]


@pytest.mark.parametrize("seed", range(3))
def test_an_export_comes_back_as_corrections(tmp_path: Path, seed: int) -> None:
    manifest = random_run(tmp_path, seed, num_images=20, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest)
    sizes = {image["id"]: (image["width"], image["height"]) for image in tree["images"]}

    def is_cut(each: Tree) -> bool:
        """Whether the tasks do not have the box as it is."""
        x, y, w, h = each["bbox"]
        width, height = sizes[each["image_id"]]
        return not each.get("mask_bbox", [0, 0, 0, 0])[2] and (x + w > width + 0.04 or y + h > height + 0.04)

    whole = {each["id"]: each for each in tree["annotations"]}
    found, counts = corrected(tmp_path, manifest, export(tasks))
    assert [each for each in found if not is_cut(whole[each["id"]])] == [
        each for each in whole.values() if not is_cut(each)
    ]
    assert counts["added"] == 0
    assert counts["conflicts"].keys() <= {"geometry"}

    changed = export(tasks)
    full = next(task for task in changed if len(task["annotations"][2]["result"]) > 3)
    regions = full["annotations"][2]["result"]
    gone = int(regions.pop(1)["id"])
    width, height = sizes[full["data"]["image_id"]]
    common = {"to_name": "image", "original_width": width, "original_height": height, "image_rotation": 0}
    drawn = {"x": 10, "y": 20, "width": 30, "height": 40, "rotation": 0, "rectanglelabels": ["dog"]}
    regions.append(common | {"id": "aBc", "type": "rectanglelabels", "from_name": "rectangle", "value": drawn})
    regions.append(common | {"id": "brush", "type": "brushlabels", "value": {"rle": [1], "brushlabels": ["dog"]}})
    regions.append({"id": "note", "type": "choices", "value": {"choices": ["good"]}})
    untouched = next(task for task in changed if task is not full and task["annotations"][2]["result"])
    untouched["annotations"] = untouched["annotations"][1:2]
    found, counts = corrected(tmp_path, manifest, changed)
    ids = {each["id"] for each in found}
    assert gone not in ids
    assert counts["added"] == 1
    (new,) = (each for each in found if each["id"] not in whole)
    expected = np.array([0.1 * width, 0.2 * height, 0.3 * width, 0.4 * height])
    np.testing.assert_allclose(new["bbox"], expected, atol=2e-3)
    assert (new["category_id"], new["image_id"]) == (3, full["data"]["image_id"])
    own = [each for each in found if each["image_id"] == untouched["data"]["image_id"]]
    assert own == [each for each in whole.values() if each["image_id"] == untouched["data"]["image_id"]]


def test_a_turned_rectangle_becomes_the_box_around_it(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 1, num_images=20, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest)
    (large,) = [image for image in tree["images"] if min(image["width"], image["height"]) > 20][:1]
    width, height = large["width"], large["height"]
    value = {
        "x": 50,
        "y": 50,
        "width": 1000 / width,
        "height": 500 / height,
        "rotation": 90,
        "rectanglelabels": ["dog"],
    }
    region = {"type": "rectanglelabels", "original_width": width, "original_height": height, "value": value}
    data = next(task["data"] for task in tasks if task["data"]["image_id"] == large["id"])
    found, _ = corrected(tmp_path, manifest, [{"data": data, "annotations": [{"result": [region]}]}])
    (own,) = (each for each in found if each["image_id"] == large["id"])
    np.testing.assert_allclose(own["bbox"], [width / 2 - 5, height / 2, 5, 10], atol=2e-3)


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([{"bbox": []}], "neither a COCO file nor"),
        ([{"data": {"image": "x"}, "annotations": [{"result": []}]}], "none that we wrote"),
        (
            [
                {"data": {"image_id": 1, "owlsam": {"fingerprint": each}}, "annotations": [{"result": []}]}
                for each in "fg"
            ],
            "several runs",
        ),
        ([{"data": {"image_id": 1}, "annotations": [{"result": []}]}], "corrections_base"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, tasks: list[Tree], words: str) -> None:
    manifest = random_run(tmp_path, 1, num_images=4, shard_size=6)
    with pytest.raises(InputError, match=words):
        corrected(tmp_path, manifest, tasks)


def test_the_annotation_that_was_saved_last_counts(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 2, num_images=20, shard_size=6)
    tasks, _, _ = written(tmp_path, manifest)
    changed = export(tasks)
    full = next(task for task in changed if len(task["annotations"][2]["result"]) > 3)
    older, _, newer = full["annotations"]
    older |= {"updated_at": "2026-06-01", "result": newer["result"][1:]}
    newer["updated_at"] = "2026-02-01"
    ids = {each["id"] for each in corrected(tmp_path, manifest, changed)[0]}
    assert int(newer["result"][0]["id"]) not in ids
    assert all(int(region["id"]) in ids for region in older["result"])


def test_regions_of_turned_pictures_are_conflicts(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 2, num_images=20, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest)
    _, before = corrected(tmp_path, manifest, export(tasks))
    changed = export(tasks)
    regions = next(task for task in changed if len(task["annotations"][2]["result"]) > 3)["annotations"][2]["result"]
    own = {int(region["id"]) for region in regions}
    for region in regions:
        region["image_rotation"] = 90
        region["value"] |= {"x": 1, "y": 2} if "x" in region["value"] else {"points": [[0, 0], [50, 0], [50, 50]]}
    found, counts = corrected(tmp_path, manifest, changed)
    assert counts["conflicts"]["geometry"] == before["conflicts"].get("geometry", 0) + len(regions)
    whole = [each for each in tree["annotations"] if each["id"] in own]
    assert [each for each in found if each["id"] in own] == whole


def test_tasks_tell_of_which_images_they_are(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 2, num_images=20, shard_size=6)
    tasks, tree, _ = written(tmp_path, manifest)
    for task in tasks:
        task["data"]["owlsam"]["image_list"] = manifest.images_digest()
    found, _ = corrected(tmp_path, manifest, export(tasks))
    assert len(found) == len(tree["annotations"])
    tasks[3]["data"]["owlsam"]["image_list"] = "another"
    with pytest.raises(GuardError, match="over other images"):
        corrected(tmp_path, manifest, export(tasks))
