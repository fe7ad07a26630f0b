"""A planned run, opened once a command and passed whole: its record, its manifest, and the settings of this call."""

from dataclasses import dataclass, replace

from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import GuardError, IncompleteError, InputError
from owlsam_ray.run.manifest import Manifest, load_manifest
from owlsam_ray.run.moved_data import Move, moves_between
from owlsam_ray.run.paths import RUN_FILE
from owlsam_ray.run.planned_settings import check_config, with_planned_suffixes
from owlsam_ray.run.record import RunRecord, load_record, run_directory


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A planned run as its directory describes it, for commands without a run file."""

    record: RunRecord
    """Content of `run.json`."""
    manifest: Manifest
    """The images and their shards."""

    @property
    def url(self) -> str:
        """Path or fsspec URL of the run directory."""
        return self.manifest.run_url


@dataclass(frozen=True, slots=True)
class Run(StoredRun):
    """A planned run, opened by a call whose settings match it. Small: it is sent to every process of an attempt."""

    config: RunConfig
    """Settings of this call."""

    @property
    def moves(self) -> tuple[Move, ...]:
        """Roots of the dataset that this call names elsewhere than the plan did."""
        return moves_between(self.record.config.get("data", {}), self.config.data.model_dump(mode="json"))

    def with_moves(self) -> "Run":
        """The run with URIs under the new roots. The files there are not looked at: see `plan.moved_images`."""
        return replace(self, manifest=self.manifest.with_moves(self.moves))


def open_stored_run(run_url: str, *, verify: bool = True) -> StoredRun:
    """Open a run directory as it is, without the settings of a call.

    Args:
        run_url: the run directory.
        verify: compare the manifest with its hashes, which reads its files completely.

    Raises:
        InputError: the directory holds no run.
        GuardError: `run.json` or the manifest is damaged, or the manifest is missing.
    """
    record = load_record(run_url)
    if record is None:
        raise InputError(f"{run_url} holds no run (no {RUN_FILE})")
    return StoredRun(record, _manifest_of(run_url, record, verify=verify))


def open_run(config: RunConfig, *, extending: bool = False) -> Run | None:
    """Open the run of a config to label its images; None if it is not planned yet.

    Args:
        config: settings of this call. Unless they set `data.suffixes`, the run's suffixes apply.
        extending: accept other settings under `data`, because images are to be added.

    Raises:
        ConfigError: the config names no run directory.
        GuardError: the run was planned with other settings, or its manifest is missing or damaged.
    """
    record = load_record(run_directory(config))
    if record is None:
        return None
    check_config(config, record, data_too=not extending)
    return reopen_run(with_planned_suffixes(config, record), record)


def open_labelled_run(config: RunConfig) -> Run:
    """Open a run to use its labels. The images are not read, so they may be anywhere.

    Raises:
        ConfigError: the config names no run directory.
        InputError: there is no run.
        GuardError: the run was planned with other settings, or its manifest is missing or damaged.
        IncompleteError: nothing was labelled yet.
    """
    run_url = run_directory(config)
    record = load_record(run_url)
    if record is None:
        raise InputError(f"{run_url} holds no run (no {RUN_FILE}): run `owlsam plan` and `owlsam annotate` first")
    check_config(config, record, images_matter=False)
    run = reopen_run(config, record)
    if record.fingerprint is None:
        raise IncompleteError(f"nothing was labelled in {run_url} yet: run `owlsam annotate`")
    return run


def reopen_run(config: RunConfig, record: RunRecord) -> Run:
    """Open a run whose record is at hand and matches the config, such as one that another process has opened.

    Raises:
        GuardError: the manifest is missing or damaged, or is not the one of the record.
    """
    return Run(record, _manifest_of(run_directory(config), record, verify=True), config)


def _manifest_of(run_url: str, record: RunRecord, *, verify: bool) -> Manifest:
    """Load the manifest of a planned run; with `verify`, compare it with its hashes."""
    manifest = load_manifest(run_url, verify=verify, num_parts=record.num_parts)
    if manifest is None:
        raise GuardError(f"{run_url}/manifest is missing: restore it, or plan again in another directory")
    if verify and manifest.layout_hash != record.layout_hash:
        raise GuardError(
            f"the manifest of {run_url} has the layout hash {manifest.layout_hash[:16]}, but the run was planned with "
            f"{record.layout_hash[:16]}: restore {run_url}/manifest, or use another directory"
        )
    return manifest
