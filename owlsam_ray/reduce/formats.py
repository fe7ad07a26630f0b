"""The formats of `reduce.formats` by name."""

from collections.abc import Callable

from owlsam_ray.errors import InputError
from owlsam_ray.guard import RunRecord
from owlsam_ray.reduce.coco import CocoOutput
from owlsam_ray.reduce.coco_results import CocoResultsOutput
from owlsam_ray.reduce.decisions import Decisions
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

    Raises:
        InputError: one is not there yet.
    """
    texts = tuple(query.text for query in record.queries)
    prompts = texts if settings.provenance else None
    made: dict[str, Callable[[], Output]] = {
        "coco": lambda: CocoOutput(prompts, polygons=settings.segmentation == "polygon"),
        "coco_results": CocoResultsOutput,
        "lvis": lambda: LvisOutput.of(decisions, record.ids_per_image, prompts),
        "parquet": lambda: TableOutput(tuple(category.name for category in decisions.categories), texts),
        "yolo": YoloOutput,
        "yolo_segment": lambda: YoloOutput(outlines=True),
    }
    missing = [name for name in settings.formats if name not in made]
    if missing:
        raise InputError(f"reduce.formats: {missing[0]} is not there yet")
    return tuple(made[name]() for name in settings.formats)
