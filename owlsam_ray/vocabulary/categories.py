"""Collect the categories from a built-in list, the dataset, a text file or the run file; all or some of them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from owlsam_ray.config.vocabulary import BuiltinVocabulary, Category, Frequency, VocabularyConfig
from owlsam_ray.errors import InputError, shown
from owlsam_ray.vocabulary.builtin import BuiltinCategory, builtin
from owlsam_ray.vocabulary.fold import fold
from owlsam_ray.vocabulary.subset import select_categories
from owlsam_ray.vocabulary.text_file import read_text_file


def resolve_categories(config: VocabularyConfig, source_categories: Sequence[dict[str, Any]]) -> tuple[Category, ...]:
    """The categories that a config names, in the order of their list.

    Args:
        config: the section `vocabulary` of the run file.
        source_categories: the dataset's own list, for `categories: dataset`.

    Raises:
        InputError: there are no categories, a name or an id repeats, the dataset's list or the text file is not usable,
            or `only` or `frequency` name something that the list lacks.
    """
    entries = {each.id: each for each in _builtin_entries(config)}
    synonyms: dict[int, Sequence[str]] = {each.id: each.synonyms for each in entries.values()}
    if entries:
        categories = [each.category(with_synonyms=config.synonyms) for each in entries.values()]
    elif config.categories == "dataset":
        categories = _from_source(source_categories, with_synonyms=config.synonyms)
    elif isinstance(config.categories, str):
        categories = read_text_file(config.categories)
    else:
        categories = _from_list(config.categories)
    _check_list(categories)
    if config.only is not None or config.frequency is not None:
        categories = select_categories(
            categories,
            only=config.only,
            frequency=config.frequency,
            spellings={each.id: each.spellings for each in entries.values()},
            synonyms=synonyms | {each.id: each.synonyms for each in categories if each.synonyms},
        )
    return tuple(categories)


def _builtin_entries(config: VocabularyConfig) -> Sequence[BuiltinCategory]:
    for name in get_args(BuiltinVocabulary):
        if config.categories == name:
            return builtin(name)
    return ()


def _check_list(categories: Sequence[Category]) -> None:
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
                f"{', '.join(repr(value) for value in repeated[:5])}. Every category needs a unique {what}."
            )


def _from_list(entries: Iterable[Category | str]) -> list[Category]:
    entries = list(entries)
    names = [entry for entry in entries if isinstance(entry, str)]
    if names and len(names) < len(entries):
        raise InputError(
            f"vocabulary.categories mixes plain names ({shown(names[0])}, …) with {{id, name}} entries: give every "
            "category an id, or none"
        )
    return [
        Category(id=number, name=entry) if isinstance(entry, str) else entry
        for number, entry in enumerate(entries, start=1)
    ]


def _from_source(source_categories: Sequence[dict[str, Any]], *, with_synonyms: bool) -> list[Category]:
    if not source_categories:
        raise InputError(
            "vocabulary.categories is `dataset`, but the dataset names no categories: list them in the run file or in "
            "a text file, or choose a built-in list: `coco`, `lvis` or `objects365`"
        )
    wanted = ("id", "name", "supercategory", *(("synonyms",) if with_synonyms else ()))
    categories = []
    for position, entry in enumerate(source_categories):
        try:
            # A null value means: not stated.
            fields = {key: entry[key] for key in wanted if entry.get(key) is not None}
            # Other datasets may use that key for something else.
            if entry.get("frequency") in get_args(Frequency):
                fields["frequency"] = entry["frequency"]
            categories.append(Category.model_validate(fields))
        except (ValidationError, TypeError, AttributeError):
            also = ", and synonyms as a list of texts" if with_synonyms else ""
            raise InputError(
                f"categories[{position}] of the dataset needs an integer id (0 ≤ id < 2^53) and a name, with a text as "
                f"supercategory, if any{also}: {shown(entry)}"
            ) from None
    if with_synonyms and not any(category.synonyms for category in categories):
        raise InputError(
            "vocabulary.synonyms is set, but no category of the dataset lists `synonyms`: leave it out, or give the "
            "synonyms in a list of categories"
        )
    return categories


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]
