"""Make untrusted text safe for terminals and spreadsheets: no escape sequences, hidden marks or formulas."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSAFE = (
    "\x00-\x1f\x7f-\x9f"  # control characters, which begin escape sequences
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff"  # lone surrogates, which no encoding accepts: non-UTF-8 bytes of a file name
)
"""Control characters, marks that change the direction of text or are invisible, and line separators. The two joiners of
Persian and of emoji (U+200C, U+200D) are harmless and stay."""
_CHARACTER = re.compile(f"[{_UNSAFE}]")


def printable(text: str) -> str:
    r"""Escape every character that controls a terminal or is invisible (`\x1b`, `\u202e`); the result is one line.

    All other characters are unchanged, whatever their script, so that most texts come back as they are.
    """
    if text.isprintable():
        return text
    return _CHARACTER.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Like `printable` for text of several lines: line breaks stay, and all lines after the first are indented.

    A line break inside a name therefore cannot pass for the start of a log line.
    """
    return "\n  ".join(printable(line.expandtabs()) for line in text.replace("\r\n", "\n").split("\n"))


def _escape(match: re.Match[str]) -> str:
    character = match[0]
    known = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}.get(character)
    if known is not None:
        return known
    number = ord(character)
    return rf"\x{number:02x}" if number < 0x100 else rf"\u{number:04x}" if number < 0x10000 else rf"\U{number:08x}"


_FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def table_cell(value: Any) -> Any:
    """Prepare a value for a CSV file that users open in a spreadsheet.

    Text that a spreadsheet would take for a formula gets an apostrophe in front, as is customary, and control
    characters are escaped. Numbers, including numbers as text, are unchanged.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def safe_text(text: str) -> Text:
    """Text for a rich table, without markup and control characters."""
    return Text(printable(text))


class SafeConsole(Console):
    """A console that escapes control characters in tables, bars and lines; only its own colours reach the terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, with control characters inside the texts escaped."""
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control is not None or text.isprintable() or text == "\n":
                yield segment
            else:
                yield Segment("\n".join(map(printable, text.split("\n"))), segment.style)


Show = Callable[[str, int, int | None], None]
"""Called with what is done (`listed`, `verified`, `planned`), the number of images, and the total if it is known."""


def silent(what: str, done: int, total: int | None) -> None:
    """Show nothing."""
