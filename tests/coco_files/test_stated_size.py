"""One rule for sizes, for values and for columns."""

import math
from typing import Any

import pyarrow as pa
import pytest

from owlsam_ray.coco_files.stated_size import MAX_SIDE, is_unstated, stated_side, stated_sides

TAKEN = [(1, 1), (96, 96), (96.0, 96), (MAX_SIDE, MAX_SIDE), (float(MAX_SIDE), MAX_SIDE)]
UNSTATED: list[Any] = [None, 0, -1, 0.0, -0.0, -1.0, math.nan]
WRONG = [-2, -3.0, 96.5, 0.5, math.inf, -math.inf, MAX_SIDE + 1, 1e300]


@pytest.mark.parametrize(("value", "pixels"), TAKEN)
def test_whole_numbers_are_pixels(value: float, pixels: int) -> None:
    side = stated_side(value)
    assert (side, type(side)) == (pixels, int)


@pytest.mark.parametrize("value", UNSTATED)
def test_what_stands_for_an_unknown_size(value: Any) -> None:
    assert is_unstated(value)
    assert stated_side(value) is None


@pytest.mark.parametrize("value", [*WRONG, "96", True, False, [96], {}, 10**400])
def test_anything_else_is_an_error(value: Any) -> None:
    with pytest.raises(ValueError, match="is not a whole number of pixels"):
        stated_side(value)


def test_columns_follow_the_same_rule() -> None:
    values = [*(float(value) for value, _ in TAKEN), *UNSTATED, *WRONG]
    sides, fits = stated_sides(pa.array(values, pa.float64()))
    assert sides.type == pa.int64()
    assert sides.to_pylist() == [pixels for _, pixels in TAKEN] + [None] * (len(UNSTATED) + len(WRONG))
    assert fits.to_pylist() == [True] * (len(TAKEN) + len(UNSTATED)) + [False] * len(WRONG)
    sides, fits = stated_sides(pa.array([5, 0, -1, None, -7, 2**62, 2**53 + 1]))
    assert sides.to_pylist() == [5, None, None, None, None, None, None]
    assert fits.to_pylist() == [True, True, True, True, False, False, False]
    assert [len(each) for each in stated_sides(pa.array([], pa.int32()))] == [0, 0]
