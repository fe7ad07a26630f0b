"""Directories as they are, hub names through the cache, anything else with a way out."""

from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.errors import WeightsError
from owlsam_ray.models.hub import resolve_weights


def test_a_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    assert resolve_weights(str(tmp_path), setting="detector.weights") == tmp_path


@pytest.mark.parametrize("setting", ["detector.weights", "segment.weights"])
def test_what_is_not_there_is_told_with_its_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    with pytest.raises(WeightsError, match=f"{setting} .*gone is not a directory in Hugging Face layout"):
        resolve_weights(str(tmp_path / "gone"), setting=setting)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("nobody/has-this-model", "not a name"):
        with pytest.raises(
            WeightsError, match=f"{setting} '{name}' is not a local directory, and the hub does not provide it"
        ):
            resolve_weights(name, setting=setting)


def test_a_revision_may_be_named_and_must_hold_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def snapshot(name: str, *, revision: str | None, **other: Any) -> str:
        asked.append((name, revision))
        return str(tmp_path)

    monkeypatch.setattr("owlsam_ray.models.hub.snapshot_download", snapshot)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"detector.weights 'org/model': the hub has no safetensors for it"):
        resolve_weights("org/model", setting="detector.weights")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert resolve_weights("org/model@refs/pr/9", setting="detector.weights") == tmp_path
    assert asked == [("org/model", None), ("org/model", "refs/pr/9")]
