"""Which categories: COCO's, the dataset's own, or a list."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError

from owlsam_ray.errors import InputError
from owlsam_ray.settings import Category, VocabularyConfig
from owlsam_ray.vocabulary.coco import COCO_CATEGORIES


def fold(text: str) -> str:
    """Two texts with the same fold are the same to CLIP's tokenizer: case and runs of spaces do not count."""
    return " ".join(text.lower().split())


def resolve_categories(config: VocabularyConfig, source_categories: Sequence[dict[str, Any]]) -> tuple[Category, ...]:
    """The categories that a config names, in its order.

    Args:
        config: the section of the run file.
        source_categories: the dataset's own list, for `categories: dataset`.

    Raises:
        InputError: there are none, a name or an id repeats, or the dataset's list is not usable.
    """
    if config.categories == "coco":
        categories = [Category(id=number, name=name, supercategory=parent) for number, name, parent in COCO_CATEGORIES]
    elif config.categories == "dataset":
        categories = _from_source(source_categories, with_synonyms=config.dataset_synonyms)
    else:
        categories = _from_list(config.categories)
    if not categories:
        raise InputError("vocabulary.categories is empty: name at least one thing to look for")
    for what, values in (
        ("name", (fold(category.name) for category in categories)),
        ("id", (category.id for category in categories)),
    ):
        repeated = _repeated(values)
        if repeated:
            raise InputError(
                f"vocabulary.categories: {len(repeated)} {what}(s) given more than once: "
                f"{', '.join(repr(value) for value in repeated[:5])}. Every category needs a {what} of its own."
            )
    return tuple(categories)


def _from_list(entries: Iterable[Category | str]) -> list[Category]:
    entries = list(entries)
    names = [entry for entry in entries if isinstance(entry, str)]
    if names and len(names) < len(entries):
        raise InputError(
            f"vocabulary.categories mixes plain names ({names[0]!r}, …) with {{id, name}} entries: give every category "
            "an id, or none"
        )
    return [
        Category(id=number, name=entry) if isinstance(entry, str) else entry
        for number, entry in enumerate(entries, start=1)
    ]


def _from_source(source_categories: Sequence[dict[str, Any]], *, with_synonyms: bool) -> list[Category]:
    if not source_categories:
        raise InputError(
            "vocabulary.categories is `dataset`, but the dataset names no categories: list them in the run file, "
            "or take `coco`"
        )
    wanted = ("id", "name", "supercategory", *(("synonyms",) if with_synonyms else ()))
    categories = []
    for position, entry in enumerate(source_categories):
        try:
            categories.append(Category.model_validate({key: entry[key] for key in wanted if key in entry}))
        except (ValidationError, TypeError):
            also = ", and synonyms as a list of texts" if with_synonyms else ""
            raise InputError(
                f"categories[{position}] of the dataset needs an integer id and a name{also}: {entry!r}"
            ) from None
    if with_synonyms and not any(category.synonyms for category in categories):
        raise InputError(
            "vocabulary.dataset_synonyms is set, but no category of the dataset lists `synonyms`: leave it out, or "
            "give the synonyms in a list of categories"
        )
    return categories


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
