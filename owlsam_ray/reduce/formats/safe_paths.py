"""Map untrusted image names to relative paths that stay below a folder, on disks and on object stores."""

import hashlib
import re
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ENDINGS = ("bmp", "dng", "jpeg", "jpg", "mpo", "png", "tif", "tiff", "webp")
"""Endings that readers of YOLO folders accept. They select files by ending, and decode by content."""
_ENDING = ".jpg"
"""Ending for images without any of these: rows do not state the format, and no reader needs it to be right."""
_MOST_BYTES = 251
"""Most bytes of a name between slashes, so that `.txt` in place of a shorter suffix still fits into 255."""
_MOST_BYTES_OF_ALL = 900
"""Most bytes of a whole path; object stores take keys of 1,024."""
# Control characters, everything that Python treats as a line end, the backslash, leading dots, trailing whitespace.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029]|^\\.+$|^\\.|\\s$")
# Readers replace the last folder of this name by `labels`, so ours must be the only one.
_IMAGES = re.compile("images_*")
_LAST = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"
_FINE = rf"^([A-Za-z0-9_-]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?/)*{_LAST}\.(?i:{'|'.join(ENDINGS)})$"
_IN_IMAGES = r"(^|/)images_*/"
_IS_FINE, _IS_IN_IMAGES = re.compile(_FINE), re.compile(_IN_IMAGES)


def safe_path(name: str, *, suffix: str = ".txt") -> str:
    """Convert an image's name to a relative path: the same name in nearly all cases.

    - Anything that could leave the folder, hide a file, break a line of a list, or name a drive or a scheme is
      percent-encoded (`../a.png` → `%2E%2E/a.png`). So is a dot at the end of a folder's name, which some readers take
      for the start of a path, and a folder's ending that equals `suffix`, because a file beside it may need that name.
    - A leading folder `images` is dropped, because it is the folder to link; further in, `images` becomes `images_`
      (and `images_` gets one more `_`).
    - A name without one of `ENDINGS` gets one.
    - Leading, trailing and repeated slashes are dropped.
    - Names that are too long are cut, and end in a hash.

    Args:
        name: any text.
        suffix: suffix of the files that will be beside or below it.
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
    """Return the label file of an image with a safe path: its suffix is replaced."""
    folder, slash, name = path.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return folder + slash + (stem if dot and stem else name) + suffix


def numbered_paths(names: Iterable[pa.ChunkedArray]) -> dict[str, str]:
    """Map names of images that would share a label file with an earlier one to numbered paths.

    The first image keeps its path, the others get a number (`same.jpg`, `same.png` → `same.jpg`, `same-2.png`) that
    collides with no other image. So a path depends only on the names before it, unless a later name already has the
    number.

    Args:
        names: names of all images in order, in chunks; distinct.
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
    """Number the images whose stems earlier ones have; returns paths by name.

    Args:
        pending: name and stem of each, in order.
        stems: stems of all images.
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
    """(N,) label files of N images, without their ending."""
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
