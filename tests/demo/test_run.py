"""`owlsam demo`, whole, with models that were not trained."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from pycocotools.coco import COCO

from owlsam_ray.cli import main as cli
from owlsam_ray.config.load import load_config
from owlsam_ray.finetune.scratch import OwlVitArchitecture, build_owlvit
from owlsam_ray.sources.drawing import COLOURS, SHAPES
from tests import seeded_mobile_sam
from tests.runs import ROOT, environment

IMAGES, SEED = 10, 4


@dataclass(frozen=True)
class Demo:
    directory: Path
    weights: Path
    summary: dict[str, Any]
    log: str

    @property
    def sets(self) -> list[str]:
        return stand_ins(self.weights)


def stand_ins(weights: Path) -> list[str]:
    settings = {"detector.weights": weights / "detector", "segment.weights": weights / "segmenter",
                "detector.max_detections": 8}  # fmt: skip
    return [f"--set={key}={value}" for key, value in settings.items()]


def write_stand_ins(root: Path) -> None:
    """A detector that takes the names of the drawn shapes, and a segmenter; both know nothing."""
    architecture = OwlVitArchitecture(image_size=64, patch_size=16, width=32, layers=1, heads=2, text_width=32)
    for part in build_owlvit(architecture, [*COLOURS, *SHAPES], seed=3):
        part.save_pretrained(root / "detector")
    seeded_mobile_sam.write_tiny(root / "segmenter")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    write_stand_ins(root / "weights")
    directory = root / "a run"
    arguments = ["--run", str(directory), "--images", str(IMAGES), "--seed", str(SEED), *stand_ins(root / "weights")]
    done = subprocess.run(
        [sys.executable, "-m", "owlsam_ray", "demo", *arguments],
        capture_output=True, text=True, check=False, env=environment(), cwd=ROOT, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = done.stdout.splitlines()
    return Demo(directory, root / "weights", json.loads(line), done.stderr)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run a command in this process: exit code, summary, log."""
    capsys.readouterr()
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, json.loads(captured.out), captured.err


def test_the_demo_labels_measures_and_draws_with_two_actors(finished: Demo) -> None:
    summary, directory = finished.summary, finished.directory
    assert summary["command"] == "demo"
    assert (summary["images"], summary["ok"] + summary["empty"], summary["failed"]) == (IMAGES, IMAGES, 0)
    assert summary["new"] == IMAGES
    assert summary["num_annotations"] == summary["num_masks"] > 0
    assert "2 actor(s) on cpu" in finished.log
    assert "withheld shape" in finished.log  # the table
    assert len(list((directory / "predictions").glob("*.parquet"))) == 2  # one for each actor
    assert len(COCO(summary["annotations"]).getAnnIds()) == summary["num_annotations"]
    with Image.open(summary["contact_sheet"]) as sheet:
        assert sheet.width > 4 * 400
        assert len(np.unique(np.asarray(sheet))) > 100


def test_the_scores_stand_in_the_evaluation_by_group_and_size(finished: Demo) -> None:
    evaluation = json.loads((finished.directory / "evaluation.json").read_text())
    drawn = json.loads((finished.directory / "drawn" / "test.json").read_text())
    assert set(evaluation["groups"]) <= {"all", "seen pair", "withheld pair", "withheld shape"}
    assert set(evaluation["groups"]["all"]) == {"all", "<32", ">=32"}
    assert evaluation["groups"]["all"]["all"]["num_objects"] == len(drawn["annotations"])
    assert evaluation["counts"]["images"] == IMAGES
    assert finished.summary["box_ap"] == evaluation["groups"]["all"]["all"]["box_ap"]


def test_the_run_file_is_whole_commented_and_carries_the_overrides(finished: Demo) -> None:
    file = finished.directory / "run.yaml"
    text = file.read_text(encoding="utf-8")
    tree = yaml.safe_load(text)
    assert tree["detector"] == {
        "weights": str(finished.weights / "detector"), "score_floor": 0.05, "labels": "multi", "max_detections": 8,
    }  # fmt: skip
    assert (tree["resources"]["actors"], tree["resources"]["num_cpus"]) == (2, 2)
    for section in tree:
        assert re.search(rf"^{section}: # \w", text, re.MULTILINE)
    config = load_config([file], run=str(finished.directory))
    assert config.data.annotations == str(finished.directory / "drawn" / "test.json")
    assert config.vocabulary.templates == "none"


