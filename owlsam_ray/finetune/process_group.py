"""Connect the workers of a training on one machine through a file that only the user can access.

torch's own store listens on every interface without authentication, and workers unpickle what they gather from each
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
    """Join the process group, in a worker; not a `partial`, since Ray asks for the name of the function."""
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=meeting, world_size=size, rank=number, timeout=timeout)


@dataclass
class LocalTorchConfig(TorchConfig):
    """Ray Train's torch configuration for workers of a single machine."""

    folder: str = ""
    """Absolute path; only its owner may enter it."""

    @property
    def backend_cls(self) -> type[_ByFile]:
        """The backend class that Ray Train instantiates."""
        return _ByFile
