"""Names that are made safe: only where they must be, and never two as one."""

import itertools
import random
import re
from urllib.parse import unquote

import pytest

from owlsam_ray.sources.listing import file_name_error
from owlsam_ray.sources.row_names import distinct_name, inside, quoted_name, row_name


@pytest.mark.parametrize("name", ["a.jpg", "a b/ü%5C.jpg", "%2E%2E/x", "...", "a:/b", "x~1.png", ".hidden", "100%"])
def test_names_that_are_safe_stay(name: str) -> None:
    assert quoted_name(name) == name


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("shelf\\3.png", "shelf%5C3.png"),
        ("50%\\3.png", "50%25%5C3.png"),
        ("nul\0.png", "nul%00.png"),
        ("./a.png", "%2E/a.png"),
        ("x/../../a.png", "x/%2E%2E/%2E%2E/a.png"),
        ("sub//a.png", "sub/%2Fa.png"),
        ("/etc/passwd", "%2Fetc/passwd"),
        ("getasset/72/", "getasset/72%2F"),
        ("a//", "a/%2F"),
        ("/", "%2F"),
        ("..", "%2E%2E"),
        ("http://h/x.png", "http:/%2Fh/x.png"),
        ("\udcff.png", "%FF.png"),
        ("\ud83d.png", "%ED%A0%BD.png"),
    ],
)
def test_names_that_are_not_are_quoted(name: str, quoted: str) -> None:
    assert quoted_name(name) == quoted
    assert file_name_error(quoted) is None


def test_quoting_can_be_undone() -> None:
    """Over every text of up to five of these pieces, and some longer ones by chance."""
    pieces = ["a", "/", ".", "\\", "%", "%5C", ":", "\0"]
    texts = {"".join(each) for length in range(1, 6) for each in itertools.product(pieces, repeat=length)}
    chance = random.Random(seed := 15)
    texts |= {"".join(chance.choices([*pieces, "ü", "%2F", "2F"], k=12)) for _ in range(2000)}
    refused = {text for text in texts if file_name_error(text) is not None}
    assert len(refused) > 20_000
    quoted = {quoted_name(text) for text in refused}
    assert len(quoted) == len(refused), seed
    assert all(unquote(quoted_name(text)) == text for text in refused), seed
    assert all(file_name_error(name) is None for name in quoted), seed


def test_names_of_rows() -> None:
    assert row_name("list.csv", 17) == "row-list.csv-17"
    assert row_name("b/list 1.csv", 0) == "row-b%2Flist%201.csv-0"
    assert file_name_error(row_name("../\\x", 3)) is None


def test_second_choices_differ_by_what_they_are_given() -> None:
    first, second = (distinct_name("h/a.b/photo.jpg", f"https://h/a.b/photo.jpg?id={number}") for number in (1, 2))
    assert re.fullmatch(r"h/a\.b/photo~[0-9a-f]{20}\.jpg", first)
    assert first != second
    assert re.fullmatch(r"h/a\.b/photo~[0-9a-f]{20}", distinct_name("h/a.b/photo", "x"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [("a.png", "a.png"), ("./a//b/../c.png", "a/c.png"), ("a/", "a/"), ("../a", None), ("a/../..", None), (".", None)],
)
def test_paths_stay_inside(path: str, expected: str | None) -> None:
    assert inside(path) == expected
