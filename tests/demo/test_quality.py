"""The shipped checkpoints find what is drawn: floors a little below what 1,000 pictures gave (README)."""

import json
import subprocess
import sys

import pytest

from owlsam_ray.finetune.config import load_finetune_config
from owlsam_ray.models.shipped import WEIGHTS
from tests.runs import ROOT, environment

IMAGES, SEED = 100, 1


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    """`groups` of the evaluation of a demo, nothing overridden."""
    directory = tmp_path_factory.mktemp("quality") / "run"
    done = subprocess.run(
        [sys.executable, "-m", "owlsam_ray", "demo", "--run", str(directory), "--images", str(IMAGES),
         "--seed", str(SEED)],
        capture_output=True, text=True, check=False, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, dict[str, dict[str, float]]] = json.loads((directory / "evaluation.json").read_text())["groups"]
    print(json.dumps(found, indent=1))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "floors"),
    [
        (">=32", {"box_ap50": 0.90, "box_ap": 0.70, "miou": 0.87, "dice": 0.92}),
        ("<32", {"box_ap50": 0.70, "miou": 0.65}),
    ],
    ids=["large", "small"],
)
def test_seen_pairs(groups: dict[str, dict[str, dict[str, float]]], size: str, floors: dict[str, float]) -> None:
    row = groups["seen pair"][size]
    assert row["num_objects"] > 100
    assert {name: row[name] for name in floors if row[name] < floors[name]} == {}


@pytest.mark.slow
def test_withheld_pairs(groups: dict[str, dict[str, dict[str, float]]]) -> None:
    """Pairs of a shape and a colour that training never showed together."""
    row = groups["withheld pair"]["all"]
    assert row["num_objects"] >= 20
    assert row["box_ap50"] >= 0.5


def test_checkpoints_are_small_and_say_where_they_come_from() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    for part, name in (("detector", "demo-detector"), ("segmenter", "demo-segmenter-large")):
        text = (WEIGHTS / part / "provenance.json").read_text()
        provenance = json.loads(text)
        job = load_finetune_config([ROOT / "jobs" / f"{name}.yaml"])
        assert provenance["config"]["optimizer"] == job.result_fields()["optimizer"]
        assert provenance["versions"]["torch"]
        assert str(ROOT) not in text
