"""Hash weight files, check tensor layouts, and raise errors that name the first tensors that do not fit."""

import contextlib
import hashlib
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owlsam_ray.errors import OwlsamError, WeightsError, one_line, shown

Shapes = Mapping[str, tuple[int, ...]]

_HASHED_SUFFIXES = {".safetensors", ".json", ".txt"}
_NAMED = 5
_CONFIG_BYTES = 16 * 2**20
_COUNTS = ("layers", "depth", "depths")
"""Endings of setting names that give a number of parts: building a model takes time for each part."""
_MOST_PARTS = 10_000
_LARGEST_SIZE = 2**31


@dataclass(frozen=True, slots=True)
class ModelPaths:
    """Paths of both models' weights, on this machine and identically on every node."""

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


@contextlib.contextmanager
def refused_as_weights(path: Path, what: str) -> Iterator[None]:
    """Turn any error of a library that reads or builds a model from a file into a `WeightsError` about that file.

    Weights are untrusted, and the errors of torch, transformers and tokenizers on damaged ones have no common base.

    Args:
        path: the file or directory.
        what: what is wrong with it, such as `does not describe a SAM`.

    Raises:
        WeightsError: in place of any error except this project's own and a lack of memory.
    """
    try:
        yield
    except (OwlsamError, MemoryError):
        raise
    except Exception as error:
        raise WeightsError(f"{path} {what}: {type(error).__name__}: {one_line(error)}") from error


def check_sizes(fields: object, source: Path, *, num_tensors: int) -> None:
    """Refuse implausible model sizes before the model is built: building it would take forever, or all memory.

    Args:
        fields: plain values of a `config.json`, nested to any depth.
        source: the file, for the message.
        num_tensors: number of tensors in the weight file; a layer has at least one.

    Raises:
        WeightsError: a number is not a possible size of a model, or there are more layers than tensors.
    """
    waiting: list[tuple[str, object]] = [("", fields)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), each) for key, each in value.items()]
        elif isinstance(value, list):
            waiting += [(name, each) for each in value[:_MOST_PARTS]]
        elif isinstance(value, int) and not isinstance(value, bool):
            # For a file without any tensors, the check of names gives a better message.
            most = min(num_tensors or _MOST_PARTS, _MOST_PARTS) if name.endswith(_COUNTS) else _LARGEST_SIZE
            if abs(value) > most:
                raise WeightsError(
                    f"{source} gives {one_line(name, 60)} {shown(value, 40)}, more than the possible {most}: is it the "
                    "config of these weights?"
                )


def read_json(file: Path) -> Any:
    """Read a small JSON file of a model directory, as plain values.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not valid JSON, larger than 16 MB, or nested too deeply.
    """
    with file.open("rb") as opened:
        data = opened.read(_CONFIG_BYTES + 1)
    if len(data) > _CONFIG_BYTES:
        raise ValueError(f"it has more than {_CONFIG_BYTES // 2**20} MB")
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_config(path: Path) -> Any:
    """Read the `config.json` of a directory in Hugging Face layout, as plain values.

    Raises:
        WeightsError: it cannot be read, or is not valid JSON.
    """
    file = path / "config.json"
    try:
        return read_json(file)
    except OSError as error:
        raise WeightsError(f"{path} is not a model directory: cannot read {file.name} ({error.strerror})") from None
    except ValueError as error:
        raise WeightsError(f"{file} is not valid JSON: {one_line(error)}") from None


def find_safetensors(path: Path, model_class: str) -> Path:
    """The weight file of a directory in Hugging Face layout.

    Args:
        path: the directory.
        model_class: transformers' class for converting other files, for the message.

    Raises:
        WeightsError: there is none; says how to make one from a pickle.
    """
    file = path / "model.safetensors"
    if not file.is_file():
        other = (
            "pytorch_model.bin is not loaded, since it may hold code: convert it once with "
            f"{model_class}.from_pretrained(…).save_pretrained(…)"
            if (path / "pytorch_model.bin").is_file()
            else "is it a directory that save_pretrained wrote?"
        )
        raise WeightsError(f"{path} holds no {file.name}; {other}")
    return file


def read_safetensors_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape from the header of a safetensors file; its tensors are not read.

    Raises:
        WeightsError: the file is missing, truncated, or not a safetensors file.
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
    except (struct.error, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise WeightsError(f"{path} is not a safetensors file: export the weights again") from None
    if size < end:
        raise WeightsError(f"{path} is truncated: {size} of {end} bytes; copy or download it again")
    _check_tensors(path)
    return shapes


def _check_tensors(path: Path) -> None:
    """Make the library check types, shapes and offsets of a file's tensors, which it does without reading them.

    Raises:
        WeightsError: they do not fit each other or the file.
    """
    from safetensors import safe_open

    with refused_as_weights(path, "is not a valid safetensors file, export the weights again"), safe_open(path, "np"):
        pass


def check_layout(expected: Shapes, found: Shapes, *, source: str, hint: str, ignored: Iterable[str] = ()) -> None:
    """Compare tensor names and shapes; two empty mappings match.

    Args:
        expected: the tensors that the model needs.
        found: the tensors in the file.
        source: the file, for the message.
        hint: how to fix it, for the message.
        ignored: names that may be in the file although the model does not need them.

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


def check_statistics(source: Path, mean: object, std: object) -> None:
    """Check that means and deviations of the three channels are numbers that can normalise pixels.

    Raises:
        WeightsError: they are not.
    """
    for name, values, least in (("image_mean", mean, -math.inf), ("image_std", std, 0.0)):
        numbers = list(values) if isinstance(values, list | tuple) else []
        fits = len(numbers) == 3 and all(
            isinstance(each, int | float) and math.isfinite(each) and each > least for each in numbers
        )
        if not fits:
            raise WeightsError(f"{source} gives {name} {shown(values)}, which must be three numbers")
