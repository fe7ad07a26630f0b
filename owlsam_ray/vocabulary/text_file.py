"""Read categories from a text file: one name per line."""

import logging
import unicodedata

from owlsam_ray import storage
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import InputError, shown
from owlsam_ray.vocabulary.fold import fold

_COMMENT = "#"
_log = logging.getLogger(__name__)


def read_text_file(url: str) -> list[Category]:
    """Read categories from a UTF-8 text file, with ids 1, 2, … in the order of its lines.

    A line is a name, or a name, a tab and comma-separated synonyms, which are queried as well. Empty lines and lines
    that begin with `#` are skipped and take no id; spaces at the ends are ignored. A name may contain commas, but the
    first such line gets a warning.

    Args:
        url: path or fsspec URL.

    Raises:
        InputError: the file cannot be read or holds no name, or a line is not UTF-8, contains control characters, has
            no name, an empty synonym or several tabs, or repeats a name; names the line.
    """
    try:
        data = storage.read_bytes(url)
    except OSError as error:
        raise InputError(
            f"cannot read {url}, the file of vocabulary.categories: {error.strerror or error or type(error).__name__}"
        ) from None
    categories: list[Category] = []
    lines: dict[str, int] = {}
    with_comma: list[str] = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        where = f"{url}, line {number}"
        text = _decoded(line, where)
        if not text or text.startswith(_COMMENT):
            continue
        category = _category(text, where, category_id=len(categories) + 1)
        earlier = lines.setdefault(fold(category.name), number)
        if earlier != number:
            raise InputError(
                f"{where} repeats the name {shown(category.name)} of line {earlier}: leave one of them out"
            )
        categories.append(category)
        if "," in text and "\t" not in text:
            with_comma.append(f"{where} ({text[:60]!r})")
    if not categories:
        raise InputError(f"{url} holds no name: write one name per line")
    if with_comma:
        _log.warning(
            "%d line(s) hold commas and are read as one name each, the first is %s: write one name per line, and "
            "synonyms after a tab",
            len(with_comma), with_comma[0],
        )  # fmt: skip
    return categories


def _decoded(line: bytes, where: str) -> str:
    try:
        text = line.decode("utf-8").strip(" \r")
    except UnicodeDecodeError:
        raise InputError(f"{where} is not UTF-8: {line[:60]!r}. Save the file as UTF-8.") from None
    if any(unicodedata.category(letter) == "Cc" and letter != "\t" for letter in text):
        raise InputError(f"{where} holds control characters: {text[:60]!r}. Is it a text file of names?")
    return text


def _category(text: str, where: str, *, category_id: int) -> Category:
    name, *rest = (part.strip() for part in text.split("\t"))
    if not name or len(rest) > 1:
        raise InputError(
            f"{where} is {text[:60]!r}: a line must be a name, or a name, one tab and comma-separated synonyms"
        )
    synonyms = tuple(synonym.strip() for synonym in rest[0].split(",")) if rest and rest[0] else ()
    if not all(synonyms):
        raise InputError(f"{where} ({shown(name)}) has an empty synonym: {shown(rest[0])}")
    return Category(id=category_id, name=name, synonyms=synonyms)
