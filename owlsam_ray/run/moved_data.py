"""Handle a dataset that has moved: find the moved roots, and compare settings without the paths of files.

The plan keeps its URIs; readers of images map them from the old root to the new one.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from owlsam_ray.config.vocabulary import is_vocabulary_file


@dataclass(frozen=True, slots=True)
class Move:
    """A root directory of files that has moved; both paths without a trailing slash."""

    old: str
    new: str

    def apply(self, uri: str) -> str:
        """Map a URI at or below the old root to the new root; return any other URI unchanged."""
        return self.new + uri[len(self.old) :] if uri.startswith(f"{self.old}/") or uri == self.old else uri

    def back(self) -> "Move":
        """Inverse move, from the new root to the old one."""
        return Move(self.new, self.old)


def moves_between(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Move, ...]:
    """Find the roots that differ between two `data` sections (plain values) while the rest of the path is the same.

    `images` is itself a root. Patterns in `files` are compared pairwise: each pair must share trailing path components,
    and what is before the longest common ending is the root.
    """
    moves = []
    if then.get("images") and now.get("images"):
        moves.append(Move(_bare(then["images"]), _bare(now["images"])))
    old_files, new_files = then.get("files") or (), now.get("files") or ()
    if len(old_files) == len(new_files):
        for old, new in zip(old_files, new_files, strict=True):
            ends = 0
            old_parts, new_parts = old.split("/"), new.split("/")
            while ends < min(len(old_parts), len(new_parts)) and old_parts[-1 - ends] == new_parts[-1 - ends]:
                ends += 1
            if ends and (ends < len(old_parts) or ends < len(new_parts)):
                moves.append(Move("/".join(old_parts[:-ends]), "/".join(new_parts[:-ends])))
    return tuple(dict.fromkeys(move for move in moves if move.old != move.new and move.old))


def without_places(then: Mapping[str, Any], now: Mapping[str, Any], *, any_data: bool) -> tuple[Any, Any]:
    """Return two configs (plain values) in which the paths that may differ within one run no longer differ.

    Weights and vocabulary files are left out, because they are compared by content. A dataset may have moved:
    `data.images` to any root, `data.files` and `data.annotations` to another folder with the same file names, and
    exemplar images along with the dataset. `any_data` means that no image is read any more, so they may be anywhere.
    """
    theirs, ours = copy.deepcopy(dict(then)), copy.deepcopy(dict(now))
    moves = moves_between(theirs.get("data", {}), ours.get("data", {}))
    for name in ("detector", "segment"):
        for tree in (theirs, ours):
            tree.get(name, {}).pop("weights", None)
    old, new = theirs.get("vocabulary", {}), ours.get("vocabulary", {})
    if is_vocabulary_file(old.get("categories")) and is_vocabulary_file(new.get("categories")):
        old.pop("categories"), new.pop("categories")
    for before, after in zip(old.get("exemplars", ()), new.get("exemplars", ()), strict=False):
        if (
            any_data
            or any(move.apply(before["image"]) == after["image"] for move in moves)
            or _same(before, after, "image")
        ):
            before["image"] = after["image"]
    old, new = theirs.get("data", {}), ours.get("data", {})
    if old.get("images") and new.get("images"):
        old["images"] = new["images"]
    if any_data or _names(old.get("files")) == _names(new.get("files")):
        old["files"] = new.get("files")
    if (
        old.get("annotations")
        and new.get("annotations")
        and _names([old["annotations"]]) == _names([new["annotations"]])
    ):
        old["annotations"] = new["annotations"]
    return theirs, ours


def _bare(root: str) -> str:
    return root.rstrip("/") or root


def _names(paths: Any) -> list[str]:
    return [PurePosixPath(path).name for path in paths or ()]


def _same(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> bool:
    return os.path.abspath(before[name]) == os.path.abspath(after[name])
