"""Values and errors of others in messages: cut, escaped, on one line."""

import datetime
import pickle

import pytest

from owlsam_ray.errors import ImageError, InputError, one_line, shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a cat", "'a cat'"),
        ("tab\tend\x1b[31m", "'tab\\tend\\x1b[31m'"),
        ("\ud800 \u202e", "'\\ud800 \\u202e'"),
        ("ümlaut 猫", "'ümlaut 猫'"),
        (b"a\x00", "b'a\\x00'"),
        (17, "17"),
        (True, "True"),
        (None, "None"),
        (float("nan"), "nan"),
        ([1, "a", [2.5]], "[1, 'a', [2.5]]"),
        ((1, 2), "(1, 2)"),
        ({"a": {"b": None}}, "{'a': {'b': None}}"),
        ({3}, "{3}"),
        ([], "[]"),
        ([[[[[1]]]]], "[[[[[…]]]]]"),
        (datetime.date(2024, 1, 2), "datetime.date(2024, 1, 2)"),
    ],
)
def test_a_short_value_is_shown_as_repr_writes_it(value: object, expected: str) -> None:
    assert shown(value) == expected


@pytest.mark.parametrize(
    "value",
    ["x" * 10**7, b"y" * 10**7, list(range(10**6)), dict.fromkeys(range(10**4), "v" * 1000), "\x1b" * 500],
    ids=["text", "bytes", "list", "mapping", "escapes"],
)
def test_a_long_value_is_cut_at_the_limit(value: object) -> None:
    text = shown(value, 40)
    assert len(text) == 40
    assert text.endswith("…")


def test_the_limit_is_120_characters() -> None:
    assert shown("a" * 118) == "'" + "a" * 118 + "'"
    assert shown("a" * 119) == "'" + "a" * 118 + "…"


def test_an_integer_of_thousands_of_digits_is_told_by_their_number() -> None:
    assert shown(10**4999) == "<integer of about 5000 digits>"
    assert shown([-(10**9999)]) == "[<integer of about 10000 digits>]"


def test_a_structure_that_holds_itself_or_billions_of_values_costs_nothing() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert shown(loop) == "[[[[[…]]]]]"
    level: list[object] = ["cat"] * 9
    for _ in range(12):  # 9^13 values, told by references
        level = [level] * 9
    assert len(shown(level)) == 120


def test_a_librarys_message_comes_on_one_line_and_cut() -> None:
    assert one_line(ValueError("a\n  b\t c\x1b[2J")) == "a b c\\x1b[2J"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(ValueError("z" * 10**7)) == "z" * 299 + "…"


def test_a_message_or_reason_of_megabytes_is_cut_whoever_made_it() -> None:
    error = InputError("m" * 10**7, {"counts": 3})
    assert (len(error.args[0]), error.args[1]) == (8000, {"counts": 3})
    assert str(InputError("m" * 8000)) == "m" * 8000
    assert len(str(InputError("m" * 8001))) == 8000
    assert ImageError("bad_uri: " + "r" * 10**7).reason == "bad_uri: " + "r" * 990 + "…"
    again = pickle.loads(pickle.dumps(error))
    assert again.args == error.args
