"""Section `vocabulary`: which categories to look for, and with which texts and exemplar images."""

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from owlsam_ray.config import rules
from owlsam_ray.config.base import Finite, Name, Section, _by_kind

BuiltinVocabulary = Literal["coco", "lvis", "objects365"]

MappingName = Literal["lvis_to_coco", "coco_to_lvis", "objects365_to_coco"]
"""Direction of a mapping from one built-in list's categories to another's."""

Frequency = Literal["r", "c", "f"]
"""LVIS's groups of categories by number of training images: rare (up to 10), common (up to 100), frequent."""


class Category(Section):
    """One category to look for."""

    RULES: ClassVar = rules.CATEGORY

    id: Annotated[int, Field(ge=0, lt=2**53, strict=True)]
    """`category_id` in the output; below 2^53, so that every JSON reader keeps it."""
    name: Name
    """Name in the output, and the text that fills the templates."""
    supercategory: str = ""
    """Copied into the output."""
    synonyms: tuple[Name, ...] = ()
    """Other names of the category, which are queried as well."""
    prompts: tuple[Name, ...] = ()
    """Texts that are queried verbatim, instead of name and synonyms in the templates."""
    frequency: Frequency | None = None
    """LVIS's frequency group, copied into the output: AP per group needs it."""


class Exemplar(Section):
    """An image of the object to look for, used as a query in addition to texts or instead of them."""

    category: Name
    """Name of the category that the image shows."""
    image: Name
    """Path or fsspec URL of an image file."""
    box: tuple[Finite, Finite, Finite, Finite] | None = None
    """[x0, y0, x1, y1] of the object in pixels of the upright image; default: the whole image."""

    @field_validator("box")
    @classmethod
    def _box_has_area(cls, value: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if value is not None and not (value[2] > value[0] and value[3] > value[1]):
            raise ValueError(f"box {list(value)} must be [x0, y0, x1, y1] with x1 > x0 and y1 > y0")
        return value


def check_template(template: str) -> None:
    """Check that a template has exactly one `{}` for the name, and no other brace.

    Raises:
        ValueError: it does not.
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
        f"{value!r:.120} is not a list of categories: choose {', '.join(VOCABULARIES)}, a text file (its path holds a "
        f"/ or ends in .txt), or a list of names{f'. Did you mean {close[0]}?' if close else ''}"
    )


VOCABULARIES = (*get_args(BuiltinVocabulary), "dataset")
"""Category lists that are chosen by name."""


def is_vocabulary_file(categories: object) -> bool:
    """Whether `vocabulary.categories` is the path or URL of a text file: it contains a `/` or ends in `.txt`."""
    return isinstance(categories, str) and ("/" in categories or categories.lower().endswith(".txt"))


class VocabularyConfig(Section):
    """The categories and how they are queried."""

    RULES: ClassVar = rules.VOCABULARY

    categories: Annotated[
        Annotated[Name, AfterValidator(_check_list_or_file), Tag("<text>")]
        | Annotated[tuple[_NameOrCategory, ...], Tag("<list>")],
        _by_kind("`coco`, `lvis`, `objects365`, `dataset`, a text file, or a list of names or {id, name, …}"),
    ] = "dataset"
    """`coco` (80), `lvis` (v1, 1203) or `objects365` (v2, 365): built in, with the dataset's ids; `dataset`: the
    source's own list; a list of names (ids from 1) or of {id, name, synonyms, prompts}; or a text file, given as a URL
    or as a path that contains `/` or ends in `.txt`: one name per line (ids from 1), optionally followed by a tab and
    synonyms; `#` begins a comment line."""
    only: tuple[int | Name, ...] | None = None
    """Names or ids of the categories to look for; default: all. They keep their ids."""
    frequency: tuple[Frequency, ...] | None = None
    """LVIS frequency groups to look for: r(are), c(ommon), f(requent); default: all."""
    templates: Annotated[
        Annotated[Literal["none", "photo", "clip_best7"], Tag("<text>")] | Annotated[tuple[Name, ...], Tag("<list>")],
        _by_kind("`none`, `photo`, `clip_best7`, or a list of texts with a {}"),
    ] = "photo"
    """Sentences around a name: `none`: the bare name; `photo`: "a photo of a {}"; `clip_best7`: the seven of OWL-ViT's
    evaluation; or your own, where `{}` becomes the name. Several templates are averaged, see `ensemble`."""
    ensemble: Literal["embeddings", "logits"] = "embeddings"
    """How the templates of one name become one query: by averaging the text embeddings, or the logits of each (as in
    OWL-ViT's evaluation). Both cost the same."""
    canonical: bool | None = Field(default=None, validate_default=True)
    """Lower-case the filled templates and replace all but letters, digits, hyphens and hashes by spaces, as OWL-ViT's
    evaluation does. Default: true for `lvis`, whose names have underscores and brackets, otherwise false."""
    synonyms: bool = False
    """Also query the synonyms that the list `lvis` or the dataset's own categories give. Synonyms in a text file or in
    a list in the run file are always queried."""
    exemplars: tuple[Exemplar, ...] = ()
    """Images as queries: {category, image, box}."""
    exemplars_replace_text: bool = False
    """Categories that have exemplars are not queried by text."""

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
            raise ValueError("templates is empty: write `none` for the bare names")
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
                        f"{info.field_name} holds {entry!r:.120}, which is neither a name nor an id (put names in "
                        "quotes where YAML would read something else)"
                    )
        return entries

    @field_validator("canonical")
    @classmethod
    def _lvis_is_canonical(cls, value: bool | None, info: ValidationInfo) -> bool:
        return info.data.get("categories") == "lvis" if value is None else value

    @model_validator(mode="before")
    @classmethod
    def _synonyms_had_another_name(cls, value: Any) -> Any:
        # Settings that earlier runs stored under the old name stay readable.
        if isinstance(value, Mapping) and "dataset_synonyms" in value and "synonyms" not in value:
            return {"synonyms" if key == "dataset_synonyms" else key: each for key, each in value.items()}
        return value
