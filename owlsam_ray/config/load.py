"""The one typed tree that describes a run.

Order of precedence: defaults < YAML files from left to right < `--set a.b=value`. No environment variable is read.
Sections named in `NON_LABEL_FIELDS` say which images, where and how fast; everything else can change labels and is part
of the label fingerprint (law 3).
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from owlsam_ray.config.added_settings import with_added, without_added
from owlsam_ray.config.overrides import parse_override
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.run_file_paths import anchored
from owlsam_ray.config.settings import (
    KINDS,
    Auto,
    DataConfig,
    DecodeConfig,
    DetectorConfig,
    FakesConfig,
    Fraction,
    MappingName,
    Name,
    PositiveInt,
    Section,
    SectionT,
    SegmentConfig,
    SuppressConfig,
    TilingConfig,
    VocabularyConfig,
    is_vocabulary_file,
)
from owlsam_ray.config.yaml_text import MAX_BYTES, load_yaml
from owlsam_ray.errors import ConfigError, one_line, shown
from owlsam_ray.storage import StoragePolicy
from owlsam_ray.storage.addresses import check_entry

NON_LABEL_FIELDS = frozenset(
    {"run", "data", "plan", "storage", "resources", "fakes", "reduce", "evaluate", "report", "logging"}
)
"""Top-level fields that cannot change the labels of an image. Which images there are, and where, stands in the
manifest: the layout hash guards it, so that a run can be extended by files that `data` did not name before."""
FREE_FIELDS = NON_LABEL_FIELDS - {"data"}
"""Top-level fields that may change on a planned run."""


_TOLD = 20
"""Fields that do not validate and are told one by one."""


class PlanConfig(Section):
    """Which of the images, and how the listing is made. Frozen by `plan`: the layout hash covers what it chose."""

    limit: PositiveInt | None = None
    """The first so many images of the listing."""
    sample: PositiveInt | None = None
    """So many images by chance, in the listing's order. A larger sample with the same seed holds the smaller one."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Of the sample."""
    splits: tuple[Name, ...] = ()
    """Only images of these splits: the first folder of their names (`val2017`, `patch8`), or a table's split column."""
    categories: tuple[Annotated[int, Field(ge=0)] | Name, ...] = ()
    """Only images with an annotation of one of these categories (names or ids of the dataset's own list)."""
    verify: Literal["none", "exists", "decode"] = "none"
    """Look at every image before the layout is frozen: `exists` asks the storage for each, `decode` reads it whole."""
    duplicates: Literal["refuse", "first"] = "refuse"
    """What to do with an image that is listed twice: refuse the listing, or keep its first place."""
    damaged_files: Literal["refuse", "keep_whole"] = "refuse"
    """What to do with tar files that are cut or damaged: refuse them, or plan the members before the damage."""
    bad_names: Literal["row", "refuse"] = "row"
    """What to do with rows of tables and COCO files that no image can be read by: make each of them a failed row, or
    refuse the listing for them, and for names that would have to be quoted."""
    workers: PositiveInt | Auto = "auto"
    """Processes that list tar files; `auto`: one per CPU."""
    part_images: PositiveInt = 1_000_000
    """Images in one part of the manifest."""

    @model_validator(mode="after")
    def _one_choice(self) -> Self:
        if self.limit is not None and self.sample is not None:
            raise ValueError(
                "plan.limit and plan.sample both choose among the images: give one, and unset the other with null"
            )
        return self


class StorageConfig(Section):
    """How storage is asked."""

    retries: Annotated[int, Field(ge=0)] = 6
    """Further tries after throttling, a server error, a cut connection or a timeout."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Seconds before the first further try; doubled each time, with jitter."""
    max_backoff_s: Annotated[float, Field(gt=0)] = 30.0
    """Most seconds between two tries."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds until a connection or an answer is given up."""
    concurrency: PositiveInt = 64
    """Open connections of one process."""
    allowed_hosts: tuple[Name, ...] = ()
    """Hosts that addresses out of data may name although they are link-local (169.254.0.0/16, fe80::/10) or a cloud's
    metadata server: names, `*.` before a domain, addresses or networks."""

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_entry(host) for host in hosts)

    def policy(self) -> StoragePolicy:
        """As `storage.configure` takes it."""
        return StoragePolicy(**self.model_dump())


