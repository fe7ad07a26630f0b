"""How fast shards become COCO, and in how much memory, against the ways that come to mind first.

    python -m tests.bench.reducing                                # the ratio; memory at 10⁵, 10⁶, 10⁷ annotations
    python -m tests.bench.reducing --annotations 100000 --rounds 5  # smaller
    python -m tests.bench.reducing --keep /tmp/reducing

The shards are made up: 640 × 480 pictures with 30 detections each, masks of ellipses. The ratio is of one core, on
the same shards, in turns: `to_pylist` + `json.dump` reads each shard with Parquet, makes an object of every annotation
and dumps them all at the end (`json.dumps`, measured beside it, is faster and needs the text in memory too); ours
besides proves every byte and row. 1,000 different masks repeat. Memory is of the real command with two workers.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.reduce.run import reduce_run
from owlsam_ray.run.manifest import Manifest, load_manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.record import RunRecord, canonical_hash, save_record
from owlsam_ray.run.shards import shard_url, write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA
from owlsam_ray.sources import ImageRecord
from owlsam_ray.sources.listing import tables_of
from owlsam_ray.vocabulary import Query
from tests.bench.measured_process import MeasuredProcess

SIZE_HW = (480, 640)
PER_IMAGE = 30
_CATEGORIES = tuple(Category(id=number, name=f"thing {number}") for number in range(1, 81))
_POOL = 1000
"""Different masks."""


def make_run(root: Path, annotations: int, *, shard_size: int = 1024, seed: int = 0) -> RunConfig:
    """A labelled run of made-up detections; returns its config, which also stands in `root/run.yaml`."""
    images = annotations // PER_IMAGE
    root.mkdir(parents=True, exist_ok=True)
    run_file = root / "run.yaml"
    run_file.write_text(
        json.dumps(
            {
                "data": {"source": "folder", "images": str(root)},
                "detector": {"model": "fake"},
                "segment": {"model": "fake"},
                "reduce": {"min_mask_area": 0},
            }
        )
    )
    run = root / "run"
    config = load_config([run_file], run=str(run))
    records = (ImageRecord(number, f"train/{number:012d}.jpg", *SIZE_HW) for number in range(1, images + 1))
    source: dict[str, Any] = {"info": {}, "licenses": [], "categories": []}
    manifest = write_parts(str(run), tables_of(records, "/i"), ShardLayout(shard_size=shard_size), source=source)
    parts = {"config": config.label_fields(), "weights": {"detector": "0", "segmenter": "0"}}
    record = RunRecord(
        owlsam_version="0",
        config=config.model_dump(mode="json"),
        categories=_CATEGORIES,
        queries=tuple(Query(label=label, prompts=(each.name,)) for label, each in enumerate(_CATEGORIES)),
        ids_per_image=100,
        layout_hash=manifest.layout_hash,
        num_parts=len(manifest.parts),
        fingerprint=canonical_hash(parts),
        fingerprint_parts=parts,
        numerics=({},),
    )
    save_record(str(run), record)
    numbers = np.random.default_rng(seed)
    pool = _masks(numbers)
    for shard in manifest.iter_shards():
        first, count = manifest.shard_span(shard)
        rows = _rows(np.arange(first, first + count), pool, numbers)
        write_shard(str(run), shard, rows, fingerprint=record.fingerprint or "", numerics="n", stage_s={})
    return config


def _masks(numbers: np.random.Generator) -> list[tuple[bytes, int, tuple[int, int, int, int]]]:
    """RLE, area and tight box of ellipses."""
    found = []
    for _ in range(_POOL):
        canvas = np.zeros(SIZE_HW, np.uint8)
        centre = (int(numbers.integers(60, 580)), int(numbers.integers(60, 420)))
        axes = (int(numbers.integers(10, 90)), int(numbers.integers(10, 60)))
        cv2.ellipse(canvas, centre, axes, float(numbers.integers(180)), 0, 360, 1, -1)
        rows, columns = np.nonzero(canvas)
        box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
        found.append((encode_rle(canvas.astype(np.bool_)), len(rows), box))
    return found


def _rows(
    image_ids: NDArray[np.int64], pool: list[tuple[bytes, int, tuple[int, int, int, int]]], numbers: np.random.Generator
) -> pa.Table:
    images, total = len(image_ids), len(image_ids) * PER_IMAGE
    which = numbers.integers(0, len(pool), total)
    boxes = np.array([box for _, _, box in pool], np.int32)[which]
    scores = -np.sort(-numbers.random((images, PER_IMAGE), np.float32), axis=1).ravel()
    jitter = numbers.random((total, 4), np.float32)
    columns = {
        "det_index": np.tile(np.arange(PER_IMAGE, dtype=np.int32), images),
        "label": numbers.integers(0, len(_CATEGORIES), total, np.int32),
        "raw_score": scores,
        "score": scores,
        "num_merged": np.ones(total, np.int32),
        "predicted_iou": numbers.random(total, np.float32),
        "stability": numbers.random(total, np.float32),
        "mask_area": np.array([area for _, area, _ in pool], np.int64)[which],
        **{axis: boxes[:, place] + jitter[:, place] for place, axis in enumerate(("x0", "y0", "x1", "y1"))},
        **{f"mask_{axis}": boxes[:, place] for place, axis in enumerate(("x0", "y0", "x1", "y1"))},
    }
    columns["prompt_id"] = columns["label"]
    flat = {name: pa.array(values) for name, values in columns.items()}
    flat["rle_counts"] = pa.array([counts for counts, _, _ in pool], pa.binary()).take(pa.array(which))
    offsets = pa.array(np.arange(0, total + 1, PER_IMAGE, dtype=np.int32))
    of_images = {
        "image_id": pa.array(image_ids),
        "status": pa.array(["ok"] * images),
        "reason": pa.nulls(images, pa.string()),
        "status_class": pa.nulls(images, pa.string()),
        "height": pa.array(np.full(images, SIZE_HW[0], np.int32)),
        "width": pa.array(np.full(images, SIZE_HW[1], np.int32)),
    }
    return pa.table(
        [
            of_images[each.name]
            if each.name in of_images
            else pa.ListArray.from_arrays(offsets, flat[each.name].cast(each.type.value_type))
            for each in PREDICTION_SCHEMA
        ],
        schema=PREDICTION_SCHEMA,
    )


def reduce_plainly(run_url: str, manifest: Manifest, out: Path, *, by_dumps: bool = False) -> None:
    """`to_pylist` + `json.dump`, which is Python; or `json.dumps`, which is C and needs the text in memory as well."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for shard in manifest.iter_shards():
        sources = manifest.read_shard(shard).to_pylist()
        first, _ = manifest.shard_span(shard)
        rows = pq.read_table(shard_url(run_url, shard)).to_pylist()
        for ordinal, (source, row) in enumerate(zip(sources, rows, strict=True), start=first):
            size = [row["height"], row["width"]]
            images.append(
                {"id": row["image_id"], "file_name": source["file_name"], "height": size[0], "width": size[1]}
            )
            for place, index in enumerate(row["det_index"]):
                x0, y0, x1, y1 = (row[axis][place] for axis in ("x0", "y0", "x1", "y1"))
                left, top, right, bottom = (row[f"mask_{axis}"][place] for axis in ("x0", "y0", "x1", "y1"))
                annotations.append(
                    {
                        "id": ordinal * 100 + index,
                        "image_id": row["image_id"],
                        "category_id": _CATEGORIES[row["label"][place]].id,
                        "bbox": [x0, y0, x1 - x0, y1 - y0],
                        "area": row["mask_area"][place],
                        "segmentation": {"size": size, "counts": row["rle_counts"][place].decode()},
                        "iscrowd": 0,
                        "score": row["score"][place],
                        "predicted_iou": row["predicted_iou"][place],
                        "stability": row["stability"][place],
                        "mask_bbox": [left, top, right - left, bottom - top],
                    }
                )
    categories = [category.model_dump() for category in _CATEGORIES]
    tree = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    with out.open("w") as file:
        if by_dumps:
            file.write(json.dumps(tree))
        else:
            json.dump(tree, file)


