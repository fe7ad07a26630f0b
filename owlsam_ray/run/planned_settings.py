"""Compare the settings of a call with those that a run was planned with."""

from owlsam_ray.config.load import differing_fields
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import GuardError
from owlsam_ray.run.moved_data import without_places
from owlsam_ray.run.paths import RUN_FILE
from owlsam_ray.run.record import RunRecord


def check_config(config: RunConfig, record: RunRecord, *, data_too: bool = True, images_matter: bool = True) -> None:
    """Refuse a config whose frozen fields differ from those of the planned run.

    Weights and vocabulary files are compared by content, elsewhere; a dataset may have moved (`moved_data`).

    Args:
        config: this call's config.
        record: the run's record.
        data_too: whether the section `data` must match too; False when a run is extended.
        images_matter: whether the images are read. If not, they may be anywhere.

    Raises:
        GuardError: fields differ; the message has one line per field.
    """
    ours, theirs = with_planned_suffixes(config, record).frozen_fields(), record.stored_config().frozen_fields()
    if not data_too:
        theirs["data"] = ours["data"]
    theirs, ours = without_places(theirs, ours, any_data=not images_matter)
    lines = differing_fields(ours, theirs)
    if lines:
        unused = f" Nothing is labelled there yet: to plan again, delete its {RUN_FILE}."
        raise GuardError(
            "\n  ".join(
                [
                    f"the run directory {config.run} was planned with other settings (there -> here):",
                    *lines,
                    "Use another --run directory for these settings, or go back to the old ones. "
                    "Sections that may change freely: plan, storage, resources, reduce, evaluate, logging."
                    + (unused if record.fingerprint is None else ""),
                ]
            )
        )


def with_planned_suffixes(config: RunConfig, record: RunRecord) -> RunConfig:
    """Use the run's `data.suffixes` if the caller sets none: the default may have been extended since the plan."""
    if "suffixes" in config.data.model_fields_set:
        return config
    data = config.data.model_copy(update={"suffixes": record.stored_config().data.suffixes})
    return config.model_copy(update={"data": data})
