"""Each format in a reader that somebody else wrote, on drawn pictures and on photographs, against our own rows.

The readers live in an environment of their own, which `tests/readers/install.sh` makes.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from owlsam_ray.config.run import RunConfig
from owlsam_ray.models.shipped import model_settings
from owlsam_ray.ops.masks import decode_rle
from owlsam_ray.reduce.formats.yolo import YoloOutput
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.sources.drawing import Split
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split
from tests.reduce.formats.test_yolo import numbered_of, reduced, run_of
from tests.runs import ROOT, label_here

PYTHON = ROOT / ".venv-readers" / "bin" / "python"
FORMATS = ["coco", "coco_results", "lvis", "yolo", "yolo_segment", "parquet", "label_studio"]

pytestmark = pytest.mark.skipif(not PYTHON.exists(), reason="no .venv-readers: call tests/readers/install.sh")


def read(kind: str, *paths: Path) -> Any:
    """What another reader saw."""
    command = [str(PYTHON), str(Path(__file__).with_name("read.py")), kind, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Labels:
    """A run in all formats."""

    config: RunConfig
    images: Path
    out: Path
    polygons: Path
    """Another reduce, with polygons."""
    some_have_no_mask: bool

    @cached_property
    def tree(self) -> Any:
        """Our COCO file, as JSON."""
        return json.loads((self.out / "annotations.json").read_text(encoding="ascii"))

    @property
    def of_image(self) -> dict[int, list[dict[str, Any]]]:
        found: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.tree["images"]}
        for each in self.tree["annotations"]:
            found[each["image_id"]].append(each)
        return found

    @property
    def counts(self) -> dict[str, int]:
        return {f"num_{key}": len(self.tree[key]) for key in ("images", "annotations", "categories")}

    @property
    def instances(self) -> Counter[str]:
        return Counter(str(each["category_id"]) for each in self.tree["annotations"])

    @property
    def mask_pixels(self) -> dict[str, int]:
        return {str(each["id"]): each["area"] for each in self.tree["annotations"] if "segmentation" in each}


def label(root: Path, images: Path, annotations: Path, *, score_floor: float, **vocabulary: Any) -> Labels:
    models = model_settings()
    models["segment"] |= {"score_floor": score_floor}
    models["vocabulary"] |= vocabulary
    tree = {
        "run": str(root / "run"),
        "data": {"source": "coco", "images": str(images), "annotations": str(annotations)},
        **models,
        "resources": {"device": "cpu", "num_cpus": 2, "shard_size": 16},
        "reduce": {"min_mask_area": 1, "formats": FORMATS},
    }
    config = RunConfig.model_validate(tree)
    label_here(config)
    polygons = config.reduce.model_copy(
        update={"out": str(root / "polygons"), "formats": ("coco",), "segmentation": "polygon"}
    )
    reduce_run(config.model_copy(update={"reduce": polygons}))
    return Labels(config, images, root / "run" / "coco", root / "polygons", score_floor > 0)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    """Twelve pictures of the demo, in a folder below the root; weak boxes have no mask."""
    root = tmp_path_factory.mktemp("drawn")
    write_split(root / "drawn", Split.TEST, 12, workers=1)
    files = image_root(root / "drawn"), annotation_file(root / "drawn", Split.TEST)
    return label(root, *files, score_floor=0.1, categories="dataset")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Labels:
    """COCO's photographs, in which the demo's models see coloured shapes."""
    folder, root = shared / "data" / "coco_mini", tmp_path_factory.mktemp("photographs")
    names = ["red circle", "blue square", "green triangle", "yellow star"]
    return label(root, folder / "images", folder / "instances.json", score_floor=0.0, categories=names)


@pytest.fixture(params=["drawn", "photographs"])
def labels(request: pytest.FixtureRequest) -> Labels:
    found: Labels = request.getfixturevalue(request.param)
    assert len(found.tree["annotations"]) > 50
    assert (len(found.mask_pixels) < len(found.tree["annotations"])) == found.some_have_no_mask
    return found


def test_pycocotools_reads_the_labels(labels: Labels) -> None:
    seen = read("coco", labels.out / "annotations.json")
    assert {key: seen[key] for key in labels.counts} == labels.counts
    assert Counter(seen["per_category"]) == labels.instances
    assert seen["mask_pixels"] == labels.mask_pixels


def test_pycocotools_draws_the_same_masks_from_polygons(labels: Labels) -> None:
    file = labels.polygons / "annotations.json"
    tree = json.loads(file.read_text(encoding="ascii"))
    assert all(isinstance(each["segmentation"], list) for each in tree["annotations"] if "segmentation" in each)
    told = tree["info"]["owlsam_ray"]["proof"]["coco"]
    areas = labels.mask_pixels
    assert told == {"polygon_masks": len(areas), "polygon_pixels": sum(areas.values()), "polygon_pixels_off": 0}
    assert read("coco", file)["mask_pixels"] == areas


def test_pycocotools_evaluates_the_results_against_the_labels_they_are(labels: Labels) -> None:
    truth = labels.out / "annotations.json"
    if labels.some_have_no_mask:  # results without a mask get their box as one; so must this truth
        truth = labels.out / "lvis.json"
    seen = read("coco_results", labels.out / "results.json", truth)
    assert seen["num_annotations"] == len(labels.tree["annotations"])
    assert seen["bbox"][0] == pytest.approx(1.0)  # AP
    assert seen["segm"][0] == pytest.approx(1.0)


def test_pycocotools_evaluates_the_results_against_a_truth(shared: Path, photographs: Labels) -> None:
    truth = shared / "data" / "coco_mini" / "instances.json"
    seen = read("coco_results", photographs.out / "results.json", truth)
    assert seen["num_annotations"] == len(photographs.tree["annotations"])
    assert 0 <= seen["bbox"][0] < 0.2  # coloured shapes are no people


def test_lvis_reads_the_labels(labels: Labels) -> None:
    seen = read("lvis", labels.out / "lvis.json")
    assert {key: seen[key] for key in labels.counts} == labels.counts
    assert Counter(seen["instance_count"]) == labels.instances
    assert seen["image_count"] == seen["images_with"]
    ids = [category["id"] for category in labels.tree["categories"]]
    most = labels.tree["info"]["owlsam_ray"]["ids_per_image"]
    for image_id, annotations in labels.of_image.items():
        found = {each["category_id"] for each in annotations}
        is_full = any(each["id"] % most == most - 1 for each in annotations)
        assert seen["negative"][str(image_id)] == [each for each in ids if each not in found and not is_full]
        assert seen["not_exhaustive"][str(image_id)] == (sorted(found, key=ids.index) if is_full else [])
    assert len(seen["mask_pixels"]) == len(labels.tree["annotations"])
    assert labels.mask_pixels.items() <= seen["mask_pixels"].items()


def test_lvis_evaluates_the_results_against_the_labels_they_are(labels: Labels) -> None:
    seen = read("lvis_results", labels.out / "results.json", labels.out / "lvis.json")
    assert seen["bbox"]["AP"] == pytest.approx(1.0)
    assert seen["segm"]["AP"] == pytest.approx(1.0)


def test_supervision_reads_boxes(labels: Labels) -> None:
    def check(ours: list[dict[str, Any]], theirs: dict[str, Any], size_wh: tuple[int, int]) -> None:
        sides = np.tile(np.array(size_wh, float), 2)
        boxes = np.array([each["bbox"] for each in ours]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert theirs["masks"] == []
        assert np.abs(np.clip(boxes, 0, sides) - np.array(theirs["boxes"]).reshape(-1, 4)).max(initial=0) < 0.01

    check_yolo(labels, "yolo", check)


def test_supervision_reads_outlines(labels: Labels) -> None:
    ious, cuts, areas = [], [], []

    def check(ours: list[dict[str, Any]], theirs: dict[str, Any], size_wh: tuple[int, int]) -> None:
        size_hw = (size_wh[1], size_wh[0])
        pairs = list(zip(ours, theirs["masks"], strict=True))
        for each, counts in pairs[::5]:
            if "segmentation" not in each:
                continue
            mask = decode_rle(each["segmentation"]["counts"].encode(), size_hw)
            drawn = decode_rle(counts.encode(), size_hw)
            # OpenCV takes corners for centres of pixels, and draws the outline: a pixel more to the right and below.
            assert (mask <= drawn).all()
            cuts.append(np.count_nonzero(drawn & ~grown(mask)))
            ious.append(each["area"] / np.count_nonzero(drawn))
            areas.append(each["area"])

    check_yolo(labels, "yolo_segment", check)
    assert len(ious) > 10
    assert sum(cuts) < 0.05 * sum(areas)
    assert np.mean(ious) > 0.8


def test_yolo_takes_names_without_an_ending_twins_and_folders_called_images(tmp_path: Path) -> None:
    """Pictures at the paths of `train.txt`, as users are told to put them."""
    paths = {
        "rows-0/1": "rows-0/1.jpg", "a/same.jpg": "a/same.jpg", "a/same.png": "a/same-2.png",
        "images/x.png": "x.png", "cam/images/y.jpg": "cam/images_/y.jpg", "end./z.png": "end%2E/z.png",
    }  # fmt: skip
    manifest = run_of(tmp_path, list(paths))
    reduced(tmp_path, manifest, YoloOutput(numbered=numbered_of(manifest)))
    folder = tmp_path / "coco" / "yolo"
    assert (folder / "train.txt").read_text().splitlines() == [f"./images/{path}" for path in paths.values()]
    for path in paths.values():
        place = folder / "images" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(place, "PNG")
    seen = read("yolo", folder, folder / "images")
    assert {path: len(each["classes"]) for path, each in seen["images"].items()} == dict.fromkeys(paths.values(), 1)


def grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A mask and the pixels to the right and below."""
    more = mask.copy()
    more[1:] |= mask[:-1]
    more[:, 1:] |= more[:, :-1]
    return more


