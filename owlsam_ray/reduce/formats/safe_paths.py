"""Names of images, which anybody may have written → paths that stay below a folder, on a disk and on object stores."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ENDINGS = ("bmp", "dng", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp")
"""Of images that readers of YOLO's folders take; they go by them, and by the content once the file is open."""
_ENDING = ".jpg"
"""Of images without any of these: rows do not tell the format, and no reader needs it to be right."""
_MOST_BYTES = 251
"""Of a name between slashes, so that `.txt` in the place of a shorter suffix still fits into 255."""
_MOST_BYTES_OF_ALL = 900
"""Object stores take keys of 1,024."""
# Control characters, whatever ends a line of text for Python, and the backslash; dots in front, space at the end.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029]|^\\.+$|^\\.|\\s$")
# Readers put `labels` in the place of the last folder of this name, so that the only one must be ours.
_IMAGES = re.compile("images_*")
_LAST = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_FINE = rf"^([A-Za-z0-9_-]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?/)*{_LAST}\.(?i:{'|'.join(ENDINGS)})$"
_IN_IMAGES = r"(^|/)images_*/"
_IS_FINE, _IS_IN_IMAGES = re.compile(_FINE), re.compile(_IN_IMAGES)


def safe_path(name: str, *, suffix: str = ".txt") -> str:
    """A relative path for an image's name: the same name in nearly all cases.

    What could leave the folder, hide a file, break a line of a list, or name a drive or a scheme is written as in URLs
    (`../a.png` → `%2E%2E/a.png`), and so is a dot at the end of a folder's name, which some readers take for the start
    of a path, and the end of a folder's name that is `suffix`, because a file beside it may need that name. A folder
    `images` in front goes, so that it is the folder to link; further in it becomes `images_` (and `images_` gets one
    more). A name without one of `ENDINGS` gets one. Slashes at the start, the end, or behind another one go. Too long
    names are cut, and end in a hash.

    Args:
        name: any text.
        suffix: of the files that will stand beside or below it.
    """
    if len(name) <= 200 and suffix not in name.lower() and _IS_FINE.fullmatch(name) and not _IS_IN_IMAGES.search(name):
        return name
    parts = [part for part in name.split("/") if part] or ["%"]
    if len(parts) > 1 and parts[0] == "images":
        del parts[0]
    stem, dot, ending = parts[-1].rpartition(".")
    if not (stem and dot and ending.lower() in ENDINGS):
        parts[-1] += _ENDING
    folders = [_plain(_folder(part, suffix), first=not index) for index, part in enumerate(parts[:-1])]
    path = "/".join([*folders, _plain(parts[-1], first=len(parts) == 1)])
    if len(path.encode()) > _MOST_BYTES_OF_ALL:
        return _hash(name) + "." + parts[-1].rpartition(".")[2]
    return path


def label_path(path: str, suffix: str = ".txt") -> str:
    """The file of labels of an image with a safe path: another suffix in the place of its own."""
    folder, slash, name = path.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return folder + slash + (stem if dot and stem else name) + suffix


def numbered_paths(names: Iterable[pa.ChunkedArray]) -> dict[str, str]:
    """Paths of the images that would share a file of labels with an earlier one, by name.

    The first one keeps its path, the others get a number (`same.jpg`, `same.png` → `same.jpg`, `same-2.png`) with which
    no other image collides. So a path depends on the names before it only, as far as those behind do not hold the
    number already.

    Args:
        names: of all images in order, some at a time; distinct.
    """
    kept, parts = [], []
    for column in names:
        for chunk in column.chunks:
            kept.append(chunk)
            parts.append(_stems(chunk))
    stems = pa.chunked_array(parts, pa.large_string())
    counts = stems.value_counts()
    several = counts.field("values").filter(pc.greater(counts.field("counts"), 1))
    if not len(several):
        return {}
    which = pc.is_in(stems, value_set=several)
    pending: list[tuple[str, str]] = []
    seen: set[str] = set()
    for name, stem in zip(
        pa.chunked_array(kept, pa.string()).filter(which).to_pylist(), stems.filter(which).to_pylist(), strict=True
    ):
        if stem in seen:
            pending.append((name, stem))
        seen.add(stem)
    return _numbered(pending, stems)


def _numbered(pending: list[tuple[str, str]], stems: pa.ChunkedArray) -> dict[str, str]:
    """Paths by name of images with stems that earlier ones have.

    Args:
        pending: name and stem of each, in order.
        stems: of all images.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    last: dict[str, int] = {}
    while pending:
        wanted = []
        for name, stem in pending:
            last[stem] = last.get(stem, 1) + 1
            wanted.append((name, stem, f"{stem}-{last[stem]}"))
        there = pc.is_in(pa.array([new for *_, new in wanted], pa.large_string()), value_set=stems).to_pylist()
        pending = []
        for (name, stem, new), is_there in zip(wanted, there, strict=True):
            if is_there or new in taken:
                pending.append((name, stem))
                continue
            taken.add(new)
            found[name] = new + safe_path(name)[len(stem) :]
    return found


def _stems(names: pa.Array) -> pa.Array:
    """(N,) files of labels of N images, without their ending."""
    fine = pc.and_(
        pc.match_substring_regex(names, _FINE),
        pc.and_(
            pc.less_equal(pc.utf8_length(names), 200),
            pc.invert(
                pc.or_(pc.match_substring_regex(names, _IN_IMAGES), pc.match_substring(names, ".txt", ignore_case=True))
            ),
        ),
    )
    stems = pc.replace_substring_regex(names, r"\.[^./]*$", "").cast(pa.large_string())
    odd = np.flatnonzero(~fine.to_numpy(zero_copy_only=False))
    if not len(odd):
        return stems
    others = [label_path(safe_path(name), "") for name in names.take(pa.array(odd)).to_pylist()]
    return pc.replace_with_mask(stems, pc.invert(fine), pa.array(others, pa.large_string()))


def _folder(part: str, suffix: str) -> str:
    if _IMAGES.fullmatch(part):
        return part + "_"
    if part.lower().endswith(suffix):
        return part[: -len(suffix)] + _quote(suffix[0]) + suffix[1:]
    return part[:-1] + _quote(".") if part.endswith(".") else part


def _plain(part: str, *, first: bool) -> str:
    quoted = _ODD.sub(lambda found: _quote(found.group()), part) or "%"
    if "::" in quoted or (first and re.match("[A-Za-z]:", quoted)):
        quoted = quoted.replace(":", "%3A")
    data = quoted.encode()
    if len(data) <= _MOST_BYTES:
        return quoted
    stem, dot, end = quoted.rpartition(".")
    end = dot + end if stem and len(end.encode()) < 9 else ""
    return data[: _MOST_BYTES - 40].decode(errors="ignore") + "~" + _hash(part) + end


def _quote(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