def test_the_next_steps_are_commands_that_work(finished: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.strip() for line in finished.log.split("What to try next")[1].splitlines()]
    matches = [re.fullmatch(r".*\bowlsam(?:_ray)? (.*)", line) for line in lines]
    commands = [shlex.split(match[1]) for match in matches if match is not None]
    assert [command[0] for command in commands] == ["reduce", "evaluate", "demo", "finetune", "demo"]
    for command in commands[:2]:
        assert call(capsys, *command)[0] == 0
    evaluation = json.loads((finished.directory / "evaluation.json").read_text())
    assert evaluation["reduce_score_threshold"] == 0.5
    assert (ROOT / commands[3][1]).is_file()

    before = {path: path.stat().st_mtime_ns for path in (finished.directory / "predictions").iterdir()}
    code, summary, log = call(capsys, *commands[2])
    assert (code, summary["new"]) == (0, 0)
    assert "nothing to do" in log
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = {key: value for key, value in summary.items() if key not in ("new", "wall_s")}
    assert again == {key: finished.summary[key] for key in again}


def test_other_pictures_in_the_same_directory_are_refused(finished: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished.directory / "drawn" / "test.json").read_bytes()
    for images, seed in ((IMAGES + 1, SEED), (IMAGES, SEED + 1)):
        code, summary, _ = call(
            capsys, "demo", "--run", str(finished.directory), f"--images={images}", f"--seed={seed}", *finished.sets
        )
        assert code == 3
        assert f"--images {IMAGES} --seed {SEED}" in summary["error"]
        assert "choose another directory with --run" in summary["error"]
    assert (finished.directory / "drawn" / "test.json").read_bytes() == before


def test_other_settings_are_refused_and_the_run_file_stays(finished: Demo, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished.directory / "run.yaml").read_bytes()
    arguments = ["--run", str(finished.directory), f"--images={IMAGES}", f"--seed={SEED}", *finished.sets]
    code, summary, _ = call(capsys, "demo", *arguments, "--set=suppress.threshold=0.5")
    assert code == 3
    assert "suppress.threshold: 0.6 -> 0.5" in summary["error"]
    assert (finished.directory / "run.yaml").read_bytes() == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_stand_ins(tmp_path / "weights")
    for name in ("run.yaml", "run.json"):
        directory = tmp_path / name.replace(".", "")
        directory.mkdir()
        (directory / name).write_text("mine")
        code, summary, _ = call(capsys, "demo", "--run", str(directory), *stand_ins(tmp_path / "weights"))
        assert code == 3
        assert name in summary["error"]
        assert [path.name for path in directory.iterdir()] == [name]
        assert (directory / name).read_text() == "mine"


def test_missing_checkpoints_are_told_before_anything_is_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("owlsam_ray.models.shipped.WEIGHTS", tmp_path / "weights")
    code, summary, _ = call(capsys, "demo", "--run", str(tmp_path / "run"))
    assert code == 2
    assert str(tmp_path / "weights" / "detector") in summary["error"]
    assert "detector.weights=DIR" in summary["error"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--images=0"], "--images must be at least 1"),
        (["--seed=-1"], "--seed at least 0"),
        (["--run=s3://bucket/demo"], "on this machine"),
        (["--set=data.source=folder"], "owlsam annotate"),
        (["--set=run=elsewhere"], "owlsam annotate"),
        (["--set=detector.scor_floor=0.1"], "detector.scor_floor"),
        (["--set=detector=3"], "detector"),
        (["--set=reduce.score_threshold=0.01"], "below detector.score_floor"),
    ],
)
def test_bad_arguments_exit_with_2_and_leave_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, summary, _ = call(capsys, "demo", "--run", str(tmp_path / "run"), *arguments)
    assert code == 2
    assert said in summary["error"]
    assert not (tmp_path / "run").exists()
