"""Names of images, which anybody may have written → paths that stay below a folder, on a disk and on object stores."""

import hashlib
import re

_MOST_BYTES = 251
"""Of a name between slashes, so that `.txt` in the place of a shorter suffix still fits into 255."""
_MOST_BYTES_OF_ALL = 900
"""Object stores take keys of 1,024."""
# Control characters, whatever ends a line of text for Python, and the backslash; dots in front, space at the end.
_ODD = re.compile("[\x00-\x1f\x7f-\x9f\\\\\u2028\u2029]|^\\.+$|^\\.|\\s$")
# Readers put `labels` in the place of the last folder of this name, so that the only one must be ours.
_IMAGES = re.compile(r"(^|/)images/")
_FINE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_-][A-Za-z0-9_.-]*)*")


def safe_path(name: str, *, suffix: str = ".txt") -> str:
    """A relative path for an image's name: the same name in nearly all cases.

    What could leave the folder, hide a file, break a line of a list, or name a drive or a scheme is written as in URLs
    (`../a` → `%2E./a`), and so is a folder `images`, and the end of a folder's name that is `suffix`, because a file
    beside it may need that name. Slashes at the start, the end, or behind another one go. Too long names are cut, and
    end in a hash.

    Args:
        name: any text.
        suffix: of the files that will stand beside or below it.
    """
    if len(name) <= 200 and suffix not in name.lower() and _FINE.fullmatch(name) and not _IMAGES.search(name):
        return name
    parts = [part for part in name.split("/") if part] or [""]
    folders = [
        _plain("%69mages" if part == "images" else _without_suffix(part, suffix), first=not index)
        for index, part in enumerate(parts[:-1])
    ]
    path = "/".join([*folders, _plain(parts[-1], first=len(parts) == 1)])
    if len(path.encode()) > _MOST_BYTES_OF_ALL:
        stem, dot, end = parts[-1].rpartition(".")
        return _hash(name) + (dot + end if stem and end.isascii() and end.isalnum() and len(end) < 9 else "")
    return path


def label_path(path: str, suffix: str = ".txt") -> str:
    """The file of labels of an image with a safe path: another suffix in the place of its own."""
    folder, slash, name = path.rpartition("/")
    stem, dot, _ = name.rpartition(".")
    return folder + slash + (stem if dot and stem else name) + suffix


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


def _without_suffix(part: str, suffix: str) -> str:
    return part[: -len(suffix)] + _quote(suffix[0]) + suffix[1:] if part.lower().endswith(suffix) else part


def _quote(text: str) -> str:
    return "".join(f"%{byte:02X}" for byte in text.encode())


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
