"""Names from outside on a terminal."""

import csv
import io
import json
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table
from rich.text import Text

from owlsam_ray.coco_files.file_copy import RemovalTable
from owlsam_ray.terminal import SafeConsole, printable, printable_lines, safe_text, table_cell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b[0m.png", r"a\x1b[31mred\x1b[0m.png"),
        ("\x1b]8;;http://evil\x1b\\click", r"\x1b]8;;http://evil\x1b\click"),
        ("a\x9b2J", r"a\x9b2J"),
        ("one\ntwo\r\tthree\x00\x7f", r"one\ntwo\r\tthree\x00\x7f"),
        ("cat\u202egnp.exe", r"cat\u202egnp.exe"),
        ("a\u2066b\u2069\u200b\ufeff\u2028", r"a\u2066b\u2069\u200b\ufeff\u2028"),
        ("a\U000e0041", r"a\U000e0041"),
        ("caf\udce9.png", r"caf\udce9.png"),
    ],
)
def test_what_steers_a_terminal_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize(
    "text", ["plain name.png", "café", "猫 と 犬", "سگ\u200cها", "👩\u200d🚀", "a\u00a0b", r"C:\x", "±×–"]
)
def test_other_texts_stay(text: str) -> None:
    assert printable(text) == text


def test_lines_stay_lines_but_none_passes_for_a_log_line() -> None:
    text = "first\x1b\n12:00:00 ERROR forged\r\n\tthird"
    assert printable_lines(text) == "first\\x1b\n  12:00:00 ERROR forged\n          third"


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
        ("@SUM(1)", "'@SUM(1)"),
        ("+1+cmd|x", "'+1+cmd|x"),
        ("-2+3", "'-2+3"),
        (" =1", "' =1"),
        ("\uff1d1", "'\uff1d1"),
        ("\t=1", r"\t=1"),
        ("\r=1", r"\r=1"),
        ("a\x1b[2J\u202e.png", r"a\x1b[2J\u202e.png"),
        ("-5", "-5"),
        ("+1.5e-3", "+1.5e-3"),
        ("plain = name.png", "plain = name.png"),
        (-5, -5),
        (-0.25, -0.25),
        (None, None),
    ],
)
def test_cells_of_tables_are_no_formulas_and_numbers_stay(value: Any, cell: Any) -> None:
    assert table_cell(value) == cell


def test_the_table_of_a_cleaning_is_safe_as_csv_and_exact_as_json() -> None:
    row = ("removed", -3, "=1+1.png", 7, "@cat\x1b[2J", "outside", "-x")
    out = io.BytesIO()
    table = RemovalTable(out, as_csv=True)
    table.add(*row)
    table.finish()
    cells = list(csv.reader(io.StringIO(out.getvalue().decode())))[1]
    assert cells == ["removed", "-3", "'=1+1.png", "7", r"'@cat\x1b[2J", "outside", "'-x"]
    out = io.BytesIO()
    table = RemovalTable(out, as_csv=False)
    table.add(*row)
    table.finish()
    assert list(json.loads(out.getvalue()).values()) == list(row)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_consoles_show_names_without_controls(is_terminal: bool) -> None:
    out = io.StringIO()
    console: Console = SafeConsole(file=out, force_terminal=is_terminal, width=200, color_system=None)
    table = Table("name", title=Text("t\x1b[2J"))
    table.add_row(safe_text("cat\x1b]0;x\x07\u202egnp\x9b2J"))
    console.print(table)
    console.print("line\x1b[31m\nsecond", markup=False, highlight=False)
    shown = out.getvalue()
    assert r"\x1b[2J" in shown
    assert r"cat\x1b]0;x" in shown
    assert r"\u202egnp\x9b2J" in shown
    assert "line\\x1b[31m\nsecond\n" in shown
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)


def test_a_console_keeps_its_own_colours() -> None:
    out = io.StringIO()
    SafeConsole(file=out, force_terminal=True, color_system="standard").print("[red]x[/red]")
    assert out.getvalue() == "\x1b[31mx\x1b[0m\n"
