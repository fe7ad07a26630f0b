"""A finished run → its label files."""

import logging
from dataclasses import asdict
from typing import Any

from owlsam_ray import __version__
from owlsam_ray.config import RunConfig
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.guard import check_config, check_writable, load_record, load_run_manifest, run_directory
from owlsam_ray.reduce.coco import CocoSettings, reduce_coco

_log = logging.getLogger(__name__)


def reduce_run(config: RunConfig) -> dict[str, Any]:
    """Merge all shards of a run into `coco/annotations.json`, and prove that every image is accounted for.

    Raises:
        InputError: there is no run.
        GuardError: the run was made with other settings.
        IncompleteError: shards are missing or damaged, or the proof does not add up.
    """
    run_url = run_directory(config)
    record = load_record(run_url)
    if record is None:
        raise InputError(f"{run_url} holds no run (no run.json): call `owlsam plan` and `owlsam annotate` first")
    check_config(config, record)
    check_writable(run_url)
    manifest = load_run_manifest(run_url, record)
    if record.fingerprint is None:
        raise IncompleteError(f"nothing was labelled in {run_url} yet: call `owlsam annotate`")
    parts = record.fingerprint_parts or {}
    result = reduce_coco(
        run_url,
        manifest,
        CocoSettings(
            categories=record.categories,
            ids_per_image=record.ids_per_image,
            fingerprint=record.fingerprint,
            provenance={
                "version": __version__,
                "fingerprint": record.fingerprint,
                "detector": parts["config"]["detector"]["model"],
                "segmenter": parts["config"]["segment"]["model"],
                "weights_sha256": parts["weights"],
                "queries": [query.model_dump(mode="json", exclude_defaults=True) for query in record.queries],
                "ids_per_image": record.ids_per_image,
                "score_floor": parts["config"]["detector"]["score_floor"],
                "score_threshold": config.reduce.score_threshold,
                "min_mask_area": config.reduce.min_mask_area,
            },
            score_threshold=config.reduce.score_threshold,
            min_mask_area=config.reduce.min_mask_area,
        ),
    )
    if result.num_small:
        _log.info(
            "left out %d annotations whose masks have fewer than %d pixels (reduce.min_mask_area)",
            result.num_small,
            config.reduce.min_mask_area,
        )
    counts = asdict(result)
    counts["images"] = counts.pop("num_images")
    return counts
