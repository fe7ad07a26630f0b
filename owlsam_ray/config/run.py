"""The whole run file: all sections, and which of them decide the labels."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    field_validator,
)

from owlsam_ray.config import rules
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


_POLICY = StoragePolicy()
"""Where the defaults of the section `storage` come from."""


class StorageConfig(Section):
    """How requests to storage are made and retried."""

    retries: Annotated[int, Field(ge=0)] = _POLICY.retries
    """Retries after throttling, a server error, a cut connection or a timeout."""
    backoff_s: Annotated[float, Field(gt=0)] = _POLICY.backoff_s
    """Seconds before the first retry; doubled each time, with jitter."""
    max_backoff_s: Annotated[float, Field(gt=0)] = _POLICY.max_backoff_s
    """Maximum seconds between two tries."""
    timeout_s: Annotated[float, Field(gt=0)] = _POLICY.timeout_s
    """Seconds until a connection attempt or a pending answer is given up."""
    concurrency: PositiveInt = _POLICY.concurrency
    """Open connections per process."""
    allowed_hosts: tuple[Name, ...] = _POLICY.allowed_hosts
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

    RULES: ClassVar = rules.RUN

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

    def label_fields(self) -> dict[str, Any]:
        """The part that can change labels, as plain JSON values, without added settings that change nothing."""
        return without_added(self, exclude=set(NON_LABEL_FIELDS))

    def frozen_fields(self) -> dict[str, Any]:
        """The part that a plan freezes: what can change labels, and which images there are.

        Added settings that change nothing are left out, as in `label_fields`.
        """
        return without_added(self, exclude=set(FREE_FIELDS))