def check_yolo(
    labels: Labels, name: str, check: Callable[[list[dict[str, Any]], dict[str, Any], tuple[int, int]], None]
) -> None:
    seen = read("yolo", labels.out / name, labels.images)
    categories = labels.tree["categories"]
    assert seen["names"] == [category["name"] for category in categories]
    classes = {category["id"]: number for number, category in enumerate(categories)}
    assert set(seen["images"]) == {image["file_name"] for image in labels.tree["images"]}
    for image in labels.tree["images"]:
        ours, theirs = labels.of_image[image["id"]], seen["images"][image["file_name"]]
        assert theirs["classes"] == [classes[each["category_id"]] for each in ours]
        check(ours, theirs, (image["width"], image["height"]))


def test_duckdb_reads_the_tables(labels: Labels) -> None:
    seen = read("parquet", labels.out / "annotations.parquet", labels.out / "images.parquet")
    names = {category["id"]: category["name"] for category in labels.tree["categories"]}
    annotations = labels.tree["annotations"]
    assert seen["per_category"] == dict(Counter(names[each["category_id"]] for each in annotations))
    count, area, score, masks, prompt = seen["sums"]
    assert (count, masks) == (len(annotations), len(labels.mask_pixels))
    assert area == pytest.approx(sum(each["area"] for each in annotations), rel=1e-6)
    assert score == pytest.approx(sum(each["score"] for each in annotations), rel=1e-6)
    assert prompt == min(pq.read_table(labels.out / "annotations.parquet")["category"].cast("string").to_pylist())
    statuses = Counter("ok" if annotations else "empty" for annotations in labels.of_image.values())
    assert seen["status"] == dict(statuses)
    assert seen["num_annotations"] == count
    assert seen["info"] == [labels.tree["info"]]


