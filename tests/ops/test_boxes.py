"""Overlaps of boxes, pair by pair and by a sweep."""

import itertools
import random

import numpy as np
import pytest

from owlsam_ray.ops import boxes
from owlsam_ray.ops.boxes import concatenated_ranges, overlapping_pairs, pair_overlaps
from tests.oracles import overlap_plain

KINDS = ("iou", "ios")


@pytest.mark.parametrize("kind", KINDS)
def test_overlaps_equal_plain_arithmetic(kind: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for scale, offset in ((1.0, 0.0), (1.0, 1e6), (1e-20, 0.0), (1e37, 0.0)):
        corners = rng.choice([0, 1, 2, 3, 4.7, 9.3], (60, 4)).astype(np.float32)  # some the wrong way round
        some = (corners * np.float32(scale) + np.float32(offset)).astype(np.float32)
        found = pair_overlaps(some[:, None], some, kind)  # type: ignore[arg-type]
        assert found.tolist() == [[overlap_plain(a, b, kind) for b in some.tolist()] for a in some.tolist()]
        assert found.dtype == np.float64
        assert ((found >= 0) & (found <= 1)).all()
        assert (found == found.T).all()


def test_overlaps_by_hand() -> None:
    large, small, beside = [0, 0, 4, 4], [0, 0, 4, 2], [4, 0, 8, 4]
    line, point, reversed_box = [0, 1, 4, 1], [2, 2, 2, 2], [3, 3, 1, 1]
    pairs = np.array([[large, large], [large, small], [large, beside], [large, line], [line, line], [point, point],
                      [large, reversed_box], [reversed_box, reversed_box]], np.float32)  # fmt: skip
    assert pair_overlaps(pairs[:, 0], pairs[:, 1], "iou").tolist() == [1, 0.5, 0, 0, 0, 0, 0, 0]
    assert pair_overlaps(pairs[:, 0], pairs[:, 1], "ios").tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert pair_overlaps(np.zeros((0, 4), np.float32), np.zeros((0, 4), np.float32), "iou").shape == (0,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", [1, 50, 1 << 14])
def test_the_sweep_finds_all_pairs(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(boxes, "_SWEEP_PAIRS", piece)
    for count in (0, 1, 2, 7, 40, 120):
        some = np.sort(rng.integers(0, 12, (count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32)
        groups = rng.integers(0, 3, count)
        above = np.array([0.0, 0.25, 0.5])[groups]
        first, second, overlap = overlapping_pairs(some, groups, kind, above=above)  # type: ignore[arg-type]
        found = sorted(zip(first.tolist(), second.tolist(), overlap.tolist(), strict=True))
        expected = [
            (a, b, overlap_plain(some[a].tolist(), some[b].tolist(), kind))
            for a, b in itertools.combinations(range(count), 2)
            if groups[a] == groups[b]
        ]
        assert found == [row for row in expected if row[2] > above[row[0]]]


def test_ranges_one_after_another() -> None:
    starts, lengths = np.array([5, 0, 7, 1]), np.array([2, 0, 1, 3])
    assert concatenated_ranges(starts, lengths).tolist() == [5, 6, 7, 1, 2, 3]
    assert concatenated_ranges(starts[:0], lengths[:0]).tolist() == []
