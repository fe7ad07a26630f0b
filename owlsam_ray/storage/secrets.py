"""Remove secrets from URLs: user info, and signatures or tokens in the query.

A manifest keeps URLs whole, since images are read with them. Everything that is shown (reasons of failed images, logs,
the JSON line) goes through `masked`. URLs that the source itself has published and that label files copy go through
`published`.
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
"""`user:password@host` without a scheme. Matched in two steps: a single pattern would take quadratic time on a text
with many possible beginnings and no end."""
_PARAMETER = re.compile(
    r"""(?P<name>[?&;](?:[\w.\-]*(?:signature|credential|token|secret|password|passwd|api[_-]?key|access[_-]?key(?:id)?)"""
    r"""|sig|se|sp|sv|sr|key|auth|pwd|policy|key-pair-id)=)[^\s&;"'<>]+""",
    re.IGNORECASE,
)
"""A secret in a query without its URL: some libraries report only the path of the request."""
_BEARER = re.compile(r"""\b(Bearer|Authorization:(?:\s*\w+)?)\s+[A-Za-z0-9._~+/=\-]{8,}""", re.IGNORECASE)
_CONTAINERS = ("abfs", "abfss", "wasb", "wasbs")
"""Azure's schemes, where a container comes before the `@`: not a secret."""
_TAIL = "'\")]}>,.;:!…"
"""Characters that may follow a URL in a sentence; they are kept where the end of the URL is masked."""


def masked(text: str) -> str:
    """A text without the secrets of the URLs in it.

    User info becomes `***@`. The query of a web address is masked; that of any other URL is masked if it looks like one
    (`?name=value`; elsewhere a `?` may be part of a name or a pattern). Masking twice changes nothing more.
    """
    if "//" in text:
        text = _URL.sub(_mask_match, _WITH_SPACES.sub(rf"\1{MASK}@", text))
    if "@" in text and ":" in text:
        text = _BEFORE_AT.sub(_mask_before_at, text)
    if "=" in text:
        text = _PARAMETER.sub(rf"\g<name>{MASK}", text)
    return _BEARER.sub(rf"\1 {MASK}", text)


def masked_url(url: str) -> str:
    """Like `masked`, for a text that is one whole URL or path: works even if it contains spaces or quotes."""
    parts = _parts(url)
    return masked(url if parts is None else f"{parts[0]}//{_mask_rest(*parts)}")


def masked_tree(value: Any, how: Callable[[str], str] = masked) -> Any:
    """A tree of JSON values with every text masked, including keys."""
    if isinstance(value, str):
        return how(value)
    if isinstance(value, Mapping):
        return {how(key) if isinstance(key, str) else key: masked_tree(entry, how) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [masked_tree(entry, how) for entry in value]
    return value


SUSPECT = r"(?s)//.*@|[?&;][^=]*="
"""Matches every text that `published` would change, and some others; valid for RE2 and for Python."""


def published(text: str) -> str:
    """A text without the user info of its URLs, and with `***` for signatures and tokens; queries stay.

    Queries stay so that the page of an image (`…/photo?id=17`) can still be opened.
    """
    if "//" in text:
        text = _URL.sub(_without_user, _WITH_SPACES.sub(rf"\1{MASK}@", text))
    return _PARAMETER.sub(rf"\g<name>{MASK}", text)


def without_query(url: str) -> str:
    """A URL without user info, and, for a web address, without anything after the path; used for names.

    In paths of object stores and disks, `?` and `#` are ordinary characters and stay, unless a signature follows.
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
    """The scheme with its colon (empty if omitted), and the text after the slashes; None for a path."""
    scheme, slashes, rest = url.partition("//")
    return (scheme, rest) if slashes and re.fullmatch(rf"(?:{_SCHEME}:*)*", scheme) else None


def _mask_match(match: re.Match[str]) -> str:
    rest = match["rest"]
    end = len(rest.rstrip(_TAIL))
    return match["scheme"] + _mask_rest(match["scheme"].removesuffix("//"), rest[:end]) + rest[end:]


def _mask_before_at(match: re.Match[str]) -> str:
    text = match[0][:-1]
    # A match after a slash, or after another @, is the middle of something else.
    is_begin = match.start() == 0 or match.string[match.start() - 1] not in "/@"
    found = next((each for each in _NO_SCHEME.finditer(text) if is_begin or each.start()), None)
    return match[0] if found is None else f"{text[: found.start()]}{MASK}@"


def _without_user(match: re.Match[str]) -> str:
    authority, path = _split(match["rest"])
    user, _, host = authority.rpartition("@")
    is_container = ":" not in user and match["scheme"].removesuffix("://").lower() in _CONTAINERS
    return match["scheme"] + (authority if is_container else host) + path


def _mask_rest(scheme: str, rest: str) -> str:
    """Mask the part of a URL after the two slashes."""
    authority, path = _split(rest)
    is_web = re.search("https?:(//|$)|^ftp:$", scheme + rest if "://" in rest else scheme, re.IGNORECASE) is not None
    return _mask_user(scheme, authority) + _mask_query(path, is_web=is_web)


def _split(rest: str) -> tuple[str, str]:
    """The authority, and the rest. A password that contains a slash still belongs to the authority."""
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
