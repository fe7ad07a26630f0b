"""The columns' path against the plain twin: the same bytes, for every decision, any number of workers and files."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from owlsam_ray.config.inference import SuppressConfig
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.run.proof import ShardRules
from tests.reduce.made_runs import CATEGORIES, FINGERPRINT, K, random_run, reduce_shards
from tests.reduce.plain import plain_reduce

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
