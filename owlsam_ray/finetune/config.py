"""Define the configuration of a training; files and overrides merge like those of a run."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from owlsam_ray.coco_files.cleaning import CleaningSettings
from owlsam_ray.config.added_settings import without_added
from owlsam_ray.config.base import Auto, Name, PositiveInt, Section
from owlsam_ray.config.load import absolute, load_tree, path_or_hub_name, validate_tree
from owlsam_ray.config.run import LoggingConfig
from owlsam_ray.finetune.augment import AugmentSettings
from owlsam_ray.finetune.detector import DetectorTraining
from owlsam_ray.finetune.segmenter import SegmenterSettings

NON_RESULT_FIELDS = frozenset({"out", "resources", "logging"})
"""Sections that do not change what is learned (up to the last bits)."""
_NON_RESULT_PATHS: dict[str, Any] = {
    "data": {
        "cache_mb": True,
        "train": {"annotations", "images"},
        "val": {"annotations", "images"},
        "drawn": {"directory"},
    },
    "checkpoint": {"every": True, "keep": True},
}
"""Single fields of other sections that do not change it; data are identified by content, not by location."""


class DatasetFiles(Section):
    """One COCO dataset."""

    annotations: Name
    """The COCO JSON file: a path or any fsspec URL."""
    images: Name
    """Root of the image files: a directory or an fsspec URL."""


class DrawnDataset(Section):
    """The demo's dataset, which is drawn if it does not exist."""

    directory: Name = "runs/drawn"
    """A local directory."""
    train: PositiveInt = 10_000
    """Number of training images."""
    val: PositiveInt = 500
    """Number of validation images."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the drawing."""

    @field_validator("directory")
    @classmethod
    def _directory_is_local(cls, value: str) -> str:
        if "://" in value:
            raise ValueError("data.drawn.directory must be a local directory")
        return value


class TrainingData(Section):
    """Training and validation data."""

    train: DatasetFiles | None = None
    """The training set."""
    val: DatasetFiles | None = None
    """The validation set; without one, the last weights are kept instead of the best."""
    drawn: DrawnDataset | None = None
    """The drawn dataset instead of `train` and `val`."""
    val_images: PositiveInt = 500
    """Number of images of the validation set that are used, evenly spread."""
    max_pixels: PositiveInt = 200_000_000
    """Largest image in pixels; larger ones are left out."""
    cache_mb: Annotated[int, Field(ge=0)] = 0
    """Memory for decoded images, per worker, in MiB. Worth it if the training set fits."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.train is None) == (self.drawn is None):
            raise ValueError("data needs either train (and val), or drawn")
        if self.drawn is not None and self.val is not None:
            raise ValueError("data.drawn brings its own validation set: leave data.val out")
        return self


class OptimizerConfig(Section):
    """Steps, and a learning rate with warm-up and cosine decay."""

    name: Literal["adamw", "muon"] = "adamw"
    """`adamw`, or `muon` for the matrices inside the towers of a detector and AdamW for the rest. From random weights,
    `muon` needs about half the steps."""
    steps: PositiveInt
    """Optimiser steps of the whole training."""
    batch_size: PositiveInt = 16
    """Images of one optimiser step, over all workers and accumulated micro batches."""
    accumulate: PositiveInt = 1
    """Micro batches of one optimiser step on each worker."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    """Peak learning rate."""
    min_lr_scale: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Learning rate at the end, relative to the peak."""
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    """Steps during which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay of matrices; norms, biases and embeddings have none."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Betas of AdamW."""
    muon_lr_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0
    """Learning rate of Muon relative to AdamW's; Muon's steps are scaled to the size of AdamW's."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the averaged weights, which are validated and kept; rises from 0 over the first steps."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of random initial weights, the order of images, augmentation and prompts."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of the forward pass (autocast); weights and losses stay in fp32."""


class CheckpointConfig(Section):
    """When checkpoints are written and validation runs."""

    every: PositiveInt = 200
    """Steps between two checkpoints."""
    keep: PositiveInt = 2
    """Number of newest checkpoints that are kept."""
    validate_every: PositiveInt = 1000
    """Steps between two validations; the last step always validates."""


class TrainingResources(Section):
    """Devices, processes, threads and the Ray cluster."""

    workers: PositiveInt = 1
    """Processes that train together (DDP)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    cpus_per_worker: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs that Ray reserves for one worker; `auto`: an equal share of the machine's, or 4 beside a GPU."""
    torch_threads: PositiveInt | Auto = "auto"
    """Threads of one worker's model on a CPU; `auto`: its CPUs."""
    loader_threads: PositiveInt = 2
    """Threads of a worker that read, decode and augment images."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often lost workers are replaced; training continues from the last checkpoint."""
    num_cpus: PositiveInt | None = None
    """CPUs of the Ray instance that is started here; default: the machine's."""
    object_store_mb: PositiveInt | None = 100
    """Object store of the Ray instance that is started here, in MiB; training hardly uses it."""
    ray_address: Name | None = None
    """An existing cluster; default: start one on this machine."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """RAY_AUTH_MODE of the cluster at `ray_address`; `token` needs the same token on every node. A Ray instance that is
    started here always requires its own token."""


class FinetuneConfig(Section):
    """The configuration of a training."""

    out: Name | None = None
    """Directory of checkpoints, metrics and the model: a path or an fsspec URL. `--out` overrides it."""
    detector: DetectorTraining | None = None
    """Train a detector. Exactly one of `detector` and `segmenter` must be set."""
    segmenter: SegmenterSettings | None = None
    """Train a segmenter."""
    data: TrainingData
    cleaning: CleaningSettings = CleaningSettings()
    augment: AugmentSettings = AugmentSettings()
    optimizer: OptimizerConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    resources: TrainingResources = TrainingResources()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.detector is None) == (self.segmenter is None):
            raise ValueError("a training needs either a section `detector` or a section `segmenter`")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        parts = self.resources.workers * self.optimizer.accumulate
        if self.optimizer.batch_size % parts:
            raise ValueError(
                f"optimizer.batch_size {self.optimizer.batch_size} is not a multiple of resources.workers × "
                f"optimizer.accumulate = {parts}"
            )
        return self

    def result_fields(self) -> dict[str, Any]:
        """The fields that decide what is learned, as plain JSON; added settings that change nothing are left out."""
        return without_added(self, exclude={**dict.fromkeys(NON_RESULT_FIELDS, True), **_NON_RESULT_PATHS})


def load_finetune_config(
    files: Sequence[str | Path], *, overrides: Iterable[str] = (), out: str | None = None
) -> FinetuneConfig:
    """Read YAML files, merge them left to right, apply overrides, validate; local paths become absolute.

    Raises:
        ConfigError: names the file or the key.
    """
    tree = load_tree(files, overrides)
    if out is not None:
        tree["out"] = out
    config = validate_tree(FinetuneConfig, tree, files, what="training config")
    update: dict[str, Any] = {"out": absolute(config.out) if config.out else None}
    data: dict[str, Any] = {}
    for name in ("train", "val"):
        files_of = getattr(config.data, name)
        if files_of is not None:
            data[name] = DatasetFiles(annotations=absolute(files_of.annotations), images=absolute(files_of.images))
    if config.data.drawn is not None:
        data["drawn"] = config.data.drawn.model_copy(update={"directory": absolute(config.data.drawn.directory)})
    update["data"] = config.data.model_copy(update=data)
    for name in ("detector", "segmenter"):
        section = getattr(config, name)
        if section is not None and section.weights is not None:
            update[name] = section.model_copy(update={"weights": path_or_hub_name(section.weights)})
    return config.model_copy(update=update)
