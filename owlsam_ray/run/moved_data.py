"""A dataset under another path: which roots have moved, and the settings of a run without the places of its files.

What was planned keeps its URIs; who reads images maps them from the old root to the new one.
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
    """A root of files that lies elsewhere by now; both without a slash at the end."""

    old: str
    new: str

    def apply(self, uri: str) -> str:
        """A URI below the old root, below the new one; any other as it is."""
        return self.new + uri[len(self.old) :] if uri.startswith(f"{self.old}/") or uri == self.old else uri

    def back(self) -> "Move":
        """From the new root to the old one."""
        return Move(self.new, self.old)


def moves_between(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[Move, ...]:
    """Roots that differ between two sections `data` (plain values), where the rest of a path is the same.

    `images` is a root itself. Of `files`, patterns move in pairs that end alike: the longest common end stays.
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
    """Two configs (plain values) without those paths that may differ on one run.

    Weights and files of names are compared by what they hold. A dataset may have moved: `data.images` to any root,
    `data.files` and `data.annotations` to another folder with the same names; pictures of exemplars along with it. With
    `any_data` no image is read any more, and any place will do.
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
