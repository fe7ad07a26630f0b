"""How the workers of a training find each other: on one machine by a file of the user's own.

torch's own store listens on every interface and authenticates nobody, and workers unpickle what they gather from each
other.
"""

import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig


class _ByFile(TorchConfig().backend_cls):  # type: ignore[misc]
    """Ray Train's set-up of torch, without a port."""

    def on_start(self, worker_group: Any, backend_config: "LocalTorchConfig") -> None:
        """Form the process group, before the training begins in any worker."""
        size = len(worker_group)
        meeting = f"file://{backend_config.folder}/{uuid.uuid4().hex}"
        ray.get(
            [
                worker_group.execute_single_async(
                    number,
                    _join,
                    backend=backend_config.backend,
                    meeting=meeting,
                    size=size,
                    number=number,
                    timeout_s=backend_config.timeout_s,
                )
                for number in range(size)
            ]
        )


def _join(*, backend: str, meeting: str, size: int, number: int, timeout_s: int) -> None:
    """Join the process group, in a worker. Ray asks for the name of what it runs, so this is no `partial`."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=meeting, world_size=size, rank=number, timeout=timeout)


@dataclass
class LocalTorchConfig(TorchConfig):
    """Workers of this machine alone."""

    folder: str = ""
    """Absolute; nobody else may enter it."""

    @property
    def backend_cls(self) -> type[_ByFile]:
        """What Ray Train calls."""
        return _ByFile
