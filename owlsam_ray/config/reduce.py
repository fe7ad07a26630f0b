"""The section `reduce` of a run file: what is decided without a GPU, and which files come of it."""

import math
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from owlsam_ray.config.base import Auto, Fraction, Name, PositiveInt, Section
from owlsam_ray.config.settings import (
    SuppressConfig,
)
from owlsam_ray.config.vocabulary import MappingName

FormatName = Literal["coco", "coco_results", "lvis", "yolo", "yolo_segment", "label_studio", "parquet"]


class ReduceConfig(Section):
    """What is decided without a GPU. May change freely on a labelled run; every setting stands in `info`."""

    out: Name | None = None
    """Directory of the files; default: `coco` in the run directory. A run can be reduced in many ways side by side."""
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1)] = ("coco",)
    """`coco`: annotations.json; `coco_results`: the list of results with scores that evaluators read; `lvis`: COCO with
    what LVIS needs; `yolo` and `yolo_segment`: a text file for each image; `label_studio`: pre-annotations; `parquet`:
    a table with one row for each annotation."""

    score_threshold: Fraction | None = None
    """Annotations are kept when their score is greater; not below `detector.score_floor`."""
    score_thresholds: dict[Name, Fraction] = Field(default={})
    """Of single categories, by name, over `operating_points` and `score_threshold`."""
    operating_points: Name | None = None
    """A file that `owlsam calibrate` wrote: thresholds of categories, over `score_threshold`."""
    only: tuple[Annotated[int, Field(ge=0)] | Name, ...] | None = None
    """Names or ids of the run's categories that are kept; default: all. They keep their ids."""
    mapping: MappingName | dict[Name, Name] | None = None
    """Write another dataset's categories: LVIS v1 and COCO meet by synset, Objects365 v2 becomes COCO by a table; or
    names of the run's categories → names of the output's, several of which may be one. What has no counterpart is
    left out and counted."""
    suppress: SuppressConfig | None = None
    """A final suppression of what is left, by category of the output; stricter than the one at inference."""
    min_mask_area: Annotated[int, Field(ge=0)] = 500
    """Annotations whose mask has fewer pixels are left out; 0 keeps all that `segment.min_area` kept. Those without a
    mask stay, here and below."""
    min_predicted_iou: Fraction | None = None
    """Masks need at least this estimate of SAM's own."""
    min_stability: Fraction | None = None
    """Masks need at least this stability under a shift of their threshold."""
    max_per_image: PositiveInt | None = None
    """The best annotations of an image that are kept, by score, of equal ones those that inference put first."""

    segmentation: Literal["rle", "polygon"] = "rle"
    """Of `coco`: `polygon` traces outlines, holes joined to them by a cut; what that loses is told."""
    provenance: bool = False
    """Tell in each annotation of `coco` and `lvis` which prompt matched, the detector's own score, and how many boxes
    were merged."""
    images_per_file: PositiveInt | None = None
    """Cut `coco` and `lvis` into files of at most so many images, at borders of shards; default: one file."""
    label_studio_url: Name | None = None
    """What stands before the file names in the tasks of `label_studio`: `/data/local-files/?d=set/images/`, or
    `https://host/images/`; default: the manifest's URIs, such as `s3://…`, which Label Studio opens through a storage
    of the project."""
    yolo_val: Name | None = None
    """What `data.yaml` of `yolo` names for `val`, which Ultralytics' training asks for: a list or folder of yours, or
    `train.txt` to validate on what is trained on; default: nothing."""
    corrections: Name | None = None
    """A COCO file of a review tool, or the JSON export of a Label Studio project, replayed over the labels. What it
    says and what the machine found meet by annotation id, so it fits whatever is decided otherwise."""
    corrections_scope: Literal["auto", "images", "annotations"] = "auto"
    """`images`: each image of that file has exactly the file's annotations (with a field `owlsam_reviewed` at the
    images: those where it is true). `annotations`: only what the file names was looked at. `auto`: as the file's
    `info` says, which files of `owlsam reduce` and `owlsam review-list` carry; needed where a tool dropped it."""
    corrections_base: Name | None = None
    """The file that was given to people, for tools that drop its `info`: that is read from here then."""

    max_failed: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Failed images that are put up with: a count (integer) or a share (with a decimal point)."""
    executor: Literal["local", "ray"] = "local"
    """Who reads the shards: processes of this machine, or tasks of the Ray cluster at `resources.ray_address`."""
    workers: PositiveInt | Auto = "auto"
    """Processes, or Ray tasks at a time; `auto`: one per CPU. The files are the same for any number."""
    scratch: Name | None = None
    """Folder of the fragments, which take about the room of the files; default: in `out` where that is a disk or the
    executor is Ray (all workers must reach it), else the machine's folder for temporary files."""

    @field_validator("score_thresholds", mode="before")
    @classmethod
    def _null_unsets_them(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("formats", mode="before")
    @classmethod
    def _one_format_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if len(set(self.formats)) < len(self.formats):
            raise ValueError(f"formats holds one twice: {list(self.formats)}")
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
