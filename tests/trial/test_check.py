"""`owlsam check`: what would stop a run is named before it starts, and nothing stays behind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray import storage
from owlsam_ray.cli import main as cli
from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError, FailedImagesError, GuardError, InputError, PreflightError
from owlsam_ray.plan.plan import plan_run
from owlsam_ray.trial.check import check_run
from tests.drawn_images import draw_coco
from tests.runs import TinyRun, label_here

STEPS = ["run file", "run directory", "dataset", "vocabulary", "resources", "weights", "prompts", "images", "space"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 images and a COCO file."""
    root = tmp_path_factory.mktemp("check")
    draw_coco(root, 30, seed=3)
    return root


@pytest.fixture
def make(drawn: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    """A run file with fake models; keyword arguments are further sections."""

    def config(**sections: Any) -> RunConfig:
        tree: dict[str, Any] = {
            "data": {"source": "coco", "images": str(drawn / "images"), "annotations": str(drawn / "instances.json")},
            "vocabulary": {"categories": ["cat", "dog"]},
            "detector": {"model": "fake"},
            "segment": {"model": "fake"},
            "resources": {"num_cpus": 2},
        }
        for name, values in sections.items():
            tree[name] = tree.get(name, {}) | values
        file = tmp_path / "run.yaml"
        file.write_text(json.dumps(tree), encoding="utf-8")
        return load_config([file], run=str(tmp_path / "deep" / "run"))

    return config


def failed(config: RunConfig, kind: type[Exception], **options: Any) -> tuple[str, dict[str, Any]]:
    """Message and summary of a check that fails."""
    with pytest.raises(kind) as caught:
        check_run(config, **options)
    message, summary = caught.value.args
    return message, summary


def marks(summary: dict[str, Any]) -> dict[str, bool | None]:
    return {step["step"]: step["ok"] for step in summary["steps"]}


def test_all_is_well_and_nothing_stays(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    lines: list[str] = []
    config = make(resources={"object_store_mb": 200})
    before = sorted(os.listdir(tmp_path))
    summary = check_run(config, say=lines.append)
    assert sorted(os.listdir(tmp_path)) == before
    assert marks(summary) == dict.fromkeys(STEPS, True)
    assert (summary["images"], summary["labelled"], summary["failed"], summary["planned"]) == (30, 8, 0, False)
    assert summary["ok"] + summary["empty"] == 8
    assert summary["images_per_s"] > 0
    assert summary["hours"] == pytest.approx(30 / summary["images_per_s"] / 3600, abs=1e-3)
    assert 0 < summary["predictions_bytes"] < 10**6 < summary["free_bytes"]
    assert [line[0] for line in lines[:-1]] == ["✓"] * 9
    assert "30 of 30 listed images" in lines[2]
    assert lines[-1].startswith("roughly ")
    assert "`owlsam estimate` measures" in lines[-1]


def test_shards_are_about_as_large_as_it_says(make: Callable[..., RunConfig]) -> None:
    config = make(resources={"shard_size": 30, "num_cpus": 2})
    summary = check_run(config, images=30)
    label_here(config)
    (name,) = storage.list_names(f"{config.run}/predictions")
    real = storage.num_bytes(f"{config.run}/predictions/{name}")
    assert 0.5 < summary["predictions_bytes"] / real < 2


def test_a_planned_run_is_checked_as_it_stands(make: Callable[..., RunConfig]) -> None:
    config = make(resources={"shard_size": 4, "num_cpus": 2})
    plan_run(config)
    assert config.run is not None
    names = sorted(path.relative_to(config.run) for path in Path(config.run).rglob("*"))
    summary = check_run(config, images=5)
    assert (summary["planned"], summary["images"], summary["labelled"]) == (True, 30, 5)
    assert sorted(path.relative_to(config.run) for path in Path(config.run).rglob("*")) == names
    label_here(config)
    assert (check_run(config)["images"], check_run(config)["hours"]) == (0, 0.0)
    message, summary = failed(make(detector={"score_floor": 0.4}), GuardError)
    assert "detector.score_floor" in message
    assert marks(summary) == dict.fromkeys(STEPS, True) | {"run directory": False}


@pytest.mark.parametrize("images", [1, 7, 30, 99])
def test_images_are_spread_evenly(make: Callable[..., RunConfig], images: int) -> None:
    for plan in (False, True):
        config = make(resources={"shard_size": 4, "num_cpus": 2})
        if plan:
            plan_run(config)
        assert check_run(config, images=images)["labelled"] == min(images, 30)


def test_what_does_not_depend_on_a_failure_is_tried(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    (tmp_path / "deep").write_text("a file where the run directory should be")
    config = make(
        data={"images": str(tmp_path / "nowhere")},
        segment={"model": "mobile_sam", "weights": str(tmp_path / "none.pt")},
    )
    message, summary = failed(config, InputError)
    assert "cannot write to the run directory" in message
    assert "(2 more step(s) failed, see above)" in message
    assert marks(summary) == {
        "run file": True,
        "run directory": False,
        "dataset": False,
        "vocabulary": True,
        "resources": True,
        "weights": False,
        "prompts": None,
        "images": None,
        "space": None,
    }
    details = {step["step"]: step["detail"] for step in summary["steps"]}
    assert "images looked up exists" in details["dataset"]
    assert "none.pt" in details["weights"]
    assert (summary["images"], summary["hours"], summary["labelled"]) == (None, None, 0)


def test_a_read_only_directory(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str) -> None:
        storage.make_directory(url)
        raise PermissionError(13, "Permission denied", url)

    monkeypatch.setattr(storage, "try_writing", refuse)
    config = make()
    message, summary = failed(config, InputError)
    assert "Permission denied" in message
    assert marks(summary) == dict.fromkeys(STEPS, True) | {"run directory": False}
    assert not Path(config.run or "").parent.exists()


def test_failed_images_are_named(make: Callable[..., RunConfig], tmp_path: Path) -> None:
    draw_coco(tmp_path / "data", 10, seed=1)
    folder = tmp_path / "data" / "images"
    victims = sorted(path for path in folder.rglob("*") if path.is_file())[:2]
    victims[0].write_bytes(victims[0].read_bytes()[:100])
    victims[1].unlink()
    data = {"images": str(folder), "annotations": str(tmp_path / "data" / "instances.json")}
    message, summary = failed(make(data=data), FailedImagesError, images=10)
    assert (summary["labelled"], summary["failed"], marks(summary)["images"]) == (10, 2, False)
    reasons = {each["file_name"]: each["reason"].split(":")[0] for each in summary["failed_images"]}
    cut, gone = (victim.relative_to(folder).as_posix() for victim in victims)
    assert reasons == {cut: reasons[cut], gone: "missing"}
    assert f"{gone}: missing" in message
    assert summary["hours"] is not None  # from the others
    summary = check_run(make(data=data, reduce={"max_failed": 2}), images=10)
    assert (summary["failed"], marks(summary)["images"]) == (2, True)


def test_resources_that_do_not_fit(make: Callable[..., RunConfig]) -> None:
    message, summary = failed(make(resources={"actors": 2, "cpus_per_actor": 1}), PreflightError)
    assert "2 actor(s) × 1 CPU" in message
    assert marks(summary)["images"] is None
    message, _ = failed(make(resources={"object_store_mb": 1, "shard_size": 1000}), PreflightError)
    assert "resources.object_store_mb" in message
    # A cluster is another machine: here an actor gets what there is.
    summary = check_run(make(resources={"actors": 64, "cpus_per_actor": 8, "ray_address": "ray://head:10001"}))
    assert (summary["actors"], summary["failed"]) == (1, 0)


def test_a_disk_that_is_too_small(make: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda url: 1000)
    message, summary = failed(make(), PreflightError)
    assert "GB of shards do not fit" in message
    assert (summary["free_bytes"], marks(summary)["space"], marks(summary)["images"]) == (1000, False, True)


def test_vocabulary(make: Callable[..., RunConfig]) -> None:
    message, summary = failed(make(suppress={"thresholds": {"horse": 0.5}}), InputError)
    assert "'horse'" in message
    assert (marks(summary)["weights"], marks(summary)["prompts"], marks(summary)["images"]) == (True, None, None)
    with pytest.raises(ConfigError, match="--images is 0"):
        check_run(make(), images=0)


def test_tiny_models_by_command(tiny: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*options: str) -> tuple[int, dict[str, Any], str]:
        code = cli.main(["check", str(tiny.run_file), "--run", str(tmp_path / "run"), *options])
        printed = capsys.readouterr()
        return code, json.loads(printed.out), printed.err

    code, summary, log = call()
    assert (code, summary["images"], summary["labelled"], summary["failed"]) == (0, 320, 8, 0)
    assert marks(summary) == dict.fromkeys(STEPS, True)
    assert log.count("✓") == 9
    assert not (tmp_path / "run").exists()
    code, summary, log = call("--set", "detector.weights=/nowhere", "--images", "2")
    assert (code, marks(summary)["weights"], marks(summary)["dataset"]) == (2, False, True)
    assert "✗ weights" in log
    code, summary, _ = call("--set", "vocabulary.templates='{} with a description that goes on for much too long'")
    assert (code, marks(summary)["prompts"]) == (2, False)
    assert cli.main(["check", str(tmp_path / "none.yaml")]) == 2
