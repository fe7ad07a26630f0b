"""What a URL may hold that nobody else shall read: user info, and signatures or tokens in its query.

A manifest keeps URLs whole, since images are read by them. What is shown (reasons of failed images, logs, the line of
JSON) goes through `masked`, and what the source itself has published and label files carry on through `published`.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

MASK = "***"

_SCHEME = r"(?<![A-Za-z0-9+.\-])[A-Za-z][A-Za-z0-9+.\-]{0,30}:"
_URL = re.compile(rf"""(?P<scheme>(?:{_SCHEME}|(?<![^\s"'(=,\[]))//)(?P<rest>[^\s"<>]+)""")
_WITH_SPACES = re.compile(rf"""({_SCHEME}//[^\s/?#@"'<>:]*:)(?!\d+[\s,;)])[^/?#@"'<>\r\n]+@""")
"""User info with a space in the password."""
_BEFORE_AT = re.compile(r"""(?<![^\s"'/@])[^\s"'/@]+@(?=[\w\[])""")
_NO_SCHEME = re.compile(r"""(?:^|(?<=[(=,\[]))[^()/:@=,\[]+:(?=.)""")
"""`user:password@host`, as it stands when somebody forgot the scheme. In two steps: one alone would take the square of
the length of a text that has many such begins and no end."""
_PARAMETER = re.compile(
    r"""(?P<name>[?&;](?:[\w.\-]*(?:signature|credential|token|secret|password|passwd|api[_-]?key|access[_-]?key(?:id)?)"""
    r"""|sig|se|sp|sv|sr|key|auth|pwd|policy|key-pair-id)=)[^\s&;"'<>]+""",
    re.IGNORECASE,
)
"""Of a query without its URL: some libraries tell only the path that they asked for."""
_BEARER = re.compile(r"""\b(Bearer|Authorization:(?:\s*\w+)?)\s+[A-Za-z0-9._~+/=\-]{8,}""", re.IGNORECASE)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")
"""Schemes of Azure, where a container stands before the `@`: no secret."""
_TAIL = "'\")]}>,.;:!…"
"""What may follow a URL in a sentence; it is left as it is where the end of the URL is masked."""


def masked(text: str) -> str:
    """A text without the secrets of the URLs in it.

    User info becomes `***@`, and so does the query of a web address, and that of any other URL as soon as it looks like
    one (`?name=value`; elsewhere a `?` may be part of a name or of a pattern). Masking twice changes nothing more.
    """
    if "//" in text:
        text = _URL.sub(_mask_match, _WITH_SPACES.sub(rf"\1{MASK}@", text))
    if "@" in text and ":" in text:
        text = _BEFORE_AT.sub(_mask_before_at, text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def masked_url(url: str) -> str:
    """The same for a text that is one URL, or path, as a whole: also where it holds spaces or quotes."""
    parts = _parts(url)
    return masked(url if parts is None else f"{parts[0]}//{_mask_rest(*parts)}")


def masked_tree(value: Any, how: Callable[[str], str] = masked) -> Any:
    """A tree of JSON's kinds with every text masked, keys too."""
    if isinstance(value, str):
        return how(value)
    if isinstance(value, Mapping):
        return {how(key) if isinstance(key, str) else key: masked_tree(entry, how) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(entry, how) for entry in value]
    return value


SUSPECT = r"(?s)//.*@|[?&;][^=]*="
"""What a text with anything for `published` to change matches at least, for RE2 and for Python."""


def published(text: str) -> str:
    """A text without the user info of the URLs in it, and with `***` for signatures and tokens; queries stay.

    So the page of an image (`…/photo?id=17`) can still be opened.
    """
    if "//" in text:
        text = _URL.sub(_without_user, _WITH_SPACES.sub(rf"\1{MASK}@", text))
    return _PARAMETER.sub(rf"\g<name>{MASK}", text)


def without_query(url: str) -> str:
    """A URL without user info, and without what follows the path of a web address; for names.

    In the path of an object store, or of a disk, `?` and `#` are characters like any other, and stay, unless a
    signature comes after them.
    """
    parts = _parts(url)
    if parts is None:
        return url
    scheme, rest = parts
    authority, path = _split(rest)
    user, _, host = authority.rpartition("@")
    if ":" in user or scheme.rstrip(":").lower() not in _CONTAINERS:
        authority = host
    if scheme == "" or scheme.lower().endswith(("http:", "https:", "ftp:")) or _PARAMETER.search(path):
        path = re.split(r"[?#]", path, maxsplit=1)[0]
    return f"{scheme}//{authority}{path}"


def _parts(url: str) -> tuple[str, str] | None:
    """The scheme with its colon (nothing where it is left out), and what follows the slashes; None: it is a path."""
    scheme, slashes, rest = url.partition("//")
    return (scheme, rest) if slashes and re.fullmatch(rf"(?:{_SCHEME}:*)*", scheme) else None


def _mask_match(match: re.Match[str]) -> str:
    rest = match["rest"]
    end = len(rest.rstrip(_TAIL))
    return match["scheme"] + _mask_rest(match["scheme"].removesuffix("//"), rest[:end]) + rest[end:]


def _mask_before_at(match: re.Match[str]) -> str:
    text = match[0][:-1]
    # What stands behind a slash, or another @, is the middle of something else.
    is_begin = match.start() == 0 or match.string[match.start() - 1] not in "/@"
    found = next((each for each in _NO_SCHEME.finditer(text) if is_begin or each.start()), None)
    return match[0] if found is None else f"{text[: found.start()]}{MASK}@"


def _without_user(match: re.Match[str]) -> str:
    authority, path = _split(match["rest"])
    user, _, host = authority.rpartition("@")
    is_container = ":" not in user and match["scheme"].removesuffix("://").lower() in _CONTAINERS
    return match["scheme"] + (authority if is_container else host) + path


def _mask_rest(scheme: str, rest: str) -> str:
    """Of a URL, what follows the two slashes."""
    authority, path = _split(rest)
    is_web = re.search("https?:(//|$)|^ftp:$", scheme + rest if "://" in rest else scheme, re.IGNORECASE) is not None
    return _mask_user(scheme, authority) + _mask_query(path, is_web=is_web)


def _split(rest: str) -> tuple[str, str]:
    """The authority, and what follows it. A password with a slash in it belongs to the authority all the same."""
    end = next((place for place, character in enumerate(rest) if character in "/?#"), len(rest))
    authority = rest[:end]
    _, colon, port = authority.partition(":")
    if "@" not in authority and colon and not authority.startswith("[") and port and not port.isdecimal():
        at = rest.find("@", end)
        if at >= 0:
            end = next((place for place in range(at, len(rest)) if rest[place] in "/?#"), len(rest))
    return rest[:end], rest[end:]


def _mask_user(scheme: str, authority: str) -> str:
    user, at, host = authority.rpartition("@")
    if not at or (scheme.rstrip(":").lower() in _CONTAINERS and ":" not in user):
        return authority
    return f"{MASK}@{host}"


def _mask_query(path: str, *, is_web: bool) -> str:
    found = re.search(r"[?#](?=.)" if is_web else r"[?#](?=[^=&/?#]+=)", path, re.DOTALL)
    return path if found is None else f"{path[: found.end()]}{MASK}"
