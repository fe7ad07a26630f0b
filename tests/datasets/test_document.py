"""JSON files in parts: equal to json.loads on whatever they hold, and every fault told with its place."""

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from owlsam_ray.datasets.document import open_document
from owlsam_ray.errors import InputError

TEXTS = st.text(alphabet='ab"\\{}[],: \n\té☃', max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = pa.schema([("id", pa.int64()), ("bbox", pa.list_(pa.float64())), ("area", pa.float64())])


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@settings(max_examples=300, deadline=None)
@given(entries=st.lists(VALUES, max_size=8), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_batches_equal_json_loads(
    tmp_path_factory: pytest.TempPathFactory, entries: list[Any], indent: int | None, ascii_only: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps({"x": entries, "y": "z"}, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with open_document(str(path)) as document:
        for max_bytes in (1, 7, 50, 10**6):
            read: list[Any] = []
            for first, batch in document.batches("x", max_bytes=max_bytes):
                assert first == len(read)
                read += batch
            assert read == entries


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("max_bytes", [64, 10**6])
def test_columns_equal_a_loop(tmp_path: Path, indent: int | None, max_bytes: int) -> None:
    entries = [
        {"id": n, "bbox": [n, 0.5, 2, 3e1], "segmentation": [[n] * 6], "note": 'a "b" }],{ \\'} for n in range(40)
    ]
    entries[7] |= {"area": 12.5, "bbox": []}
    url = write(tmp_path / "a.json", json.dumps({"annotations": entries}, indent=indent).encode())
    rows: list[dict[str, Any]] = []
    with open_document(url) as document:
        for first, table in document.columns("annotations", OBJECTS, max_bytes=max_bytes):
            assert first == len(rows)
            assert table.schema.equals(OBJECTS)
            rows += table.to_pylist()
    assert rows == [{"id": e["id"], "bbox": e["bbox"], "area": e.get("area")} for e in entries]


def test_small_values(tmp_path: Path) -> None:
    url = write(tmp_path / "a.json", b'\xef\xbb\xbf{"info": {"year": 2017}, "licenses": null, "images": []}')
    with open_document(url) as document:
        assert document.value("info", dict, {}) == {"year": 2017}
        assert document.value("licenses", list, [5]) == [5]
        assert document.has("images")
        assert not document.has("licenses")
        assert list(document.batches("images")) == list(document.columns("gone", OBJECTS)) == []
        with pytest.raises(InputError, match=r"`info` is a dict, not a list"):
            document.value("info", list, [])
        with pytest.raises(InputError, match=r"`info` is a dict, not a list"):
            list(document.batches("info"))


def test_a_remote_file(tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/set/a.json", b'{"images": [{"id": 3}]}')
    with open_document("memory://set/a.json") as document:
        assert list(document.batches("images")) == [(0, [{"id": 3}])]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty (0 bytes)"),
        (b"[1]", "holds a list, not an object"),
        (b'{"images": [', "is not valid JSON: Input data was truncated (it has 12 bytes)"),
        (b'{"images": [{"id": 1} {"id": 2}]}', "is not valid JSON: JSON is malformed: expected ',' or ']' (byte 22)"),
        (b'{"images": [NaN]}', "(byte 12)"),
        (b'{"images": [{"file_name": "\\ud800.jpg"}]}', "hex escape (byte 33)"),
    ],
)
def test_a_broken_file_is_told_with_its_place(tmp_path: Path, content: bytes, words: str) -> None:
    url = write(tmp_path / "a.json", content)
    with pytest.raises(InputError) as caught, open_document(url):
        pass
    assert url in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('{"id": "7"}', "annotations[2]: id '7' is not an integer"),
        ('{"id": 7.0}', "annotations[2]: id 7.0 is not an integer"),
        ('{"id": true}', "annotations[2]: id True is not an integer"),
        ('{"id": 9223372036854775808}', "annotations[2]: id 9223372036854775808 is not an integer"),
        ('{"id": 7, "bbox": [1, "2"]}', "annotations[2] (id 7): bbox [1, '2'] is not a list of numbers"),
        ('{"id": 7, "area": {}}', "annotations[2] (id 7): area {} is not a number"),
        ("[]", "annotations[2] is a list, not an object"),
        ("7", "annotations[2] is a int, not an object"),
    ],
)
def test_an_entry_that_does_not_fit_is_named(tmp_path: Path, entry: str, words: str) -> None:
    url = write(tmp_path / "a.json", f'{{"annotations": [{{"id": 1}}, {{"id": 2}}, {entry}]}}'.encode())
    with open_document(url) as document, pytest.raises(InputError) as caught:
        list(document.columns("annotations", OBJECTS))
    assert words in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"), open_document(str(tmp_path / "gone.json")):
        pass
