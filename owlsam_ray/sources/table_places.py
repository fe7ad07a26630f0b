"""Converts the URIs of a table to addresses and file names; a URI that cannot be used becomes a reason.

Plain paths and URLs are processed as whole columns; all other rows are processed one by one.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from owlsam_ray.errors import InputError, shown
from owlsam_ray.sources.files import check_schemes
from owlsam_ray.sources.listing import bad_names, below, file_name_error
from owlsam_ray.sources.row_names import (
    absolute_root,
    bad_reason,
    distinct_name,
    inside,
    quoted_name,
    without_local_scheme,
)
from owlsam_ray.storage.secrets import masked_url, without_query

_SCHEME = r"^[A-Za-z][A-Za-z0-9+.-]*://"
_LOCAL = r"^(?i:file|local)://"
_UPPER = r"^[A-Za-z0-9+.-]*[A-Z][A-Za-z0-9+.-]*://"
_ODD_URL = r"[?#@]|://.*//"
"""Matches a URL with a query, user info, or a path with an empty part."""
_WEB = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Place:
    """Address and file name of one image."""

    uri: str
    file_name: str
    other_name: str | None = None
    quoted: str | None = None
    """See `LISTING_SCHEMA`."""


@dataclass(frozen=True, slots=True)
class PlaceColumns:
    """Addresses and names of N rows; text arrays as in `LISTING_SCHEMA`."""

    uri: pa.Array
    file_name: pa.Array
    other_name: pa.Array
    quoted: pa.Array
    reasons: dict[int, str]
    """Reasons of the unusable rows, by position; the other columns are null there."""


class TablePlaces:
    """Finds the addresses and names of a table's rows.

    Args:
        root: `data.images`; without it only full URLs can be used.
    """

    def __init__(self, root: str | None) -> None:
        self._root = root
        self._begin = absolute_root(root) if root is not None else None
        self._schemes: dict[str, str | None] = {}
        """Why URLs with a scheme cannot be opened, by scheme; None: they can."""

    def columns(self, uris: pa.Array) -> PlaceColumns:
        """Addresses and names of (N,) URIs.

        Raises:
            InputError: the package that a scheme needs is not installed.
        """
        paths = pc.replace_substring_regex(uris, _LOCAL, "")
        is_url = pc.match_substring_regex(paths, _SCHEME)
        absolute = pc.starts_with(paths, "/")
        tidy = pc.if_else(absolute, pc.replace_substring_regex(paths, r"/{2,}", "/"), paths)
        begin = self._begin
        below_root = pc.starts_with(tidy, begin) if begin is not None else pc.less(pc.binary_length(uris), 0)
        relative = pc.invert(pc.or_(is_url, absolute))
        rest = pc.utf8_slice_codeunits(tidy, start=len(begin or ""))
        bare = pc.replace_substring_regex(pc.replace_substring_regex(paths, _SCHEME, ""), r"/{2,}", "/")
        short = pc.replace_substring_regex(paths, r"^(\./)+", "")
        names = pc.if_else(below_root, rest, pc.if_else(relative, short, bare))
        whole = pc.if_else(relative, below(self._root or "", names, are_uris=True), uris)
        odd = self._odd(uris, paths, is_url, pc.or_(below_root, is_url if begin is None else pc.or_(relative, is_url)))
        odd[bad_names(names).to_numpy()] = True
        scheme = pc.replace_substring_regex(paths, r"(?s)^(\w[^:]*)://.*$", r"\1")
        elsewhere = pc.and_(pc.and_(is_url, pc.invert(below_root)), pc.not_equal(scheme, "https"))
        # The same host and path under another scheme is a different address.
        others = pc.if_else(elsewhere, pc.binary_join_element_wise(scheme, names, "/"), pa.scalar(None, pa.string()))
        return self._with_odd_rows(uris, PlaceColumns(whole, names, others, pa.nulls(len(uris), pa.string()), {}), odd)

    def _odd(self, uris: pa.Array, paths: pa.Array, is_url: pa.Array, known: pa.Array) -> NDArray[np.bool_]:
        """(N,) mask of the rows to process one by one; `known`: whether a row's folder is known."""
        conditions = [
            pc.invert(known),
            pc.match_substring(paths, "::"),
            pc.and_(pc.match_substring_regex(uris, _LOCAL), pc.invert(pc.starts_with(paths, "/"))),
            pc.and_(is_url, pc.match_substring_regex(paths, _ODD_URL)),
            pc.match_substring_regex(uris, _UPPER),
        ]
        if self._begin is not None and self._begin.startswith(_WEB):
            conditions.append(pc.match_substring_regex(paths, r"[?#]"))
        schemes = pc.struct_field(pc.extract_regex(paths, r"^(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://"), "scheme")
        refused = [each for each in pc.unique(schemes).drop_null().to_pylist() if self._refusal(each)]
        conditions.append(pc.is_in(schemes, value_set=pa.array(refused, pa.string())))
        odd = np.zeros(len(uris), np.bool_)
        for each in conditions:
            odd |= pc.fill_null(each, True).to_numpy(zero_copy_only=False)
        return odd

    def _refusal(self, scheme: str) -> str | None:
        """Why URLs with a scheme cannot be opened; None when they can.

        Raises:
            InputError: a package is not installed, which says nothing about the row.
        """
        if scheme not in self._schemes:
            self._schemes[scheme] = None
            try:
                check_schemes([f"{scheme}://"])
            except InputError as error:
                if isinstance(error.__context__, ImportError):
                    raise
                self._schemes[scheme] = f"has a scheme that cannot be opened ({error.__context__ or error})"
        return self._schemes[scheme]

    def _with_odd_rows(self, uris: pa.Array, plain: PlaceColumns, odd: NDArray[np.bool_]) -> PlaceColumns:
        """The columns with the (N,) odd rows filled in, which are processed one by one."""
        at = np.flatnonzero(odd)
        if not len(at):
            return plain
        found = [self.place(uri) for uri in uris.take(pa.array(at)).to_pylist()]
        columns = {
            key: pc.replace_with_mask(
                getattr(plain, key),
                pa.array(odd),
                pa.array([None if isinstance(place, str) else getattr(place, key) for place in found], pa.string()),
            )
            for key in ("uri", "file_name", "other_name", "quoted")
        }
        reasons = {row: place for row, place in zip(at.tolist(), found, strict=True) if isinstance(place, str)}
        return PlaceColumns(**columns, reasons=reasons)

    def place(self, uri: str | None) -> Place | str:
        """Address and name of one row's image, or the reason why there is none."""
        if not uri:
            return bad_reason("bad_uri", uri, "is no URI")
        if scheme := re.match(_SCHEME, uri):
            uri = scheme[0].lower() + uri[scheme.end() :]
        path = without_local_scheme(uri)
        if "\0" in uri:
            return bad_reason("bad_uri", uri, "holds a NUL")
        if "::" in path:
            return bad_reason("bad_uri", uri, "is a chain of file systems (::)")
        if path != uri and not path.startswith("/"):
            return bad_reason("bad_uri", uri, "is no file on this machine: three slashes follow file:")
        is_url = re.match(_SCHEME, path) is not None
        if is_url:
            refusal = self._refusal(path.partition("://")[0])
            if refusal is not None:
                return bad_reason("bad_uri", uri, refusal)
        elif self._root is None:
            return bad_reason("bad_uri", uri, "is no URL: set data.images to the folder that it lies below")
        if is_url and not (self._begin is not None and path.startswith(self._begin)):
            return _elsewhere(path)
        return self._below_root(uri, path)

    def _below_root(self, uri: str, path: str) -> Place | str:
        """Address and name for a path or URL that must be below the root."""
        begin = self._begin or ""
        relative = path
        if path.startswith("/"):
            path = re.sub(r"/{2,}", "/", path)
        if path.startswith("/") or "://" in path[: len(begin)]:
            if not path.startswith(begin):
                return bad_reason("bad_uri", uri, f"does not lie below data.images {masked_url(self._root or '')}")
            relative = path[len(begin) :]
        is_web = begin.startswith(_WEB)
        plain, query = re.fullmatch(r"([^?#]*)(.*)", relative, re.DOTALL).groups() if is_web else (relative, "")  # type: ignore[union-attr]
        name = inside(plain)
        if name is None:
            return bad_reason("bad_uri", uri, "leaves data.images, or is that folder itself")
        has_dots = any(part in (".", "..") for part in plain.split("/"))
        if path != relative and not has_dots:
            whole = uri
        else:  # repeated slashes matter to servers and object stores
            kept = name if has_dots else plain
            whole = below(self._root or "", pa.array([kept + query]), are_uris=True)[0].as_py()
        return _named(whole, name, query)


def _elsewhere(url: str) -> Place | str:
    """Address and name for a full URL: the name is host and path, without the parts that may be secret."""
    plain = without_query(url)
    scheme, _, path = plain.partition("://")
    name = re.sub(r"/{2,}", "/", path)
    if name == path and plain == url and file_name_error(name) is None:
        return Place(url, name, None if scheme == "https" else f"{scheme}/{name}")
    return _named(url, name, url)


def _named(uri: str, name: str, more: str) -> Place | str:
    """A place with a safe name; `more`: the part of the URI that the name does not contain."""
    if not name.strip("/"):
        return bad_reason("bad_uri", uri, "names neither host nor path")
    safe = quoted_name(name)
    error = file_name_error(name)
    other = distinct_name(safe, uri) if more or error else None
    return Place(uri, safe, other, f"{shown(name)}: {error}" if error else None)
