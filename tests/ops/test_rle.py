"""RLE of many masks at once, against one by one."""

import random
import time

import numpy as np
from numpy.typing import NDArray

from owlsam_ray.ops.masks import encode_rle
from owlsam_ray.ops.rle import rle_areas, rle_runs


def joined(texts: list[bytes]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Texts behind others, which do not count, as in a slice of a column."""
    lengths = [3, *(len(text) for text in texts)]
    return np.frombuffer(b"xyz" + b"".join(texts) + b"0", np.uint8), np.cumsum(lengths)


def one_by_one(texts: list[bytes]) -> list[list[int]]:
    sums = []
    for text in texts:
        try:
            runs = rle_runs(text)
        except ValueError:
            sums.append([-1, -1])
            continue
        sums.append([-1, -1] if (runs < 0).any() else [int(runs.sum()), int(runs[1::2].sum())])
    return sums


def random_texts(choose: random.Random, count: int) -> list[bytes]:
    """Masks of all kinds, some of them damaged."""
    texts = []
    for _ in range(count):
        size = (choose.randrange(1, 90), choose.randrange(1, 90))
        numbers = np.random.default_rng(choose.randrange(2**32))
        mask = numbers.random(size) < choose.choice([0, 0.01, 0.5, 1])
        mask[: choose.randrange(size[0] + 1), : choose.randrange(size[1] + 1)] ^= True
        text = bytearray(encode_rle(mask))
        damage = choose.randrange(12)
        if damage == 0:
            text[choose.randrange(len(text))] = choose.randrange(256)
        elif damage == 1:
            del text[choose.randrange(len(text)) :]
        elif damage == 2:
            text += bytes(choose.randrange(48, 112) for _ in range(choose.randrange(20)))
        elif damage == 3:
            text = bytearray(b"o" * choose.randrange(12) + b"0")
        texts.append(bytes(text))
    return texts


def test_many_at_once_equal_one_by_one() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    bad = 0
    for _ in range(60):
        texts = random_texts(choose, choose.randrange(40))
        expected = one_by_one(texts)
        assert rle_areas(*joined(texts)).tolist() == expected
        bad += expected.count([-1, -1])
    assert bad > 20


def test_none_and_empty_ones() -> None:
    assert rle_areas(*joined([])).shape == (0, 2)
    assert rle_areas(*joined([b"", b""])).tolist() == [[0, 0], [0, 0]]
    assert rle_areas(*joined([b"", b"4", b"", b"04"])).tolist() == [[0, 0], [4, 0], [0, 0], [4, 4]]


def test_it_is_worth_it() -> None:
    mask = np.zeros((480, 640), np.bool_)
    mask[100:180, 200:300] = True
    texts = [encode_rle(mask)] * 2000
    seconds = []
    for function in (one_by_one, lambda some: rle_areas(*joined(some))):
        start = time.perf_counter()
        function(texts)
        seconds.append(time.perf_counter() - start)
    print(seconds)
    assert seconds[1] < seconds[0] / 2
