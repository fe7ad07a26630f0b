"""Categories → prompts."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from owlsam_ray.errors import InputError
from owlsam_ray.settings import Category, VocabularyConfig
from owlsam_ray.vocabulary.coco import COCO_CATEGORIES

__all__ = ["Vocabulary", "resolve_vocabulary"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is looked for, and the text queries that look for it."""

    categories: tuple[Category, ...]
    prompts: tuple[str, ...]
    prompt_labels: tuple[int, ...]
    """Index into `categories` of each prompt."""


def resolve_vocabulary(config: VocabularyConfig, source_categories: Sequence[dict[str, Any]]) -> Vocabulary:
    """The categories that a config names, each with its prompt.

    Args:
        config: the section of the run file.
        source_categories: the dataset's own list, for `categories: dataset`.

    Raises:
        InputError: there are none, or a name or an id repeats.
    """
    if config.categories == "coco":
        categories = [Category(id=number, name=name, supercategory=parent) for number, name, parent in COCO_CATEGORIES]
    elif config.categories == "dataset":
        categories = _from_source(source_categories)
    else:
        categories = _from_list(config.categories)
    if not categories:
        raise InputError("vocabulary.categories is empty: name at least one thing to look for")
    for what, values in (
        ("name", (" ".join(category.name.lower().split()) for category in categories)),
        ("id", (category.id for category in categories)),
    ):
        repeated = _repeated(values)
        if repeated:
            raise InputError(
                f"vocabulary.categories: {len(repeated)} {what}(s) given more than once: "
                f"{', '.join(repr(value) for value in repeated[:5])}. Every category needs a {what} of its own."
            )
    return Vocabulary(
        categories=tuple(categories),
        prompts=tuple(config.template.replace("{}", category.name) for category in categories),
        prompt_labels=tuple(range(len(categories))),
    )


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


def _from_source(source_categories: Sequence[dict[str, Any]]) -> list[Category]:
    if not source_categories:
        raise InputError(
            "vocabulary.categories is `dataset`, but the dataset names no categories: list them in the run file, "
            "or take `coco`"
        )
    categories = []
    for position, entry in enumerate(source_categories):
        try:
            fields = {key: entry[key] for key in ("id", "name", "supercategory") if key in entry}
            categories.append(Category.model_validate(fields))
        except (ValidationError, TypeError):
            raise InputError(
                f"categories[{position}] of the dataset needs an integer id and a name: {entry!r}"
            ) from None
    return categories


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
