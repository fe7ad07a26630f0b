"""How fast datasets are planned, and what reading by byte range costs.

    python -m tests.bench.planning                                  # every source, 10⁴ to 10⁶ images
    python -m tests.bench.planning --sources table.parquet webdataset --counts 100000 --repeats 1
    python -m tests.bench.planning --read                           # members of a tar file against plain files

Each plan is a process of its own, from the listing to `run.json`. Wall time (without the start of Python) and peak
memory (resident, summed over all its processes, so that shared pages count in each) are medians of `--repeats`. The
files of a dataset are written once to a temporary directory; `plan` reads no image.
"""

import argparse
import csv
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from owlsam_ray import storage
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.schema import Container
from tests.faulty_s3 import faulty_s3

COUNTS = (10_000, 100_000, 1_000_000)
_PARTS = 16
"""Files of a table or of a set of tar files."""


def names(count: int) -> list[str]:
    return [f"{number // 1000:04d}/{number:08d}.jpg" for number in range(count)]


def one_picture(root: Path, name: str) -> None:
    """JSON sources look a few files up."""
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()


def write_folder(root: Path, count: int) -> dict[str, Any]:
    for name in names(count):
        one_picture(root, name)
    return {"source": "folder", "images": str(root)}


def write_coco(root: Path, count: int) -> dict[str, Any]:
    images = [
        {"id": n, "file_name": name, "height": 480, "width": 640, "license": 3, "date_captured": "2013-11-14 17:02:52"}
        for n, name in enumerate(names(count))
    ]
    boxes = [
        {"id": n, "image_id": n, "category_id": 1, "bbox": [1.5, 2.25, 30.0, 40.5], "area": 1215.0, "iscrowd": 0}
        | {"segmentation": [[1.5, 2.25, 31.5, 2.25, 31.5, 42.75, 1.5, 42.75]]}
        for n in range(count)
    ]
    one_picture(root, names(1)[0])
    tree = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (root / "list.json").write_text(json.dumps(tree))
    return {"source": "coco", "images": str(root), "annotations": str(root / "list.json")}


