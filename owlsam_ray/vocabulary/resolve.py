"""Turn the categories into queries for the detector."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

from owlsam_ray.config.vocabulary import Category, Exemplar, VocabularyConfig
from owlsam_ray.errors import InputError, shown
from owlsam_ray.vocabulary.canonical import canonical
from owlsam_ray.vocabulary.categories import resolve_categories
from owlsam_ray.vocabulary.fold import fold
from owlsam_ray.vocabulary.templates import fill

_log = logging.getLogger(__name__)

_NAMED = 5
"""Number of entries that a message names at most."""


class Query(BaseModel):
    """One input of the class head: the averaged prompts of one name, or one exemplar."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    label: int
    """Index of the query's category in the vocabulary."""
    prompts: tuple[str, ...]
    """Texts as passed to the tokenizer; empty for an exemplar."""
    exemplar: Exemplar | None = None
    """The image that replaces the text."""

    @property
    def text(self) -> str:
        """Short description for messages: the first prompt and how many more, or the image and the box in it."""
        if self.exemplar is not None:
            box = self.exemplar.box
            where = "" if box is None else f" [{', '.join(f'{edge:g}' for edge in box)}]"
            return f"{self.exemplar.image}{where}"
        more = f" (+{len(self.prompts) - 1})" if len(self.prompts) > 1 else ""
        return f"{self.prompts[0]}{more}"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The categories to look for, and the queries for them."""

    categories: tuple[Category, ...]
    queries: tuple[Query, ...]
    """By rising label, so that the queries of one label are adjacent: name, synonyms, exemplars."""

    @property
    def query_labels(self) -> tuple[int, ...]:
        """Index into `categories`, per query."""
        return tuple(query.label for query in self.queries)

    @property
    def category_names(self) -> tuple[str, ...]:
        """Name of each category."""
        return tuple(category.name for category in self.categories)


def resolve_vocabulary(config: VocabularyConfig, source_categories: Sequence[dict[str, Any]]) -> Vocabulary:
    """The categories that a config names, each with its queries.

    If queries of one category differ only in case and spaces, the first is kept. The same query in two categories gets
    a warning, since their scores are always equal.

    Args:
        config: the section `vocabulary` of the run file.
        source_categories: the dataset's own list, for `categories: dataset`; keys other than `id`, `name`,
            `supercategory`, `synonyms` and `frequency` are not read.

    Raises:
        InputError: the categories are not usable, see `resolve_categories`; an exemplar's category is not among them;
            a name is empty in canonical form.
    """
    categories = resolve_categories(config, source_categories)
    exemplars = _by_label(config.exemplars, categories)
    queries: list[Query] = []
    for label, category in enumerate(categories):
        found = []
        if not (config.exemplars_replace_text and label in exemplars):
            found += [Query(label=label, prompts=prompts) for prompts in _texts(category, config)]
        found += [Query(label=label, prompts=(), exemplar=exemplar) for exemplar in exemplars.get(label, ())]
        distinct: dict[Any, Query] = {}
        for query in found:
            distinct.setdefault(_key(query), query)
        queries += distinct.values()
    _warn_of_equal_queries(categories, queries)
    return Vocabulary(categories=categories, queries=tuple(queries))


def _texts(category: Category, config: VocabularyConfig) -> list[tuple[str, ...]]:
    """The prompts of each text query of a category."""
    if category.prompts:
        return [(prompt,) for prompt in category.prompts]  # verbatim: neither templates nor canonical form
    filled = []
    for name in (category.name, *category.synonyms):
        prompts = fill(config.templates, name)
        if config.canonical:
            if not canonical(name):
                whose = "" if name == category.name else f" (a synonym of {shown(category.name)})"
                raise InputError(
                    f"the name {shown(name)}{whose} is empty in canonical form, which keeps only a-z, 0-9 and dashes: "
                    "set vocabulary.canonical: false, or give the category another name, or prompts"
                )
            prompts = tuple(canonical(prompt) for prompt in prompts)
        filled.append(prompts)
    return filled


def _by_label(exemplars: Iterable[Exemplar], categories: Sequence[Category]) -> dict[int, list[Exemplar]]:
    labels = {fold(category.name): label for label, category in enumerate(categories)}
    grouped: dict[int, list[Exemplar]] = {}
    for position, exemplar in enumerate(exemplars):
        label = labels.get(fold(exemplar.category))
        if label is None:
            known = ", ".join(repr(category.name) for category in categories[:_NAMED])
            more = f", … ({len(categories)} in all)" if len(categories) > _NAMED else ""
            raise InputError(
                f"vocabulary.exemplars[{position}] shows {shown(exemplar.category)}, and no category has that name. "
                f"The categories are: {known}{more}"
            )
        grouped.setdefault(label, []).append(exemplar)
    return grouped


def _key(query: Query) -> Any:
    """A key that is equal for queries with equal embeddings."""
    exemplar = query.exemplar
    shown = None if exemplar is None else (exemplar.image, exemplar.box)
    return (*(fold(prompt) for prompt in query.prompts), shown)


def _warn_of_equal_queries(categories: Sequence[Category], queries: Iterable[Query]) -> None:
    first: dict[Any, Query] = {}
    clashes = []
    for query in queries:
        earlier = first.setdefault(_key(query), query)
        if earlier.label != query.label:
            names = (categories[earlier.label].name, categories[query.label].name)
            clashes.append(
                f"{shown(query.text)} of {shown(names[1])} equals {shown(earlier.text)} of {shown(names[0])}"
            )
    if clashes:
        more = f"; and {len(clashes) - _NAMED} more" if len(clashes) > _NAMED else ""
        _log.warning(
            "%d quer%s shared by two categories, whose scores for it are equal, so the later category never wins: %s%s",
            len(clashes),
            "y is" if len(clashes) == 1 else "ies are",
            "; ".join(clashes[:_NAMED]),
            more,
        )
