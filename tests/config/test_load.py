"""Run files: merging, overrides, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from owlsam_ray.config.load import config_from_stored, differing_fields, load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "data": {"source": "folder", "images": "pictures"},
    "detector": {"weights": "org/model"},
    "segment": {"weights": "mobile_sam.pt"},
}


def write(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_files_merge_left_to_right_then_overrides(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", MINIMAL | {"resources": {"actors": 3, "grace_s": 5}})
    site = write(tmp_path / "site.yaml", {"resources": {"actors": 4}, "data": {"suffixes": [".ppm"]}})
    config = load_config([base, site], overrides=["resources.grace_s=7", "vocabulary.categories=[cat, dog]"], run="r")
    assert (config.resources.actors, config.resources.grace_s) == (4, 7)
    assert config.data.suffixes == (".ppm",)  # lists are replaced
    assert config.vocabulary.categories == ("cat", "dog")
    assert config.run == str(Path("r").absolute())


def test_local_paths_become_absolute_and_urls_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "run.yaml", MINIMAL | {"run": "s3://bucket/run"})
    config = load_config([file])
    assert config.run == "s3://bucket/run"
    assert config.data.images == str(tmp_path / "pictures")
    assert config.segment.weights == str(tmp_path / "mobile_sam.pt")
    assert config.detector.weights == "org/model"  # a hub name, since there is no such directory
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert load_config([file]).detector.weights == str(tmp_path / "org" / "model")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("detector.score_flor=0.1", ["detector.score_flor", "Extra inputs"]),
        ("speed=1", ["speed"]),
        ("detector.score_floor=nan", ["detector.score_floor"]),
        ("detector.score_floor=1.5", ["detector.score_floor", "1.5"]),
        ("detector.max_detections=0", ["detector.max_detections"]),
        ("resources.actors=zero", ["resources.actors", "zero"]),
        ("vocabulary.templates='two {} and {}'", ["templates", "exactly once"]),
        ("vocabulary.templates=nothing", ["templates"]),
        ("vocabulary.categories=['']", ["vocabulary.categories"]),
        ("data.source=coco", ["data.annotations"]),
        ("data.annotations=a.json", ["source: coco"]),
        ("reduce.score_threshold=0.01", ["score_threshold 0.01", "inference did not keep"]),
        ("detector.weights=", ["detector.weights"]),
        ("novalue", ["section.field=value"]),
        ("=3", ["section.field=value"]),
        ("a.b=[", ["valid YAML"]),
        ("detector=3", ["detector"]),
        ("evaluate.mapping=coco_to_coco", ["evaluate.mapping: ", "coco_to_coco"]),
        ("evaluate.text=1", ["evaluate.text: Extra inputs"]),
        ("vocabulary.categories=[{id: '1', name: cat}]", ["vocabulary.categories.0.id: ", "valid integer"]),
    ],
)
def test_what_does_not_validate_is_named(tmp_path: Path, override: str, words: list[str]) -> None:
    file = write(tmp_path / "run.yaml", MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config([file], overrides=[override])
    for word in words:
        assert word in str(caught.value)
    assert "Value error" not in str(caught.value)  # pydantic's prefix says nothing to users


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "must hold sections, not a list"),
        (b"data: {source: folder\n", "not valid YAML"),
        (b"data:\n  source: folder\n  source: coco\n", "'source' is given twice"),
        (b"data: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"", "error(s) in the run config"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml") as caught:
        load_config([path])
    assert words in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read run file .*gone\.yaml: No such file"):
        load_config([tmp_path / "gone.yaml"])


def test_config_is_frozen_and_survives_storage(tmp_path: Path) -> None:
    config = load_config([write(tmp_path / "run.yaml", MINIMAL)])
    with pytest.raises(ValueError, match="frozen"):
        config.detector.score_floor = 0.5
    assert config_from_stored(json.loads(json.dumps(config.model_dump(mode="json")))) == config
    with pytest.raises(ConfigError, match="does not load in this version"):
        config_from_stored({"data": 1})


def test_differences_name_every_leaf() -> None:
    ours = {"a": {"b": 1, "c": [1]}, "d": "x" * 500}
    theirs = {"a": {"b": 2, "c": [1]}, "e": 3}
    lines = differing_fields(ours, theirs)
    assert lines[0] == "a.b: 2 -> 1"
    assert lines[1].startswith("d: None -> 'xxx")
    assert len(lines[1]) < 200
    assert lines[2] == "e: 3 -> None"


def test_every_field_is_documented() -> None:
    """`use_attribute_docstrings` gives each field a description: the reference of the run file."""
    for name, section in RunConfig.model_fields.items():
        kind = section.annotation
        for field, info in getattr(kind, "model_fields", {}).items():
            assert info.description, f"{name}.{field} has no docstring"
