"""The whole run file: all sections, and which of them decide the labels."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from owlsam_ray.config.added_settings import without_added
from owlsam_ray.config.base import Name, PositiveInt, Section
from owlsam_ray.config.data import DataConfig, PlanConfig
from owlsam_ray.config.evaluate import EvaluateConfig
from owlsam_ray.config.inference import (
    DecodeConfig,
    DetectorConfig,
    FakesConfig,
    SegmentConfig,
    SuppressConfig,
    TilingConfig,
)
from owlsam_ray.config.reduce import ReduceConfig
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.config.vocabulary import VocabularyConfig
from owlsam_ray.storage import StoragePolicy
from owlsam_ray.storage.addresses import check_entry

NON_LABEL_FIELDS = frozenset(
    {"run", "data", "plan", "storage", "resources", "fakes", "reduce", "evaluate", "report", "logging"}
)
"""Top-level fields that cannot change the labels of an image. Which images there are, and where, is in the manifest,
which the layout hash guards, so that a run can be extended by files that `data` did not name before."""

FREE_FIELDS = NON_LABEL_FIELDS - {"data"}
"""Top-level fields that may change on a planned run."""


class StorageConfig(Section):
    """How requests to storage are made and retried."""

    retries: Annotated[int, Field(ge=0)] = 6
    """Retries after throttling, a server error, a cut connection or a timeout."""
    backoff_s: Annotated[float, Field(gt=0)] = 0.5
    """Seconds before the first retry; doubled each time, with jitter."""
    max_backoff_s: Annotated[float, Field(gt=0)] = 30.0
    """Maximum seconds between two tries."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds until a connection attempt or a pending answer is given up."""
    concurrency: PositiveInt = 64
    """Open connections per process."""
    allowed_hosts: tuple[Name, ...] = ()
    """Hosts that addresses found in data may name although they are link-local (169.254.0.0/16, fe80::/10) or a cloud's
    metadata server: names, `*.` before a domain, addresses or networks."""

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_entry(host) for host in hosts)

    def policy(self) -> StoragePolicy:
        """The settings in the form that `storage.configure` takes."""
        return StoragePolicy(**self.model_dump())


class LoggingConfig(Section):
    """What is logged and shown."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Level of the log on stderr."""
    progress_s: Annotated[float, Field(gt=0)] = 5.0
    """Seconds between two updates of the progress."""


class RunConfig(Section):
    """The configuration of a whole run."""

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
        if self.reduce.suppress is not None and self.reduce.mapping is None:  # a mapping may join separate categories
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
        """The part that can change labels, as plain JSON values, without added settings that change nothing."""
        return without_added(self, exclude=set(NON_LABEL_FIELDS))

    def frozen_fields(self) -> dict[str, Any]:
        """The part that a plan freezes: what can change labels, and which images there are.

        Added settings that change nothing are left out, as in `label_fields`.
        """
        return without_added(self, exclude=set(FREE_FIELDS))


def _check_stricter(late: SuppressConfig, early: SuppressConfig) -> None:
    """Refuse a suppression at reduce that is looser than the one at inference: removed boxes cannot come back.

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
