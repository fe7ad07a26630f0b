"""Relative paths of a run file: the working directory first, then the file's own folder."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from owlsam_ray.config.load import load_config, load_tree

FIELDS: dict[str, Any] = {
    "data": {"source": "table", "images": "pics", "files": ["rows/*.csv", "more/{0..1}.csv", "gone.csv"]},
    "vocabulary": {"categories": "names.txt"},
    "detector": {"weights": "models/owl"},
    "segment": {"weights": "sam.pt"},
    "evaluate": {"ground_truth": "truth.json"},
    "reduce": {"out": "labels"},
    "run": "runs/1",
}


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run file and what it names; the working directory is another one."""
    folder = tmp_path / "jobs [1]"
    for name in ("pics", "rows", "more", "models/owl", "labels"):
        (folder / name).mkdir(parents=True)
    for name in ("rows/a.csv", "more/0.csv", "names.txt", "sam.pt", "truth.json"):
        (folder / name).write_text("x")
    (folder / "run.yaml").write_text(yaml.safe_dump(FIELDS))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder


def test_what_is_only_beside_the_run_file_is_taken_from_there(job: Path) -> None:
    here = Path.cwd()
    config = load_config([job / "run.yaml"])
    assert config.data.images == str(job / "pics")
    assert config.data.files == (str(job / "rows" / "*.csv"), str(job / "more" / "{0..1}.csv"), str(here / "gone.csv"))
    assert config.vocabulary.categories == str(job / "names.txt")
    assert config.detector.weights == str(job / "models" / "owl")
    assert config.segment.weights == str(job / "sam.pt")
    assert config.evaluate.ground_truth == str(job / "truth.json")
    assert config.reduce.out == str(here / "labels")  # written, not read
    assert config.run == str(here / "runs" / "1")


def test_the_working_directory_comes_first(job: Path) -> None:
    (Path.cwd() / "pics").mkdir()
    (Path.cwd() / "sam.pt").write_text("y")
    config = load_config([Path("..") / job.name / "run.yaml"])
    assert config.data.images == str(Path.cwd() / "pics")
    assert config.segment.weights == str(Path.cwd() / "sam.pt")
    assert config.detector.weights == str(job / "models" / "owl")


def test_urls_hub_names_and_set_are_left_alone(job: Path) -> None:
    tree = FIELDS | {"detector": {"weights": "org/model"}, "data": {"source": "folder", "images": "s3://bucket/pics"}}
    (job / "run.yaml").write_text(yaml.safe_dump(tree))
    config = load_config([job / "run.yaml"], overrides=["segment.weights=sam.pt"])
    assert config.detector.weights == "org/model"
    assert config.data.images == "s3://bucket/pics"
    assert config.segment.weights == str(Path.cwd() / "sam.pt")


@pytest.mark.parametrize("odd", [{"data": 3}, {"data": ["x"]}, {"data": {"files": [1, None]}}, {"vocabulary": None}])
def test_what_is_no_path_is_left_for_validation(job: Path, odd: dict[str, Any]) -> None:
    (job / "run.yaml").write_text(yaml.safe_dump(odd))
    assert load_tree([job / "run.yaml"]) == odd
