"""Weight files: hashes, tensor layouts, and errors that name the first tensors that do not fit."""

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owlsam_ray.errors import WeightsError

Shapes = Mapping[str, tuple[int, ...]]

_HASHED_SUFFIXES = {".safetensors", ".json", ".txt"}
_NAMED = 5


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Where the weights of both models lie on this machine, and at the same path on every node."""

    detector: Path
    segmenter: Path


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file; of a directory, over names and contents of its weight, config and vocabulary files.

    In a directory only `*.safetensors`, `*.json` and `*.txt` count, in order of their names: what a loader may read.

    Raises:
        WeightsError: there is no such file, or it cannot be read.
    """
    try:
        if path.is_file():
            return _sha256_of_file(path)
        digest = hashlib.sha256()
        for file in sorted(file for file in path.iterdir() if file.is_file() and file.suffix in _HASHED_SUFFIXES):
            digest.update(f"{file.name}\0{_sha256_of_file(file)}\n".encode())
        return digest.hexdigest()
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from None


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(path: Path) -> Any:
    """The `config.json` of a directory in Hugging Face layout, as plain values.

    Raises:
        WeightsError: it cannot be read, or is not valid JSON.
    """
    file = path / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} is no model directory: cannot read {file.name} ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {error}") from None


def find_safetensors(path: Path, model_class: str) -> Path:
    """The weight file of a directory in Hugging Face layout.

    Args:
        path: the directory.
        model_class: of transformers, which converts other files.

    Raises:
        WeightsError: there is none; says how to make one of a pickle.
    """
    file = path / "model.safetensors"
    if not file.is_file():
        other = (
            "pytorch_model.bin is not loaded, it may hold code: convert it once with "
            f"{model_class}.from_pretrained(…).save_pretrained(…)"
            if (path / "pytorch_model.bin").is_file()
            else "is it a directory that save_pretrained wrote?"
        )
        raise WeightsError(f"{path} holds no {file.name}; {other}")
    return file


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape from the header of a safetensors file; its tensors are not read.

    Raises:
        WeightsError: the file is missing, cut off, or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                raise WeightsError(f"{path} is not a safetensors file (its header claims {length} bytes)")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    except OSError as error:
        raise WeightsError(f"cannot read weights {path}: {error.strerror}") from None
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise WeightsError(f"{path} is not a safetensors file: export the weights again") from None
    if size < end:
        raise WeightsError(f"{path} is cut off: {size} of {end} bytes; copy or download it again")
    return shapes


def check_layout(expected: Shapes, found: Shapes, *, source: str, hint: str, ignored: Iterable[str] = ()) -> None:
    """Compare tensor names and shapes; two empty mappings fit.

    Args:
        expected: what the model needs.
        found: what the file has.
        source: the file, for the message.
        hint: the way out.
        ignored: names that may be in the file though the model does not need them.

    Raises:
        WeightsError: names the first tensors that are missing, unexpected, or of another shape.
    """
    known = {*expected, *ignored}
    missing = [f"{name} {tuple(expected[name])}" for name in expected if name not in found]
    unexpected = [f"{name} {tuple(found[name])}" for name in found if name not in known]
    misshapen = [
        f"{name} {tuple(found[name])} instead of {tuple(expected[name])}"
        for name in expected
        if name in found and tuple(found[name]) != tuple(expected[name])
    ]
    lines = [
        f"  {len(names)} {what}: {', '.join(names[:_NAMED])}{', …' if len(names) > _NAMED else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if lines:
        raise WeightsError("\n".join([f"{source} does not fit the model:", *lines, f"  {hint}"]))
