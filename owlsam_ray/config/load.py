"""Load and validate a run's configuration from layered YAML files and overrides.

Order of precedence: defaults < YAML files from left to right < `--set a.b=value`. No environment variable is read.
Sections named in `NON_LABEL_FIELDS` decide which images, where and how fast; everything else can change labels and is
part of the label fingerprint (law 3).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import (
    ValidationError,
)

from owlsam_ray.config.added_settings import with_added
from owlsam_ray.config.base import KINDS, SectionT
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.config.overrides import parse_override
from owlsam_ray.config.run import FREE_FIELDS, RunConfig
from owlsam_ray.config.run_file_paths import anchored
from owlsam_ray.config.vocabulary import is_vocabulary_file
from owlsam_ray.config.yaml_text import MAX_BYTES, load_yaml
from owlsam_ray.errors import ConfigError, one_line, shown

_MOST_PROBLEMS = 20
"""Maximum number of invalid fields that are reported one by one."""


def load_config(files: Sequence[str | Path], *, overrides: Iterable[str] = (), run: str | None = None) -> RunConfig:
    """Read YAML files, merge them left to right, apply overrides, validate.

    Local paths are made absolute, so that the stored config means the same from any directory.

    Args:
        files: at least one; a later file's keys win, sections merge key by key, lists are replaced.
        overrides: `a.b=value`, see `overrides`.
        run: the run directory; replaces the files' `run`.

    Raises:
        ConfigError: a file cannot be read or parsed, or the result does not validate; names the file or the key.
    """
    merged = load_tree(files, overrides)
    if run is not None:
        merged["run"] = run
    return with_absolute_paths(validate_tree(RunConfig, merged, files))


def with_frozen_of(
    stored: RunConfig, files: Sequence[str | Path], *, overrides: Iterable[str] = (), run: str | None = None
) -> RunConfig:
    """Like `load_config`, but frozen settings that the files leave out are taken from a planned run.

    Raises:
        ConfigError: as `load_config`.
    """
    overrides = list(overrides)
    merged = load_tree(files, overrides)
    if run is not None:
        merged["run"] = run
    frozen = stored.model_dump(mode="json", exclude=set(FREE_FIELDS))
    try:
        return with_absolute_paths(validate_tree(RunConfig, _merge(frozen, merged), files))
    except ConfigError:  # settings that contradict the run's: the guard says which, if they are valid without the run's
        return load_config(files, overrides=overrides, run=run)


def _lines(error: ValidationError, prefix: str = "") -> list[str]:
    """One line per invalid field, up to `_MOST_PROBLEMS` of them; values and names are shortened."""
    lines = []
    for item in error.errors(include_url=False, include_context=False)[:_MOST_PROBLEMS]:
        place = ".".join(one_line(part, 60) for part in item["loc"] if part not in KINDS) or "(run file)"
        got = "" if isinstance(item["input"], dict) else f" (got {shown(item['input'])})"
        lines.append(f"  {prefix}{place}: {one_line(item['msg'].removeprefix('Value error, '), 1000)}{got}")
    more = error.error_count() - len(lines)
    return [*lines, f"  and {more} more"] if more > 0 else lines


def load_evaluate_settings(overrides: Iterable[str]) -> EvaluateConfig:
    """Load the section `evaluate` without a run file: defaults, then overrides `evaluate.field=value`.

    Raises:
        ConfigError: an override belongs to another section, or does not validate; names it.
    """
    merged: dict[str, Any] = {}
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    others = sorted(set(merged) - {"evaluate"})
    if others:
        raise ConfigError(f"--set {others[0]}…: without a run file only the section `evaluate` can be set")
    try:
        return EvaluateConfig.model_validate(merged.get("evaluate", {}))
    except ValidationError as error:
        raise ConfigError(
            "\n".join([f"{error.error_count()} error(s) in --set", *_lines(error, "evaluate.")])
        ) from None


def load_tree(files: Sequence[str | Path], overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Merge YAML files from left to right, then apply overrides `a.b=value`; the result is not validated yet.

    An input path that does not exist relative to the working directory is resolved against the file's folder if it
    exists there (`run_file_paths`).

    Raises:
        ConfigError: a file or an override cannot be read or parsed.
    """
    merged: dict[str, Any] = {}
    for file in files:
        merged = _merge(merged, anchored(_read_yaml(Path(file)), os.path.dirname(file)))
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return merged


