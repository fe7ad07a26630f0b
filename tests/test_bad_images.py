"""Damaged and hostile files: each ends with a picture or a reason, within bounds, and a run over them completes."""

import json
import os
import resource
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray import storage
from owlsam_ray.config.run import RunConfig
from owlsam_ray.run.manifest import load_manifest
from owlsam_ray.run.shards import load_shard
from tests.bad_images import corpus, mutated
from tests.runs import ROOT, label_here

COUNT, SEED, SIDE = 600, 5, 2500
REASONS = {"not_an_image", "empty_file", "truncated", "too_large", "decode_error", "unsupported_mode"}
MOST_CPU_S = 5.0
BYTES_PER_PIXEL = 17
"""WebP's decoder holds three copies of four bytes a pixel, and Pillow a fourth."""


@cache
def outcomes(seed: int, count: int, side: int, folder: str | None = None) -> dict[str, dict[str, Any]]:
    """What a process of its own makes of the corpus, by file; it may have 5 GB, and has to end quietly."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_images", str(seed), str(count), str(side), *([folder] if folder else [])],
        cwd=ROOT,
        env=os.environ | {"PYTHONWARNINGS": "default"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_AS, (5 * 10**9, 5 * 10**9)),
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"exit {done.returncode} with {lines[-1:]}\n{done.stderr[-4000:]}"
    assert done.stderr == ""
    return {name["name"]: what for name, what in zip(lines[::2], lines[1::2], strict=True)}


def check(found: dict[str, dict[str, Any]], count: int) -> None:
    assert len(found) == count
    for name, what in found.items():
        word = what["outcome"].split(":")[0]
        assert word in REASONS | {"ok"}, (name, what)
        assert what["cpu_s"] < MOST_CPU_S, (name, what)
        assert what["peak_mb"] < 64 + 2 * what["bytes"] / 1e6 + BYTES_PER_PIXEL * what["pixels"] / 1e6, (name, what)
    words = Counter(what["outcome"].split(":")[0] for what in found.values())
    print(f"{words}, {sum(what['cpu_s'] for what in found.values()):.1f} s")
    assert words.keys() >= {"ok", "not_an_image", "truncated", "too_large", "decode_error"}
    assert words["ok"] > count / 10
    assert sum(words[reason] for reason in REASONS) > count / 3


def test_every_file_ends_within_bounds() -> None:
    print(f"seed {SEED}")
    check(outcomes(SEED, COUNT, SIDE), COUNT)


def test_damaged_photographs_end_within_bounds(shared: Path) -> None:
    print(f"seed {SEED + 1}")
    check(outcomes(SEED + 1, 400, 0, str(shared / "data" / "coco_mini" / "images")), 400)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 105))
def test_ten_thousand_files(seed: int, shared: Path) -> None:
    """With pictures just below the limit of 200 million pixels."""
    print(f"seed {seed}")
    check(outcomes(seed, 2000, 14_000, str(shared / "data" / "coco_mini" / "images")), 2000)


def test_the_mutator_depends_on_its_seed_alone() -> None:
    first, again, other = (list(mutated(seed, 100)) for seed in (1, 1, 2))
    assert first == again
    assert len({image.data for image in first + other}) > 190


def test_a_run_over_them_completes(tmp_path: Path) -> None:
    """Every file is one row, with the outcome that decoding alone has."""
    print(f"seed {SEED}")
    names = {}
    for number, image in enumerate(corpus(SEED, COUNT, side=SIDE)):
        names[f"{number:05d}.jpg"] = image.name
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{number:05d}.jpg").write_bytes(image.data)
    run = tmp_path / "run"
    content = json.loads(
        label_here(
            RunConfig.model_validate(
                {
                    "run": str(run),
                    "data": {"source": "folder", "images": str(tmp_path / "images")},
                    "vocabulary": {"categories": ["cat", "dog"]},
                    "detector": {"model": "fake", "score_floor": 0.05},
                    "segment": {"model": "fake"},
                    "resources": {"shard_size": 50},
                    "reduce": {"max_failed": 1.0},
                }
            )
        )
    )
    manifest = load_manifest(str(run), verify=True)
    assert manifest is not None
    expected = outcomes(SEED, COUNT, SIDE)
    seen: Counter[str] = Counter()
    for shard in manifest.iter_shards():
        rows = load_shard(str(run), shard)[1].select(["image_id", "status", "reason", "height", "width"]).to_pylist()
        for row, planned in zip(rows, manifest.read_shard(shard).to_pylist(), strict=True):
            assert row["image_id"] == planned["image_id"]
            name = names.pop(planned["file_name"])
            found = row["reason"] if row["status"] == "failed" else f"ok: {row['width']}x{row['height']}"
            assert found == expected[name]["outcome"], name
            seen[row["status"]] += 1
    assert not names
    assert len(content["images"]) == seen["ok"] + seen["empty"]
    labelled = {annotation["image_id"] for annotation in content["annotations"]}
    assert labelled <= {each["id"] for each in content["images"]}
    assert len(labelled) > 25
    assert seen["ok"] > 50
    assert seen["failed"] > 150
    assert not storage.temporary_files(storage.join(str(run), "predictions"))
