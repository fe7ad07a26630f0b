"""Resolve relative input paths of a run file: from the working directory first, then from the file's folder.

This applies only to files and folders that are read. Output paths (`run`, `reduce.out`, …) are always relative to the
working directory, since they need not exist yet.
"""

import copy
import glob
import os
import re
from collections.abc import Iterator
from typing import Any

from owlsam_ray.config.vocabulary import VOCABULARIES

_INPUTS = (
    ("data", "images"),
    ("data", "annotations"),
    ("data", "files"),
    ("vocabulary", "categories"),
    ("vocabulary", "exemplars", "image"),
    ("detector", "weights"),
    ("segment", "weights"),
    ("segmenter", "weights"),
    ("reduce", "operating_points"),
    ("reduce", "corrections"),
    ("reduce", "corrections_base"),
    ("evaluate", "ground_truth"),
    ("data", "train", "annotations"),
    ("data", "train", "images"),
    ("data", "val", "annotations"),
    ("data", "val", "images"),
)
"""Input paths in run files and in files that describe a training."""
_BRACES = re.compile(r"\{[^{}]*\}")


def anchored(tree: dict[str, Any], folder: str) -> dict[str, Any]:
    """A run file's tree, with paths that exist only relative to its folder joined to that folder.

    Args:
        tree: the YAML content; not validated, so any value may be anywhere.
        folder: the run file's folder, relative to the working directory or absolute.
    """
    if not folder:
        return tree
    found = copy.deepcopy(tree)
    for keys in _INPUTS:
        for holder, key in _places(found, keys):
            holder[key] = _anchored(holder[key], folder)
    return found


def _places(tree: Any, keys: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """(list or mapping, its index or key) of every text at the place `keys`."""
    holder, rest = tree, keys
    while isinstance(holder, dict) and len(rest) > 1:
        holder, rest = holder.get(rest[0]), rest[1:]
    if isinstance(holder, list):
        for entry in holder:
            yield from _places(entry, rest)
    elif isinstance(holder, dict):
        value = holder.get(rest[0])
        if isinstance(value, str):
            yield holder, rest[0]
        elif isinstance(value, list) and rest[0] == "files":
            yield from ((value, index) for index, each in enumerate(value) if isinstance(each, str))


def _anchored(path: str, folder: str) -> str:
    if "://" in path or path.startswith(("/", "~")) or path in VOCABULARIES or not path.strip() or "\0" in path:
        return path
    there = os.path.join(folder, path)
    return there if not _is_there(path) and _is_there(there, root=folder) else path


def _is_there(path: str, *, root: str = "") -> bool:
    """Whether the file or folder exists, or the pattern matches one."""
    if os.path.exists(path):
        return True
    tail = path[len(root) :]  # a folder's own name is not a pattern
    pattern = glob.escape(root) + _BRACES.sub("*", tail)
    return glob.has_magic(pattern) and next(glob.iglob(pattern, recursive=True), None) is not None
