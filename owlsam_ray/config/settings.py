"""Settings that can change labels: what to look for, in which images, with which models and choices.

The rest of a run, where and how fast, stands in `config`. Two settings that contradict each other are refused, never
resolved silently. A default of None stands for a value that only some choices use; the field's text names it.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Auto = Literal["auto"]
PositiveInt = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    """Frozen, and refuses keys that it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


@dataclass(frozen=True, slots=True)
class Added:
    """Marks a field that came after runs were stored: `Annotated[Kind, Added(value)] = default`.

    Every new field that can change labels, or which images there are, needs it (a test walks them): without, all
    earlier runs would be refused. See `added_settings`.
    """

    as_before: Any
    """The value that labels as the code did without the field, as plain JSON has it. The default may be another one."""


SectionT = TypeVar("SectionT", bound=Section)


KINDS = ("<text>", "<list>", "<mapping>")
"""Tags of what a value may be: pydantic puts them into the place of an error, where they are no field. No field can be
called so."""


def _by_kind(wanted: str) -> Discriminator:
    """Which branch of a union a value is meant for, so that only its errors are told; `wanted` if it is for none."""

    def kind(value: Any) -> str:
        if isinstance(value, str):
            return "<text>"
        if isinstance(value, (list, tuple)):
            return "<list>"
        return "<mapping>" if isinstance(value, (Mapping, BaseModel)) else "none of these"

    return Discriminator(kind, custom_error_type="kind", custom_error_message=f"Input should be {wanted}")


