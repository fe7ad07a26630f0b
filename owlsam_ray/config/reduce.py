"""Section `reduce`: decisions made without a GPU, and output files."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    field_validator,
)

from owlsam_ray.config.base import Auto, Fraction, Name, PositiveInt, Section
from owlsam_ray.config.inference import (
    SuppressConfig,
)
from owlsam_ray.config.vocabulary import MappingName

FormatName = Literal["coco", "coco_results", "lvis", "yolo", "yolo_segment", "label_studio", "parquet"]


class ReduceConfig(Section):
    """Decisions made without a GPU. May change freely on a labelled run; every setting is recorded in `info`."""

    out: Name | None = None
    """Output directory; default: `coco` in the run directory. One run can be reduced into many directories."""
    formats: Annotated[tuple[FormatName, ...], Field(min_length=1)] = ("coco",)
    """`coco`: annotations.json; `coco_results`: the list of results with scores that evaluators read; `lvis`: COCO with
    the fields LVIS needs; `yolo` and `yolo_segment`: one text file per image; `label_studio`: pre-annotations;
    `parquet`: a table with one row per annotation."""

    score_threshold: Fraction | None = None
    """Annotations are kept when their score is greater; must not be below `detector.score_floor`."""
    score_thresholds: dict[Name, Fraction] = Field(default={})
    """Thresholds of single categories, by name; they take precedence over `operating_points` and `score_threshold`."""
    operating_points: Name | None = None
    """A file written by `owlsam calibrate`: thresholds per category; they take precedence over `score_threshold`."""
    only: tuple[Annotated[int, Field(ge=0)] | Name, ...] | None = None
    """Names or ids of the run's categories to keep; default: all. They keep their ids."""
    mapping: MappingName | dict[Name, Name] | None = None
    """Write another dataset's categories: LVIS v1 and COCO are matched by synset, Objects365 v2 is mapped to COCO by a
    table. Or a mapping from names of the run's categories to names in the output, several of which may be the same.
    Categories without a counterpart are left out and counted."""
    suppress: SuppressConfig | None = None
    """A final suppression among the remaining boxes, by output category; stricter than the one at inference."""
    min_mask_area: Annotated[int, Field(ge=0)] = 500
    """Annotations whose mask has fewer pixels are left out; 0 keeps all that `segment.min_area` kept. Annotations
    without a mask are kept, here and in the settings below."""
    min_predicted_iou: Fraction | None = None
    """Masks need at least this predicted IoU, SAM's own estimate."""
    min_stability: Fraction | None = None
    """Masks need at least this stability under a shift of their threshold."""
    max_per_image: PositiveInt | None = None
    """Keep at most this many annotations per image, by score; ties go to the one that inference put first."""

    segmentation: Literal["rle", "polygon"] = "rle"
    """For `coco`. `polygon` traces outlines and joins holes to them by a cut; the loss is reported."""
    provenance: bool = False
    """Add to each annotation of `coco` and `lvis` the prompt that matched, the detector's own score, and how many boxes
    were merged."""
    images_per_file: PositiveInt | None = None
    """Split `coco` and `lvis` into files of at most this many images, at shard borders; default: one file."""
    label_studio_url: Name | None = None
    """Prefix of the file names in the tasks of `label_studio`: `/data/local-files/?d=set/images/`, or
    `https://host/images/`; default: the manifest's URIs, such as `s3://…`, which Label Studio opens through a storage
    of the project."""
    yolo_val: Name | None = None
    """What `data.yaml` of `yolo` names as `val`, which Ultralytics' training requires: a list or folder of yours, or
    `train.txt` to validate on the training images; default: nothing."""
    corrections: Name | None = None
    """A COCO file from a review tool, or the JSON export of a Label Studio project, replayed over the labels. Its
    entries are matched to the detections by annotation id, so it remains valid when other settings change."""
    corrections_scope: Literal["auto", "images", "annotations"] = "auto"
    """`images`: each image of that file has exactly the file's annotations (if its images have a field
    `owlsam_reviewed`: only those where it is true). `annotations`: only what the file names was reviewed. `auto`: as
    the file's `info` says, which files of `owlsam reduce` and `owlsam review-list` carry; set it where a tool dropped
    the `info`."""
    corrections_base: Name | None = None
    """The file that was given to the reviewers, for tools that drop its `info`: the `info` is read from here then."""

    max_failed: Annotated[int, Field(ge=0)] | Annotated[float, Field(ge=0.0, le=1.0)] = 0.01
    """Failed images that are tolerated: a count (integer) or a share (with a decimal point)."""
    executor: Literal["local", "ray"] = "local"
    """What reads the shards: processes on this machine, or tasks of the Ray cluster at `resources.ray_address`."""
    workers: PositiveInt | Auto = "auto"
    """Number of processes, or of concurrent Ray tasks; `auto`: one per CPU. The files are the same for any number."""
    scratch: Name | None = None
    """Folder for the fragments, which need about as much space as the files; default: in `out` if that is on a disk or
    the executor is Ray (all workers must reach it), otherwise the machine's folder for temporary files."""

    @field_validator("score_thresholds", mode="before")
    @classmethod
    def _null_unsets_them(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("formats", mode="before")
    @classmethod
    def _one_format_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("formats")
    @classmethod
    def _formats_differ(cls, value: tuple[FormatName, ...]) -> tuple[FormatName, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a format is listed twice")
        return value


def allowed_failures(max_failed: int | float, num_images: int) -> int:
    """Number of failed images that `reduce.max_failed` tolerates: an integer is a count, a float a share of all."""
    return max_failed if isinstance(max_failed, int) else math.floor(max_failed * num_images)
