"""Train: the loop of one worker, alone or in a process group. Independent of Ray.

The same command resumes: model, averaged model and optimiser come from the newest checkpoint, and batches are a
function of the step, so on a CPU the next losses are those of an uninterrupted training.
"""

import contextlib
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensorboardX import SummaryWriter
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from owlsam_ray.errors import IncompleteError, InputError, TrainingError
from owlsam_ray.finetune.batches import BatchPlan, SampleReader, iterate_batches
from owlsam_ray.finetune.config import FinetuneConfig, OptimizerConfig
from owlsam_ray.finetune.data import Sample
from owlsam_ray.finetune.store import MODEL, TENSORBOARD, TrainingStore, temporary_directory
from owlsam_ray.finetune.task import Task

_log = logging.getLogger(__name__)

LOG_EVERY = 10
"""Number of steps that one line of metrics averages over."""


@dataclass(frozen=True, slots=True)
class Worker:
    """The rank of this process among the workers of a training."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this worker validates and writes."""
        return self.rank == 0


def train(
    task: Task,
    config: FinetuneConfig,
    reader: SampleReader,
    validation: SampleReader | None,
    *,
    worker: Worker,
    store: TrainingStore,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Train to the last step, from the newest checkpoint if there is one.

    Args:
        task: the model to train, with its losses.
        config: configuration of the training.
        reader: reads the training set.
        validation: reads the validation set, if there is one.
        worker: the rank of this process among the workers.
        store: directory of the training.
        report: called by the first worker with every line of metrics.

    Returns:
        The last line of metrics, and the best validation.

    Raises:
        TrainingError: a loss is not finite; names the step and the images.
        IncompleteError: a checkpoint cannot be saved.
    """
    return _Training(task, config, reader, validation, worker, store, report).run()


class _Training:
    def __init__(
        self,
        task: Task,
        config: FinetuneConfig,
        reader: SampleReader,
        validation: SampleReader | None,
        worker: Worker,
        store: TrainingStore,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        self.task, self.config, self.reader, self.validation = task, config, reader, validation
        self.worker, self.store, self.report = worker, store, report
        self.settings = config.optimizer
        self.module = task.module.to(worker.device)
        self.averaged = AveragedModel(self.module, multi_avg_fn=self._average, use_buffers=True)
        self.optimizers = make_optimizers(task.parameter_groups(), self.settings)
        self.step = 0
        self.best: dict[str, Any] = {}
        self.metrics: list[dict[str, Any]] = []
        self.window: list[dict[str, float]] = []
        """Losses since the last line of metrics."""
        self._resume()
        self.wrapped: nn.Module = self.module
        if worker.world_size > 1:
            self._check_agreement()
            self.wrapped = DistributedDataParallel(self.module)

    def run(self) -> dict[str, Any]:
        """Train to the last step."""
        steps = self.settings.steps
        if self.step >= steps:
            _log.info("nothing to do: all %d steps of %s are done", steps, self.store.url)
            return self._summary()
        with contextlib.ExitStack() as stack:
            board = _Board(self.store, self.step) if self.worker.is_first else None
            if board is not None:
                stack.callback(board.close)
            self._steps(board)
        summary = self._summary()
        self._report({"step": self.step, "finished": True} | summary, None)
        return summary

    def _steps(self, board: "_Board | None") -> None:
        steps = self.settings.steps
        seen: list[int] = []
        first_epoch = len(self.reader.images) // self.settings.batch_size
        start, since = time.monotonic(), self.step
        for step, batches in self._batches():
            rate = learning_rate(self.settings, step)
            for group in self._groups():
                group["lr"] = rate * group["lr_scale"]
            self.window.append(self._one_step(step, batches))
            if step < first_epoch:
                seen += [image_id for batch in batches for image_id in batch["image_ids"]]
            elif step == first_epoch:
                _log.debug("worker %d saw images %s", self.worker.rank, seen)
            self.step = step + 1
            if self.step % LOG_EVERY == 0 or self.step == steps:
                seconds = time.monotonic() - start
                line = _mean(self.window) | {
                    "step": self.step,
                    "lr": rate,
                    "images_per_s": round((self.step - since) * self.settings.batch_size / seconds, 2),
                    "eta_s": round((steps - self.step) * seconds / (self.step - since)),
                }
                self.window = []
                self._report(line, board)
            if self.step % self.config.checkpoint.validate_every == 0 or self.step == steps:
                self._validate(board)
            if self.step % self.config.checkpoint.every == 0 or self.step == steps:
                self._save(board)

    def _groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimisers; not stored, since loading a state replaces them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _batches(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        plan = BatchPlan(
            num_images=len(self.reader.images),
            batch_size=self.settings.batch_size,
            accumulate=self.settings.accumulate,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            seed=self.settings.seed,
        )
        return iterate_batches(
            plan,
            self.reader,
            self.task.collate,
            augmentation=self.config.augment,
            steps=range(self.step, self.settings.steps),
            threads=self.config.resources.loader_threads,
        )

    def _one_step(self, step: int, batches: list[dict[str, Any]]) -> dict[str, float]:
        """Run one optimiser step; returns its losses."""
        self.module.train()
        losses: list[dict[str, float]] = []
        for number, batch in enumerate(batches):
            batch = _to_device(batch, self.worker.device)
            last = number == len(batches) - 1
            # Gradients are synchronized between workers once per step.
            wrapped = self.wrapped
            quiet = isinstance(wrapped, DistributedDataParallel) and not last
            with wrapped.no_sync() if quiet else contextlib.nullcontext():  # type: ignore[operator]
                losses.append(self._backward(step, batch, share=1 / len(batches)))
        parameters = [parameter for group in self._groups() for parameter in group["params"]]
        norm = nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm or math.inf)
        if not math.isfinite(norm):
            raise TrainingError(_not_finite("gradient", step, batches))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.averaged.update_parameters(self.module)
        return _mean(losses) | {"grad_norm": float(norm)}

    def _backward(self, step: int, batch: dict[str, Any], *, share: float) -> dict[str, float]:
        reduced = self.settings.dtype == "bf16"
        try:
            with torch.autocast(self.worker.device.type, torch.bfloat16, enabled=reduced):
                outputs = self.wrapped(*self.task.inputs(batch))
            parts = self.task.loss(outputs, batch)
        except TrainingError as error:
            raise TrainingError(f"{_not_finite('loss', step, [batch])} ({error})") from None
        if not bool(torch.isfinite(parts["loss"])):
            raise TrainingError(_not_finite("loss", step, [batch]))
        (parts["loss"] * share).backward()
        return {name: float(value.detach()) for name, value in parts.items()}

    def _average(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Update the averaged weights. The decay rises from 0, or the random start would persist for long."""
        if not averaged[0].is_floating_point():  # batch counters
            torch._foreach_copy_(list(averaged), list(current))
            return
        decay = min(self.settings.ema_decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(list(averaged), list(current), 1 - decay)

    def _validate(self, board: "_Board | None") -> None:
        """Validate the averaged weights in the first worker, and keep them if they are the best so far."""
        if self.worker.is_first and self.validation is not None:
            start = time.monotonic()
            metrics = self.task.validate(self._averaged_module(), self._validation_samples(), device=self.worker.device)
            seconds = round(time.monotonic() - start, 1)
            self._report({"step": self.step} | metrics | {"val/seconds": seconds}, board)
            value = metrics[self.task.best_metric]
            if not self.best or value > self.best[self.task.best_metric]:
                self.best = {"step": self.step} | metrics
                self._export()
        elif self.worker.is_first and self.step == self.settings.steps:
            self.best = {"step": self.step}
            self._export()
        if self.worker.world_size > 1:
            dist.barrier()

    def _averaged_module(self) -> nn.Module:
        module: nn.Module = self.averaged.module
        return module

    def _validation_samples(self) -> Iterator[Sample]:
        if self.validation is None:
            return
        count = len(self.validation.images)
        wanted = min(count, self.config.data.val_images)
        for number in range(wanted):
            sample = self.validation.read(number * count // wanted)
            if sample is not None:
                yield sample

    def _export(self) -> None:
        from owlsam_ray.finetune.provenance import write_provenance

        with temporary_directory() as directory:
            self.task.export(self._averaged_module().state_dict(), Path(directory))
            write_provenance(
                Path(directory),
                self.config,
                best=self.best,
                categories=self.reader.images.categories,
                data_sha256=self.store.read_record().get("data_sha256", {}),
            )
            self.store.put_directory(MODEL, Path(directory), last="config.json")

    def _save(self, board: "_Board | None") -> None:
        if self.worker.is_first:
            self.store.write_metrics(self.metrics)
            if board is not None:
                board.upload()
            state = {
                "model": self.module.state_dict(),
                "averaged": self.averaged.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "best": self.best,
                "window": self.window,
            }
            self.store.save_checkpoint(self.step, state, keep=self.config.checkpoint.keep)
        if self.worker.world_size > 1:
            dist.barrier()

    def _resume(self) -> None:
        found = self.store.load_checkpoint()
        if found is None:
            return
        self.step, state = found
        try:
            self.module.load_state_dict(state["model"])
            self.averaged.load_state_dict(state["averaged"])
            for optimizer, stored in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(stored)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the checkpoint of step {self.step} in {self.store.url} belongs to another architecture ({reason}): "
                "choose another --out"
            ) from None
        self.best, self.window = state["best"], state["window"]
        self.metrics = [line for line in self.store.read_metrics() if line["step"] <= self.step]
        if self.step < self.settings.steps:
            self._report({"step": self.step, "resumed": True}, None)

    def _check_agreement(self) -> None:
        """Check that all workers found the same checkpoint.

        Workers that do not share a directory would continue from different checkpoints, or wait forever.
        """
        steps: list[Any] = [None] * self.worker.world_size
        dist.all_gather_object(steps, self.step)
        if len(set(steps)) > 1:
            raise IncompleteError(
                f"the workers found checkpoints of different steps ({steps}) in {self.store.url}: choose a directory "
                "that all workers share"
            )

    def _report(self, line: dict[str, Any], board: "_Board | None") -> None:
        if not self.worker.is_first:
            return
        self.metrics.append(line)
        if board is not None:
            board.add(line)
        self.report(line)
        self.store.write_metrics(self.metrics)

    def _summary(self) -> dict[str, Any]:
        last: dict[str, Any] = next((line for line in reversed(self.metrics) if "loss" in line), {})
        return {
            "steps": self.step,
            "last_loss": last.get("loss"),
            "images_per_s": last.get("images_per_s"),
            "best": self.best,
            "left_out": self._left_out(),
        }

    def _left_out(self) -> dict[str, int]:
        """Reason → number of images that could not be read, over all workers and both sets."""
        mine = self.reader.failures + (self.validation.failures if self.validation is not None else Counter())
        if self.worker.world_size == 1:
            return dict(mine)
        all_of_them: list[Any] = [None] * self.worker.world_size
        dist.all_gather_object(all_of_them, mine)
        return dict(sum(all_of_them, Counter()))


def make_optimizers(groups: list[dict[str, Any]], settings: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Create optimisers for the groups of `task.Task.parameter_groups`.

    Args:
        groups: those marked `hidden_matrices` go to Muon, if it is requested.
        settings: name, learning rate, and more.

    Returns:
        AdamW, and Muon if it has any groups. Every group keeps its `lr_scale`.
    """
    muon = [group for group in groups if settings.name == "muon" and group.get("hidden_matrices")]
    others = [group for group in groups if not any(group is one for one in muon)]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        adamw = torch.optim.AdamW(others, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)
        optimizers.append(adamw)
    if muon:
        scaled = [group | {"lr_scale": group["lr_scale"] * settings.muon_lr_scale} for group in muon]
        optimizers.append(
            torch.optim.Muon(scaled, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def learning_rate(settings: OptimizerConfig, step: int) -> float:
    """Return the learning rate of a step, numbered from 0: a linear rise, then half a cosine down to `min_lr_scale`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return settings.lr * (settings.min_lr_scale + (1 - settings.min_lr_scale) * cosine)


class _Board:
    """TensorBoard events, written locally and copied to the store from time to time."""

    def __init__(self, store: TrainingStore, step: int) -> None:
        self._store, self._directory = store, temporary_directory()
        # A resumed training repeats the steps after its checkpoint.
        self._writer = SummaryWriter(self._directory.name, purge_step=step)

    def add(self, line: dict[str, Any]) -> None:
        """Add one line of metrics."""
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                self._writer.add_scalar(name if "/" in name else f"train/{name}", value, line["step"])

    def upload(self) -> None:
        """Copy the events written so far to the store."""
        self._writer.flush()
        self._store.put_directory(TENSORBOARD, Path(self._directory.name))

    def close(self) -> None:
        """Delete the local copy; `upload` must come first."""
        self._writer.close()
        self._directory.cleanup()


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch, including those in lists, to a device."""

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        return [move(item) for item in value] if isinstance(value, list) else value

    return {name: move(value) for name, value in batch.items()}


def _mean(lines: list[dict[str, float]]) -> dict[str, float]:
    """Average each value over the lines that have it: a batch without objects has fewer."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    return {name: sum(of_name) / len(of_name) for name, of_name in values.items()}


def _not_finite(what: str, step: int, batches: list[dict[str, Any]]) -> str:
    ids = [image_id for batch in batches for image_id in batch["image_ids"]]
    return (
        f"the {what} of step {step + 1} is not finite; its images were {ids}. Check these images, lower "
        "optimizer.lr, or set optimizer.dtype to fp32; earlier checkpoints are kept"
    )
