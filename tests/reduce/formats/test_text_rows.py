"""Rows of text from columns: numbers, nulls and escapes, against Python's own."""

import json
import random

import numpy as np
import pyarrow as pa

from owlsam_ray.reduce.formats.text_rows import Piece, join_rows, text_bytes
from tests.reduce.plain import Number


def test_numbers_are_the_shortest_that_give_the_same_float_back() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    numbers = np.random.default_rng(seed)
    bits = numbers.integers(0, 2**32, 20_000, np.uint32).view(np.float32)
    values = np.concatenate([bits[np.isfinite(bits)], (numbers.random(20_000) * 2000).astype(np.float32)])
    few = np.round(numbers.random(20_000) * 10.0 ** numbers.integers(-4, 8, 20_000), 2).astype(np.float32)
    powers = np.concatenate([np.float32(2.0) ** np.arange(-20, 30), np.float32(10.0) ** np.arange(-6, 10)])
    edges = [np.nextafter(powers, np.float32(way), dtype=np.float32) for way in (0, np.inf)]
    units = numbers.random(100_000, np.float32)
    values = np.concatenate([values, few, -few, powers, *edges, units, np.arange(2000) / 8]).astype(np.float32)
    values = np.concatenate(
        [values, np.array([0, -0.0, 1, 100, 1e9, 1e10, 1e-6, 1e-7, 16777216, 0.1, -5.25], np.float32)]
    )
    rows = join_rows([Piece("", pa.array(values))], len(values)).to_pylist()
    for value, text in zip(values, rows, strict=True):
        assert np.float32(json.loads(text)) == value
        assert text == repr(Number(value))


def test_rows_join_pieces_around_nulls() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    alphabet = ["", "a", '"', "\\", "ü", "x\\y", None]
    for _ in range(50):
        count = choose.randrange(6)
        columns = [[choose.choice(alphabet) for _ in range(count + 2)] for _ in range(choose.randrange(1, 5))]
        pieces, expected = [], [""] * count
        for column in columns:
            before, behind, quoted = choose.choice(["", "<", "é"]), choose.choice(["", ">"]), choose.random() < 0.5
            kind = choose.choice([pa.string(), pa.large_string(), pa.binary()])
            pieces.append(Piece(before, pa.array(column, pa.string()).cast(kind).slice(1, count), behind, quoted))
            for row, text in enumerate(column[1 : count + 1]):
                if text is not None:
                    inside = text.replace("\\", "\\\\").replace('"', '\\"') if quoted else text
                    expected[row] += before + inside + behind
        rows = join_rows(pieces, count)
        assert rows.to_pylist() == expected
        assert bytes(text_bytes(rows)).decode() == "".join(expected)


def test_integers_are_their_digits() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    numbers = np.random.default_rng(seed)
    powers = [10**power + more for power in range(19) for more in (-1, 0, 1)]
    values = [*powers, *(-each for each in powers), *(int(each) for each in numbers.integers(-(2**62), 2**62, 1000))]
    values += [int(each) for each in numbers.integers(-(10**6), 10**6, 1000)]
    assert join_rows([Piece("", pa.array(values, pa.int64()))], len(values)).to_pylist() == [str(v) for v in values]
    small = pa.array([0, None, 9, 10, 255], pa.uint8())
    assert join_rows([Piece("<", small, ">")], 5).to_pylist() == ["<0>", "", "<9>", "<10>", "<255>"]
