"""Define what the training loop needs from a model: the protocol that detector and segmenter implement."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from owlsam_ray.finetune.data import Sample


class Task(Protocol):
    """One model with its batch format, loss and export."""

    @property
    def module(self) -> nn.Module:
        """The trainable module. The loop moves it to a device, wraps it for DDP, and keeps an EMA of it."""

    @property
    def best_metric(self) -> str:
        """The entry of `validate` by which the loop keeps the best checkpoint; higher is better."""

    @property
    def needs_masks(self) -> bool:
        """Whether samples must have masks."""

    def collate(self, samples: Sequence[Sample], rng: np.random.Generator) -> dict[str, Any]:
        """Convert samples to a batch: tensors on the CPU, and `image_ids`, a list of int.

        Called in loader threads. Any or all samples may be without objects.

        Args:
            samples: samples of one step; at least one.
            rng: the only source of randomness.
        """

    def inputs(self, batch: dict[str, Any]) -> tuple[Any, ...]:
        """Return the arguments of `module(*inputs)` for a batch whose tensors are already on the device."""

    def loss(self, outputs: Any, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Compute the losses of a batch, in float32 whatever the outputs are.

        Args:
            outputs: outputs of `module(*inputs)`.
            batch: result of `collate`, on the device.

        Returns:
            `loss`, a scalar with a gradient for every parameter of `parameter_groups`, even for a batch without objects
            (DDP waits for all of them); and detached scalars for the log.
        """

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return groups for the optimiser, each {`params`, `lr_scale`, `name`}; frozen parameters are in none.

        A group of norms and biases has `weight_decay` 0; the others leave that to the optimiser. `hidden_matrices`
        marks matrices inside a tower, which Muon takes.
        """

    def validate(self, module: nn.Module, samples: Iterable[Sample], *, device: torch.device) -> dict[str, float]:
        """Compute metrics on whole samples, including `best_metric`.

        Args:
            module: this task's, or a copy of it with other weights, on `device`; its training mode is restored.
            samples: samples without augmentation.
            device: device of `module`.
        """

    def export(self, state: Mapping[str, Tensor], directory: Path) -> None:
        """Write a directory that `annotate` loads.

        Args:
            state: the state dict of `module`, raw or averaged, on any device.
            directory: created if it does not exist.
        """