def write_lvis(root: Path, count: int) -> dict[str, Any]:
    images = [
        {"id": n, "coco_url": f"http://images.cocodataset.org/train2017/{n:012d}.jpg", "height": 480, "width": 640}
        | {"neg_category_ids": [284, 53, 754, 299], "not_exhaustive_category_ids": []}
        for n in range(count)
    ]
    one_picture(root, "train2017/000000000000.jpg")
    (root / "list.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "cat"}]}))
    return {"source": "lvis", "images": str(root), "annotations": str(root / "list.json")}


def write_objects365(root: Path, count: int) -> dict[str, Any]:
    images = [
        {"id": n, "file_name": f"images/v1/patch{n % 51}/objects365_v1_{n:08d}.jpg", "height": 512, "width": 769}
        | {"license": 5, "url": ""}
        for n in range(count)
    ]
    one_picture(root, "train/patch0/objects365_v1_00000000.jpg")
    (root / "list.json").write_text(json.dumps({"images": images, "categories": [{"id": 1, "name": "Person"}]}))
    return {"source": "objects365", "images": str(root), "annotations": str(root / "list.json")}


def parts(count: int) -> Iterator[tuple[int, range]]:
    bounds = np.linspace(0, count, _PARTS + 1).astype(int).tolist()
    for part in range(_PARTS):
        yield part, range(bounds[part], bounds[part + 1])


def urls(numbers: Sequence[int]) -> list[str]:
    return [f"s3://bucket/photos/{number // 1000:04d}/{number:08d}.jpg" for number in numbers]


def write_parquet(root: Path, count: int) -> dict[str, Any]:
    for part, numbers in parts(count):
        pq.write_table(pa.table({"uri": urls(numbers), "id": list(numbers)}), root / f"{part:04d}.parquet")
    return {"source": "table", "files": str(root / "*.parquet"), "columns": {"id": "id"}}


def write_csv(root: Path, count: int) -> dict[str, Any]:
    for part, numbers in parts(count):
        with (root / f"{part:04d}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("uri", "id"), *zip(urls(numbers), numbers, strict=True)])
    return {"source": "table", "files": str(root / "*.csv"), "columns": {"id": "id"}}


def write_jsonl(root: Path, count: int) -> dict[str, Any]:
    for part, numbers in parts(count):
        with (root / f"{part:04d}.jsonl").open("w") as file:
            file.writelines(
                json.dumps({"uri": url, "id": number}) + "\n"
                for url, number in zip(urls(numbers), numbers, strict=True)
            )
    return {"source": "table", "files": str(root / "*.jsonl"), "columns": {"id": "id"}}


def write_tars(root: Path, count: int) -> dict[str, Any]:
    """A picture of 100 bytes for each member: the headers are what `plan` reads."""
    data = bytes(100)
    for part, numbers in parts(count):
        with tarfile.open(root / f"{part:04d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for number in numbers:
                member = tarfile.TarInfo(f"{number:08d}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return {"source": "webdataset", "files": str(root / "*.tar")}


SOURCES: dict[str, Callable[[Path, int], dict[str, Any]]] = {
    "folder": write_folder,
    "coco": write_coco,
    "lvis": write_lvis,
    "objects365": write_objects365,
    "table.parquet": write_parquet,
    "table.csv": write_csv,
    "table.jsonl": write_jsonl,
    "webdataset": write_tars,
}


def plan_once(data: dict[str, Any], count: int) -> tuple[float, float]:
    """Seconds and MiB of one plan in a process of its own."""
    with tempfile.TemporaryDirectory() as run:
        file = Path(run) / "run.json5"
        file.write_text(
            json.dumps(
                {
                    "data": data,
                    "vocabulary": {"categories": ["cat"]},
                    "detector": {"weights": "none"},
                    "segment": {"weights": "none.pt"},
                }
            )
        )
        code = "import sys; from tests.bench.planning import measured; sys.exit(measured(sys.argv[1:]))"
        done = subprocess.run(
            [sys.executable, "-c", code, "plan", str(file), "--run", f"{run}/run"],
            check=True,
            capture_output=True,
            text=True,
        )
        summary, figures = (json.loads(line) for line in done.stdout.splitlines()[-2:])
        assert summary["images"] == count, summary
        return figures["seconds"], figures["mib"]


def measured(arguments: Sequence[str]) -> int:
    """The command, and what it took; called in a process of its own."""
    start = time.perf_counter()
    from owlsam_ray.cli.main import main

    stop, peak = threading.Event(), [0]

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], resident_bytes(os.getpid()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = main(arguments)
    stop.set()
    watcher.join()
    print(json.dumps({"seconds": time.perf_counter() - start, "mib": peak[0] / 2**20}), flush=True)
    return code


def resident_bytes(pid: int) -> int:
    """Of a process and all below it (`ru_maxrss` begins with that of the process which started it)."""
    try:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        below = [
            each for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()
        ]
    except OSError:  # it has ended
        return 0
    return own + sum(resident_bytes(int(each)) for each in below)


def bench_plans(sources: Sequence[str], counts: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    rows = []
    for source in sources:
        for count in counts:
            with tempfile.TemporaryDirectory() as folder:
                data = SOURCES[source](Path(folder), count)
                runs = [plan_once(data, count) for _ in range(repeats)]
            seconds, mib = (statistics.median(values) for values in zip(*runs, strict=True))
            rows.append({"source": source, "images": count, "seconds": seconds, "rate": count / seconds, "mib": mib})
            print(f"| {source} | {count:,} | {seconds:.1f} | {count / seconds:,.0f} | {mib:.0f} |", flush=True)
    return rows


def bench_reading(root: str, count: int, num_bytes: int, repeats: int) -> dict[str, float]:
    """Images per second from plain files and from a tar file, shards of 64 images, 16 requests at once."""
    rng = np.random.default_rng(1)
    data = [rng.bytes(num_bytes) for _ in range(count)]
    plain, members, buffer = [], [], io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number, each in enumerate(data):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(each)
            tar.addfile(member, io.BytesIO(each))
            members.append(buffer.tell() - (-(-len(each) // 512) * 512))
            storage.write_atomic(f"{root}/{number}.jpg", each)
    storage.write_atomic(f"{root}/all.tar", buffer.getvalue())
    nothing = {"container": None, "member": None, "offset": None, "length": None}
    plain = [nothing | {"uri": f"{root}/{number}.jpg"} for number in range(count)]
    packed = [
        {"uri": f"{root}/all.tar", "container": Container.TAR, "member": "m", "offset": offset, "length": num_bytes}
        for offset in members
    ]
    rates = {}
    for name, rows in (("plain", plain), ("tar", packed)):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            read = [
                each
                for first in range(0, count, 64)
                for each in fetch_rows(rows[first : first + 64], threads=16, max_bytes=10**9)
            ]
            times.append(time.perf_counter() - start)
            assert read == data
        rates[name] = count / statistics.median(times)
    return rates


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", nargs="+", choices=list(SOURCES), default=list(SOURCES))
    parser.add_argument("--counts", nargs="+", type=int, default=list(COUNTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--read", action="store_true", help="members of a tar file against plain files")
    options = parser.parse_args(arguments)
    if not options.read:
        print("| source | images | seconds | images/s | peak MiB |\n|---|---|---|---|---|")
        bench_plans(options.sources, options.counts, options.repeats)
        return
    print("| storage | bytes an image | tar over plain |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, faulty_s3():
        for place, root in (("disk", folder), ("S3 on this machine", "s3://labels/bench")):
            for num_bytes in (20_000, 150_000):
                rates = bench_reading(f"{root}/{num_bytes}", 512, num_bytes, options.repeats)
                print(f"| {place} | {num_bytes:,} | {rates['tar'] / rates['plain']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
