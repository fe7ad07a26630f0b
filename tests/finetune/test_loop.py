"""The training loop in one process: resume, averages, errors, what it leaves behind."""

import contextlib
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

from owlsam_ray import storage
from owlsam_ray.config.inference import DetectorConfig
from owlsam_ray.errors import ConfigError, GuardError, IncompleteError, InputError, TrainingError
from owlsam_ray.finetune import loop
from owlsam_ray.finetune.config import FinetuneConfig, OptimizerConfig
from owlsam_ray.finetune.job import make_task, open_data
from owlsam_ray.finetune.loop import learning_rate
from owlsam_ray.finetune.store import TrainingStore
from owlsam_ray.models.mobile_sam import MobileSam
from owlsam_ray.models.owl import Owl
from tests.finetune.drawn import DETECTOR, SEGMENTER, draw_sets, load_job, run_alone


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_sets(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(autouse=True)
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of metrics for each step."""
    monkeypatch.setattr(loop, "LOG_EVERY", 1)


def losses(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("model", [DETECTOR, SEGMENTER], ids=["detector", "segmenter"])
def test_a_resumed_training_has_the_same_losses(tmp_path: Path, drawn: Path, model: dict[str, Any]) -> None:
    augment = {"horizontal_flip": 0.5, "rotate90": 0.5, "brightness": 0.2, "cutout": 0.5}
    straight = load_job(tmp_path, drawn, model=model, augment=augment)
    (tmp_path / "again").mkdir()
    whole = losses(run_alone(straight))
    broken = load_job(tmp_path / "again", drawn, model=model, augment=augment)
    task = make_task(broken, open_data(broken)[0])
    calls = 0
    collate = task.collate

    def breaking(samples: Any, rng: Any) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls > 10:
            raise KeyboardInterrupt
        return collate(samples, rng)

    task.collate = breaking  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_alone(broken, task=task)
    assert TrainingStore(broken.out or "").checkpoints() in ([4], [4, 8])
    rest = losses(run_alone(broken))
    assert min(rest) in (5, 9)
    assert max(rest) == 12
    assert rest == pytest.approx({step: whole[step] for step in rest}, abs=1e-6)
    kept = losses([json.loads(line) for line in (tmp_path / "again/out/metrics.jsonl").read_text().splitlines()])
    assert kept == pytest.approx(whole, abs=1e-6)  # each step once


def test_a_finished_training_is_left_alone(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 2})
    run_alone(config)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert run_alone(config) == []
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_what_is_left_behind_loads_where_labels_are_made(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 3}, checkpoint={"every": 1, "keep": 2, "validate_every": 2})
    lines = run_alone(config)
    assert [line["step"] for line in lines if "val/box_ap" in line] == [2, 3]
    assert TrainingStore(config.out or "").checkpoints() == [2, 3]
    Owl.load(tmp_path / "out" / "model", DetectorConfig(weights="-"), device=torch.device("cpu"), dtype=torch.float32)
    provenance = json.loads((tmp_path / "out" / "model" / "provenance.json").read_text())
    assert provenance["config"]["optimizer"]["steps"] == 3
    assert provenance["best"]["step"] in (2, 3)
    assert str(tmp_path) not in json.dumps(provenance)
    assert any((tmp_path / "out" / "tensorboard").iterdir())
    (tmp_path / "segmenter").mkdir()
    config = load_job(tmp_path / "segmenter", drawn, model=SEGMENTER, optimizer={"steps": 2})
    run_alone(config)
    MobileSam.load(f"{config.out}/model", device=torch.device("cpu"), dtype=torch.float32)


def test_without_a_validation_set_the_last_weights_are_kept(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 2})
    config = config.model_copy(update={"data": config.data.model_copy(update={"val": None})})
    run_alone(config)
    assert json.loads((tmp_path / "out" / "model" / "provenance.json").read_text())["best"] == {"step": 2}


def test_accumulated_micro_batches_are_one_step(tmp_path: Path, drawn: Path) -> None:
    """Two halves give the mean of their gradients; the segmenter would see other batch statistics."""
    found = []
    for number, accumulate in enumerate((1, 2)):
        root = tmp_path / str(number)
        root.mkdir()
        config = load_job(root, drawn, optimizer={"steps": 1, "batch_size": 4, "accumulate": accumulate})
        found.append(run_alone(config)[0])
    assert found[0]["step"] == found[1]["step"] == 1
    # Normalised by the pairs of each half, not of the whole: close, not equal.
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.3)


class _Odd:
    """A task whose loss is not finite at one step."""

    def __init__(self, task: Any, step: int) -> None:
        self._task, self._left = task, step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = self._task.loss(outputs, batch)
        self._left -= 1
        return parts | {"loss": parts["loss"] * float("nan")} if self._left == 0 else parts


def test_a_nan_loss_stops_with_step_and_images(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn)
    task = make_task(config, open_data(config)[0])
    with pytest.raises(TrainingError, match=r"loss of step 6 is not finite; its images were \[\d+, \d+, \d+, \d+\]"):
        run_alone(config, task=_Odd(task, 6))
    assert TrainingStore(config.out or "").checkpoints() == [4]


def test_weights_that_are_not_finite_stop_too(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn)
    task = make_task(config, open_data(config)[0])
    task.module.get_parameter("model.box_head.dense0.weight").data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="step 1 is not finite"):
        run_alone(config, task=task)


def test_a_full_disk_keeps_the_last_good_checkpoint(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_job(tmp_path, drawn)
    open_atomic = storage.open_atomic

    class Full(io.BytesIO):
        """A file on a disk that is full after 20 kB."""

        def write(self, data: Any) -> int:
            if self.tell() > 20_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    @contextlib.contextmanager
    def full(url: str) -> Iterator[IO[bytes]]:
        with open_atomic(url) as file:
            yield Full() if "step-00000008" in url else file

    monkeypatch.setattr(storage, "open_atomic", full)
    with pytest.raises(IncompleteError, match=r"checkpoint of step 8 .*No space left.*step 4 is intact"):
        run_alone(config)
    monkeypatch.setattr(storage, "open_atomic", open_atomic)
    assert min(losses(run_alone(config))) == 5


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn)
    run_alone(config)
    checkpoints = tmp_path / "out" / "checkpoints"
    newest = checkpoints / "step-00000012.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert min(losses(run_alone(config))) == 9
    for file in checkpoints.iterdir():
        file.write_bytes(b"")
    with pytest.raises(InputError, match=r"every checkpoint .* is damaged"):
        run_alone(config)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path, drawn: Path) -> None:
    run_alone(load_job(tmp_path, drawn, optimizer={"steps": 4}))
    wider = {"detector": DETECTOR["detector"] | {"architecture": {**_architecture(), "width": 64}}}
    with pytest.raises(InputError, match="another architecture"):
        run_alone(load_job(tmp_path, drawn, model=wider, optimizer={"steps": 8}))


def _architecture() -> dict[str, Any]:
    architecture = DETECTOR["detector"]["architecture"]
    assert isinstance(architecture, dict)
    return architecture


def test_other_settings_on_the_same_directory_are_refused(tmp_path: Path, drawn: Path) -> None:
    store = TrainingStore(str(tmp_path / "out"))
    first = load_job(tmp_path, drawn)
    store.guard({"config": first.result_fields()})
    store.guard({"config": load_job(tmp_path, drawn, resources={"loader_threads": 5}).result_fields()})
    with pytest.raises(GuardError, match=r"optimizer\.lr: 0\.001 -> 0\.5"):
        store.guard({"config": load_job(tmp_path, drawn, optimizer={"lr": 0.5}).result_fields()})


def test_the_average_follows_the_weights(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 1, "ema_decay": 0.5})
    task = make_task(config, open_data(config)[0])
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    run_alone(config, task=task)
    after = task.module.state_dict()
    saved = torch.load(tmp_path / "out/checkpoints/step-00000001.pt", weights_only=True)["averaged"]
    moved = 0
    for name, value in after.items():
        # The first step's decay is at most 1 / 10; torch's averaging takes the first weights as they are.
        low, high = torch.minimum(before[name], value), torch.maximum(before[name], value)
        average = saved[f"module.{name}"]
        assert bool(((average >= low - 1e-6) & (average <= high + 1e-6)).all())
        moved += int((value != before[name]).any())
    assert moved > 10


def test_learning_rate_rises_then_falls() -> None:
    settings = OptimizerConfig(steps=100, warmup_steps=10, lr=1.0, min_lr_scale=0.1)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert 0.1 <= rates[99] < 0.101
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize(
    ("model", "share"),
    [
        pytest.param(DETECTOR, 0.8, id="detector"),
        pytest.param(SEGMENTER, 0.9, id="segmenter", marks=pytest.mark.slow),
    ],
)
def test_the_loss_falls(tmp_path: Path, drawn: Path, model: dict[str, Any], share: float) -> None:
    """The segmenter's waits on a plateau for its first hundreds of steps."""
    config: FinetuneConfig = load_job(
        tmp_path, drawn, model=model, optimizer={"steps": 60, "batch_size": 8, "lr": 2e-3, "dtype": "bf16"}
    )
    found = list(losses(run_alone(config)).values())
    assert sum(found[-10:]) < share * sum(found[:10])


def test_a_line_of_metrics_that_a_checkpoint_divides_is_the_same(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "LOG_EVERY", 3)
    whole = losses(run_alone(load_job(tmp_path, drawn, optimizer={"steps": 6})))
    root = tmp_path / "again"
    root.mkdir()
    config = load_job(root, drawn, optimizer={"steps": 6})
    task = make_task(config, open_data(config)[0])
    with pytest.raises(TrainingError):  # after the checkpoint of step 4, in the middle of a line
        run_alone(config, task=_Odd(task, 5))
    assert losses(run_alone(config)) == pytest.approx({6: whole[6]}, abs=1e-6)


def test_everything_may_lie_on_an_object_store(tmp_path: Path, drawn: Path) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 4}).model_copy(update={"out": "memory://bucket/training"})
    lines = run_alone(config)
    assert TrainingStore("memory://bucket/training").checkpoints() == [4]
    assert lines[-1]["finished"]
    assert storage.exists("memory://bucket/training/model/model.safetensors")
    assert run_alone(config) == []


def test_storage_that_does_not_answer_is_no_damaged_checkpoint(
    tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_job(tmp_path, drawn, optimizer={"steps": 4})
    run_alone(config)
    read = storage.read_bytes

    def silent(url: str) -> bytes:
        if url.endswith(".pt"):
            raise OSError(5, "Input/output error")
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", silent)
    with pytest.raises(IncompleteError, match="cannot read the checkpoint of step 4"):
        run_alone(config)


def test_a_model_with_nothing_to_learn_is_refused(tmp_path: Path, drawn: Path) -> None:
    frozen = {"detector": DETECTOR["detector"] | {"frozen": ["text", "vision", "box_head", "class_head"]}}
    config = load_job(tmp_path, drawn, model=frozen)
    with pytest.raises(ConfigError, match="every part of the model is frozen"):
        make_task(config, open_data(config)[0])
