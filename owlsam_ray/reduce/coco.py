"""Shards in manifest order → `coco/annotations.json` and `coco/failures.jsonl`, one pass, one shard in memory."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from owlsam_ray import storage
from owlsam_ray.manifest import Manifest
from owlsam_ray.reduce.proof import check_all_present, read_shard
from owlsam_ray.settings import Category

ANNOTATIONS = "annotations.json"
FAILURES = "failures.jsonl"


@dataclass(frozen=True, slots=True)
class CocoSettings:
    """What goes into the file."""

    categories: tuple[Category, ...]
    ids_per_image: int
    """K: an annotation's id is image ordinal × K + det_index."""
    fingerprint: str
    provenance: dict[str, Any]
    """Stands in `info.owlsam_ray`; no time and no host, so that the same run gives the same bytes."""
    score_threshold: float | None = None
    """Annotations are kept when their score is greater."""
    min_mask_area: int = 0
    """Annotations whose mask has fewer pixels are left out."""


@dataclass(slots=True)
class ReduceResult:
    """Counts of a reduce; the sum of ok, empty and failed was proven to be the number of images."""

    num_images: int
    ok: int = 0
    empty: int = 0
    failed: int = 0
    num_annotations: int = 0
    num_masks: int = 0
    num_small: int = 0
    """Annotations above the score threshold that were left out for their small masks."""
    failed_by_reason: dict[str, int] = field(default_factory=dict)
    flagged_by_reason: dict[str, int] = field(default_factory=dict)
    annotations: str = ""
    failures: str = ""


def reduce_coco(run_url: str, manifest: Manifest, settings: CocoSettings) -> ReduceResult:
    """Merge all shards.

    Annotations carry `bbox` (the detector's box), `segmentation` (RLE), `area` (mask pixels), `mask_bbox`, `score`,
    `predicted_iou`, `stability`. A detection under the mask floor has no mask fields, and its box's area. Failed images
    do not appear (they would train as background); empty ones do.

    Raises:
        IncompleteError: a shard is missing or cannot be trusted; nothing appears under the final names then.
    """
    check_all_present(run_url, manifest)
    result = ReduceResult(
        num_images=manifest.num_images,
        annotations=storage.join(run_url, "coco", ANNOTATIONS),
        failures=storage.join(run_url, "coco", FAILURES),
    )
    with (
        tempfile.TemporaryFile() as images,
        tempfile.TemporaryFile() as annotations,
        storage.open_atomic(result.failures) as failures,
    ):
        _spool(run_url, manifest, settings, result, images=images, annotations=annotations, failures=failures)
        with storage.open_atomic(result.annotations) as out:
            _stitch(out, _head(manifest, settings, result), images=images, annotations=annotations)
    return result


def _spool(
    run_url: str,
    manifest: Manifest,
    settings: CocoSettings,
    result: ReduceResult,
    *,
    images: IO[bytes],
    annotations: IO[bytes],
    failures: IO[bytes],
) -> None:
    """One pass over the shards; counts go to `result`."""
    counts: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    flagged: Counter[str] = Counter()
    for shard in manifest.iter_shards():
        sources = manifest.read_shard(shard).to_pylist()
        rows = read_shard(
            run_url,
            shard,
            image_ids=[source["image_id"] for source in sources],
            fingerprint=settings.fingerprint,
            ids_per_image=settings.ids_per_image,
            num_labels=len(settings.categories),
        )
        first_ordinal, _ = manifest.shard_span(shard)
        for ordinal, (source, row) in enumerate(zip(sources, rows, strict=True), start=first_ordinal):
            counts[row["status"]] += 1
            if row["status"] == "failed":
                failed[row["reason"].split(":")[0]] += 1
                _write_line(failures, _failure(source, row), end=b"\n")
                continue
            if row["reason"] is not None:
                flagged[row["reason"].split(":")[0]] += 1
            _write_line(images, _image(source, row), end=b",\n")
            kept = _above_threshold(row, settings)
            large = [position for position in kept if not _is_small(row, position, settings)]
            counts["small"] += len(kept) - len(large)
            for annotation in _annotations(row, large, ordinal, settings):
                counts["annotations"] += 1
                counts["masks"] += "segmentation" in annotation
                _write_line(annotations, annotation, end=b",\n")
    result.ok, result.empty, result.failed = counts["ok"], counts["empty"], counts["failed"]
    result.num_annotations, result.num_masks, result.num_small = counts["annotations"], counts["masks"], counts["small"]
    result.failed_by_reason, result.flagged_by_reason = dict(sorted(failed.items())), dict(sorted(flagged.items()))


