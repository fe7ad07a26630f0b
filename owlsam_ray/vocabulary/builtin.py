"""The lists of categories that come with the package: COCO's, LVIS v1's and Objects365 v2's, as tables of facts.

They stand in `data/`, one file each, which names where it comes from. No definitions, no counts.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import get_args

from owlsam_ray.config.vocabulary import BuiltinVocabulary, Category, Frequency

_LIST_SEPARATOR = "|"
_COMMENT = "#"


@dataclass(frozen=True, slots=True)
class BuiltinCategory:
    """One line of a list."""

    id: int
    """The dataset's own: 1…90 with gaps (COCO), 1…1203 (LVIS v1), 1…365 (Objects365 v2)."""
    name: str
    """As the dataset's file has it; Objects365's with its typos corrected."""
    raw_name: str
    """The dataset's own spelling, mostly the same."""
    supercategory: str = ""
    """COCO's; else empty."""
    synonyms: tuple[str, ...] = ()
    """Of LVIS, without the name itself."""
    frequency: Frequency | None = None
    """Of LVIS."""
    synset: str | None = None
    """WordNet sense, of COCO and LVIS."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """The name, and the dataset's own spelling where it is another one."""
        return (self.name,) if self.raw_name == self.name else (self.name, self.raw_name)

    def category(self, *, with_synonyms: bool) -> Category:
        """As a category to look for."""
        return Category(
            id=self.id,
            name=self.name,
            supercategory=self.supercategory,
            synonyms=self.synonyms if with_synonyms else (),
            frequency=self.frequency,
        )


@cache
def builtin(name: BuiltinVocabulary) -> tuple[BuiltinCategory, ...]:
    """A list, by rising id."""
    return tuple(_category(row) for row in read_table(f"{name}.tsv"))


def read_table(file_name: str) -> list[dict[str, str]]:
    """A file of `data/`: one mapping a line, from the names of the columns; what a line leaves out is empty."""
    text = resources.files("owlsam_ray.vocabulary").joinpath("data", file_name).read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith(_COMMENT)]
    columns = lines[0]
    return [dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True)) for cells in lines[1:]]


def split_list(cell: str) -> tuple[str, ...]:
    """The entries of a cell that holds a list; none of an empty one."""
    return tuple(cell.split(_LIST_SEPARATOR)) if cell else ()


def _category(row: dict[str, str]) -> BuiltinCategory:
    frequency: dict[str, Frequency] = {letter: letter for letter in get_args(Frequency)}
    return BuiltinCategory(
        id=int(row["id"]),
        name=row["name"],
        raw_name=row.get("raw_name") or row["name"],
        supercategory=row.get("supercategory", ""),
        synonyms=split_list(row.get("synonyms", "")),
        frequency=frequency.get(row.get("frequency", "")),
        synset=row.get("synset") or None,
    )
