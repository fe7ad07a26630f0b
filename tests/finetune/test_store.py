"""The directory of a training: what it says when its files are damaged."""

from pathlib import Path

import pytest

from owlsam_ray.errors import GuardError
from owlsam_ray.finetune.store import METRICS_FILE, RECORD_FILE, TrainingStore


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00"])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    store = TrainingStore(str(tmp_path))
    (tmp_path / RECORD_FILE).write_text(text)
    (tmp_path / METRICS_FILE).write_text(text)
    with pytest.raises(GuardError, match=RECORD_FILE):
        store.read_record()
    with pytest.raises(GuardError, match=RECORD_FILE):
        store.guard({"config": {}})
    with pytest.raises(GuardError, match=METRICS_FILE):
        store.read_metrics()


def test_a_new_directory_holds_nothing(tmp_path: Path) -> None:
    store = TrainingStore(str(tmp_path / "new"))
    assert store.read_record() == {}
    assert store.read_metrics() == []
