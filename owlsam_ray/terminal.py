"""Text from outside as a terminal, or a spreadsheet, may show it: no escape sequence, no hidden order, no formula."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_UNSAFE = (
    "\x00-\x1f\x7f-\x9f"  # controls: escape sequences begin with them
    "\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
    "\ud800-\udfff"  # halves of pairs, which no encoding takes: bytes of a file name that are not UTF-8
)
"""Controls, marks that turn the direction of text or cannot be seen, and line separators. The two joiners of Persian
and of emoji (U+200C, U+200D) are no danger and stay."""
_CHARACTER = re.compile(f"[{_UNSAFE}]")


def printable(text: str) -> str:
    r"""Text with every character that steers a terminal, or hides itself, as an escape (`\x1b`, `\u202e`); in one line.

    Everything else stays as it is, whatever its script, so that most texts come back unchanged.
    """
    if text.isprintable():
        return text
    return _CHARACTER.sub(_escape, text)


def printable_lines(text: str) -> str:
    """The same for a text of several lines. They stay, but all after the first are indented.

    So a line end inside a name cannot pass for the begin of a log line.
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
    """A value for a CSV file that people open with a spreadsheet.

    A text that would be taken for a formula gets an apostrophe in front, as is usual, and controls are escaped.
    Numbers, also as texts, stay numbers.
    """
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def safe_text(text: str) -> Text:
    """A text for a table of rich: no markup, no controls."""
    return Text(printable(text))


class SafeConsole(Console):
    """A console whose tables, bars and lines show nothing that steers the terminal, but for its own colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is drawn, with controls inside texts escaped."""
        for segment in super().render(renderable, options):
            text = segment.text
            if segment.control is not None or text.isprintable() or text == "\n":
                yield segment
            else:
                yield Segment("\n".join(map(printable, text.split("\n"))), segment.style)


Show = Callable[[str, int, int | None], None]
"""Called with what is done (`listed`, `verified`, `planned`), how many images, and of how many where that is known."""


def silent(what: str, done: int, total: int | None) -> None:
    """Show nothing."""
