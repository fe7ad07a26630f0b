"""Convert the JSON export of a Label Studio project that we wrote to a COCO file for `reduce.corrections`.

A task with an annotation that was not cancelled is a reviewed image, with the regions of the annotation saved last;
other tasks are left as they are. A region that came from us still has its annotation's id; polygons become masks,
rectangles boxes. A region of an image that was rotated in the tool has other axes than ours: it becomes a conflict.
"""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from owlsam_ray import storage
from owlsam_ray.coco_files.document import Document, open_document
from owlsam_ray.coco_files.fields import flag_of
from owlsam_ray.errors import InputError
from owlsam_ray.reduce.formats.json_rows import LINE_END, dump_json

_SHAPES = ("rectanglelabels", "polygonlabels", "brushlabels", "ellipselabels", "keypointlabels")
"""Types of regions. The first two are read, the others are reported as conflicts; a choice or a text is not a region.
"""
_DIGITS = 3
"""Decimals of a pixel that percentages in float32 preserve."""


@contextlib.contextmanager
def open_corrections(url: str) -> Iterator[Document]:
    """Open a COCO file, or an export of Label Studio converted to one.

    Raises:
        InputError: the file is neither.
    """
    if not _is_list(url):
        with open_document(url) as document:
            yield document
        return
    with tempfile.TemporaryDirectory(prefix="owlsam-export-") as folder:
        wrapped, converted = Path(folder, "wrapped.json"), Path(folder, "coco.json")
        with storage.open_input(url) as source, wrapped.open("wb") as out:
            out.write(b'{"tasks": ')
            shutil.copyfileobj(source, out)
            out.write(b"}")
        with open_document(str(wrapped)) as tasks:
            tasks.url = url
            with converted.open("wb") as out:
                _Conversion(tasks).write(out)
        wrapped.unlink()
        with open_document(str(converted)) as document:
            document.url = url
            yield document


def _is_list(url: str) -> bool:
    try:
        with storage.open_input(url) as file:
            return file.read(1024).lstrip().startswith(b"[")
    except OSError as error:
        raise InputError(f"cannot read reduce.corrections {url}: {error.strerror or error}") from None


class _Conversion:
    """The conversion of one export."""

    def __init__(self, tasks: Document) -> None:
        self._tasks = tasks
        self._categories: dict[str, int] = {}
        self._run: dict[str, Any] | None = None
        self._image_lists: set[str] = set()
        """Digests of the run's image list, which may have been extended between two exports to the tool."""

    def write(self, out: IO[bytes]) -> None:
        """Write the COCO file.

        Raises:
            InputError: the file is not a Label Studio export, or its tasks belong to several runs.
        """
        with tempfile.TemporaryFile() as annotations:
            out.write(b'{"images": [\n')
            ends = [b"", b""]
            for first, tasks in self._tasks.batches("tasks"):
                for position, task in enumerate(tasks, first):
                    reviewed = self._reviewed(position, task)
                    if reviewed is None:
                        continue
                    image, entries = reviewed
                    out.write(ends[0] + dump_json(image).encode())
                    ends[0] = LINE_END.encode()
                    for entry in entries:
                        annotations.write(ends[1] + dump_json(entry).encode())
                        ends[1] = LINE_END.encode()
            out.write(b'],\n"annotations": [\n')
            annotations.seek(0)
            shutil.copyfileobj(annotations, out)
        info = {}
        if self._run is not None:
            lists = {"image_lists": sorted(self._image_lists)} if self._image_lists else {}
            info = {"owlsam_ray": self._run | lists | {"review": {"scope": "images"}}}
        categories = [{"id": number, "name": name} for name, number in self._categories.items()]
        out.write(f'],\n"categories": {dump_json(categories)},\n"info": {dump_json(info)}}}\n'.encode())

    def _reviewed(self, position: int, task: Any) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """Return the image of a task and its entries; None: the task was not reviewed."""
        data = task.get("data") if isinstance(task, dict) else None
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(annotations, list):
            raise InputError(
                f"{self._tasks.url} is neither a COCO file nor the JSON export of a Label Studio project (its element "
                f"{position} has no `data` or no `annotations`)"
            )
        done = [each for each in annotations if isinstance(each, dict) and not flag_of(each.get("was_cancelled"))]
        if not done:
            return None
        if type(data.get("image_id")) is not int:
            raise InputError(f"{self._tasks.url}: data of task {position} has no image_id, so it is none that we wrote")
        run = data.get("owlsam")
        if isinstance(run, dict):
            self._image_lists |= {str(run["image_list"])} if "image_list" in run else set()
            run = {name: value for name, value in run.items() if name != "image_list"}
            if self._run not in (None, run):
                raise InputError(f"{self._tasks.url} holds tasks of several runs: export one project for each")
            self._run = run
        newest = max(done, key=lambda each: str(each.get("updated_at") or each.get("created_at") or ""))
        image = {"id": data["image_id"], "file_name": data.get("file_name")}
        results = newest.get("result")
        regions = results if isinstance(results, list) else []
        return image, [
            self._entry(data["image_id"], each)
            for each in regions
            if isinstance(each, dict) and each.get("type") in _SHAPES
        ]

    def _entry(self, image_id: int, region: dict[str, Any]) -> dict[str, Any]:
        """Convert a region to a COCO entry; without a shape if the region is of a kind that is not read."""
        value = region.get("value")
        value = value if isinstance(value, dict) else {}
        names = value.get(region["type"])
        entry: dict[str, Any] = {"image_id": image_id}
        if isinstance(names, list) and names and isinstance(names[0], str):
            entry["category_id"] = self._categories.setdefault(names[0], len(self._categories) + 1)
        digits = str(region.get("id", "")).partition("#")[0]
        if digits.isascii() and digits.isdigit() and len(digits) < 19:
            entry["id"] = int(digits)
        if region.get("image_rotation") not in (None, 0, 360):
            return entry  # without a shape
        sides = (region.get("original_width"), region.get("original_height"))
        with contextlib.suppress(KeyError, TypeError, ValueError):  # no shape then, which is a conflict
            width, height = (float(side) / 100 for side in sides if side is not None)
            if region["type"] == "polygonlabels":
                points = [(float(x) * width, float(y) * height) for x, y in value["points"]]
                entry["segmentation"] = [[_rounded(side) for point in points for side in point]]
            elif region["type"] == "rectanglelabels":
                entry["bbox"] = _box(value, width, height)
        return entry


def _box(value: dict[str, Any], width: float, height: float) -> list[float]:
    """The axis-aligned box around a rectangle that is rotated about its first corner."""
    angle = math.radians(float(value.get("rotation") or 0))
    x, y = float(value["x"]) * width, float(value["y"]) * height
    w, h = float(value["width"]) * width, float(value["height"]) * height
    across, down = (w * math.cos(angle), w * math.sin(angle)), (-h * math.sin(angle), h * math.cos(angle))
    # Extent along both axes, relative to that corner.
    lows, highs = zip(
        *((min(0, a, d, a + d), max(0, a, d, a + d)) for a, d in zip(across, down, strict=True)), strict=True
    )
    return [_rounded(each) for each in (x + lows[0], y + lows[1], highs[0] - lows[0], highs[1] - lows[1])]


def _rounded(number: float) -> float:
    """Round a number of pixels.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(number):
        raise ValueError(number)
    return round(number, _DIGITS)
