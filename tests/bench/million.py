"""A million pictures through plan, annotate and reduce on two cores, with stand-ins for the models.

    python -m tests.bench.million                        # 10⁶ pictures
    python -m tests.bench.million --images 100000 --keep /tmp/million
    python -m tests.bench.million --source webdataset

The pictures are PNGs of 8 × 8 pixels in cells of Parquet files, or members of tar files; `DISTINCT` of them are
different, and each `BROKEN`-th is cut, so what a whole run must give follows from labelling each different picture
once. The real commands run as processes; memory is sampled, resident (the driver) and proportional (all processes).
"""

import argparse
import contextlib
import io
import json
import struct
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray.coco_files.document import open_document
from owlsam_ray.config.load import load_config
from tests.bench.measured_process import MeasuredProcess, tree_bytes
from tests.runs import label_here

NUM_IMAGES = 1_000_000
DISTINCT = 1009
"""Prime, so that each different picture stands at every place of a shard."""
BROKEN = 9973
_FILES = 16
SOURCES = ("table", "webdataset")
_MEMORY = ("driver", "all", "store")


def png(number: int) -> bytes:
    """A picture of 8 × 8 pixels that tells its number."""
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def is_broken(number: int) -> bool:
    """Whether the picture at a place, counted from 0, is cut."""
    return number % BROKEN == BROKEN - 1


def write_pictures(folder: Path, images: int, source: str) -> dict[str, Any]:
    """Files of pictures; returns the section `data` that names them."""
    kinds = [png(number) for number in range(DISTINCT)]
    bounds = np.linspace(0, images, _FILES + 1).astype(int).tolist()
    for part in range(_FILES):
        numbers = range(bounds[part], bounds[part + 1])
        data = [kinds[number % DISTINCT][: 60 if is_broken(number) else None] for number in numbers]
        if source == "table":
            cells = {"id": list(numbers), "bytes": [len(each) for each in data], "picture": data}
            pq.write_table(pa.table(cells), folder / f"{part:04d}.parquet", row_group_size=1024)
        else:
            with tarfile.open(folder / f"{part:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, each in zip(numbers, data, strict=True):
                    member = tarfile.TarInfo(f"{number:08d}.png")
                    member.size = len(each)
                    tar.addfile(member, io.BytesIO(each))
    if source == "table":
        columns = {"id": "id", "num_bytes": "bytes", "bytes": "picture"}
        return {"source": "table", "files": str(folder / "*.parquet"), "columns": columns}
    return {"source": "webdataset", "files": str(folder / "*.tar")}


def write_run_file(path: Path, data: dict[str, Any], **resources: Any) -> None:
    tree = {
        "data": data,
        "vocabulary": {"categories": ["cat", "dog", "red ball"]},
        "detector": {"model": "fake"},
        "segment": {"model": "fake"},
        "reduce": {"min_mask_area": 0, "max_failed": 0.01},
        # Threads that wait for each other cost more than these models do.
        "resources": {"num_cpus": 2, "object_store_mb": 200, "torch_threads": 1}
        | {"detector_batch": 32, "segmenter_batch": 32, "decoder_batch": 128}
        | resources,
    }
    path.write_text(json.dumps(tree))


def run_command(name: str, run_file: Path, run: Path) -> dict[str, Any]:
    """One command to its end: its summary, with its seconds and peaks of memory."""
    command = [sys.executable, "-m", "owlsam_ray", name, str(run_file), "--run", str(run)]
    with MeasuredProcess(command) as process:
        code = process.wait()
        seconds = process.seconds
    assert code == 0, f"{name} ended with {code}:\n{process.told()[-4000:]}"
    summary: dict[str, Any] = json.loads(process.output.splitlines()[-1])
    return summary | {
        "seconds": seconds,
        "driver_mib": process.peak_bytes / 2**20,
        "all_mib": process.all_peak_bytes / 2**20,
        "store_mib": process.store_peak_bytes / 2**20,
    }


def expected(folder: Path, images: int) -> dict[str, int]:
    """What `reduce` must count, from a run of each different picture once, in this process."""
    folder.mkdir()
    write_run_file(folder / "run.json5", write_pictures(folder, DISTINCT, "table"))
    label_here(load_config([str(folder / "run.json5")], overrides=[], run=str(folder / "run")))
    found = np.zeros((DISTINCT, 2), np.int64)
    for image_id, area in annotations_of(folder / "run"):
        found[image_id] += (1, area)
    whole = [number % DISTINCT for number in range(images) if not is_broken(number)]
    annotations, area = found[whole].sum(axis=0).tolist()
    empty = int((found[whole, 0] == 0).sum())
    return {
        "images": images,
        "ok": len(whole) - empty,
        "empty": empty,
        "failed": images - len(whole),
        "num_annotations": annotations,
        "area": area,
    }


def annotations_of(run: Path) -> Iterator[tuple[int, int]]:
    """(image id, mask area) of every annotation of a reduced run."""
    with open_document(str(run / "coco" / "annotations.json")) as document:
        for _, batch in document.batches("annotations"):
            for annotation in batch:
                yield annotation["image_id"], annotation["area"]


def bench(folder: Path, images: int, source: str, **resources: Any) -> dict[str, Any]:
    """Run all three commands below a folder, and compare what they made with what they must.

    Returns:
        For each command its summary and figures, and `files` and `bytes` of the run directory and of its labels.
    """
    pictures, run = folder / "pictures", folder / "run"
    pictures.mkdir()
    write_run_file(folder / "run.json5", write_pictures(pictures, images, source), **resources)
    must = expected(folder / "once", images)
    told = {name: run_command(name, folder / "run.json5", run) for name in ("plan", "annotate", "reduce")}
    ids, area = set(), 0
    for image_id, each in annotations_of(run):
        ids.add(image_id)
        area += each
    found = {key: told["reduce"][key] for key in must if key != "area"} | {"area": area}
    assert found == must, f"{found} instead of {must}"
    assert len(ids) == must["ok"], "each picture with annotations has them under its own id"
    for name, part in (("whole", run), ("shards", run / "predictions"), ("labels", run / "coco")):
        told[name] = dict(zip(("files", "bytes"), tree_bytes(part), strict=True))
    return told


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=NUM_IMAGES)
    parser.add_argument("--source", choices=SOURCES, default="table")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which is kept")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="owlsam-million-")))
        told = bench(folder, options.images, options.source)
    titles = ("command", "seconds", "images/s", "driver MiB", "all processes MiB", "object store MiB")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for name in ("plan", "annotate", "reduce"):
        row = told[name]
        figures = (row["seconds"], options.images / row["seconds"], *(row[f"{part}_mib"] for part in _MEMORY))
        print(f"| {name} | {' | '.join(f'{figure:,.1f}' for figure in figures)} |")
    for name in ("whole", "shards", "labels"):
        print(f"{name}: {told[name]['files']:,} files, {told[name]['bytes'] / 1e6:,.1f} MB")
    print(json.dumps(told["annotate"].get("stage_s")))


if __name__ == "__main__":
    main()
