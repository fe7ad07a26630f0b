"""Names of images that are safe wherever labels are written: below a root, in valid Unicode, and told apart.

A name that is safe stays as it is. Of any other one the parts that make it unsafe are percent-encoded, and so is every
`%` in it: two different unsafe names never become one, and `urllib.parse.unquote` gives the name back. A row without a
name is called after its file and its number. Where the result is the name of another image of the listing all the same,
`told_apart` gives the second choice.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from owlsam_ray.errors import shown
from owlsam_ray.sources.listing import file_name_error
from owlsam_ray.storage.secrets import masked_url

_ENCODED = re.compile(r"[%\\\x00\ud800-\udfff]")
_NO_PATH = re.compile(r"[\x00\ud800-\udfff]")
_SLASHES = re.compile(r"\A/|(?<=/)/|/\Z")
"""Slashes that do not stand between two parts of a path."""
_LOCAL = re.compile(r"^(file|local)://", re.IGNORECASE)
_DIGEST_BYTES = 10
"""Enough for 10⁸ URLs that differ in their queries alone."""


def quoted_name(name: str) -> str:
    """A text as a file name: itself where `file_name_error` takes it, otherwise percent-encoded where it does not.

    Args:
        name: not empty. Bytes of a file name that are no UTF-8 (surrogate escapes) are encoded as themselves.
    """
    if file_name_error(name) is None:
        return name
    encoded = _SLASHES.sub("%2F", _ENCODED.sub(lambda match: _percent(match[0]), name))
    parts = ("%2E" * len(part) if part in (".", "..") else part for part in encoded.split("/"))
    return "/".join(parts)


def row_name(file: str, row: int) -> str:
    """Name of a row that has none of its own.

    Args:
        file: the file's name, relative as in other names.
        row: its number, from 0.
    """
    return f"row-{quote(file, safe='')}-{row}"


def told_apart(name: str, by: str) -> str:
    """The name to take where another image has `name`: with a hash of what tells them apart, before the ending."""
    digest = hashlib.blake2b(by.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    folder, slash, base = name.rpartition("/")
    stem, ending = os.path.splitext(base)
    return f"{folder}{slash}{stem}~{digest}{ending}"


def inside(path: str) -> str | None:
    """A relative path without parts that are empty, `.` or `..`; None where it leaves the folder, or is the folder.

    A slash at the end stays: to a server it makes another address.
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts) + "/" * path.endswith("/") if parts else None


def absolute_root(root: str) -> str:
    """What the absolute paths and URLs of files below a root begin with; ends in a slash."""
    path = _LOCAL.sub("", root)
    return f"{(path if '://' in path else os.path.abspath(path)).rstrip('/')}/"


def without_local_scheme(uri: str) -> str:
    """A path or URL without `file://` or `local://`."""
    return _LOCAL.sub("", uri)


def path_below(begin: str, given: object) -> str | None:
    """A file name as a path below the root; None where it is none, or leaves the root.

    Args:
        begin: what `absolute_root` gives: absolute names have to begin with it.
        given: from a file of annotations.
    """
    if not isinstance(given, str) or _NO_PATH.search(given):
        return None
    name = without_local_scheme(given)
    if name.startswith(begin):
        name = name[len(begin) :]
    elif name.startswith("/") or "://" in name:
        return None
    return inside(name.rstrip("/"))


def bad_reason(word: str, value: object, why: str) -> str:
    """The reason of a bad row: what kind, the value as far as it may be shown, and why it cannot be used."""
    text = masked_url(value) if isinstance(value, str) else value
    return f"{word}: {shown(text)} {why}"


def join_kinds(kinds: Sequence[tuple[str, int, Sequence[Any]]]) -> str:
    """Problems by kind for a message: one line a kind with its number and the first of them.

    Args:
        kinds: what is wrong, how often, and a few examples.
    """
    lines = []
    for kind, count, examples in kinds:
        more = f", and {count - len(examples)} more" if count > len(examples) else ""
        lines.append(f"{count} {kind}: {'; '.join(map(str, examples))}{more}")
    return "\n  ".join(lines)


def _percent(character: str) -> str:
    """One character as percent-encoded bytes."""
    try:
        raw = character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = character.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in raw)
