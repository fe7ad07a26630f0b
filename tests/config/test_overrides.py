"""`--set`: no text is cut, no missing value is taken for the default, and lists, sections and numbers still work."""

from typing import Any

import pytest
import yaml

from owlsam_ray.config.load import load_tree
from owlsam_ray.errors import ConfigError


def value_of(text: str) -> Any:
    return load_tree([], [f"a.b={text}"])["a"]["b"]


@pytest.mark.parametrize(
    "text",
    [
        "holiday #3",
        "#3",
        "a#b",
        "one: two",
        "one:",
        ": one",
        "*star",
        "*.tar",
        "&anchor",
        "!tag",
        "!!python/name:os.system",
        "%percent",
        "@at",
        "`tick`",
        "> folded",
        "| literal",
        "- item",
        "-",
        "?",
        "? key",
        "two\ttabs\there",
        "2026-01-01",
        "<<",
        "=",
        "x=y",
        "s3://bucket/a b#c?d",
        "a, b",
        "a]",
        "a'b\"c",
        "naïve 😀",
        "…",
    ],
)
def test_plain_texts_are_taken_as_they_are(text: str) -> None:
    assert value_of(text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("-3", -3),
        ("0.25", 0.25),
        ("1.0e-3", 0.001),
        (" 7 ", 7),
        ("true", True),
        ("null", None),
        ("~", None),
        ("''", ""),
        ('""', ""),
        ("'holiday #3'", "holiday #3"),
        ('"a\\tb"', "a\tb"),
        ("[]", []),
        ("{}", {}),
        ("[cat, 'a #1', 3]", ["cat", "a #1", 3]),
        ("{cat: 0.5, 'a: b': 1}", {"cat": 0.5, "a: b": 1}),
        ("[{id: 1, name: cat}]", [{"id": 1, "name": "cat"}]),
        ("- cat\n- dog", ["cat", "dog"]),
        ("cat: 1\ndog: 2\n", {"cat": 1, "dog": 2}),
    ],
)
def test_values_of_yaml(text: str, expected: Any) -> None:
    found = value_of(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("text", ["", " ", "\t", "\n"])
def test_a_missing_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set a\.b= has no value \(an unset shell variable\?\).*a\.b=null"):
        value_of(text)


@pytest.mark.parametrize(
    "text",
    ["[a #b]", "[a, b] # c", "'a' # b", "'a' b", "{a: 1} #", "[a", "'a", '"a', "{000..127}.tar", "a: 1\n# b\nc: 2"],
)
def test_what_would_be_cut_or_is_broken_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--set .* is not valid YAML: .*quoted"):
        value_of(text)


def test_a_key_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        value_of("{a: 1, a: 2}")


def test_yaml_agrees_where_it_reads_a_plain_number_or_word() -> None:
    for text in ("1_000", "0x1F", "1e3", "1.5", ".inf", "yes", "No", "off", "NULL", "010", "1:30"):
        assert value_of(text) == yaml.safe_load(text), text
