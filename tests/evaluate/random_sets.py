"""Small random ground truths and predictions in COCO's format, with crowds, ties and awkward shapes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

SIZE = (48, 64)
GROUPS = {1: "warm", 2: "warm", 4: "cold", 7: "cold", 9: "empty"}
"""Category → supercategory; nothing is ever drawn of category 9."""


def random_ground_truth(seed: int, *, images: int = 12, crowds: bool = True) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for _ in range(int(random.integers(0, 7))):
            mask, box = _blob(random)
            is_crowd = crowds and random.random() < 0.15
            rle = _rle(mask)
            annotations.append(
                {
                    "id": 100 + len(annotations),
                    "image_id": image_id,
                    "category_id": int(random.choice([1, 2, 4, 7])),
                    "bbox": box,
                    "area": int(mask.sum()),
                    "iscrowd": int(is_crowd),
                    "segmentation": rle if is_crowd or random.random() < 0.5 else _polygons(box),
                }
            )
            if isinstance(annotations[-1]["segmentation"], list):
                annotations[-1]["area"] = box[2] * box[3]
    return {
        "images": [
            {"id": image_id, "file_name": f"{image_id}.png", "height": SIZE[0], "width": SIZE[1]}
            for image_id in range(1, images + 1)
        ],
        "categories": [{"id": each, "name": f"thing {each}", "supercategory": group} for each, group in GROUPS.items()],
        "annotations": annotations,
    }


def random_results(seed: int, truth: dict[str, Any], *, kind: str) -> list[dict[str, Any]]:
    """Shaken objects, doubles, strangers; scores in steps of a tenth, so that some are equal."""
    random = np.random.default_rng(seed + 1000)
    results: list[dict[str, Any]] = []
    for annotation in truth["annotations"]:
        for _ in range(int(random.choice([0, 1, 1, 2]))):
            results.append(_result(random, annotation["image_id"], annotation["category_id"], annotation["bbox"], kind))
    for _ in range(len(truth["images"])):
        image_id, category_id = int(random.choice([each["id"] for each in truth["images"]])), int(random.choice([1, 4]))
        results.append(_result(random, image_id, category_id, _blob(random)[1], kind))
    return [results[index] for index in random.permutation(len(results))]


def dense(segmentation: Any) -> NDArray[np.bool_]:
    """(H, W) of a segmentation."""
    rle = segmentation
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *SIZE))
    return np.asarray(coco_mask.decode(rle)).astype(np.bool_)


def _result(
    random: np.random.Generator, image_id: int, category_id: int, box: list[float], kind: str
) -> dict[str, Any]:
    x, y, width, height = (value + random.normal(0, 0.12 * (box[2] + box[3]) / 2) for value in box)
    x, y = float(np.clip(x, 0, SIZE[1] - 3)), float(np.clip(y, 0, SIZE[0] - 3))
    width, height = float(np.clip(width, 1, SIZE[1] - x)), float(np.clip(height, 1, SIZE[0] - y))
    result: dict[str, Any] = {
        "image_id": image_id,
        "category_id": category_id,
        "score": round(float(random.integers(1, 11)) / 10, 1),
    }
    if kind == "bbox":
        return result | {"bbox": [x, y, width, height]}
    mask = np.zeros(SIZE, np.bool_)
    mask[round(y) : round(y + height) + 1, round(x) : round(x + width) + 1] = True
    mask &= random.random(SIZE) < 0.93
    return result | {"segmentation": _rle(mask)}


def _blob(random: np.random.Generator) -> tuple[NDArray[np.bool_], list[float]]:
    """An ellipse with its tight box."""
    height, width = (int(side) for side in random.integers(3, 30, 2))
    top, left = int(random.integers(0, SIZE[0] - height)), int(random.integers(0, SIZE[1] - width))
    rows, columns = np.ogrid[: SIZE[0], : SIZE[1]]
    mask = ((rows + 0.5 - top - height / 2) / (height / 2)) ** 2 + (
        (columns + 0.5 - left - width / 2) / (width / 2)
    ) ** 2 <= 1
    return mask, [float(left), float(top), float(width), float(height)]


def _rle(mask: NDArray[np.bool_]) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(SIZE), "counts": rle["counts"].decode("ascii")}


def _polygons(box: list[float]) -> list[list[float]]:
    x, y, width, height = box
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]
