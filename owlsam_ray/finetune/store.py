"""Read and write a training's directory, on a disk or any fsspec URL.

finetune.json                 the resolved config, its fingerprint, versions, what cleaning removed
checkpoints/step-00000200.pt  model, averaged model, optimiser, step: to resume from
metrics.jsonl                 one line per log interval and validation
tensorboard/                  the same for TensorBoard
model/                        what `annotate` loads: the best by validation; provenance.json beside it
"""

import contextlib
import io
import json
import logging
import pickle
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from owlsam_ray import storage
from owlsam_ray.config.load import differing_fields
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
    """Read and write the directory; one process writes, all may read."""

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
        except (ValueError, RecursionError) as error:
            raise GuardError(f"{url} is damaged ({error}): choose another directory") from None
        guarded = ("config", "data_sha256", "categories")
        ours, theirs = ({name: each.get(name) for name in guarded} for each in (record, stored))
        changed = differing_fields(ours, theirs)
        if changed:
            raise GuardError(
                f"{self.url} holds a training with other settings or data; continue with those, or choose another "
                "--out:\n  " + "\n  ".join(changed)
            )
        if stored.get("versions") != record.get("versions"):
            _log.warning("library versions have changed: the last digits may differ from here on")

    def read_record(self) -> dict[str, Any]:
        """Read what `guard` wrote; empty when there is nothing.

        Raises:
            GuardError: the file is damaged.
        """
        url = storage.join(self.url, RECORD_FILE)
        try:
            record: dict[str, Any] = json.loads(storage.read_bytes(url))
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError) as error:
            raise GuardError(f"{url} is damaged ({error}): choose another directory") from None
        return record

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint, ascending."""
        names = storage.list_names(storage.join(self.url, _CHECKPOINTS))
        return sorted(int(name[5:-3]) for name in names if name.startswith("step-") and name[5:-3].isdigit())

    def save_checkpoint(self, step: int, state: Mapping[str, Any], *, keep: int) -> None:
        """Write a checkpoint completely or not at all, and delete the oldest beyond `keep`.

        Raises:
            IncompleteError: storage refused; earlier checkpoints are unchanged.
        """
        with (
            self._explained_errors(f"the checkpoint of step {step}"),
            storage.open_atomic(self._checkpoint_url(step)) as file,
        ):
            torch.save(dict(state), file)
        for old in self.checkpoints()[:-keep]:
            storage.remove(self._checkpoint_url(old))
        storage.remove_stale_temporaries(storage.join(self.url, _CHECKPOINTS))

    @contextlib.contextmanager
    def _explained_errors(self, what: str) -> Iterator[None]:
        """Convert a refusal of the storage to an error that says what is kept and what to do."""
        try:
            yield
        # torch's writer wraps errors of the file.
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            kept = self.checkpoints()
            raise IncompleteError(
                f"cannot save {what} in {self.url}: {cause.strerror or cause}. "
                + (f"The checkpoint of step {kept[-1]} is intact. " if kept else "")
                + "Free space or fix the permissions, then run the same command again."
            ) from error

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """Return the newest readable checkpoint as (step, state); None when there is none.

        Raises:
            IncompleteError: storage does not answer; the checkpoints may be fine.
            InputError: there are checkpoints, and all of them are damaged.
        """
        steps = self.checkpoints()
        for step in reversed(steps):
            try:
                data = storage.read_bytes(self._checkpoint_url(step))
            except FileNotFoundError:
                continue  # another process has just replaced it by a newer one
            except OSError as error:
                raise IncompleteError(
                    f"cannot read the checkpoint of step {step} in {self.url}: {error}. Run the same command again."
                ) from error
            try:
                state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except (EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
                _log.warning("the checkpoint of step %d is damaged (%s)", step, str(error).split("\n")[0])
                continue
            return step, state
        if steps:
            raise InputError(f"every checkpoint in {self.url} is damaged: choose another --out, or delete them")
        return None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Read the lines of `metrics.jsonl`; none when there is no such file.

        Raises:
            GuardError: the file is damaged.
        """
        url = storage.join(self.url, METRICS_FILE)
        try:
            return [json.loads(line) for line in storage.read_bytes(url).decode().splitlines()]
        except FileNotFoundError:
            return []
        except (ValueError, RecursionError) as error:
            raise GuardError(
                f"{url} is damaged ({error}): delete the damaged lines, or choose another directory"
            ) from None

    def write_metrics(self, lines: list[dict[str, Any]]) -> None:
        """Replace `metrics.jsonl`: object stores cannot append, and a resumed training drops repeated steps."""
        text = "".join(json.dumps(line) + "\n" for line in lines)
        with self._explained_errors(METRICS_FILE):
            storage.write_atomic(storage.join(self.url, METRICS_FILE), text.encode())

    def put_directory(self, name: str, local: Path, *, last: str | None = None) -> None:
        """Copy a local directory's files into the training's directory, each completely or not at all.

        Args:
            name: name of the directory in the store.
            local: the directory to copy.
            last: a file that is copied last, and without which readers refuse the directory.
        """
        files = sorted(path for path in local.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == last):
            relative = path.relative_to(local).as_posix()
            with self._explained_errors(f"{name}/{relative}"):
                storage.write_atomic(storage.join(self.url, name, *relative.split("/")), path.read_bytes())

    def _checkpoint_url(self, step: int) -> str:
        return storage.join(self.url, _CHECKPOINTS, f"step-{step:08d}.pt")


def temporary_directory() -> "tempfile.TemporaryDirectory[str]":
    """A local directory for files that are copied to the store afterwards."""
    return tempfile.TemporaryDirectory(prefix="owlsam-")
