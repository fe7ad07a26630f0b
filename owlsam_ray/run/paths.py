"""Names of the files in a run directory."""

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError, InputError

RUN_FILE = "run.json"
"""The run's record: its settings, and the hashes that guard it."""
QUERY_FILE = "query_embeddings.safetensors"
"""(Q, D) embeddings of the prompts and exemplars, computed once per run."""
MANIFEST = "manifest"
"""Folder of the manifest's parts: which images, in which order, in which shards."""
PREDICTIONS = "predictions"
"""Folder of finished shards, one Parquet file each."""
DAMAGED = "damaged"
"""Folder that `verify --repair` moves bad shard files to."""
ATTEMPTS = "attempts"
"""Folder of the attempts' records and signs of life."""
IN_HAND = "in-hand"
"""Folder of the markers of shards that a process works on."""
PROGRESS_FILE = "progress.json"
"""Counts of the latest attempt."""

COCO_FOLDER = "coco"
"""Folder that `reduce` writes into unless it is given another one."""
ANNOTATIONS = "annotations.json"
FAILURES = "failures.jsonl"
CORRECTIONS = "corrections_report.json"
REVIEW_FOLDER = "review"
"""Folder that `review-list` writes into unless it is given another one."""
EVALUATION_FILE = "evaluation.json"
OPERATING_POINTS_FILE = "operating_points.json"


def annotations_of_run(run_url: str) -> str:
    """Path of the labels of a reduced run.

    Raises:
        InputError: there is no run.
        IncompleteError: the run is not reduced yet, or not to one COCO file.
    """
    annotations = storage.join(run_url, COCO_FOLDER, ANNOTATIONS)
    if storage.exists(annotations):
        return annotations
    if storage.exists(storage.join(run_url, RUN_FILE)):
        raise IncompleteError(
            f"{run_url} is not reduced yet, or not to one COCO file (no coco/annotations.json): run `owlsam reduce` "
            "first, or give the path of another COCO file as FILE, instead of --run"
        )
    raise InputError(
        f"{run_url} holds no run (neither run.json nor coco/annotations.json): give the directory of a reduced run, or "
        "name a COCO file instead of --run"
    )
