"""Makes image names safe for every output: below a root, in valid Unicode, and distinct.

A safe name is kept. In any other name, the parts that make it unsafe and every `%` are percent-encoded: two different
unsafe names never become equal, and `urllib.parse.unquote` restores the name. A row without a name is named after its
file and its number. If the result is already the name of another image of the listing, `distinct_name` gives the
alternative name.
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
"""Slashes that do not separate two parts of a path."""
_LOCAL = re.compile(r"^(file|local)://", re.IGNORECASE)
_DIGEST_BYTES = 10
"""Enough to distinguish 10⁸ URLs that differ only in their queries."""


def quoted_name(name: str) -> str:
    """Make a text a file name: unchanged if `file_name_error` accepts it, otherwise percent-encoded where unsafe.

    Args:
        name: not empty. Bytes of a file name that are not UTF-8 (surrogate escapes) are encoded as the original bytes.
    """
    if file_name_error(name) is None:
        return name
    encoded = _SLASHES.sub("%2F", _ENCODED.sub(lambda match: _percent(match[0]), name))
    parts = ("%2E" * len(part) if part in (".", "..") else part for part in encoded.split("/"))
    return "/".join(parts)


def row_name(file: str, row: int) -> str:
    """Name of a row that states none.

    Args:
        file: the file's name, relative like other names.
        row: its number, from 0.
    """
    return f"row-{quote(file, safe='')}-{row}"


def distinct_name(name: str, by: str) -> str:
    """Alternative for a name that another image has: a hash of `by`, which differs, goes before the file ending."""
    digest = hashlib.blake2b(by.encode("utf-8", "surrogatepass"), digest_size=_DIGEST_BYTES).hexdigest()
    folder, slash, base = name.rpartition("/")
    stem, ending = os.path.splitext(base)
    return f"{folder}{slash}{stem}~{digest}{ending}"


def inside(path: str) -> str | None:
    """Normalise a relative path: drop parts that are empty, `.` or `..`; None if it leaves the folder or is the folder.

    A slash at the end is kept: to a server it makes a different address.
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
    """The prefix of all absolute paths and URLs of files below a root; ends in a slash."""
    path = _LOCAL.sub("", root)
    return f"{(path if '://' in path else os.path.abspath(path)).rstrip('/')}/"


def without_local_scheme(uri: str) -> str:
    """Strip `file://` or `local://` from a path or URL."""
    return _LOCAL.sub("", uri)


def path_below(begin: str, given: object) -> str | None:
    """Convert a file name to a path below the root; None if it is not a file name, or leaves the root.

    Args:
        begin: result of `absolute_root`; absolute names must begin with it.
        given: value from an annotation file.
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
    """Reason of a bad row: the kind, the value as far as it may be shown, and why it cannot be used."""
    text = masked_url(value) if isinstance(value, str) else value
    return f"{word}: {shown(text)} {why}"


def join_kinds(kinds: Sequence[tuple[str, int, Sequence[Any]]]) -> str:
    """Format problems for a message: one line per kind with its count and the first examples.

    Args:
        kinds: for each kind: what is wrong, how often, and a few examples.
    """
    lines = []
    for kind, count, examples in kinds:
        more = f", and {count - len(examples)} more" if count > len(examples) else ""
        lines.append(f"{count} {kind}: {'; '.join(map(str, examples))}{more}")
    return "\n  ".join(lines)


def _percent(character: str) -> str:
    """Percent-encode the bytes of one character."""
    try:
        raw = character.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raw = character.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in raw)
