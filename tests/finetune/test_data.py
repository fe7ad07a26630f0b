"""Training images: real ones against pycocotools, bad input, sizes and orientations, threads and pickles."""

import contextlib
import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from owlsam_ray.coco_files.cleaning import CleaningSettings
from owlsam_ray.coco_files.outlines import read_outline
from owlsam_ray.errors import FailureClass, ImageError, InputError
from owlsam_ray.finetune.data import Sample, TrainingImages, read_training_images
from owlsam_ray.ops.masks import decode_rle, encode_rle

ALL = CleaningSettings(min_area=0, duplicate_iou=None)
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}]


@pytest.fixture(scope="module")
def real(shared: Path) -> tuple[COCO, TrainingImages]:
    root = shared / "data" / "coco_mini"
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / "instances.json"))
    return coco, read_training_images(str(root / "instances.json"), str(root / "images"), ALL)


def test_real_counts(shared: Path, real: tuple[COCO, TrainingImages]) -> None:
    _, images = real
    counts = images.report.as_dict()
    assert (counts["images_in"], counts["annotations_in"], counts["annotations_out"]) == (91, 742, 733)
    assert {rule: count for rule, count in counts["removed"].items() if count} == {"crowd": 9}
    root = shared / "data" / "coco_mini"
    cleaned = read_training_images(str(root / "instances.json"), str(root / "images"), CleaningSettings())
    tree = json.loads((root / "instances.json").read_text())
    small = sum(entry["area"] < 100 and not entry["iscrowd"] for entry in tree["annotations"])
    assert cleaned.report.as_dict()["removed"]["small"] == small > 0
    assert len(cleaned.image_ids) == 91


def test_real_boxes_and_masks_equal_pycocotools(real: tuple[COCO, TrainingImages]) -> None:
    coco, images = real
    compared = 0
    for index, image_id in enumerate(images.image_ids):
        entries = coco.loadAnns(sorted(coco.getAnnIds(imgIds=[image_id], iscrowd=False)))
        expected = [coco.annToMask(entry).astype(bool) for entry in entries]
        sample, with_masks = images.load(index), images.load(index, masks=True)
        assert sample.masks is None
        assert sample.image_id == image_id
        assert [images.categories[label].id for label in sample.labels] == [entry["category_id"] for entry in entries]
        bboxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
        xyxy = np.concatenate([bboxes[:, :2], bboxes[:, :2] + bboxes[:, 2:]], axis=1)
        assert np.abs(sample.boxes_xyxy - xyxy).max(initial=0) <= 1 / 256 + 1e-6
        assert with_masks.masks is not None
        drawable = [mask for mask in expected if mask.any()]
        assert with_masks.masks.shape == (len(drawable), *sample.pixels.shape[:2])
        assert all(np.array_equal(mine, theirs) for mine, theirs in zip(with_masks.masks, drawable, strict=True))
        compared += len(drawable)
    assert compared > 700


def test_real_crowds_as_runs_equal_pycocotools(real: tuple[COCO, TrainingImages]) -> None:
    coco, _ = real
    crowds = coco.loadAnns(coco.getAnnIds(iscrowd=True))
    assert len(crowds) == 9
    for entry in crowds:
        size = entry["segmentation"]["size"]
        outline, _ = read_outline(entry["segmentation"], tuple(size))
        assert isinstance(outline, bytes)
        assert np.array_equal(decode_rle(outline, tuple(size)), coco.annToMask(entry))


def write(directory: Path, annotations: list[dict[str, Any]], **image: Any) -> str:
    """One image of 60 × 80 (H × W) with annotations, as `list.json`."""
    (directory / "images").mkdir(exist_ok=True)
    path = directory / "images" / "1.png"
    if not path.exists():
        pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    entry = {"id": 1, "file_name": "1.png", "height": 60, "width": 80} | image
    tree = {
        "images": [{key: value for key, value in entry.items() if value is not None}],
        "annotations": [{"id": i + 1, "image_id": 1, "category_id": 3, **entry} for i, entry in enumerate(annotations)],
        "categories": CATEGORIES,
    }
    (directory / "list.json").write_text(json.dumps(tree))
    return str(directory / "list.json")


def load_one(directory: Path, annotations: list[dict[str, Any]], *, masks: bool = False, **image: Any) -> Sample:
    url = write(directory, annotations, **image)
    return read_training_images(url, str(directory / "images"), ALL).load(0, masks=masks)


