"""Settings that came after runs were stored, marked with `settings.Added`: earlier runs go on all the same.

A run directory stores its settings and their hash. A setting that is added later must change neither as long as it
stands at the value that labels as the code did before it existed: it is left out of what is hashed and compared, and
where stored settings lack it, it has that value.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.main import IncEx

from owlsam_ray.config.base import Added


def marker_of(field: FieldInfo) -> Added | None:
    """The marker of a field; None when it was there from the first release on."""
    return next((each for each in field.metadata if isinstance(each, Added)), None)


def without_added(settings: BaseModel, *, exclude: IncEx | None = None) -> dict[str, Any]:
    """Settings as plain JSON values, without added fields that stand at the value from before.

    Args:
        settings: of any depth; sections may stand in lists and mappings.
        exclude: further fields to leave out, as `model_dump` takes them.
    """
    tree = settings.model_dump(mode="json", exclude=exclude)
    _strip(settings, tree)
    return tree


def _strip(settings: BaseModel, tree: dict[str, Any]) -> None:
    """Remove from a dump what `without_added` leaves out, in place."""
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
    """Stored settings, with the value from before for each added field that they lack.

    Args:
        kind: of the settings.
        tree: as they are stored. Sections that stand in lists are left as they are: there the default of an added field
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
