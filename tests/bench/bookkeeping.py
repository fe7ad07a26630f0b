"""How soon work begins in a run of ten million images, and what its driver holds: fresh, and 99 % done.

    python -m tests.bench.bookkeeping                                # 10⁷ images; about ten minutes, 1.5 GB of disk
    python -m tests.bench.bookkeeping --images 1000000 --repeats 1
    python -m tests.bench.bookkeeping --without-ray

The plan is generated, not listed; finished shards are real files, of images that failed. Two ways of measuring, each in
a process of its own, medians of `--repeats`: what is done before shards can be handed to Ray (planned run, manifest,
listing, the first wave), and `owlsam annotate` itself, which is stopped once it has written a shard.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from owlsam_ray.config.load import load_config
from owlsam_ray.errors import FailureClass
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.records import Prediction
from owlsam_ray.run.manifest import Manifest, load_manifest
from owlsam_ray.run.manifest_writer import ShardLayout, write_parts
from owlsam_ray.run.paths import PREDICTIONS
from owlsam_ray.run.record import RunRecord, load_record, save_record
from owlsam_ray.run.shards import done_shards, write_shard
from owlsam_ray.schema import predictions_to_table
from owlsam_ray.sources.listing import listing_table
from tests.bench.measured_process import ROOT, MeasuredProcess, highest_bytes

NUM_IMAGES = 10_000_000
SHARD_SIZE = 1024
LEFT_OUT = 100
"""Every so many shards one is not done, in a run that is 99 % done."""
_WITH_PICTURES = (0, 1, 2, LEFT_OUT, 2 * LEFT_OUT)
"""Shards whose pictures exist: those with which an attempt begins."""
_UP = "actor(s) on"
"""What the log says once Ray runs and the resources are checked."""


def picture_tables(root: Path, count: int) -> Iterator[pa.Table]:
    """A listing of pictures, as a COCO file or a folder would give it."""
    for first in range(0, count, 2**16):
        numbers = range(first, min(count, first + 2**16))
        names = [name_of(number) for number in numbers]
        yield listing_table(
            {
                "image_id": pa.array(np.arange(numbers.start + 1, numbers.stop + 1)),
                "file_name": pa.array(names),
                "uri": pa.array([f"{root}/{name}" for name in names]),
                "height": pa.array(np.full(len(names), 8, np.int32)),
                "width": pa.array(np.full(len(names), 8, np.int32)),
            }
        )


def name_of(number: int) -> str:
    return f"{number // 1000:05d}/{number:08d}.png"


def make_run(folder: Path, images: int, *, shard_size: int = SHARD_SIZE) -> Manifest:
    """A planned run below a folder; few of its pictures exist."""
    pictures = folder / "pictures"
    first = pictures / name_of(0)
    first.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8), (10, 200, 30)).save(first)
    (folder / "run.json5").write_text(
        json.dumps(
            {
                "data": {"source": "folder", "images": str(pictures)},
                "vocabulary": {"categories": ["cat"]},
                "detector": {"model": "fake"},
                "segment": {"model": "fake"},
                "resources": {"num_cpus": 2, "object_store_mb": 200, "heartbeat_s": 1, "takeover_s": 3},
                "reduce": {"max_failed": 1.0},
            }
        )
    )
    run = folder / "run"
    record = plan_run(load_config([str(folder / "run.json5")], overrides=[], run=str(run))).run.record
    manifest = write_parts(str(run), picture_tables(pictures, images), ShardLayout(shard_size=shard_size), source={})
    save_record(
        str(run),
        record.model_copy(update={"layout_hash": manifest.layout_hash, "num_parts": len(manifest.parts)}),
    )
    for shard in _WITH_PICTURES:
        for number in range(shard * shard_size, min(images, (shard + 1) * shard_size)):
            path = pictures / name_of(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.hardlink_to(first)
    return manifest


def finish(run: str, manifest: Manifest, fingerprint: str, numerics: str) -> None:
    """Write 99 % of the shards."""
    shards = [shard for shard in manifest.iter_shards() if shard % LEFT_OUT]
    parts = [shards[start : start + 500] for start in range(0, len(shards), 500)]
    if len(parts) == 1:
        _write_some(run, shards, (fingerprint, numerics))
        return
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        list(pool.map(_write_some, itertools.repeat(run), parts, itertools.repeat((fingerprint, numerics))))


def _write_some(run: str, shards: Sequence[int], marks: tuple[str, str]) -> None:
    manifest = load_manifest(run, verify=False)
    assert manifest is not None
    failure = ("not_found", FailureClass.PERMANENT)
    stage_s = dict.fromkeys(("decode", "detect", "suppress", "segment", "encode"), 1.5)
    size = manifest.parts[0].shard_size
    some = predictions_to_table([Prediction(image_id=place, failure=failure) for place in range(size)])
    for shard in shards:
        first, count = manifest.shard_span(shard)
        ids = pa.array(np.arange(first, first + count))
        rows = some.slice(0, count).set_column(0, some.schema.field(0), ids)
        write_shard(run, shard, rows, fingerprint=marks[0], numerics=marks[1], stage_s=stage_s)


def measure_bookkeeping(run: str) -> dict[str, float]:
    """What an attempt does between the start of Python and its first wave, without models and Ray."""
    code = "import sys; from tests.bench.bookkeeping import keep_books; keep_books(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, run], check=True, capture_output=True, text=True, cwd=ROOT)
    return dict(json.loads(done.stdout))


def keep_books(run: str) -> None:
    """Called in a process of its own; prints figures."""
    from owlsam_ray.run.counts import RunCounts
    from owlsam_ray.run.run import open_stored_run

    start = time.perf_counter()
    tally = RunCounts(open_stored_run(run))
    tally.refresh_listing()
    wave = tally.pending()[:1000]
    ready = time.perf_counter()
    tally.refresh()
    told = {"ready_s": ready - start, "wave": len(wave), "footers_s": time.perf_counter() - ready}
    print(json.dumps(told | {"mib": highest_bytes(os.getpid()) / 2**20}))


def measure_annotate(folder: Path) -> dict[str, float]:
    """Seconds of the command until Ray was up, an actor had a shard in hand, and the first file was there."""
    run = str(folder / "run")
    before = done_shards(run)
    command = [sys.executable, "-m", "owlsam_ray", "annotate", str(folder / "run.json5"), "--run", run]
    with MeasuredProcess(command) as driver:
        up = driver.moment_of(_UP)
        in_hand = driver.wait_for(lambda: driver.seconds if in_hand.list_markers(run) else None)
        first = driver.wait_for(lambda: driver.seconds if done_shards(run) - before else None)
        # Until it has counted what earlier attempts did, too.
        driver.wait_for(lambda: True if driver.seconds > first + 10 else None)
        code = driver.terminate()
    assert code in (0, 75), driver.told()
    for shard in done_shards(run) - before:
        (folder / "run" / PREDICTIONS / f"shard-{shard:08d}.parquet").unlink()
    shutil.rmtree(folder / "run" / "attempts")
    return {
        "up_s": up,
        "in_hand_s": in_hand - up,
        "first_file_s": first - up,
        "mib": driver.peak_bytes / 2**20,
    }


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def marks_of(record: RunRecord | None) -> tuple[str, str]:
    """Fingerprint and numerics id; made up when no attempt has set them."""
    if record is None or record.fingerprint is None:
        return "0" * 64, "0" * 16
    return record.fingerprint, record.numerics_id


def bench(images: int, repeats: int, *, with_ray: bool, shard_size: int = SHARD_SIZE) -> dict[str, dict[str, float]]:
    """Figures by state of the run, and with or without Ray."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="owlsam-bookkeeping-") as folder:
        run = str(Path(folder) / "run")
        manifest = make_run(Path(folder), images, shard_size=shard_size)
        for state in ("fresh", "99 % done"):
            if state != "fresh":
                finish(run, manifest, *marks_of(load_record(run)))
            found[state] = medians([measure_bookkeeping(run) for _ in range(repeats)])
            if with_ray:
                found[f"{state}, with Ray"] = medians([measure_annotate(Path(folder)) for _ in range(repeats)])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-ray", action="store_true")
    options = parser.parse_args(arguments)
    found = bench(options.images, options.repeats, with_ray=not options.without_ray)
    print("| run | figures |\n|---|---|")
    for state, figures in found.items():
        print(f"| {state} | {', '.join(f'{key} {value:.2f}' for key, value in figures.items())} |")


if __name__ == "__main__":
    main()