class ResourcesConfig(Section):
    """Where and how fast. `device`, `dtype` and the batch sizes are also part of the numerics id."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA where there is one."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the image towers."""
    actors: PositiveInt | Auto = "auto"
    """Processes that hold both models; `auto`: one per GPU, or one on a CPU machine."""
    cpus_per_actor: Annotated[float, Field(gt=0)] | Auto = "auto"
    """CPUs that Ray reserves for one actor; `auto`: what fetch and write leave, at most 8 beside a GPU."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | Auto = "auto"
    """GPUs that Ray reserves for one actor; 0 on a CPU."""
    detector_batch: PositiveInt | Auto = "auto"
    """Images in one detector call; `auto`: 4 on a CPU, 32 on a GPU."""
    segmenter_batch: PositiveInt | Auto = "auto"
    """Images in one encoder call; `auto`: 2 on a CPU, 16 on a GPU (4 with `segment.model: sam`)."""
    decoder_batch: PositiveInt | Auto = "auto"
    """Boxes in one mask decoder call, rounded up to a multiple of 8; `auto`: 16 on a CPU, 128 on a GPU."""
    decode_threads: PositiveInt | Auto = "auto"
    """Threads in an actor that decode images and encode masks; `auto`: its CPUs, at least 2."""
    torch_threads: PositiveInt | Auto = "auto"
    """Threads of one model call on a CPU; part of the numerics id there. `auto`: a power of two, at most 8 and at most
    the CPUs. Powers of two only keep results free of a row's place in its batch."""
    shards_in_flight: PositiveInt = 2
    """Shards that one actor works on at once, so that the model never waits at a shard's end."""
    shard_size: PositiveInt | Auto = "auto"
    """Images in a shard, frozen at plan; `auto`: images / 64, clamped to 8…1024 and to `shard_max_mb`."""
    shard_max_mb: PositiveInt = 256
    """Encoded bytes that an `auto` shard may hold."""
    wave_shards: PositiveInt = 1000
    """Shards that are handed to Ray at a time."""
    fetch_threads: PositiveInt = 16
    """Files that one fetch task reads at once."""
    fetch_cpus: Annotated[float, Field(gt=0)] = 0.5
    """CPUs of a fetch task. Must differ from the actor's, or Ray would fuse the two."""
    write_cpus: Annotated[float, Field(gt=0)] = 0.25
    """CPUs of a write task."""
    num_cpus: PositiveInt | None = None
    """CPUs of the Ray instance that is started here; default: the machine's."""
    object_store_mb: PositiveInt | None = None
    """Object store of the Ray instance that is started here; default: Ray's own."""
    ray_address: Name | None = None
    """An existing cluster (`auto`, `ip:port`, `ray://…`); default: start one on this machine."""
    auth_mode: Literal["disabled", "token"] = "disabled"
    """RAY_AUTH_MODE of the cluster at `ray_address`; `token` needs the same token on every node. A Ray that is started
    here always asks for a token of its own."""
    grace_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds that shards in hand get to finish after SIGINT, SIGTERM or SIGUSR1."""
    heartbeat_s: Annotated[float, Field(gt=0)] = 10.0
    """Seconds between two signs of life of an attempt."""
    takeover_s: Annotated[float, Field(gt=0)] = 60.0
    """An attempt without a sign of life for so long is taken over by the next one, which waits that long for it."""
    image_deadline_s: Annotated[float, Field(gt=0)] = 300.0
    """Seconds that one image may take to be decoded or encoded, or one call of a model; an actor that hangs for longer
    is ended, and the image that did it is found and quarantined."""
    fetch_deadline_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds of a shard's fetching in which not a single image arrives, after which the rest fails as
    `fetch_timeout`, to be tried again at the end."""
    actor_memory_gb: Annotated[float, Field(gt=0)] | Auto = "auto"
    """Gigabytes (10⁹ bytes) of an actor's own memory; above, it is ended as if it hung. `auto`: 80 % of the node's."""

    @model_validator(mode="after")
    def _several_beats(self) -> Self:
        if self.takeover_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"takeover_s {self.takeover_s:g} is less than two times heartbeat_s {self.heartbeat_s:g}: an attempt "
                "that lives would be taken over"
            )
        return self


