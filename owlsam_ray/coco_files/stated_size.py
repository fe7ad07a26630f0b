"""Reads heights and widths as datasets state them: whole pixels of any numeric type, or not stated.

JSON files and tables share this rule. 96 and 96.0 are 96 pixels. Null, NaN, 0 and -1 are what exporters write for an
unknown size. Everything else is an error.
"""

from typing import TypeGuard

import pyarrow as pa
import pyarrow.compute as pc

MAX_SIDE = 2**31 - 1
"""Pixels: the limit of the int32 columns of manifest and predictions."""


def is_unstated(value: object) -> bool:
    """Whether a decoded JSON value means that a side of an image is not known."""
    return value is None or (_is_number(value) and (value != value or value in (0, -1)))  # NaN is unequal to itself


def stated_side(value: object) -> int | None:
    """Height or width of an image in pixels, from a decoded JSON value.

    Returns:
        From 1 to `MAX_SIDE`; None when the side is not stated.

    Raises:
        ValueError: the value is anything else: a text, a boolean, a fraction, negative, infinite, too large.
    """
    if is_unstated(value):
        return None
    if not _is_number(value) or not 1 <= value <= MAX_SIDE or value != int(value):
        raise ValueError("is not a whole number of pixels")
    return int(value)


def stated_sides(values: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Apply the rule to the N numbers of a column.

    Args:
        values: (N,) integers or floats.

    Returns:
        (N,) int64, null where the side is not stated or the value is wrong; (N,) booleans without nulls: whether the
        value is accepted.
    """
    numbers = values.cast(pa.float64(), safe=False)  # integers that this rounds exceed `MAX_SIDE` anyway
    zero_or_less = pc.or_(pc.equal(numbers, 0.0), pc.equal(numbers, -1.0))
    unstated = pc.or_(pc.is_null(numbers, nan_is_null=True), pc.fill_null(zero_or_less, False))
    inside = pc.and_(pc.greater_equal(numbers, 1.0), pc.less_equal(numbers, float(MAX_SIDE)))
    whole = pc.fill_null(pc.and_(inside, pc.equal(pc.floor(numbers), numbers)), False)
    return pc.if_else(whole, numbers, pa.scalar(None, pa.float64())).cast(pa.int64()), pc.or_(unstated, whole)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
