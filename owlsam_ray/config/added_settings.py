"""Keep stored runs valid when new settings are added: fields marked with `Added` are left out of hashes.

A run directory stores its settings and their hash. A setting that is added later must change neither while it has the
value that labels as the code did before the setting existed. At that value it is left out of hashes and comparisons,
and stored settings that lack it are read with that value.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.main import IncEx

from owlsam_ray.config.base import Added


def marker_of(field: FieldInfo) -> Added | None:
    """The field's marker; None when the field has existed since the first release."""
    return next((each for each in field.metadata if isinstance(each, Added)), None)


def without_added(settings: BaseModel, *, exclude: IncEx | None = None) -> dict[str, Any]:
    """Settings as plain JSON values, without added fields that have the value from before they existed.

    Args:
        settings: nested to any depth; sections may be inside lists and mappings.
        exclude: further fields to leave out, as `model_dump` takes them.
    """
    tree = settings.model_dump(mode="json", exclude=exclude)
    _strip(settings, tree)
    return tree


def _strip(settings: BaseModel, tree: dict[str, Any]) -> None:
    """Remove from a dump, in place, what `without_added` leaves out."""
    for name, field in type(settings).model_fields.items():
        if name not in tree:
            continue
        marker = marker_of(field)
        if marker is not None and tree[name] == marker.as_before:
            del tree[name]
            continue
        for inner, dumped in _sections(getattr(settings, name), tree[name]):
            _strip(inner, dumped)


def _sections(value: Any, dumped: Any) -> Iterator[tuple[BaseModel, dict[str, Any]]]:
    """Sections in a field's value, each with its dump."""
    if isinstance(value, BaseModel) and isinstance(dumped, dict):
        yield value, dumped
    elif isinstance(value, (list, tuple)):
        for inner, plain in zip(value, dumped, strict=True):
            yield from _sections(inner, plain)
    elif isinstance(value, Mapping):
        for inner, plain in zip(value.values(), dumped.values(), strict=True):
            yield from _sections(inner, plain)


def with_added(kind: type[BaseModel], tree: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings, completed with the value from before for each added field that they lack.

    Args:
        kind: the model of the settings.
        tree: the settings as stored. Sections inside lists are left unchanged: there the default of an added field
            must be its value from before.
    """
    filled = dict(tree)
    for name, field in kind.model_fields.items():
        marker, inner = marker_of(field), field.annotation
        if marker is not None and name not in filled:
            filled[name] = marker.as_before
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            section = filled.get(name, {})
            if isinstance(section, Mapping) and (below := with_added(inner, section)):
                filled[name] = below
    return filled
