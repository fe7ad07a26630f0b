"""Run by .venv-readers' python: open a file that we wrote with somebody else's reader, and print what it saw as JSON.

read.py coco ANNOTATIONS
read.py coco_results RESULTS TRUTH
read.py lvis LVIS
read.py lvis_results RESULTS LVIS
read.py yolo FOLDER IMAGES
read.py parquet ANNOTATIONS IMAGES
read.py label_studio TASKS CONFIG
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def read_coco(file: str) -> dict[str, Any]:
    """With pycocotools: counts, and the masks as it draws them."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO

    coco = COCO(file)
    with_mask = [each for each in coco.loadAnns(coco.getAnnIds()) if "segmentation" in each]
    return {
        **_counts(coco.imgs, coco.anns, coco.cats),
        "per_category": {str(each): len(coco.getAnnIds(catIds=[each])) for each in coco.getCatIds()},
        "mask_pixels": {str(each["id"]): int(coco_mask.area(coco.annToRLE(each))) for each in with_mask},
    }


def read_coco_results(file: str, truth: str) -> dict[str, Any]:
    """With pycocotools: `loadRes`, and the evaluation of boxes and of masks."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO(truth)
    results = coco.loadRes(file)
    scores = {}
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(coco, results, kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores[kind] = [float(each) for each in evaluation.stats]
    return {"num_annotations": len(results.anns), **scores}


def read_lvis(file: str) -> dict[str, Any]:
    """With LVIS's API: counts, lists of categories, and the masks as it draws them."""
    import pycocotools.mask as coco_mask
    from lvis import LVIS  # type: ignore[import-not-found]

    lvis = LVIS(file)
    return {
        **_counts(lvis.imgs, lvis.anns, lvis.cats),
        "image_count": {str(each["id"]): each["image_count"] for each in lvis.cats.values()},
        "instance_count": {str(each["id"]): each["instance_count"] for each in lvis.cats.values()},
        "images_with": {str(each): len(set(lvis.cat_img_map[each])) for each in lvis.get_cat_ids()},
        "negative": {str(each["id"]): each["neg_category_ids"] for each in lvis.imgs.values()},
        "not_exhaustive": {str(each["id"]): each["not_exhaustive_category_ids"] for each in lvis.imgs.values()},
        "mask_pixels": {str(key): int(coco_mask.area(lvis.ann_to_rle(each))) for key, each in lvis.anns.items()},
    }


def read_lvis_results(file: str, truth: str) -> dict[str, Any]:
    """With LVIS's API: its evaluation of boxes and of masks."""
    from lvis import LVISEval

    np.float = float  # type: ignore[attr-defined]  # lvis 0.5.3 evaluates with numpy 1
    scores: dict[str, Any] = {}
    for kind in ("bbox", "segm"):
        evaluation = LVISEval(truth, file, kind)
        evaluation.run()
        scores[kind] = {key: float(value) for key, value in evaluation.get_results().items()}
    return scores


def read_yolo(folder: str, images: str) -> dict[str, Any]:
    """With supervision, which reads one folder of images at a time: boxes, and outlines as RLE, by image."""
    import supervision  # type: ignore[import-not-found]
    from pycocotools import mask as coco_mask

    root = Path(images)
    found: dict[str, Any] = {}
    classes: list[str] = []
    for directory in sorted({path.parent for path in root.rglob("*") if path.suffix.lower() in (".jpg", ".png")}):
        dataset = supervision.DetectionDataset.from_yolo(
            images_directory_path=str(directory),
            annotations_directory_path=str(Path(folder, "labels", directory.relative_to(root))),
            data_yaml_path=str(Path(folder, "data.yaml")),
        )
        classes = dataset.classes
        for path, detections in dataset.annotations.items():
            masks = [] if detections.mask is None else detections.mask
            encoded = (coco_mask.encode(np.asfortranarray(mask, np.uint8)) for mask in masks)
            found[Path(path).relative_to(root).as_posix()] = {
                "classes": [int(each) for each in detections.class_id] if len(detections) else [],
                "boxes": np.asarray(detections.xyxy, float).tolist(),
                "masks": [each["counts"].decode() for each in encoded],
            }
    return {"names": classes, "images": found}


def read_parquet(annotations: str, images: str) -> dict[str, Any]:
    """With DuckDB: counts and sums."""
    import duckdb  # type: ignore[import-not-found]

    def rows(query: str, file: str) -> list[Any]:
        return duckdb.execute(query, [file]).fetchall()

    per_category = "select category, count(*) from read_parquet(?) group by all"
    sums = "select count(*), sum(area), sum(score::double), count(rle_counts), min(prompt) from read_parquet(?)"
    metadata = "select value from parquet_kv_metadata(?) where key = 'info'"
    return {
        "per_category": dict(rows(per_category, annotations)),
        "sums": rows(sums, annotations)[0],
        "status": dict(rows("select status, count(*) from read_parquet(?) group by all", images)),
        "num_annotations": rows("select sum(num_annotations)::bigint from read_parquet(?)", images)[0][0],
        "info": [json.loads(bytes(value)) for (value,) in rows(metadata, annotations)],
    }


def read_label_studio(tasks: str, config: str) -> dict[str, Any]:
    """With Label Studio's SDK: what is wrong with tasks and predictions; and its converter to COCO, for which every
    prediction is accepted as somebody's annotation.
    """
    from label_studio_sdk.converter import Converter  # type: ignore[import-not-found]
    from label_studio_sdk.label_interface import LabelInterface  # type: ignore[import-not-found]

    interface = LabelInterface(Path(config).read_text(encoding="utf-8"))
    listed = json.loads(Path(tasks).read_text(encoding="utf-8"))
    # Apart from its predictions: with them `validate_task` of 2.1.2 raises a TypeError.
    wrong = [f"task {task['data']}" for task in listed if not interface.validate_task({"data": task["data"]})]
    accepted = []
    for number, task in enumerate(listed):
        for prediction in task["predictions"]:
            wrong += interface.validate_prediction(prediction, return_errors=True)
        annotations = [{"result": prediction["result"]} for prediction in task["predictions"]]
        accepted.append({"id": number, "data": task["data"], "annotations": annotations})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "export.json")
        source.write_text(json.dumps(accepted), encoding="utf-8")
        converter = Converter(config, project_dir=folder, download_resources=False)
        converter.convert_to_coco(str(source), folder, is_dir=False)
        coco = json.loads(Path(folder, "result.json").read_text(encoding="utf-8"))
    return {"wrong": wrong, "coco": {key: coco[key] for key in ("images", "annotations", "categories")}}


def _counts(images: Any, annotations: Any, categories: Any) -> dict[str, int]:
    return {"num_images": len(images), "num_annotations": len(annotations), "num_categories": len(categories)}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {
    "coco": read_coco,
    "coco_results": read_coco_results,
    "lvis": read_lvis,
    "lvis_results": read_lvis_results,
    "yolo": read_yolo,
    "parquet": read_parquet,
    "label_studio": read_label_studio,
}

if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        seen = KINDS[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(seen))
