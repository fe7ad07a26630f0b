"""Sections `data` and `plan`: which images are labelled, and how they are listed and divided."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
)

from owlsam_ray.config import rules
from owlsam_ray.config.base import Auto, Name, PositiveInt, Section


class ColumnsConfig(Section):
    """Names of a table's columns. A dot reaches into a structure: `image.bytes`."""

    RULES: ClassVar = rules.COLUMNS

    uri: Name | None = None
    """Location of the image: a URL, or a path below `data.images`. Default: `uri`, unless `bytes` is given."""
    bytes: Name | None = None
    """The encoded image itself, in Parquet tables only."""
    id: Name | None = None
    """Integers, unique across all tables; default: images are numbered from 1."""
    file_name: Name | None = None
    """Name in the output; default: derived from the URI, or from table and row number for `bytes`."""
    height: Name | None = None
    """Pixels; only with `width`."""
    width: Name | None = None
    """Pixels; only with `height`."""
    num_bytes: Name | None = None
    """Encoded size in bytes, which helps to make shards of equal weight."""
    split: Name | None = None
    """What `plan.splits` selects by; default: the first folder of the file name."""
    extra: tuple[Name, ...] = ()
    """Columns that are copied into the image records of the output."""


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class DataConfig(Section):
    """Where the images come from."""

    RULES: ClassVar = rules.DATA

    source: Literal["coco", "lvis", "objects365", "folder", "table", "webdataset"]
    """`coco`, `lvis`, `objects365`: images listed in a JSON file; `folder`: every image file under `images`; `table`:
    rows of Parquet, CSV or JSONL files; `webdataset`: members of tar files."""
    images: Name | None = None
    """Root of the image files: a directory or any fsspec URL. Not needed for tables with full URLs or for tar files."""
    annotations: Name | None = None
    """The JSON file of `coco`, `lvis` or `objects365` (its annotations, if any, are not read)."""
    files: Annotated[tuple[Name, ...], BeforeValidator(_one_or_more)] = ()
    """The tables or tar files: paths or fsspec URLs, which may contain `*`, `?`, `[0-9]`, `**` and `{000..127}`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column names, for `table` only."""
    suffixes: tuple[Name, ...] = (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".jp2", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng"),
    )
    """File endings, case-insensitive, that `folder` takes as image files and `webdataset` as image members. A planned
    run keeps the ones it was planned with, unless others are given."""


class PlanConfig(Section):
    """Which of the images are planned, and how they are listed. Frozen by `plan`: the layout hash covers its choice."""

    RULES: ClassVar = rules.PLAN

    limit: PositiveInt | None = None
    """Take only the first N images of the listing."""
    sample: PositiveInt | None = None
    """Take N random images, in the listing's order. Samples with the same seed are nested."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the sample."""
    splits: tuple[Name, ...] = ()
    """Only images of these splits: first folders of file names (`val2017`, `patch8`), or values of the split column."""
    categories: tuple[Annotated[int, Field(ge=0)] | Name, ...] = ()
    """Only images with an annotation of one of these categories (names or ids from the dataset's own list)."""
    verify: Literal["none", "exists", "decode"] = "none"
    """Check every image before the layout is frozen: `exists` looks it up in storage, `decode` reads all of it."""
    duplicates: Literal["refuse", "first"] = "refuse"
    """What to do with an image that is listed twice: refuse the listing, or keep its first occurrence."""
    damaged_files: Literal["refuse", "keep_whole"] = "refuse"
    """What to do with truncated or damaged tar files: refuse them, or plan the members before the damage."""
    bad_names: Literal["row", "refuse"] = "row"
    """What to do with rows of tables and COCO files from which no image can be read: turn each into a failed row
    (`row`), or refuse the listing (`refuse`, also for names that would have to be quoted)."""
    workers: PositiveInt | Auto = "auto"
    """Processes that list tar files; `auto`: one per CPU."""
    part_images: PositiveInt = 1_000_000
    """Images per part of the manifest."""
