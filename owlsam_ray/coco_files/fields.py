"""Checks and converts plain JSON values to Arrow types, with readable error messages."""

import json
import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

NO_FLAG = 2
_FLAG = {b"owlsam": b"flag"}
"""Metadata that marks a schema field as a flag."""
_FLAGS = {
    "": False, "0": False, "0.0": False, "false": False, "no": False,
    "1": True, "1.0": True, "true": True, "yes": True,
}  # fmt: skip
"""Texts in lower case."""


def flag_field(name: str) -> pa.Field:
    """A schema field for values that `flag_of` reads: 1 or 0, null where not stated.

    A value that is not a flag becomes `NO_FLAG`, or is kept if it is an integer.
    """
    return pa.field(name, pa.int64(), metadata=_FLAG)


def values_of(elements: Sequence[dict[str, Any]], field: pa.Field) -> pa.Array:
    """(N,) values of a field from N elements in which `misfit` finds nothing wrong."""
    values = (element.get(field.name) for element in elements)
    if field.metadata == _FLAG:
        return pa.array([_flag_code(value) for value in values], field.type)
    return pa.array([_as_kind(value, field.type) for value in values], field.type)


def _flag_code(value: Any) -> int | None:
    flag = flag_of(value)
    return None if value is None else NO_FLAG if flag is None else int(flag)


def misfit(element: Any, schema: pa.Schema) -> str | None:
    """Why an element of an array cannot be a row of a schema, such as ` (id 3): area "big" is not a number`.

    Args:
        element: decoded JSON.
        schema: a missing or null field fits unless it has `nullable=False`.

    Returns:
        None when it fits.
    """
    if not isinstance(element, dict):
        return f" is {kind_of(element)}, not an object"
    number = element.get("id")
    which = f" (id {number})" if isinstance(number, int) and not isinstance(number, bool) else ""
    for field in schema:
        value = element.get(field.name)
        if value is None and not field.nullable:
            return f"{which} has no {field.name}"
        if value is not None and field.metadata != _FLAG and not _fits(value, field.type):
            of_bits = " of 64 bits" if pa.types.is_int64(field.type) and type(value) is int else ""
            return f"{which}: {field.name} {_short(value)} is not {_wanted(field.type)}{of_bits}"
    return None


def _as_kind(value: Any, kind: pa.DataType) -> Any:
    """Convert a value that fits to what Arrow accepts: where it wants a float, large integers become floats."""
    if value is None:
        return None
    if pa.types.is_floating(kind):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if pa.types.is_list(kind):
        return [_as_kind(each, kind.value_type) for each in value]
    if pa.types.is_struct(kind):
        return {field.name: _as_kind(value.get(field.name), field.type) for field in kind}
    return value


def kind_of(value: Any) -> str:
    """The JSON type of a decoded value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "a text"
    return "a list" if isinstance(value, list) else "an object"


def flag_of(value: Any) -> bool | None:
    """Read a yes/no field such as `iscrowd`, whatever type a tool gave it. The only rule for all flags.

    Returns:
        Whether it is set; null and an empty text mean no. None for a value that is not a flag: other numbers and texts,
        lists, objects.
    """
    if value is None:
        return False
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower())
    return bool(value) if isinstance(value, bool | int | float) and value in (0, 1) else None


def _fits(value: Any, kind: pa.DataType) -> bool:
    if pa.types.is_list(kind):
        return isinstance(value, list) and all(each is None or _fits(each, kind.value_type) for each in value)
    if pa.types.is_struct(kind):
        return isinstance(value, dict) and all(
            value.get(field.name) is None or _fits(value[field.name], field.type) for field in kind
        )
    if pa.types.is_boolean(kind):
        return isinstance(value, bool)
    if pa.types.is_integer(kind):
        half = 2 ** (kind.bit_width - 1)
        return isinstance(value, int) and not isinstance(value, bool) and -half <= value < half
    if pa.types.is_floating(kind):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, str)


def _wanted(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        plural = {"an integer": "integers", "a number": "numbers", "a text": "texts", "true or false": "true or false"}
        each = _wanted(kind.value_type)
        return f"a list of {plural.get(each, 'lists' if pa.types.is_list(kind.value_type) else 'objects')}"
    if pa.types.is_struct(kind):
        return "an object"
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_integer(kind):
        return "an integer" if kind.bit_width == 64 else f"an integer of {kind.bit_width} bits"
    return "a number" if pa.types.is_floating(kind) else "a text"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:59]}…"
