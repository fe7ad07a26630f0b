"""Read the category lists that ship with the package: COCO, LVIS v1 and Objects365 v2, as tables of facts.

They are in `data/`, one file per list, and each file names its source. No definitions, no counts.
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
    """The dataset's own id: 1…90 with gaps (COCO), 1…1203 (LVIS v1), 1…365 (Objects365 v2)."""
    name: str
    """The name in the dataset's file; typos in Objects365's names are corrected."""
    raw_name: str
    """The dataset's own spelling, usually equal to `name`."""
    supercategory: str = ""
    """COCO's supercategory; otherwise empty."""
    synonyms: tuple[str, ...] = ()
    """LVIS's synonyms, without the name itself; otherwise empty."""
    frequency: Frequency | None = None
    """LVIS's frequency group; otherwise None."""
    synset: str | None = None
    """WordNet sense, for COCO and LVIS; otherwise None."""

    @property
    def spellings(self) -> tuple[str, ...]:
        """The name, and the dataset's own spelling if it differs."""
        return (self.name,) if self.raw_name == self.name else (self.name, self.raw_name)

    def category(self, *, with_synonyms: bool) -> Category:
        """The entry as a category to look for."""
        return Category(
            id=self.id,
            name=self.name,
            supercategory=self.supercategory,
            synonyms=self.synonyms if with_synonyms else (),
            frequency=self.frequency,
        )


@cache
def builtin(name: BuiltinVocabulary) -> tuple[BuiltinCategory, ...]:
    """A built-in list, by rising id."""
    return tuple(_category(row) for row in read_table(f"{name}.tsv"))


def read_table(file_name: str) -> list[dict[str, str]]:
    """Read a file of `data/`: one mapping per line, from column name to cell; cells that a line omits are empty."""
    text = resources.files("owlsam_ray.vocabulary").joinpath("data", file_name).read_text(encoding="utf-8")
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith(_COMMENT)]
    columns = lines[0]
    return [dict(zip(columns, cells + [""] * (len(columns) - len(cells)), strict=True)) for cells in lines[1:]]


def split_list(cell: str) -> tuple[str, ...]:
    """The entries of a cell that contains a list; an empty cell has none."""
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