class ColumnsConfig(Section):
    """Which columns of a table say what. A dot goes into a structure: `image.bytes`."""

    uri: Name | None = None
    """Where the image lies: a URL, or a path below `data.images`. Default: `uri`, unless `bytes` is given."""
    bytes: Name | None = None
    """The encoded image itself, in Parquet tables only."""
    id: Name | None = None
    """Integers, unique over all tables; default: images are numbered from 1."""
    file_name: Name | None = None
    """Name in the output; default: from the URI, or table and row number for `bytes`."""
    height: Name | None = None
    """Pixels; only with `width`."""
    width: Name | None = None
    """Pixels; only with `height`."""
    num_bytes: Name | None = None
    """Encoded size, which helps to cut shards of equal weight."""
    split: Name | None = None
    """What `plan.splits` selects by; default: the first folder of the file name."""
    extra: tuple[Name, ...] = ()
    """Columns that are carried into the image records of the output."""

    @model_validator(mode="after")
    def _sizes_are_pairs(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("columns.height and columns.width go together: give both, or neither")
        if self.uri is not None and self.bytes is not None:
            raise ValueError("columns.uri and columns.bytes both say where the image is: give one of them")
        return self


def _one_or_more(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


class DataConfig(Section):
    """Which images."""

    source: Literal["coco", "lvis", "objects365", "folder", "table", "webdataset"]
    """`coco`, `lvis`, `objects365`: a JSON file lists them; `folder`: every image file under `images`; `table`: rows of
    Parquet, CSV or JSONL files; `webdataset`: members of tar files."""
    images: Name | None = None
    """Root of the image files: a directory or any fsspec URL. A table with full URLs needs none, tar files neither."""
    annotations: Name | None = None
    """The JSON file of `coco`, `lvis` or `objects365` (its annotations, if any, are not read)."""
    files: Annotated[tuple[Name, ...], BeforeValidator(_one_or_more)] = ()
    """The tables or tar files: paths or fsspec URLs, with `*`, `?`, `[0-9]`, `**` and `{000..127}`."""
    columns: ColumnsConfig = ColumnsConfig()
    """Of `table`."""
    suffixes: tuple[Name, ...] = (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".avif", ".jp2", ".bmp", ".tif", ".tiff", ".gif"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".apng"),
    )
    """Endings, in any case, of the files that `folder` takes, and of the members that `webdataset` takes. A run that is
    planned keeps those it was planned with, unless others are given."""

    @model_validator(mode="after")
    def _fields_belong_to_the_source(self) -> Self:
        by_json, by_files = self.source in ("coco", "lvis", "objects365"), self.source in ("table", "webdataset")
        if by_json and self.annotations is None:
            raise ValueError(f"source: {self.source} needs data.annotations, the JSON file")
        if not by_json and self.annotations is not None:
            raise ValueError(f"source: {self.source} takes no data.annotations; did you mean source: coco?")
        if by_files and not self.files:
            raise ValueError(
                f"source: {self.source} needs data.files, the {'tables' if self.source == 'table' else 'tar files'}"
            )
        if not by_files and self.files:
            raise ValueError(f"source: {self.source} takes no data.files; did you mean source: table or webdataset?")
        if not by_files and self.images is None:
            raise ValueError(f"source: {self.source} needs data.images, the root of the image files")
        if self.source == "webdataset" and self.images is not None:
            raise ValueError("source: webdataset takes no data.images: the images are members of data.files")
        if self.source != "table" and self.columns != ColumnsConfig():
            raise ValueError(f"data.columns is for source: table, not for {self.source}")
        return self


BuiltinVocabulary = Literal["coco", "lvis", "objects365"]
MappingName = Literal["lvis_to_coco", "coco_to_lvis", "objects365_to_coco"]
"""From the categories of one built-in list to those of another."""
Frequency = Literal["r", "c", "f"]
"""LVIS's groups of categories by number of training images: rare (up to 10), common (up to 100), frequent."""


class Category(Section):
    """One thing to look for."""

    id: Annotated[int, Field(ge=0, lt=2**53, strict=True)]
    """`category_id` in the output; below 2^53, so that every JSON reader keeps it."""
    name: Name
    """Name in the output, and what the templates are filled with."""
    supercategory: str = ""
    """Carried into the output."""
    synonyms: tuple[Name, ...] = ()
    """Other names of the same thing, asked for as well."""
    prompts: tuple[Name, ...] = ()
    """Texts that are asked as they stand, instead of name and synonyms in the templates."""
    frequency: Frequency | None = None
    """LVIS's group, carried into the output: AP by group needs it."""

    @model_validator(mode="after")
    def _prompts_replace_names(self) -> Self:
        if self.prompts and self.synonyms:
            raise ValueError(
                f"category {self.name!r:.120} has prompts and synonyms: prompts replace name and synonyms, so add the "
                "synonyms to the prompts, or leave the prompts out"
            )
        return self


class Exemplar(Section):
    """A picture of the thing to look for, asked beside texts or instead of them."""

    category: Name
    """Name of the category that it shows."""
    image: Name
    """Path or fsspec URL of an image file."""
    box: tuple[Finite, Finite, Finite, Finite] | None = None
    """[x0, y0, x1, y1] of the thing in pixels of the upright picture; default: all of it."""

    @field_validator("box")
    @classmethod
    def _box_has_area(cls, value: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if value is not None and not (value[2] > value[0] and value[3] > value[1]):
            raise ValueError(f"box {list(value)} must be [x0, y0, x1, y1] with x1 > x0 and y1 > y0")
        return value


def check_template(template: str) -> None:
    """One hole for the name, and no other brace.

    Raises:
        ValueError: it has none, or more.
    """
    if template.count("{}") != 1 or set(template.replace("{}", "")) & set("{}"):
        raise ValueError(f"template {template!r:.120} must contain {{}} exactly once and no other brace")


_NameOrCategory = Annotated[
    Annotated[Name, Tag("<text>")] | Annotated[Category, Tag("<mapping>")],
    _by_kind("a name (in quotes where YAML would read something else), or {id, name, …}"),
]


def _check_list_or_file(value: str) -> str:
    if value in VOCABULARIES or is_vocabulary_file(value):
        return value
    close = difflib.get_close_matches(value.lower(), VOCABULARIES, n=1)
    raise ValueError(
        f"{value!r:.120} is no list of categories: take {', '.join(VOCABULARIES)}, a text file (its path holds a / or "
        f"ends in .txt), or a list of names{f'. Did you mean {close[0]}?' if close else ''}"
    )


VOCABULARIES = (*get_args(BuiltinVocabulary), "dataset")
"""Lists of categories that go by a word."""


def is_vocabulary_file(categories: object) -> bool:
    """Whether `vocabulary.categories` is the path or URL of a text file: it holds a `/` or ends in `.txt`."""
    return isinstance(categories, str) and ("/" in categories or categories.lower().endswith(".txt"))


class VocabularyConfig(Section):
    """What to look for."""

    categories: Annotated[
        Annotated[Name, AfterValidator(_check_list_or_file), Tag("<text>")]
        | Annotated[tuple[_NameOrCategory, ...], Tag("<list>")],
        _by_kind("`coco`, `lvis`, `objects365`, `dataset`, a text file, or a list of names or {id, name, …}"),
    ] = "dataset"
    """`coco` (80), `lvis` (v1, 1203) or `objects365` (v2, 365): built in, with the dataset's ids; `dataset`: the
    source's own list; a list of names (ids from 1) or of {id, name, synonyms, prompts}; or a text file, a URL or a path
    with a `/` or `.txt`: one name a line (ids from 1), then a tab and synonyms, if any; `#` begins a comment line."""
    only: tuple[int | Name, ...] | None = None
    """Names or ids of the categories to look for; default: all. They keep their ids."""
    frequency: tuple[Frequency, ...] | None = None
    """Groups of LVIS to look for: r(are), c(ommon), f(requent); default: all."""
    templates: Annotated[
        Annotated[Literal["none", "photo", "clip_best7"], Tag("<text>")] | Annotated[tuple[Name, ...], Tag("<list>")],
        _by_kind("`none`, `photo`, `clip_best7`, or a list of texts with a {}"),
    ] = "photo"
    """Sentences around a name: `none`: the bare name; `photo`: "a photo of a {}"; `clip_best7`: the seven of OWL-ViT's
    evaluation; or your own, `{}` becomes the name. Several are averaged, see `ensemble`."""
    ensemble: Literal["embeddings", "logits"] = "embeddings"
    """How the templates of one name become one query: by averaging text embeddings, or the logits that each gives (as
    OWL-ViT's evaluation does). Both cost the same."""
    canonical: bool | None = Field(default=None, validate_default=True)
    """Lower case, and spaces for what is no letter, digit, hyphen or hash: as OWL-ViT's evaluation has it. Default:
    true for `lvis`, whose names have underscores and brackets, else false."""
    synonyms: bool = False
    """Ask also for the synonyms that the list `lvis` or the dataset's own categories give. Those of a text file and of
    a list in the run file are asked anyway."""
    exemplars: tuple[Exemplar, ...] = ()
    """Pictures as queries: {category, image, box}."""
    exemplars_replace_text: bool = False
    """Categories that have exemplars are not asked for by text."""

    @field_validator("templates", mode="before")
    @classmethod
    def _one_template_is_a_list_of_one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) and "{" in value else value

    @field_validator("templates")
    @classmethod
    def _templates_have_one_hole(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(value, str):
            return value
        if not value:
            raise ValueError("templates is empty: take `none` for the bare names")
        for template in value:
            check_template(template)
        if len(set(value)) < len(value):
            raise ValueError("templates holds the same template twice")
        return value

    @field_validator("only", "frequency", mode="before")
    @classmethod
    def _some_are_chosen(cls, value: Any, info: ValidationInfo) -> Any:
        entries = (value,) if isinstance(value, (str, int)) else value
        if isinstance(entries, (list, tuple)):
            if not entries:
                raise ValueError(f"{info.field_name} is empty: leave it out (null) to look for all categories")
            for entry in entries:
                if isinstance(entry, bool) or not isinstance(entry, (str, int)):
                    raise ValueError(
                        f"{info.field_name} holds {entry!r:.120}, which is no name or id (put names in quotes where "
                        "YAML would read something else)"
                    )
        return entries

    @field_validator("canonical")
    @classmethod
    def _lvis_is_canonical(cls, value: bool | None, info: ValidationInfo) -> bool:
        return info.data.get("categories") == "lvis" if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _synonyms_had_another_name(cls, value: Any) -> Any:
        # What earlier runs have stored stays readable.
        if isinstance(value, Mapping) and "dataset_synonyms" in value and "synonyms" not in value:
            return {"synonyms" if key == "dataset_synonyms" else key: each for key, each in value.items()}
        return value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.synonyms and self.categories not in ("lvis", "dataset"):
            raise ValueError(
                "synonyms: true takes those that `lvis` or the dataset's own categories list, and categories is "
                "neither `lvis` nor `dataset`: give synonyms in a list of categories or a text file, where they are "
                "asked anyway"
            )
        without_groups = isinstance(self.categories, str) and self.categories not in ("lvis", "dataset")
        if self.frequency is not None and without_groups:
            raise ValueError(
                f"frequency: {list(self.frequency)} needs categories with groups, and {self.categories} has none: "
                "`lvis` has, and `dataset` where the dataset's categories have a `frequency`"
            )
        if self.exemplars_replace_text and not self.exemplars:
            raise ValueError("exemplars_replace_text without exemplars: there would be nothing to replace the texts by")
        return self


Grey16 = Literal["full", "auto", 8, 9, 10, 11, 12, 13, 14, 15, 16]


class DecodeConfig(Section):
    """Bytes to pixels."""

    max_pixels: PositiveInt = 200_000_000
    """Larger images fail with the reason `too_large` before their pixels are read."""
    max_file_mb: PositiveInt = 512
    """Larger files fail with the reason `too_large` and are not read to their end."""
    grey16: Annotated[Grey16, Added("full")] = "full"
    """What stands for white in pictures of 16-bit grey: `full`: 65535; 8 to 16: the largest value of so many bits, as
    cameras of 12 bits need it; `auto`: of as many bits as the picture uses. A remark in the row says where much is
    dark, where values are cut, and what `auto` chose."""


def _without_weights(fields: Any) -> Any:
    """A fake's `weights` are given by its name."""
    if isinstance(fields, dict) and fields.get("model") == "fake":
        return {"weights": "fake"} | fields
    return fields


class DetectorConfig(Section):
    """Prompts to boxes."""

    model: Literal["owlvit", "owlv2", "fake"] = "owlvit"
    """Architecture; `fake`: a stand-in that computes boxes from the pixels without a model, for tests of scale."""
    weights: Name
    """A directory in Hugging Face layout (safetensors), or a hub name, `org/model` or `org/model@revision`. A fake
    needs none."""
    preprocess: Literal["hf", "scenic"] = "hf"
    """`hf`: as the installed transformers prepares pictures for this model (OwlViT's are squashed to a square, OWLv2's
    padded to one); `scenic`: as the original code does, padded right and below for both."""
    pad_value: Fraction | None = None
    """Grey of scenic's padding, 0 (as its evaluator; the default) to 1; its training used 0.5."""
    image_size: PositiveInt | None = None
    """Side of the square input in pixels, a multiple of the patch size; default: the model's own. Others interpolate
    the position embeddings."""
    objectness: Literal["ignore", "multiply"] = "ignore"
    """OWLv2's estimate that a box holds any object at all: unused, as transformers and scenic have it, or a factor of
    every score."""
    score_floor: Fraction = 0.05
    """Boxes are kept when their score is greater. Low on purpose: `reduce` decides."""
    labels: Literal["multi", "best"] = "multi"
    """`multi`: every label above the floor makes a detection; `best`: only the best label of a box."""
    max_candidates: PositiveInt = 1000
    """Best detections of an image (or tile) that enter suppression."""
    max_detections: PositiveInt = 100
    """Best detections of an image that are kept after suppression."""
    clip_boxes: bool = True
    """Cut boxes at the image border; what has no area left is dropped."""

    _fake_has_no_weights = model_validator(mode="before")(_without_weights)

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        if self.pad_value is not None and self.preprocess != "scenic":
            raise ValueError(
                f"pad_value {self.pad_value} belongs to preprocess: scenic; hf pads as transformers does. Set "
                "preprocess: scenic, or leave pad_value out"
            )
        if self.objectness == "multiply" and self.model != "owlv2":
            raise ValueError(f"objectness: multiply needs an OWLv2; model is {self.model}, which estimates none")
        return self


class TilingConfig(Section):
    """Large images in overlapping tiles, so that small objects are seen at their own size."""

    size: Annotated[int, Field(ge=32)] | None = None
    """Side of a tile in original pixels; default: no tiles. Images that fit one tile are not cut."""
    overlap: Annotated[float, Field(ge=0.0, le=0.9, allow_inf_nan=False)] = 0.25
    """Share of a tile's side that neighbours have in common, at least: more than the largest object that only tiles can
    find. Of a piece that a tile's border cuts and the whole object, nms with `suppress.overlap: ios` leaves the one
    that scores higher; with `iou` both often stay."""
    full_image: bool = True
    """Look at the whole image as well: large objects do not fit a tile."""

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        fields = type(self).model_fields
        for name in ("overlap", "full_image"):
            if self.size is None and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: {getattr(self, name)} without size would have no effect: set tiling.size")
        return self


class SuppressConfig(Section):
    """Overlapping boxes."""

    strategy: Literal["nms", "soft_nms", "merge", "none"] = "nms"
    """`nms`: the best box stays, those that overlap it more than the threshold go; `soft_nms`: their scores decay;
    `merge`: they become one box, weighted by score; `none`: all stay."""
    overlap: Literal["iou", "ios"] = "iou"
    """Intersection over union, or over the smaller of the two boxes (for parts and tiles)."""
    threshold: Fraction | None = None
    """Overlap above which two boxes are taken for one object; default 0.7. Exponential decay needs none."""
    thresholds: dict[Name, Fraction] = {}
    """Thresholds of single categories, by name, over `threshold`."""
    across_labels: bool = False
    """Boxes of different labels compete as well: one object, one name. Default: each label by itself."""
    decay: Literal["exponential", "linear"] | None = None
    """Of soft_nms: `exponential` (the default): score · exp(-overlap² / sigma); `linear`: score · (1 - overlap) above
    the threshold. What falls to detector.score_floor goes."""
    sigma: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Of exponential decay; default 0.5. Smaller decays more."""

    @field_validator("thresholds", mode="before")
    @classmethod
    def _null_unsets_them(cls, value: Any) -> Any:
        return {} if value is None else value

    @model_validator(mode="after")
    def _settings_agree(self) -> Self:
        soft = self.strategy == "soft_nms"
        if self.decay is not None and not soft:
            raise ValueError(f"decay: {self.decay} belongs to strategy: soft_nms, not to {self.strategy}")
        if self.sigma is not None and (not soft or self.decay == "linear"):
            raise ValueError(f"sigma {self.sigma} belongs to strategy: soft_nms with decay: exponential")
        if self.threshold is not None or self.thresholds:
            name = "thresholds" if self.thresholds else f"threshold {self.threshold}"
            if self.strategy == "none":
                raise ValueError(
                    f"strategy: none suppresses nothing, so {name} would have no effect: leave it out (null)"
                )
            if soft and self.decay != "linear":
                raise ValueError(
                    f"exponential decay has no threshold, so {name} would have no effect: leave it out "
                    "(null), or set decay: linear"
                )
        if self.thresholds and self.across_labels:
            raise ValueError(
                "thresholds are of single categories, and across_labels compares boxes of different ones: set one "
                "threshold, or across_labels: false"
            )
        if self.strategy == "merge" and self.overlap == "ios":
            raise ValueError(
                "strategy: merge averages boxes, and overlap: ios puts parts together with wholes: the mean would be "
                "the box of neither. Take overlap: iou, or strategy: nms"
            )
        if self.strategy == "none" and (self.across_labels or self.overlap != "iou"):
            name = "across_labels" if self.across_labels else f"overlap: {self.overlap}"
            raise ValueError(f"strategy: none suppresses nothing, so {name} would have no effect")
        return self


class SegmentConfig(Section):
    """Boxes to masks."""

    model: Literal["mobile_sam", "sam", "fake"] = "mobile_sam"
    """Architecture; `sam`: ViT-B, L or H; `fake`: a stand-in without a model, for tests of scale."""
    weights: Name
    """MobileSAM: `mobile_sam.pt`, a `.safetensors` file of the same layout, or a directory with `config.json` and
    `model.safetensors`. SAM: a directory in Hugging Face layout (safetensors), or a hub name. A fake needs none."""
    score_floor: Fraction = 0.0
    """Boxes get a mask when their score is at least this."""
    prompt: Literal["box", "box_and_center"] = "box"
    """What the model is given: the box, or the box and its centre as a point of the object."""
    masks: Literal["single", "best_of_three", "most_stable"] = "single"
    """SAM's single mask; or one of its three: with the highest predicted IoU, or the most stable one."""
    min_area: Annotated[int, Field(ge=0)] = 0
    """Detections whose mask has fewer pixels are dropped for good; `reduce.min_mask_area` decides late instead."""
    fill_holes: Annotated[int, Field(ge=0)] = 0
    """Holes of a mask with fewer pixels are filled."""
    remove_islands: Annotated[int, Field(ge=0)] = 0
    """Parts of a mask with fewer pixels are removed; its largest part always stays."""

    _fake_has_no_weights = model_validator(mode="before")(_without_weights)


class FakesConfig(Section):
    """What the models called `fake` do besides labelling: for tests. Changes no labels."""

    delay_s: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that each call of the detector sleeps."""
    poison: bool = False
    """Pictures whose first pixel says so kill the process, as a broken decoder would: see `models/fakes.py`."""


MEGABYTE = 10**6
