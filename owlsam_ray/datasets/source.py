"""What every source gives: a listing of images, and what the output carries over from it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from owlsam_ray.errors import InputError

MAX_IMAGE_ID = 2**53
"""Ids stay below, so that every JSON reader takes them as they are."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of a listing."""

    image_id: int
    file_name: str
    """Full path relative to the root of the images."""
    height: int | None = None
    """As the source states it."""
    width: int | None = None
    num_bytes: int | None = None
    """Size of the file, where the listing tells it."""
    extra: dict[str, Any] = field(default_factory=dict)
    """The source's other fields of the image, carried into the output."""


@dataclass(frozen=True, slots=True)
class Source:
    """A listing in its final order, with unique ids and unique file names."""

    records: Sequence[ImageRecord]
    info: dict[str, Any] = field(default_factory=dict)
    licenses: list[Any] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)


def file_name_error(name: object) -> str | None:
    """Why a file name cannot be taken; None when it can. A name must stay below the root of the images."""
    if not isinstance(name, str) or not name:
        return "file_name is not a text"
    if "\0" in name or "\\" in name:
        return "file_name holds a NUL or a backslash"
    if "://" in name or name.startswith("/"):
        return "file_name is not relative"
    if any(part in ("", ".", "..") for part in name.split("/")):
        return "file_name leaves the root, or holds an empty part"
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        return "file_name is not valid Unicode"
    return None


def raise_offences(where: str, offences: Sequence[str], way_out: str, *, use: str = "labelled") -> None:
    """Refuse a file, naming the first offences.

    Raises:
        InputError: when there is any.
    """
    if offences:
        more = f"\n  … and {len(offences) - 5} more" if len(offences) > 5 else ""
        listed = "\n  ".join(offences[:5])
        raise InputError(f"{where} cannot be {use} as it is ({len(offences)} offences):\n  {listed}{more}\n{way_out}")