def _head(manifest: Manifest, settings: CocoSettings, result: ReduceResult) -> dict[str, Any]:
    """Everything but images and annotations."""
    source = manifest.parts[0].source
    proof = {
        "images": result.num_images,
        "ok": result.ok,
        "empty": result.empty,
        "failed": result.failed,
        "failed_by_reason": result.failed_by_reason,
        "flagged_by_reason": result.flagged_by_reason,
        "annotations": result.num_annotations,
        "small_left_out": result.num_small,
    }
    return {
        "info": source["info"] | {"owlsam_ray": settings.provenance | {"proof": proof}},
        "licenses": source["licenses"],
        "categories": [_category(category) for category in settings.categories],
    }


def _stitch(out: IO[bytes], head: dict[str, Any], *, images: IO[bytes], annotations: IO[bytes]) -> None:
    out.write(b"{\n")
    for key in ("info", "licenses"):
        out.write(f'"{key}": {_json(head[key])},\n'.encode())
    out.write(b'"images": [\n')
    _copy_without_last_comma(images, out)
    out.write(f'],\n"categories": {_json(head["categories"])},\n"annotations": [\n'.encode())
    _copy_without_last_comma(annotations, out)
    out.write(b"]\n}\n")


def _copy_without_last_comma(spool: IO[bytes], out: IO[bytes]) -> None:
    if spool.tell():
        spool.truncate(spool.tell() - len(b",\n"))
        spool.seek(0)
        shutil.copyfileobj(spool, out, 2**20)
        out.write(b"\n")


def _category(category: Category) -> dict[str, Any]:
    """Id, name and supercategory; synonyms and frequency where they are known, as LVIS has them."""
    synonyms = {"synonyms": list(category.synonyms)} if category.synonyms else {}
    frequency = {"frequency": category.frequency} if category.frequency else {}
    return {"id": category.id, "name": category.name, "supercategory": category.supercategory} | synonyms | frequency


def _image(source: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    image = {
        "id": row["image_id"],
        "file_name": source["file_name"],
        "height": row["height"],
        "width": row["width"],
    }
    return image | (json.loads(source["extra"]) if source["extra"] else {})


def _failure(source: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    return {
        "image_id": row["image_id"],
        "file_name": source["file_name"],
        "reason": row["reason"],
        "class": row["status_class"],
    }


def _above_threshold(row: dict[str, Any], settings: CocoSettings) -> list[int]:
    """Positions of the detections that score enough."""
    threshold = settings.score_threshold
    return [position for position, score in enumerate(row["score"]) if threshold is None or score > threshold]


def _is_small(row: dict[str, Any], position: int, settings: CocoSettings) -> bool:
    """Whether a detection has a mask of too few pixels."""
    area = row["mask_area"][position]
    return area is not None and area < settings.min_mask_area


def _annotations(
    row: dict[str, Any], positions: Sequence[int], ordinal: int, settings: CocoSettings
) -> Iterator[dict[str, Any]]:
    for position in positions:
        score = row["score"][position]
        x0, y0, x1, y1 = (np.float32(row[axis][position]) for axis in ("x0", "y0", "x1", "y1"))
        annotation: dict[str, Any] = {
            "id": ordinal * settings.ids_per_image + row["det_index"][position],
            "image_id": row["image_id"],
            "category_id": settings.categories[row["label"][position]].id,
            "bbox": [_short(x0), _short(y0), _short(x1 - x0), _short(y1 - y0)],
        }
        counts = row["rle_counts"][position]
        if counts is None:
            annotation |= {"area": _short((x1 - x0) * (y1 - y0)), "iscrowd": 0, "score": _short(score)}
        else:
            left, top, right, bottom = (row[f"mask_{axis}"][position] for axis in ("x0", "y0", "x1", "y1"))
            annotation |= {
                "area": row["mask_area"][position],
                "segmentation": {"size": [row["height"], row["width"]], "counts": counts.decode("ascii")},
                "iscrowd": 0,
                "score": _short(score),
                "predicted_iou": _short(row["predicted_iou"][position]),
                "stability": _short(row["stability"][position]),
                "mask_bbox": [left, top, right - left, bottom - top],
            }
        yield annotation


def _short(value: Any) -> float:
    """The shortest decimal that gives the same float32 back: 108.94 instead of 108.94000244140625."""
    return float(str(np.float32(value)))


def _write_line(file: IO[bytes], value: dict[str, Any], *, end: bytes) -> None:
    file.write(_json(value).encode() + end)


def _json(value: Any) -> str:
    # ASCII with escapes, as COCO's own files: half of a surrogate pair in a name must not stop the last step of a run.
    return json.dumps(value, allow_nan=False, separators=(", ", ": "))
