"""Expands the patterns of `data.files` to a list of files in a fixed order."""

import inspect
import itertools
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence

import fsspec

from owlsam_ray import storage
from owlsam_ray.errors import InputError, one_line, shown

_log = logging.getLogger(__name__)
_ENDINGS_NAMED = 10
_GLOB = re.compile(r"[*?\[]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_files(patterns: Sequence[str]) -> list[str]:
    """Expand patterns to paths and URLs: the matches of a pattern sorted, each file once, at its first occurrence.

    Braces are expanded first, `{000..127}` (keeping leading zeros) and `{train,val}`; then `*`, `?`, `[0-9]` and `**`,
    as in fsspec. A name without a pattern is kept as it is, and so is the result of braces: whether such a file exists
    is found out when it is read.

    Raises:
        InputError: a pattern matches nothing, or its range descends; names the pattern.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        # An existing file is taken literally, whatever characters its name has.
        plain = not _GLOB.search(pattern) and not _BRACES.search(pattern)
        if plain or ("://" not in pattern and os.path.exists(pattern)):
            found[pattern] = None
            continue
        for name in expand_braces(pattern):
            found |= dict.fromkeys(_glob(name) if _GLOB.search(name) else [name])
    return list(found)


def expand_braces(pattern: str) -> list[str]:
    """All names that the braces of a pattern expand to, in the order of the braces.

    Raises:
        InputError: a range descends.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    inside = _RANGE.fullmatch(match[1])
    if inside is None:
        choices = match[1].split(",")
    else:
        first, last = int(inside[1]), int(inside[2])
        if last < first:
            raise InputError(
                f"data.files {pattern}: the range {{{match[1]}}} descends; write {{{inside[2]}..{inside[1]}}}"
            )
        choices = [f"{number:0{len(inside[1])}d}" for number in range(first, last + 1)]
    rests = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + rest for choice in choices for rest in rests]


def _glob(pattern: str) -> list[str]:
    try:
        found = storage.glob_files(pattern)
    except OSError as error:
        raise InputError(f"cannot list data.files {pattern}: {error.strerror or error}") from None
    if not found:
        raise InputError(
            f"data.files {pattern} matches no file: check the folder, and quote the pattern where a shell would "
            "expand it"
        )
    return found


def relative_names(urls: Sequence[str]) -> list[str]:
    """Each path or URL relative to their common folder; for a single file, its name."""
    paths = [url.split("://", 1)[-1] for url in urls]
    folders = [path.rsplit("/", 1)[0].split("/") if "/" in path else [] for path in paths]
    common = len(
        list(itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders, strict=False))) if folders else []
    )
    return ["/".join(path.split("/")[common:]) for path in paths]


def ending_of(name: str) -> str:
    """The ending of a file's name in lower case, such as `.txt`; `none` if it has none."""
    return os.path.splitext(name)[1].lower() or "none"


def warn_of_left_out(where: str, endings: Mapping[str, int]) -> None:
    """Log in one line how many files were left out because of their endings; log nothing when there are none.

    Args:
        where: the folder or the files that were listed.
        endings: number of files by ending.
    """
    if not endings:
        return
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    listed = ", ".join(f"{number} {ending[:20]}" for ending, number in ordered[:_ENDINGS_NAMED])
    rest = sum(number for _, number in ordered[_ENDINGS_NAMED:])
    more = f", {rest} with {len(ordered) - _ENDINGS_NAMED} other endings" if rest else ""
    total = sum(endings.values())
    _log.warning("%s: %d files are left out because of their endings (data.suffixes): %s%s", where, total, listed, more)


def check_schemes(urls: Iterable[str]) -> None:
    """Check that URLs can be opened, judging by their schemes; no request is made.

    Raises:
        InputError: a scheme is unknown, its package is not installed, or it needs settings that a URL cannot hold;
            names the first URL with it.
    """
    first: dict[str, str] = {}
    for url in urls:
        if "://" in url:
            first.setdefault(url.split("://")[0], url)
    for scheme, url in first.items():
        try:
            _check_scheme(scheme)
        except (ValueError, ImportError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise InputError(
                f"cannot open {shown(url, 500)}: {one_line(error)}. Images must be on a disk, or at s3, gs, http(s) "
                "or other URLs that fsspec opens without further settings."
            ) from None


def _check_scheme(scheme: str) -> None:
    kind = fsspec.get_filesystem_class(scheme)
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    needed = [
        each.name for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD
    ]
    if needed:
        raise ValueError(f"{scheme} needs {', '.join(needed)}")
    fsspec.filesystem(scheme)  # makes no request
