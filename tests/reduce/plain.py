"""The plain twin of reduce: row by row, with a Python object for everything; what the fast path must equal."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from owlsam_ray.inference.suppress import suppress
from owlsam_ray.records import Detections
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules, prove_shard


def read_shard(
    run_url: str, shard: int, *, image_ids: list[int], fingerprint: str, ids_per_image: int, num_labels: int
) -> list[dict[str, Any]]:
    """Read and prove one shard, and return its rows.

    Args:
        run_url: the run directory.
        shard: the shard's number.
        image_ids: image ids of the shard in the manifest, in order.
        fingerprint: label fingerprint that the shard must have.
        ids_per_image: K: det_index is less than K.
        num_labels: number of categories; labels are less than this.

    Raises:
        IncompleteError: the shard breaks a rule; the message names the file, the problem, and how to redo it.
        OSError: storage failed, which says nothing about the file.
    """
    rules = ShardRules(fingerprint, ids_per_image, num_labels)
    rows: list[dict[str, Any]] = prove_shard(run_url, shard, image_ids, rules)[1].to_pylist()
    return rows


class Number(float):
    """A float32 as the files have it: the shortest digits, no `.0`; exponents as Arrow writes them."""

    def __repr__(self) -> str:
        value = np.float32(self)
        mantissa, exponent = np.format_float_scientific(value, unique=True, trim="-").split("e")
        if -7 < int(exponent) < 10:
            return np.format_float_positional(value, unique=True, trim="-")
        return f"{mantissa}e{int(exponent):+d}"


@dataclass
class Plain:
    """Lines of a run."""

    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    def lines(self, key: str) -> str:
        return ",\n".join(dump(each) for each in getattr(self, key))


def dump(value: Any) -> str:
    """`json.dumps` takes `float.__repr__`, whatever the class: numbers go in as words and lose their quotes."""
    if isinstance(value, Number):
        return repr(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {dump(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(dump(each) for each in value) + "]"
    return json.dumps(value, allow_nan=False)


def plain_reduce(
    run_url: str,
    manifest: Manifest,
    rules: ShardRules,
    decisions: Decisions,
    *,
    shards: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
) -> Plain:
    found = Plain()
    for shard in manifest.iter_shards() if shards is None else shards:
        sources = manifest.read_shard(shard).to_pylist()
        rows = read_shard(
            run_url,
            shard,
            image_ids=[source["image_id"] for source in sources],
            fingerprint=rules.fingerprint,
            ids_per_image=rules.ids_per_image,
            num_labels=rules.num_labels,
        )
        first, _ = manifest.shard_span(shard)
        for ordinal, (source, row) in enumerate(zip(sources, rows, strict=True), start=first):
            if row["status"] == "failed":
                keys = {"image_id": row["image_id"], "file_name": source["file_name"], "reason": row["reason"]}
                found.failures.append(keys | {"class": row["status_class"]})
                continue
            image = {"id": row["image_id"], "file_name": source["file_name"]}
            image |= {"height": row["height"], "width": row["width"]}
            found.images.append(image | (json.loads(source["extra"]) if source["extra"] else {}))
            for one in decided(row, decisions, found.left_out):
                found.annotations.append(
                    annotation(row, one, ordinal * rules.ids_per_image, decisions, prompts=prompts)
                )
    return found


def decided(row: dict[str, Any], decisions: Decisions, left_out: Counter[str]) -> list[dict[str, Any]]:
    """Detections of an image that become annotations, by rising det_index."""
    names = [name for name, value in row.items() if isinstance(value, list)]
    kept = []
    for position in range(len(row["det_index"])):
        one = {name: row[name][position] for name in names}
        one["category"] = int(decisions.target[one["label"]])
        has_mask = one["rle_counts"] is not None
        if one["category"] < 0:
            left_out["category"] += 1
        elif not one["score"] > decisions.thresholds[one["label"]]:
            left_out["score"] += 1
        elif has_mask and one["mask_area"] < decisions.min_mask_area:
            left_out["small_mask"] += 1
        elif has_mask and one["predicted_iou"] < np.float32(decisions.min_predicted_iou):
            left_out["predicted_iou"] += 1
        elif has_mask and one["stability"] < np.float32(decisions.min_stability):
            left_out["stability"] += 1
        else:
            kept.append(one)
    if decisions.suppress is not None and decisions.suppress.strategy != "none":
        before = len(kept)
        kept = suppressed(kept, decisions)
        left_out["suppressed"] += before - len(kept)
    if decisions.max_per_image is not None:
        ranked = sorted(kept, key=lambda one: (-one["score"], one["det_index"]))
        left_out["over_max"] += len(ranked[decisions.max_per_image :])
        kept = ranked[: decisions.max_per_image]
    return sorted(kept, key=lambda one: int(one["det_index"]))


def suppressed(kept: list[dict[str, Any]], decisions: Decisions) -> list[dict[str, Any]]:
    ranked = sorted(kept, key=lambda one: -one["score"])
    if not ranked or decisions.suppress is None:
        return ranked
    found = suppress(
        Detections(
            boxes_xyxy=np.array([[one[axis] for axis in ("x0", "y0", "x1", "y1")] for one in ranked], np.float32),
            scores=np.array([one["score"] for one in ranked], np.float32),
            raw_scores=np.array([one["raw_score"] for one in ranked], np.float32),
            labels=np.array([one["category"] for one in ranked]),
            prompt_ids=np.arange(len(ranked)),
            num_merged=np.array([one["num_merged"] for one in ranked]),
        ),
        decisions.suppress,
        thresholds=decisions.suppress_thresholds,
    )
    result = []
    for position, which in enumerate(found.prompt_ids.tolist()):
        one = dict(ranked[which])
        one["score"] = float(found.scores[position])
        one["num_merged"] = int(found.num_merged[position])
        one |= dict(zip(("x0", "y0", "x1", "y1"), found.boxes_xyxy[position].tolist(), strict=True))
        if one["score"] > decisions.thresholds[one["label"]]:
            result.append(one)
    return result


def annotation(
    row: dict[str, Any],
    one: dict[str, Any],
    first_id: int,
    decisions: Decisions,
    *,
    prompts: Sequence[str] | None,
) -> dict[str, Any]:
    x0, y0, x1, y1 = (np.float32(one[axis]) for axis in ("x0", "y0", "x1", "y1"))
    found: dict[str, Any] = {
        "id": first_id + one["det_index"],
        "image_id": row["image_id"],
        "category_id": decisions.categories[one["category"]].id,
        "bbox": [Number(x0), Number(y0), Number(x1 - x0), Number(y1 - y0)],
    }
    if one["rle_counts"] is None:
        found |= {"area": Number((x1 - x0) * (y1 - y0)), "iscrowd": 0, "score": Number(one["score"])}
    else:
        left, top, right, bottom = (one[f"mask_{axis}"] for axis in ("x0", "y0", "x1", "y1"))
        found |= {
            "area": one["mask_area"],
            "segmentation": {"size": [row["height"], row["width"]], "counts": one["rle_counts"].decode("ascii")},
            "iscrowd": 0,
            "score": Number(one["score"]),
            "predicted_iou": Number(one["predicted_iou"]),
            "stability": Number(one["stability"]),
            "mask_bbox": [left, top, right - left, bottom - top],
        }
    if prompts is not None:
        found |= {
            "prompt": prompts[one["prompt_id"]],
            "raw_score": Number(one["raw_score"]),
            "num_merged": one["num_merged"],
        }
    return found
