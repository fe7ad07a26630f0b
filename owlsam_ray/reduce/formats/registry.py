"""List the formats of `reduce.formats` by name."""

from collections.abc import Callable, Sequence

from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.formats.coco import CocoOutput
from owlsam_ray.reduce.formats.coco_results import RESULTS, CocoResultsOutput
from owlsam_ray.reduce.formats.label_studio import CONFIG, TASKS, LabelStudioOutput
from owlsam_ray.reduce.formats.lvis import LvisOutput
from owlsam_ray.reduce.formats.parquet import ANNOTATION_TABLE, IMAGE_TABLE, ParquetOutput
from owlsam_ray.reduce.formats.protocol import FileSpan, Output
from owlsam_ray.reduce.formats.safe_paths import numbered_paths
from owlsam_ray.reduce.formats.yolo import YoloOutput
from owlsam_ray.run.paths import CORRECTIONS, FAILURES
from owlsam_ray.run.run import Run


def outputs_of(run: Run, decisions: Decisions) -> tuple[Output, ...]:
    """Create the requested formats, in the order of the settings.

    Args:
        run: the run, whose settings name the formats and their options.
        decisions: settings resolved for the run.
    """
    settings, manifest = run.config.reduce, run.manifest
    texts = tuple(query.text for query in run.record.queries)
    prompts = texts if settings.provenance else None
    numbered = {}
    if {"yolo", "yolo_segment"} & set(settings.formats):
        numbered = numbered_paths(table["file_name"] for table in manifest.iter_names())
    made: dict[str, Callable[[], Output]] = {
        "coco": lambda: CocoOutput(prompts, polygons=settings.segmentation == "polygon"),
        "coco_results": CocoResultsOutput,
        "label_studio": lambda: _label_studio(run, decisions),
        "lvis": lambda: LvisOutput.of(decisions, prompts),
        "parquet": lambda: ParquetOutput(tuple(category.name for category in decisions.categories), texts),
        "yolo": lambda: YoloOutput(numbered=numbered, val=settings.yolo_val),
        "yolo_segment": lambda: YoloOutput(outlines=True, numbered=numbered, val=settings.yolo_val),
    }
    return tuple(made[name]() for name in settings.formats)


def _label_studio(run: Run, decisions: Decisions) -> LabelStudioOutput:
    record, image_list = run.record, run.manifest.images_digest()
    config = (record.fingerprint_parts or {})["config"]
    fingerprint = record.fingerprint or ""
    return LabelStudioOutput(
        decisions.categories,
        f"{config['detector']['model']} {config['segment']['model']} {fingerprint[:16]}",
        {"fingerprint": fingerprint, "ids_per_image": record.ids_per_image, "image_list": image_list},
        run.config.reduce.label_studio_url,
    )


def file_names(name: str, spans: Sequence[FileSpan]) -> list[str]:
    """Names of the files and folders that a format writes."""
    stems = {"coco": "annotations", "lvis": "lvis", "label_studio": TASKS}
    cut = [span.name(stems[name], ".json") for span in spans] if name in stems else []
    fixed = {
        "failures": [FAILURES],
        "corrections": [CORRECTIONS],
        "coco_results": [RESULTS],
        "label_studio": [CONFIG],
        "parquet": [ANNOTATION_TABLE, IMAGE_TABLE],
        "yolo": ["yolo"],
        "yolo_segment": ["yolo_segment"],
    }
    return cut + fixed.get(name, [])
