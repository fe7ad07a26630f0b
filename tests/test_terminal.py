"""Names from outside on a terminal."""

import pytest

from owlsam_ray.terminal import printable, printable_lines


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
