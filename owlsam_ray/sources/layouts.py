"""Where the images of a JSON file lie below the root: some layouts are usual, and a few look-ups tell which it is."""

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from owlsam_ray import storage
from owlsam_ray.errors import InputError
from owlsam_ray.sources.row_names import absolute_root, path_below

LOOKED_UP = 20
"""Images of a file that are looked up, each in all layouts at most."""
_THREADS = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PathLayout:
    """One rule by which an image record says where its file lies."""

    caption: str
    """For people, as `<split>/<file_name>`."""
    place: Callable[[dict[str, Any]], Any]
    """Image record → path below the root, not checked yet; None where the record lacks what the rule needs."""


def choose_layout(
    root: str, samples: Iterable[Sequence[dict[str, Any]]], layouts: Sequence[PathLayout], *, where: str
) -> PathLayout:
    """The layout in which most of a sample is there; the choice holds for the whole file. Logged.

    Args:
        root: of the images.
        samples: up to `LOOKED_UP` image records each; the next one is drawn only when nothing of those before exists.
        layouts: of equal ones the first is taken, which is the choice as well when no record can be placed.
        where: the file of annotations, for messages.

    Raises:
        InputError: nothing that was looked up exists; names the first path of each layout.
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
                "%s: images lie at %s below %s (%d of %d looked up)", where, chosen.caption, root, best, len(sample)
            )
            return chosen
    if not tried:
        return layouts[0]
    paths = ", ".join(storage.join(root, name) for name in tried)
    raise InputError(
        f"none of {looked_up} images looked up exists under data.images {root}; the first was looked for at {paths}. "
        f"Is data.images the folder that the file names of {where} are relative to, or the one above it?{refused}"
    )


def exist(root: str, names: Sequence[str]) -> list[bool]:
    """Which files are there, asked in threads; one that may not be asked for counts as absent."""
    return [present for present, _ in _look_up(root, names)]


def _safe(root: str, names: Iterable[Any]) -> list[str]:
    begin = absolute_root(root)
    return [path for name in names if (path := path_below(begin, name)) is not None]


def _count_present(root: str, names: Sequence[str]) -> tuple[int, str]:
    """How many are there, and what storage refused."""
    answers = _look_up(root, names)
    refusals = [refusal for _, refusal in answers if refusal]
    return sum(present for present, _ in answers), f" Storage refused: {refusals[0]}." if refusals else ""


def _look_up(root: str, names: Sequence[str]) -> list[tuple[bool, str]]:
    def ask(name: str) -> tuple[bool, str]:
        try:
            return storage.exists(storage.join(root, name)), ""
        except PermissionError as error:  # what an object store answers for absent keys to those who may not list
            return False, str(error)

    if not names:
        return []
    with ThreadPoolExecutor(min(_THREADS, len(names))) as threads:
        return list(threads.map(ask, names))
