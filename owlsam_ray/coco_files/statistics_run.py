"""Runs `owlsam stats`: computes the statistics of a file, prints them, and writes them to a directory."""

import json
import logging
import os
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from owlsam_ray import storage
from owlsam_ray.coco_files.file_copy import refuse_no_place
from owlsam_ray.coco_files.statistics import statistics
from owlsam_ray.coco_files.statistics_table import statistics_table
from owlsam_ray.errors import InputError
from owlsam_ray.terminal import SafeConsole

STATISTICS_FILE = "statistics.json"
PLOTS_FILE = "statistics.png"
_LOG_INTERVAL_S = 10.0
_WIDTH = 160
_log = logging.getLogger(__name__)


def run_statistics(url: str, *, out: str | None, as_json: bool, console: Console) -> dict[str, Any]:
    """Compute the statistics of a COCO-format file, print them, and write them to `out`.

    Args:
        url: path or fsspec URL of the file.
        out: directory for `statistics.json` and `statistics.png`, path or URL; None: nothing is written.
        as_json: return all statistics, and print no table.
        console: for progress and table.

    Returns:
        The contents of the command's last output line.

    Raises:
        InputError: the file cannot be read, is not a COCO file, or a field has a wrong type; `out` is a file, or cannot
            be a directory.
        OSError: `out` cannot be written.
    """
    if out is not None:
        filesystem, path = storage.open_filesystem(out)
        if storage.is_local(filesystem) and os.path.exists(path) and not os.path.isdir(path):
            raise InputError(f"--out {out} is a file: name a directory")
    with ByteDisplay(console) as display:
        result = statistics(url, display.show)
    crowds = result["annotations"]["crowds"]["number"]
    if crowds and crowds == result["annotations"]["number"]:
        _log.warning("%s: all %d objects are crowd regions (iscrowd)", url, crowds)
    written = {}
    if out is not None:
        with refuse_no_place("--out", out):
            written = write_statistics(result, out)
    if as_json:
        return result | written
    wide = console if console.is_terminal else SafeConsole(file=console.file, width=_WIDTH)
    wide.print(statistics_table(result))
    images, annotations = result["images"], result["annotations"]
    return {
        "file": url,
        "images": images["number"],
        "images_without_annotations": images["without_annotations"],
        "annotations": annotations["number"],
        "categories": result["categories"]["number"],
        "categories_without_objects": len(result["categories"]["without_objects"]),
        "mean_annotations_per_image": images["annotations_per_image"]["mean"],
        "crowds": annotations["crowds"]["number"],
        "masks": annotations["masks"]["number"],
        "problems": {name: found["count"] for name, found in result["problems"].items() if found["count"]},
    } | written


def write_statistics(result: dict[str, Any], out: str) -> dict[str, str]:
    """Write `statistics.json` and `statistics.png` into a directory, path or fsspec URL.

    Args:
        result: result of `statistics`.
        out: created if it does not exist.

    Returns:
        Paths of both files, under `statistics` and `plots`.

    Raises:
        OSError: it cannot be written.
    """
    # Importing matplotlib takes half a second, which is wasted unless plots are drawn.
    from owlsam_ray.coco_files.statistics_plots import draw_statistics

    files = {"statistics": storage.join(out, STATISTICS_FILE), "plots": storage.join(out, PLOTS_FILE)}
    storage.make_directory(out)
    text = json.dumps(result, indent=1, allow_nan=False)
    storage.write_atomic(files["statistics"], text.encode())
    storage.write_atomic(files["plots"], draw_statistics(result))
    return files


class ByteDisplay:
    """Shows progress as a bar on a terminal, and as occasional log lines elsewhere."""

    def __init__(self, console: Console) -> None:
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("stats"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("stats", total=None)
        self._start = self._last_logged = time.monotonic()

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, done: int, total: int) -> None:
        """Report how many bytes have been read."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
        elif now - self._last_logged >= _LOG_INTERVAL_S:
            self._last_logged = now
            rate = done / (now - self._start)
            _log.info(
                "%s of %s MB read · %.0f MB/s · %.0f s left",
                f"{done / 1e6:,.0f}",
                f"{total / 1e6:,.0f}",
                rate / 1e6,
                (total - done) / rate,
            )
