"""Small trainings on drawn pictures, for the tests of the loop, the tasks and the job."""

from pathlib import Path
from typing import Any

import torch
import yaml

from owlsam_ray.finetune.batches import SampleReader
from owlsam_ray.finetune.config import FinetuneConfig, load_finetune_config
from owlsam_ray.finetune.data import TrainingImages
from owlsam_ray.finetune.job import make_task, open_data
from owlsam_ray.finetune.loop import Worker, train
from owlsam_ray.finetune.store import TrainingStore
from owlsam_ray.sources.drawing import Split
from owlsam_ray.sources.drawn import annotation_file, image_root, write_split

ALONE = Worker(rank=0, world_size=1, device=torch.device("cpu"))
DETECTOR = {
    "detector": {
        "architecture": {
            "image_size": 96,
            "patch_size": 16,
            "width": 32,
            "layers": 1,
            "heads": 2,
            "text_width": 32,
        },
        "template": "{}",
        "text_lr_scale": 1.0,
    }
}
SEGMENTER = {
    "segmenter": {
        "architecture": {
            "image_size": 64,
            "embed_dims": [16, 24, 32, 32],
            "depths": [1, 1, 1, 1],
            "num_heads": [1, 1, 2, 2],
            "window_sizes": [4, 4, 4, 4],
            "prompt_dim": 32,
            "decoder_layers": 1,
            "decoder_heads": 2,
            "decoder_mlp_dim": 32,
            "iou_head_dim": 32,
        }
    }
}


def draw_sets(root: Path, *, train: int = 24, val: int = 6) -> Path:
    """Draw a training and a validation set below `root`."""
    for split, count in ((Split.TRAIN, train), (Split.VAL, val)):
        write_split(root, split, count, seed=5, workers=1)
    return root


def write_job(root: Path, drawn: Path, *, model: dict[str, Any] = DETECTOR, **sections: Any) -> Path:
    """A job file for a small training; `sections` are merged over it."""
    fields: dict[str, Any] = {
        **model,
        "data": {
            name: {"annotations": str(annotation_file(drawn, split)), "images": str(image_root(drawn))}
            for name, split in (("train", Split.TRAIN), ("val", Split.VAL))
        },
        "optimizer": {"steps": 12, "batch_size": 4, "lr": 1e-3, "warmup_steps": 2},
        "checkpoint": {"every": 4, "validate_every": 100},
        "logging": {"progress_s": 0.5},
    }
    for name, values in sections.items():
        fields[name] = fields.get(name, {}) | values
    path = root / "job.yaml"
    path.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return path


def load_job(root: Path, drawn: Path, **sections: Any) -> FinetuneConfig:
    """The config of `write_job`, with `root/out` as its directory."""
    return load_finetune_config([write_job(root, drawn, **sections)], out=str(root / "out"))


def readers(config: FinetuneConfig, *, masks: bool) -> tuple[SampleReader, SampleReader | None]:
    """Readers of both sets."""
    training, validation = open_data(config)
    return _reader(training, masks), None if validation is None else _reader(validation, masks)


def _reader(images: TrainingImages, masks: bool) -> SampleReader:
    return SampleReader(images, masks=masks)


def run_alone(config: FinetuneConfig, *, task: Any = None) -> list[dict[str, Any]]:
    """Train in this process, without Ray; returns the lines of metrics of this attempt."""
    training, validation = open_data(config)
    task = task or make_task(config, training)
    lines: list[dict[str, Any]] = []
    train(
        task,
        config,
        _reader(training, task.needs_masks),
        None if validation is None else _reader(validation, task.needs_masks),
        worker=ALONE,
        store=TrainingStore(config.out or ""),
        report=lines.append,
    )
    return lines
