"""Check the types in untrusted Arrow and Parquet files before any value is read.

A column's extension type names a class that makes Python objects of its values, and such a class can run any code: Ray
Data's unpickles them, in every process that has imported ray.data. Code that reads a Parquet or Arrow file from outside
therefore first compares its schema with the one that the file must have (`misfit_of`), or refuses extension types by
name (`extension_of`).
"""

import contextlib

import pyarrow as pa

from owlsam_ray.errors import shown

_NAME = b"ARROW:extension:name"
_OF_ARROW = frozenset({"arrow.bool8", "arrow.fixed_shape_tensor", "arrow.json", "arrow.opaque", "arrow.uuid"})
"""Arrow's own extension types, implemented in C++, whose values are converted without foreign code."""
_OF_RAY = (
    "ray.data.arrow_pickled_object",
    "ray.data.arrow_tensor",
    "ray.data.arrow_tensor_v2",
    "ray.data.arrow_variable_shaped_tensor",
)


def forget_ray_types() -> None:
    """Unregister the extension types that importing ray.data has registered; nothing here uses them.

    Every module that imports ray.data calls this right afterwards, so that it holds in the driver, in Ray's tasks and
    in its actors: a column of such a type is plain binary there.
    """
    for name in _OF_RAY:
        with contextlib.suppress(pa.ArrowKeyError):  # not registered
            pa.unregister_extension_type(name)


def extension_of(field: pa.Field) -> str | None:
    """Name of an extension type that a column has or contains at any depth; None when its values are plain.

    Types unknown to this process, which Arrow reads as their storage type, count as well: whether a file is read must
    not depend on what else the process has imported. Arrow's own types (JSON, UUID, …) are plain.
    """
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType):
        # All extension types written in Python have this class.
        if isinstance(kind, pa.ExtensionType) or kind.extension_name not in _OF_ARROW:
            return str(kind.extension_name)
        return extension_of(pa.field("", kind.storage_type))
    name = (field.metadata or {}).get(_NAME, b"").decode("utf-8", "replace")
    if name and name not in _OF_ARROW:
        return name
    inner = [pa.field("", kind.value_type)] if pa.types.is_dictionary(kind) else []
    inner += [kind.field(place) for place in range(kind.num_fields)]
    return next((found for each in inner if (found := extension_of(each)) is not None), None)


def misfit_of(found: pa.Schema, wanted: pa.Schema, *, may_lack: tuple[str, ...] = ()) -> str | None:
    """Why a file's columns do not match a schema, for a message; None when they match.

    Names, their order and types must be equal; nullability and metadata are ignored.

    Args:
        found: the file's schema.
        wanted: the schema that the file must have.
        may_lack: columns that files of older versions do not have.
    """
    lacks = [name for name in may_lack if name not in found.names]
    names = [name for name in wanted.names if name not in lacks]
    if found.names != names:
        return f"its columns are not {', '.join(names)}"
    for name in names:
        column, kind = found.field(name), wanted.field(name).type
        extension = extension_of(column)
        if extension is not None or column.type != kind:
            return f"its column {name} holds {shown_type(column)}, not {kind}"
    return None


def holds_bytes(field: pa.Field) -> bool:
    """Whether each value of a column is a byte string, in any of Arrow's layouts."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    checks = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return extension_of(field) is None and any(check(kind) for check in checks)


def shown_type(field: pa.Field) -> str:
    """A column's type for a message: the name of an extension type, or Arrow's own notation."""
    extension = extension_of(field)
    return f"the extension type {shown(extension)}" if extension is not None else f"{field.type!s:.200}"
