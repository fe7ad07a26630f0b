"""The formats of `reduce.formats` by name."""

from collections.abc import Callable

from owlsam_ray.guard import RunRecord
from owlsam_ray.reduce.coco import CocoOutput
from owlsam_ray.reduce.coco_results import CocoResultsOutput
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.label_studio import LabelStudioOutput
from owlsam_ray.reduce.lvis import LvisOutput
from owlsam_ray.reduce.outputs import Output
from owlsam_ray.reduce.table import TableOutput
from owlsam_ray.reduce.yolo import YoloOutput
from owlsam_ray.reduce_settings import ReduceConfig


def outputs_of(settings: ReduceConfig, record: RunRecord, decisions: Decisions) -> tuple[Output, ...]:
    """The formats that are asked for, in that order.

    Args:
        settings: which, and how.
        record: of the run.
        decisions: resolved for it.
    """
    texts = tuple(query.text for query in record.queries)
    prompts = texts if settings.provenance else None
    made: dict[str, Callable[[], Output]] = {
        "coco": lambda: CocoOutput(prompts, polygons=settings.segmentation == "polygon"),
        "coco_results": CocoResultsOutput,
        "label_studio": lambda: _label_studio(settings, record, decisions),
        "lvis": lambda: LvisOutput.of(decisions, prompts),
        "parquet": lambda: TableOutput(tuple(category.name for category in decisions.categories), texts),
        "yolo": YoloOutput,
        "yolo_segment": lambda: YoloOutput(outlines=True),
    }
    return tuple(made[name]() for name in settings.formats)


def _label_studio(settings: ReduceConfig, record: RunRecord, decisions: Decisions) -> LabelStudioOutput:
    config = (record.fingerprint_parts or {})["config"]
    fingerprint = record.fingerprint or ""
    return LabelStudioOutput(
        decisions.categories,
        f"{config['detector']['model']} {config['segment']['model']} {fingerprint[:16]}",
        {"fingerprint": fingerprint, "ids_per_image": record.ids_per_image},
        settings.label_studio_url,
    )