SQUARE: dict[str, Any] = {"bbox": [10, 10, 30, 20], "segmentation": [[10, 10, 40, 10, 40, 30, 10, 30]]}


def test_types_and_layout(tmp_path: Path) -> None:
    sample = load_one(tmp_path, [SQUARE, SQUARE | {"category_id": 9}], masks=True)
    assert sample.pixels.dtype == np.uint8
    assert sample.pixels.flags.c_contiguous
    assert sample.boxes_xyxy.dtype == np.float32
    assert sample.boxes_xyxy.tolist() == [[10, 10, 40, 30]] * 2
    assert sample.labels.dtype == np.int64
    assert sample.labels.tolist() == [0, 1]
    assert sample.masks is not None
    assert sample.masks.dtype == np.bool_
    assert sample.masks.sum(axis=(1, 2)).tolist() == [600, 600]


def test_boxes_lie_on_the_grid_and_keep_their_area(tmp_path: Path) -> None:
    thin = {"bbox": [10.0001, 10.3, 0.0001, 20], "segmentation": SQUARE["segmentation"]}
    box = load_one(tmp_path, [thin]).boxes_xyxy[0]
    assert (box * 256 == np.round(box * 256)).all()
    assert box[2] > box[0]


def test_all_kinds_of_segmentation_draw_the_same(tmp_path: Path) -> None:
    mask = np.zeros((60, 80), bool)
    mask[10:30, 10:40] = True
    runs = np.diff(np.flatnonzero(np.diff(mask.T.ravel(), prepend=False, append=False)), prepend=0).tolist()
    runs.append(60 * 80 - sum(runs))
    rles = [{"size": [60, 80], "counts": counts} for counts in (encode_rle(mask).decode(), runs)]
    sample = load_one(tmp_path, [SQUARE, *(SQUARE | {"segmentation": rle} for rle in rles)], masks=True)
    assert sample.masks is not None
    assert all(np.array_equal(drawn, mask) for drawn in sample.masks)
    assert len(sample.masks) == 3


def test_objects_without_a_mask_are_left_out_only_with_masks(tmp_path: Path) -> None:
    sliver = SQUARE | {"segmentation": [[10.1, 10.1, 10.2, 10.1, 10.2, 10.3]], "category_id": 9}
    bare = {"bbox": [1, 2, 3, 4]}
    assert len(load_one(tmp_path, [sliver, bare, SQUARE]).labels) == 3
    sample = load_one(tmp_path, [sliver, bare, SQUARE], masks=True)
    assert sample.boxes_xyxy.tolist() == [[10, 10, 40, 30]]
    assert sample.labels.tolist() == [0]


def test_image_without_objects(tmp_path: Path) -> None:
    url = write(tmp_path, [SQUARE])
    tree = json.loads(Path(url).read_text())
    tree["images"].append({"id": 2, "file_name": "2.png"})
    Image.new("L", (5, 4)).save(tmp_path / "images" / "2.png")
    Path(url).write_text(json.dumps(tree))
    images = read_training_images(url, str(tmp_path / "images"), ALL)
    sample = images.load(1, masks=True)
    assert (len(images), images.image_ids) == (2, (1, 2))
    assert sample.pixels.shape == (4, 5, 3)
    assert sample.boxes_xyxy.shape == (0, 4)
    assert sample.masks is not None
    assert sample.masks.shape == (0, 4, 5)
    dropped = read_training_images(url, str(tmp_path / "images"), CleaningSettings(drop_empty_images=True))
    assert dropped.image_ids == (1,)


def test_boxes_are_cut_at_loading_where_no_size_is_stated(tmp_path: Path) -> None:
    inside_later = {"bbox": [70, 50, 30, 30]}
    outside_later = {"bbox": [90, 50, 30, 30]}
    sample = load_one(tmp_path, [inside_later, outside_later], height=None, width=None)
    assert sample.boxes_xyxy.tolist() == [[70, 50, 80, 60]]


@pytest.mark.parametrize(
    ("stated_hw", "shape"), [((60, 80), (60, 80, 3)), ((80, 60), (80, 60, 3)), ((None, None), (80, 60, 3))]
)
def test_orientation_follows_the_stated_size(
    tmp_path: Path, stated_hw: tuple[int | None, int | None], shape: tuple[int, ...]
) -> None:
    """As in the main job: a stated size that equals the raw one means that boxes were drawn on raw pixels."""
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(tmp_path / "images" / "1.png", exif=exif)
    assert load_one(tmp_path, [SQUARE], height=stated_hw[0], width=stated_hw[1]).pixels.shape == shape


