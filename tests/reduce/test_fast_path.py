"""The columns' path against the plain twin: the same bytes, for every decision, any number of workers and files."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.ops.compiled import Piece, join_rows, text_bytes
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.run.proof import ShardRules
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, K, random_run, reduce_shards
from tests.reduce.plain import Number, plain_reduce

RULES = ShardRules(FINGERPRINT, K, len(CATEGORIES))
PROMPTS = ("a cat", 'a "dog"', "ü\\")


def random_decisions(choose: random.Random) -> Decisions:
    count = len(CATEGORIES)
    target = np.array([choose.randrange(-1, count) for _ in range(count)], np.int32)
    suppress = choose.choice(
        [
            None,
            SuppressConfig(strategy="nms", threshold=0.3),
            SuppressConfig(strategy="nms", threshold=0.5, across_labels=True),
            SuppressConfig(strategy="soft_nms"),
            SuppressConfig(strategy="merge", threshold=0.2),
        ]
    )
    return Decisions(
        categories=CATEGORIES,
        target=choose.choice([target, np.arange(count, dtype=np.int32)]),
        thresholds=np.array([choose.choice([-np.inf, 0.3, choose.random()]) for _ in range(count)]),
        min_mask_area=choose.choice([0, 1, 500]),
        min_predicted_iou=choose.choice([-np.inf, 0.5]),
        min_stability=choose.choice([-np.inf, 0.5]),
        suppress=suppress,
        max_per_image=choose.choice([None, 1, 3]),
    )


@pytest.mark.parametrize("seed", range(12))
def test_bytes_are_those_of_the_plain_twin(tmp_path: Path, seed: int) -> None:
    print(f"seed {seed}")
    choose = random.Random(seed)
    manifest = random_run(tmp_path, seed, num_images=choose.randrange(1, 40), shard_size=choose.randrange(1, 12))
    decisions = random_decisions(choose)
    prompts = choose.choice([None, PROMPTS])
    counts = reduce_shards(str(tmp_path), manifest, ReduceConfig(), decisions=decisions, outputs=(CocoOutput(prompts),))
    plain = plain_reduce(str(tmp_path), manifest, RULES, decisions, prompts=prompts)
    text = (tmp_path / "coco" / "annotations.json").read_text(encoding="ascii")
    _, images, rest = text.partition('"images": [\n')
    images, _, rest = rest.partition('],\n"categories"')
    _, _, annotations = rest.partition('"annotations": [\n')
    assert images == "".join(line + "\n" for line in [plain.lines("images")] if line)
    assert annotations == "".join(line + "\n" for line in [plain.lines("annotations")] if line) + "]\n}\n"
    assert counts["left_out"] == dict(+plain.left_out)
    lines = (tmp_path / "coco" / "failures.jsonl").read_text(encoding="ascii").splitlines()
    assert [json.loads(line) for line in lines] == plain.failures
    tree = json.loads(text)
    ids = [each["id"] for each in tree["annotations"]]
    assert ids == sorted(set(ids))
    assert {each["image_id"] for each in tree["annotations"]} <= {each["id"] for each in tree["images"]}
    assert tree["info"]["owlsam_ray"]["proof"]["images"] == manifest.num_images


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 5, num_images=60, shard_size=4)

    def files(**settings: Any) -> dict[str, bytes]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        counts = reduce_shards(str(tmp_path), manifest, ReduceConfig(out=str(out), **settings))
        assert sorted(path.name for path in out.iterdir()) == sorted([*counts["files"], "reduce.json"])
        return {path.name: path.read_bytes() for path in out.iterdir()}

    assert files(workers=1) == files(workers=2)
    assert files(workers=1, images_per_file=9) == files(workers=2, images_per_file=9)


def test_files_of_some_images_hold_what_the_one_file_holds(tmp_path: Path) -> None:
    manifest = random_run(tmp_path, 6, num_images=50, shard_size=4)
    reduce_shards(str(tmp_path), manifest, ReduceConfig())
    whole = json.loads((tmp_path / "coco" / "annotations.json").read_text())
    counts = reduce_shards(str(tmp_path), manifest, ReduceConfig(images_per_file=10))
    assert not (tmp_path / "coco" / "annotations.json").exists()  # of the reduce before, with other settings
    names = [f"annotations-{number:05d}-of-00006.json" for number in range(6)]
    assert counts["files"] == ["failures.jsonl", *names]
    trees = [json.loads((tmp_path / "coco" / name).read_text()) for name in names]
    for key in ("images", "annotations"):
        assert [each for tree in trees for each in tree[key]] == whole[key]
    assert all(len(tree["images"]) <= 10 for tree in trees)
    assert all(tree["info"] == whole["info"] for tree in trees)
    for tree in trees:
        assert {each["image_id"] for each in tree["annotations"]} <= {each["id"] for each in tree["images"]}


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