def validate_tree(
    kind: type[SectionT], tree: dict[str, Any], files: Sequence[str | Path], *, what: str = "run config"
) -> SectionT:
    """Validate a tree of plain values as a config.

    Args:
        kind: the model of the whole config.
        tree: plain values, as from `load_tree`.
        files: the files it came from, for the message.
        what: what the config is called in the message.

    Raises:
        ConfigError: names every wrong key and the value it got.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        names = ", ".join(str(file) for file in files)
        raise ConfigError(
            "\n".join([f"{names}: {error.error_count()} error(s) in the {what}", *_lines(error)])
        ) from None


def config_from_stored(fields: Mapping[str, Any]) -> RunConfig:
    """The config that a run directory stores; settings added since then get the value from before they existed.

    Raises:
        ConfigError: it was written by a version with other fields.
    """
    try:
        return RunConfig.model_validate(with_added(RunConfig, fields))
    except ValidationError as error:
        message = "\n".join(["the stored run config does not load in this version:", *_lines(error)])
        raise ConfigError(message) from None


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `a.b: theirs -> ours` for every leaf in which two trees of plain values differ."""
    lines: list[str] = []
    for key in sorted({*ours, *theirs}):
        mine, other = ours.get(key), theirs.get(key)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            lines += differing_fields(mine, other, f"{prefix}{key}.")
        elif mine != other:
            lines.append(f"{prefix}{key}: {shown(other)} -> {shown(mine)}")
    return lines


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"run file {path} has more than {MAX_BYTES // 2**20} MB: is it a run file?")
        tree = load_yaml(data.decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read run file {path}: {error.strerror}") from None
    except ValueError as error:  # also invalid UTF-8
        raise ConfigError(f"run file {path} is not valid YAML: {one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"run file {path} must hold sections, not a {type(tree).__name__}")
    return {key: value for key, value in tree.items() if not _holds_anchors(key)}


def _holds_anchors(key: object) -> bool:
    """Whether a top-level key, `x` or `x-…`, exists only to hold YAML anchors for reuse."""
    return isinstance(key, str) and (key == "x" or key.startswith("x-"))


def _parse_override(text: str) -> dict[str, Any]:
    return parse_override(text, load_yaml)


def _merge(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(left)
    for key, value in right.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The config with its local paths made absolute; URLs and hub names are unchanged."""
    data = config.data.model_copy(
        update={
            "images": absolute(config.data.images) if config.data.images else None,
            "annotations": absolute(config.data.annotations) if config.data.annotations else None,
            "files": tuple(absolute(file) for file in config.data.files),
        }
    )
    exemplars = [
        exemplar.model_copy(update={"image": absolute(exemplar.image)}) for exemplar in config.vocabulary.exemplars
    ]
    categories = config.vocabulary.categories
    vocabulary = config.vocabulary.model_copy(
        update=({"exemplars": tuple(exemplars)} if exemplars else {})
        | ({"categories": absolute(str(categories))} if is_vocabulary_file(categories) else {})
    )
    segment_weights = config.segment.weights
    if config.segment.model == "mobile_sam":
        segment_weights = absolute(segment_weights)
    return config.model_copy(
        update={
            "run": absolute(config.run) if config.run else None,
            "data": data,
            "vocabulary": vocabulary,
            "detector": config.detector.model_copy(update={"weights": path_or_hub_name(config.detector.weights)}),
            "segment": config.segment.model_copy(update={"weights": path_or_hub_name(segment_weights)}),
            "reduce": config.reduce.model_copy(
                update={
                    name: absolute(value)
                    for name in ("out", "operating_points", "corrections", "corrections_base", "scratch")
                    if (value := getattr(config.reduce, name))
                }
            ),
            "evaluate": config.evaluate.model_copy(
                update={"ground_truth": absolute(config.evaluate.ground_truth)} if config.evaluate.ground_truth else {}
            ),
        }
    )


def path_or_hub_name(weights: str) -> str:
    """Make a local path absolute; leave a hub name unchanged.

    A hub name ("org/model") looks like a relative path: it counts as a path if it exists, or starts with /, . or ~.
    """
    is_path = weights.startswith(("/", ".", "~")) or os.path.exists(weights)
    return absolute(weights) if is_path else weights


def absolute(path_or_url: str) -> str:
    """Leave an fsspec URL unchanged; expand `~` in a local path and make it absolute."""
    return path_or_url if "://" in path_or_url else os.path.abspath(os.path.expanduser(path_or_url))
