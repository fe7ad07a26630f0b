"""Directories as they are, hub names through the cache, anything else with a way out."""

from pathlib import Path

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
        with pytest.raises(WeightsError, match=f"{setting} '{name}' is neither a directory here nor to be had from"):
            resolve_weights(name, setting=setting)