def compare(root: Path, annotations: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns, each time in a process of its own, which has done the same once before."""
    make_run(root / "compared", annotations)
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "dumps": [], "ours": []}
    for _ in range(rounds):
        for side, found in times.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                found.append(pool.submit(_timed, side, root).result())
    _check_same(root / "compared" / "plain.json", root / "compared" / "run" / "coco" / "annotations.json")
    number = annotations // PER_IMAGE * PER_IMAGE
    result: dict[str, Any] = {"annotations": number, "rounds": rounds}
    for place, kind in enumerate(("cpu", "wall")):
        seconds = {side: statistics.median(each[place] for each in found) for side, found in times.items()}
        result |= {f"{side}_per_{kind}_s": round(number / each) for side, each in seconds.items()}
        result[f"{kind}_ratio"] = round(seconds["plain"] / seconds["ours"], 1)
        result[f"{kind}_ratio_to_dumps"] = round(seconds["dumps"] / seconds["ours"], 1)
    return result


def _timed(side: str, root: Path) -> tuple[float, float]:
    """Seconds of the CPU, which other processes of the machine change less, and of the clock."""
    folder = root / "compared"
    for _ in range(2):
        config = load_config([folder / "run.yaml"], run=str(folder / "run"), overrides=["reduce.workers=1"])
        manifest = load_manifest(str(config.run), verify=False)
        assert manifest is not None
        cpu, clock = time.process_time(), time.perf_counter()
        if side == "ours":
            reduce_run(config)
        else:
            pa.set_cpu_count(1)
            reduce_plainly(str(config.run), manifest, folder / "plain.json", by_dumps=side == "dumps")
        seconds = time.process_time() - cpu, time.perf_counter() - clock
    return seconds


def _check_same(plain: Path, ours: Path) -> None:
    """Both files say the same, as float32."""
    trees = [json.loads(path.read_text()) for path in (plain, ours)]
    assert [each["id"] for each in trees[0]["images"]] == [each["id"] for each in trees[1]["images"]]
    for one, other in zip(trees[0]["annotations"], trees[1]["annotations"], strict=True):
        for key in ("id", "image_id", "category_id", "area", "segmentation", "mask_bbox"):
            assert one[key] == other[key], (key, one, other)
        assert np.allclose(np.float32(one["bbox"]), np.float32(other["bbox"]), rtol=0, atol=1e-4)
        assert np.float32(one["score"]) == np.float32(other["score"])


def measure(root: Path, annotations: int) -> dict[str, Any]:
    """The real command with two workers: seconds, rate, memory of all its processes."""
    folder = root / f"{annotations}"
    make_run(folder, annotations)
    command = [sys.executable, "-m", "owlsam_ray", "reduce", str(folder / "run.yaml"), "--run", str(folder / "run")]
    with MeasuredProcess([*command, "--set", "reduce.workers=2"]) as process:
        code = process.wait()
        seconds = process.seconds
    assert code == 0, process.told()
    counts = json.loads(process.output.splitlines()[-1])
    return {
        "annotations": counts["num_annotations"],
        "seconds": round(seconds, 1),
        "per_s": round(counts["num_annotations"] / seconds),
        "parent_mib": process.peak_bytes >> 20,
        "all_mib": process.all_peak_bytes >> 20,
        "file_mb": (folder / "run" / "coco" / "annotations.json").stat().st_size // 10**6,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a line of JSON for each measurement."""
    parser = argparse.ArgumentParser(description="Reduce against to_pylist + json.dump; memory over sizes.")
    parser.add_argument("--annotations", type=int, default=100_000, help="of the comparison (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of the comparison (default: %(default)s)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10**5, 10**6, 10**7], help="whose memory is measured")
    parser.add_argument("--keep", type=Path, help="folder of the runs (default: a temporary one)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        if options.rounds:
            print(json.dumps(compare(root, options.annotations, options.rounds)), flush=True)
        for size in options.sizes:
            print(json.dumps(measure(root, size)), flush=True)


if __name__ == "__main__":
    main()