def test_label_studio_reads_its_tasks(labels: Labels) -> None:
    seen = read("label_studio", labels.out / "label_studio.json", labels.out / "label_studio_config.xml")
    assert seen["wrong"] == []
    coco = seen["coco"]
    assert {each["name"]: each["id"] for each in coco["categories"]} == {
        each["name"]: each["id"] for each in labels.tree["categories"]
    }
    assert [Path(image["file_name"]).name for image in coco["images"]] == [
        Path(image["file_name"]).name for image in labels.tree["images"]
    ]
    theirs: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(coco["images"]))}
    for each in coco["annotations"]:
        theirs[each["image_id"]].append(each)
    for number, (image, ours) in enumerate(zip(labels.tree["images"], labels.of_image.values(), strict=True)):
        # Their converter takes first what one of the two tools drew, then the other's.
        found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for each in theirs[number]:
            found[bool(each["segmentation"])].append(each)
        for is_polygon, regions in found.items():
            own = [each for each in ours if ("segmentation" in each) == is_polygon]
            assert [each["category_id"] for each in regions] == [each["category_id"] for each in own]
            for each, region in zip(own, regions, strict=True):
                box = each["mask_bbox"] if is_polygon else each["bbox"]
                np.testing.assert_allclose(region["bbox"], box, atol=2e-3)
                if is_polygon:
                    corners = [[round(side, 2) for side in polygon] for polygon in region["segmentation"]]
                    rle = coco_mask.merge(coco_mask.frPyObjects(corners, image["height"], image["width"]))
                    assert int(coco_mask.area(rle)) == each["area"]