def allowed_failures(max_failed: int | float, num_images: int) -> int:
    """Failed images that `reduce.max_failed` puts up with: an integer is a count, a float is a share."""
    return max_failed if isinstance(max_failed, int) else math.floor(max_failed * num_images)


class EvaluateConfig(Section):
    """How good the labels are, against a ground truth."""

    ground_truth: Name | None = None
    """A COCO or LVIS JSON file with annotations; default: `data.annotations` where that is given."""
    score_threshold: Fraction = 0.3
    """Precision, recall, mIoU and Dice are of the predictions whose score is at least this. AP is of all."""
    iou_threshold: Fraction = 0.5
    """A prediction finds an object when their IoU is at least this."""
    size_edges_px: tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...] = (32.0, 96.0)
    """Sides in pixels, rising, that divide the rows per size. An object's side is the root of its box's w × h."""
    mapping: MappingName | None = None
    """Score predictions of one dataset's categories on another's ground truth: LVIS v1 and COCO meet by synset (79 of
    COCO's 80), Objects365 v2 becomes COCO by a table of names. Predictions of categories without a counterpart are left
    out and counted."""

    @field_validator("size_edges_px")
    @classmethod
    def _edges_rise(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(high <= low for low, high in pairwise(value)):
            raise ValueError(f"size_edges_px must rise, and {list(value)} does not")
        return value


class LoggingConfig(Section):
    """What is told to people."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the log on stderr."""
    progress_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two looks at the progress."""


class RunConfig(Section):
    """A whole run."""

    run: Name | None = None
    """The run directory: a path or an fsspec URL. `--run` replaces it."""
    data: DataConfig
    vocabulary: VocabularyConfig = VocabularyConfig()
    decode: DecodeConfig = DecodeConfig()
    detector: DetectorConfig
    tiling: TilingConfig = TilingConfig()
    suppress: SuppressConfig = SuppressConfig()
    segment: SegmentConfig
    plan: PlanConfig = PlanConfig()
    storage: StorageConfig = StorageConfig()
    resources: ResourcesConfig = ResourcesConfig()
    fakes: FakesConfig = FakesConfig()
    reduce: ReduceConfig = ReduceConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _reduce_decides_about_what_is_there(self) -> Self:
        floor = self.detector.score_floor
        asked = {"score_threshold": self.reduce.score_threshold} | {
            f"score_thresholds.{name}": value for name, value in self.reduce.score_thresholds.items()
        }
        for name, threshold in asked.items():
            if threshold is not None and threshold < floor:
                raise ValueError(
                    f"reduce.{name} {threshold} is below detector.score_floor {floor}: inference did not keep those "
                    "boxes"
                )
        if self.reduce.suppress is not None and self.reduce.mapping is None:  # which may join what never met
            _check_stricter(self.reduce.suppress, self.suppress)
        return self

    @model_validator(mode="after")
    def _tiles_are_merged(self) -> Self:
        if self.tiling.size is not None and self.suppress.strategy == "none":
            raise ValueError(
                "tiling.size with suppress.strategy: none would leave an object once for every tile that sees it: take "
                "nms, soft_nms or merge"
            )
        return self

    def label_fields(self) -> dict[str, Any]:
        """The part that can change labels, as plain JSON values; without added settings that change nothing."""
        return without_added(self, exclude=set(NON_LABEL_FIELDS))

    def frozen_fields(self) -> dict[str, Any]:
        """The part that a plan freezes: what can change labels, and which images there are.

        Without added settings that change nothing, as `label_fields`.
        """
        return without_added(self, exclude=set(FREE_FIELDS))


def _check_stricter(late: SuppressConfig, early: SuppressConfig) -> None:
    """Refuse a suppression at reduce that would bring back what the one at inference has removed.

    Raises:
        ValueError: says what differs.
    """
    if late.strategy == "none" or early.strategy not in ("nms", "merge") or late.strategy == "soft_nms":
        return
    if (late.overlap, late.across_labels) != (early.overlap, early.across_labels):
        return
    there, here = (0.7 if each.threshold is None else each.threshold for each in (early, late))
    looser = {"threshold": (here, there)} if here > there and set(early.thresholds) == set(late.thresholds) else {}
    for name, value in late.thresholds.items():
        if value > early.thresholds.get(name, there):
            looser[f"thresholds.{name}"] = (value, early.thresholds.get(name, there))
    for name, (value, before) in looser.items():
        raise ValueError(
            f"reduce.suppress.{name} {value:g} is looser than suppress.threshold {before:g}, with which inference has "
            "removed boxes already: nothing brings these back. Take a smaller one, or leave reduce.suppress out"
        )


def load_config(files: Sequence[str | Path], *, overrides: Iterable[str] = (), run: str | None = None) -> RunConfig:
    """Read YAML files, merge them left to right, apply overrides, validate.

    Args:
        files: at least one; a later file's keys win, sections merge key by key, lists are replaced.
        overrides: `a.b=value`, see `overrides`.
        run: the run directory, over the files' `run`.

    Local paths are made absolute, so that the stored config means the same from any directory.

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
    """As `load_config`, but what a plan freezes and the files do not say is that of a planned run.

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
    except ConfigError:  # of settings that contradict the run's: the guard tells which, if they are sound by themselves
        return load_config(files, overrides=overrides, run=run)


def _lines(error: ValidationError, prefix: str = "") -> list[str]:
    """One line for each field that does not validate, of the first ones; values and names are cut."""
    lines = []
    for item in error.errors(include_url=False, include_context=False)[:_TOLD]:
        place = ".".join(one_line(part, 60) for part in item["loc"] if part not in KINDS) or "(run file)"
        got = "" if isinstance(item["input"], dict) else f" (got {shown(item['input'])})"
        lines.append(f"  {prefix}{place}: {one_line(item['msg'], 1000)}{got}")
    more = error.error_count() - len(lines)
    return [*lines, f"  and {more} more"] if more > 0 else lines


def load_evaluate_settings(overrides: Iterable[str]) -> EvaluateConfig:
    """The section `evaluate` without a run file: defaults, then overrides `evaluate.field=value`.

    Raises:
        ConfigError: an override is of another section, or does not validate; names it.
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
    """YAML files merged from left to right, then overrides `a.b=value`; not validated yet.

    Paths of inputs that are not found from the working directory are taken from the file's folder, where they are
    found from there (`run_file_paths`).

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
    """A tree of plain values as a config.

    Args:
        kind: of the whole config.
        tree: of `load_tree`.
        files: where it came from, for the message.
        what: it is, for the message.

    Raises:
        ConfigError: names every key that is wrong, and what it got.
    """
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        names = ", ".join(str(file) for file in files)
        raise ConfigError(
            "\n".join([f"{names}: {error.error_count()} error(s) in the {what}", *_lines(error)])
        ) from None


def config_from_stored(fields: Mapping[str, Any]) -> RunConfig:
    """The config that a run directory stores; what it lacks, as settings that were added since, is as it was before.

    Raises:
        ConfigError: it was written by a version with other fields.
    """
    try:
        return RunConfig.model_validate(with_added(RunConfig, fields))
    except ValidationError as error:
        told = "\n".join(["the stored run config does not load in this version:", *_lines(error)])
        raise ConfigError(told) from None


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
    except ValueError as error:  # also of UTF-8
        raise ConfigError(f"run file {path} is not valid YAML: {one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"run file {path} must hold sections, not a {type(tree).__name__}")
    return {key: value for key, value in tree.items() if not _holds_anchors(key)}


def _holds_anchors(key: object) -> bool:
    """Whether a top-level key is only there for what it holds to be named and reused: `x`, or `x-…`."""
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
    """A config whose local paths are absolute; URLs and hub names stay."""
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
    """A local path made absolute, a hub name as it is.

    A hub name ("org/model") looks like a relative path: it is one when it exists, or when it starts like one.
    """
    is_path = weights.startswith(("/", ".", "~")) or os.path.exists(weights)
    return absolute(weights) if is_path else weights


def absolute(path_or_url: str) -> str:
    """An fsspec URL as it is; a local path with `~` expanded and made absolute."""
    return path_or_url if "://" in path_or_url else os.path.abspath(os.path.expanduser(path_or_url))
