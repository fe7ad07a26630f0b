"""A training's directory, on a disk or any fsspec URL.

finetune.json                 the resolved config, its fingerprint, versions, what cleaning removed
checkpoints/step-00000200.pt  model, averaged model, optimiser, step: to go on with
metrics.jsonl                 one line per log interval and validation
tensorboard/                  the same for TensorBoard
model/                        what `annotate` loads: the best by validation; provenance.json beside it
"""

import io
import json
import logging
import pickle
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from owlsam_ray import storage
from owlsam_ray.config import differing_fields
from owlsam_ray.errors import GuardError, IncompleteError, InputError

_log = logging.getLogger(__name__)

RECORD_FILE, METRICS_FILE, MODEL, TENSORBOARD, PROVENANCE = (
    "finetune.json",
    "metrics.jsonl",
    "model",
    "tensorboard",
    "provenance.json",
)
_CHECKPOINTS = "checkpoints"


class TrainingStore:
    """Reads and writes the directory; one process writes, all may read."""

    def __init__(self, url: str) -> None:
        self.url = url

    def guard(self, record: Mapping[str, Any]) -> None:
        """Write `finetune.json`, or refuse a directory that belongs to another training.

        Args:
            record: `config` (what decides what is learned) and more.

        Raises:
            GuardError: names the settings that differ.
        """
        url = storage.join(self.url, RECORD_FILE)
        try:
            stored = json.loads(storage.read_bytes(url))
        except FileNotFoundError:
            storage.write_atomic(url, (json.dumps(record, indent=1) + "\n").encode())
            return
        except ValueError as error:
            raise GuardError(f"{url} is damaged ({error}): choose another directory") from None
        changed = differing_fields(record["config"], stored.get("config", {}))
        if changed:
            raise GuardError(
                f"{self.url} holds a training with other settings; go on with those, or choose another --out:\n  "
                + "\n  ".join(changed)
            )

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint, rising."""
        names = storage.list_names(storage.join(self.url, _CHECKPOINTS))
        return sorted(int(name[5:-3]) for name in names if name.startswith("step-") and name[5:-3].isdigit())

    def save_checkpoint(self, step: int, state: Mapping[str, Any], *, keep: int) -> None:
        """Write a checkpoint whole or not at all, and delete the oldest beyond `keep`.

        Raises:
            IncompleteError: storage refused; earlier checkpoints are as they were.
        """
        data = io.BytesIO()
        torch.save(dict(state), data)
        try:
            storage.write_atomic(self._checkpoint_url(step), data.getbuffer())
        except OSError as error:
            kept = self.checkpoints()
            raise IncompleteError(
                f"cannot save the checkpoint of step {step} in {self.url}: {error.strerror or error}. "
                + (f"The one of step {kept[-1]} is whole. " if kept else "")
                + "Free space or fix the permissions, then call the same command again."
            ) from error
        for old in self.checkpoints()[:-keep]:
            storage.remove(self._checkpoint_url(old))

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The newest checkpoint that can be read, as (step, state); None when there is none.

        Raises:
            InputError: there are checkpoints, and none can be read.
        """
        steps = self.checkpoints()
        for step in reversed(steps):
            try:
                data = storage.read_bytes(self._checkpoint_url(step))
                state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
                _log.warning("the checkpoint of step %d cannot be read (%s)", step, str(error).split("\n")[0])
                continue
            return step, state
        if steps:
            raise InputError(f"no checkpoint in {self.url} can be read: choose another --out, or delete them")
        return None

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; none when there is no such file."""
        try:
            text = storage.read_bytes(storage.join(self.url, METRICS_FILE)).decode()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace `metrics.jsonl`: an object store cannot append, and a resumed training cuts off what it redoes."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        storage.write_atomic(storage.join(self.url, METRICS_FILE), text.encode())

    def put_directory(self, name: str, local: Path, *, last: str | None = None) -> None:
        """Copy a local directory's files below the training's directory, each whole or not at all.

        Args:
            name: of the directory there.
            local: what to copy.
            last: a file that comes last, and without which readers refuse the directory.
        """
        files = sorted(path for path in local.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == last):
            relative = path.relative_to(local).as_posix()
            storage.write_atomic(storage.join(self.url, name, *relative.split("/")), path.read_bytes())

    def _checkpoint_url(self, step: int) -> str:
        return storage.join(self.url, _CHECKPOINTS, f"step-{step:08d}.pt")


def temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    """A local directory for what is copied to the store afterwards."""
    return tempfile.TemporaryDirectory(prefix="owlsam-")