def test_images_that_cannot_be_trained_on_say_why(tmp_path: Path) -> None:
    url = write(tmp_path, [SQUARE])
    images = read_training_images(url, str(tmp_path / "images"), ALL)
    path = tmp_path / "images" / "1.png"
    data = path.read_bytes()
    Image.new("RGB", (81, 60)).save(path)
    with pytest.raises(ImageError, match="stated_size_differs: stated 60x80, file 60x81"):
        images.load(0)
    for content, reason in ((data[:-3000], "truncated"), (b"", "empty_file"), (b"hello", "not_an_image")):
        path.write_bytes(content)
        with pytest.raises(ImageError) as caught:
            images.load(0)
        assert caught.value.reason.split(":")[0] == reason
        assert caught.value.failure_class is FailureClass.PERMANENT
    path.unlink()
    with pytest.raises(ImageError, match=r"^missing$"):
        images.load(0)


def test_a_damaged_rle_fails_its_image_where_masks_are_drawn(tmp_path: Path) -> None:
    images = [SQUARE | {"segmentation": {"size": [60, 80], "counts": "52203"}}]
    assert len(load_one(tmp_path, images).labels) == 1
    with pytest.raises(ImageError, match=r"^bad_mask: RLE of 5 bytes does not describe a mask of 60 × 80"):
        load_one(tmp_path, images, masks=True)


def test_a_set_with_nothing_to_train_on_is_refused_with_the_counts(tmp_path: Path) -> None:
    url = write(tmp_path, [SQUARE | {"iscrowd": 1}, SQUARE | {"bbox": [0, 0, 0, 4]}, {"bbox": [500, 0, 9, 9]}])
    with pytest.raises(InputError) as caught:
        read_training_images(url, str(tmp_path / "images"), ALL)
    message = str(caught.value)
    assert "list.json has no annotation to train on: training uses 0 of 3 annotations" in message
    assert "1 crowd, 1 zero_area, 1 outside" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"categories": []}, "list.json lists no categories"),
        ({"categories": [*CATEGORIES, {"id": 4, "name": "Dog"}]}, "list.json: .*name.*given more than once: 'dog'"),
        ({"categories": [{"id": 9, "name": "dog"}]}, "category_id 3 is not among the 1 categories"),
        ({"annotations": []}, "has no annotation to train on: training uses 0 of 0"),
        ({"images": [{"id": 1, "file_name": "../1.png"}]}, "does not lie below data.images"),
        ({"images": [{"id": 2, "file_name": "1.png"}]}, "image_id 1 is not among the 1 images"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    url = write(tmp_path, [SQUARE])
    Path(url).write_text(json.dumps(json.loads(Path(url).read_text()) | change))
    with pytest.raises(InputError, match=words):
        read_training_images(url, str(tmp_path / "images"), ALL)


def test_wrong_root_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of 1 images looked up exists"):
        read_training_images(write(tmp_path, [SQUARE]), str(tmp_path / "elsewhere"), ALL)


def test_urls(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    url = write(tmp_path, [SQUARE])
    memory.pipe_file("/train/list.json", Path(url).read_bytes())
    memory.pipe_file("/train/images/1.png", (tmp_path / "images" / "1.png").read_bytes())
    images = read_training_images("memory://train/list.json", "memory://train/images", ALL)
    assert np.array_equal(images.load(0).pixels, load_one(tmp_path, [SQUARE]).pixels)


def test_threads_and_pickles_give_the_same(real: tuple[COCO, TrainingImages]) -> None:
    _, images = real
    copy = pickle.loads(pickle.dumps(images))
    order = [*range(12)] * 2
    with ThreadPoolExecutor(6) as pool:
        parallel = list(pool.map(lambda index: images.load(index, masks=True), order))
    for index, sample in zip(order[:12], parallel[12:], strict=True):
        other = pickle.loads(pickle.dumps(copy.load(index, masks=True)))
        for name in ("pixels", "boxes_xyxy", "labels", "masks"):
            assert np.array_equal(getattr(sample, name), getattr(other, name))


def test_samples_do_not_share_memory_with_the_set(tmp_path: Path) -> None:
    images = read_training_images(write(tmp_path, [SQUARE]), str(tmp_path / "images"), ALL)
    images.load(0).boxes_xyxy[:] = 0
    assert images.load(0).boxes_xyxy.tolist() == [[10, 10, 40, 30]]
