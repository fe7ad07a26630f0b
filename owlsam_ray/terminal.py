"""Text from outside as a terminal may show it: no escape sequence, no other control, no reordering of what is read."""

import re

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
