"""Finds out where the images of a JSON file are below the root, by a few look-ups of the usual layouts."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from owlsam_ray import storage
from owlsam_ray.errors import InputError
from owlsam_ray.sources.row_names import absolute_root, path_below

LOOKED_UP = 20
"""Maximum number of images of a file that are looked up, each in all layouts."""
_THREADS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PathLayout:
    """A rule that derives the path of an image file from its image record."""

    caption: str
    """Shown to users, such as `<split>/<file_name>`."""
    place: Callable[[dict[str, Any]], Any]
    """Image record → path below the root, not checked yet; None where the record lacks a field that the rule needs."""


def choose_layout(
    root: str, samples: Iterable[Sequence[dict[str, Any]]], layouts: Sequence[PathLayout], *, where: str
) -> PathLayout:
    """Choose the layout in which most images of a sample exist; it holds for the whole file and is logged.

    Args:
        root: root of the images.
        samples: lists of up to `LOOKED_UP` image records; the next list is drawn only when no image of the previous
            ones exists.
        layouts: in order of preference: the first one wins ties, and is chosen when no layout gives a path for any
            record.
        where: the annotation file, for messages.

    Raises:
        InputError: none of the images looked up exists; names the first path of each layout.
    """
    tried: dict[str, None] = {}
    looked_up, refused = 0, ""
    for sample in samples:
        found: list[int] = []
        for layout in layouts:
            names = _safe(root, (layout.place(image) for image in sample))
            present, refusal = _count_present(root, names)
            refused = refused or refusal
            found.append(present)
            tried.update(dict.fromkeys(names[:1]))
            looked_up = max(looked_up, len(names))
            if names and present == len(sample):
                break
        best = max(found, default=0)
        if best:
            chosen = layouts[found.index(best)]
            _log.info(
                "%s: images are at %s below %s (%d of %d looked up exist)",
                where, chosen.caption, root, best, len(sample),
            )  # fmt: skip
            return chosen
    if not tried:
        return layouts[0]
    paths = ", ".join(storage.join(root, name) for name in tried)
    raise InputError(
        f"none of {looked_up} images looked up exists below data.images {root}; the first was expected at {paths}. Set "
        f"data.images to the folder that the file names of {where} are relative to, or to the one above it.{refused}"
    )


def exist(root: str, names: Sequence[str]) -> list[bool]:
    """Look up in threads which files exist; a file that may not be accessed counts as absent."""
    return [present for present, _ in _look_up(root, names)]


def _safe(root: str, names: Iterable[Any]) -> list[str]:
    begin = absolute_root(root)
    return [path for name in names if (path := path_below(begin, name)) is not None]


def _count_present(root: str, names: Sequence[str]) -> tuple[int, str]:
    """Number of files that exist, and what storage refused."""
    answers = _look_up(root, names)
    refusals = [refusal for _, refusal in answers if refusal]
    return sum(present for present, _ in answers), f" Storage refused: {refusals[0]}." if refusals else ""


def _look_up(root: str, names: Sequence[str]) -> list[tuple[bool, str]]:
    def ask(name: str) -> tuple[bool, str]:
        try:
            return storage.exists(storage.join(root, name)), ""
        except PermissionError as error:  # an object store's answer for absent keys without list permission
            return False, str(error)

    if not names:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(names))) as threads:
        return list(threads.map(ask, names))
