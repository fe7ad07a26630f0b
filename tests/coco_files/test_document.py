"""The streaming reader against `json.loads`, on documents made by chance, and its refusals."""

import json
import logging
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from owlsam_ray.coco_files.blocks import cut_array
from owlsam_ray.coco_files.document import open_document
from owlsam_ray.errors import InputError

SCHEMA = pa.schema(
    [("id", pa.int64()), ("bbox", pa.list_(pa.float64())), ("area", pa.float64()), ("name", pa.string())]
)
_TEXTS = st.text(alphabet='ab"\\[]{},|:é\n\u2028😀', max_size=8) | st.text(st.characters(exclude_categories=["Cs"]))
_VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4),
    max_leaves=12,
)
_LAYOUTS = st.sampled_from(
    [
        {"separators": (",", ":")},
        {"separators": (" , ", " : ")},
        {"separators": (",\r\n", ":")},
        {"indent": 2},
        {"indent": "\t", "ensure_ascii": False},
        {"ensure_ascii": False},
    ]
)
_ROWS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.integers(-(2**63), 2**63 - 1) | st.none(),
            "bbox": st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-9, 9), max_size=4),
            "area": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**30), 10**30) | st.none(),
            "name": _TEXTS,
            "segmentation": _VALUES,
            '"id"': _VALUES,
        },
    ),
    max_size=12,
)


def _write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("documents") / "file.json"


@given(st.lists(_VALUES, max_size=12), _LAYOUTS, st.integers(1, 80))
@hypothesis_settings(max_examples=400, deadline=None)
def test_pieces_are_the_elements(elements: list[Any], layout: dict[str, Any], max_bytes: int) -> None:
    text = np.frombuffer(json.dumps(elements, **layout).encode(), np.uint8)[1:-1]
    found: list[Any] = []
    for piece in cut_array(text, max_bytes):
        inside = json.loads(b"[" + piece.text.tobytes() + b"]")
        assert piece.count == len(inside)
        assert piece.all_objects == all(isinstance(element, dict) for element in inside)
        assert [json.loads(line) for line in piece.lines().tobytes().split(b"\n")] == inside
        assert piece.count == 1 or len(piece.text) <= max_bytes
        found += inside
    assert found == elements


@given(st.dictionaries(_TEXTS, _VALUES, max_size=5), _ROWS, _LAYOUTS, st.integers(1, 300))
@hypothesis_settings(max_examples=300, deadline=None)
def test_a_document_is_what_json_loads_gives(
    path: Path, others: dict[str, Any], rows: list[dict[str, Any]], layout: dict[str, Any], max_bytes: int
) -> None:
    tree = others | {"annotations": rows, "mixed": list(others.values())}
    with open_document(_write(path, json.dumps(tree, **layout))) as document:
        for key, value in tree.items():
            assert document.has(key) == (value is not None)
            assert document.value(key, object, None) == value
        for key in ("annotations", "mixed"):
            batches = list(document.batches(key, max_bytes=max_bytes))
            assert [element for _, batch in batches for element in batch] == tree[key]
            assert [first for first, _ in batches] == np.cumsum([0, *(len(batch) for _, batch in batches)])[
                :-1
            ].tolist()
        tables = list(document.columns("annotations", SCHEMA, max_bytes=max_bytes))
        stops = [block.stop for block in document.blocks("annotations", max_bytes=max_bytes)]
    wanted = [{name: row.get(name) for name in SCHEMA.names} for row in rows]
    for row in wanted:
        row["area"] = None if row["area"] is None else float(row["area"])
    assert [row for _, table in tables for row in table.to_pylist()] == wanted
    assert all(table.schema == SCHEMA for _, table in tables)
    assert stops == sorted(stops)
    assert all(path.read_bytes()[stop : stop + 1].strip() in (b",", b"]", b"") for stop in stops)


def test_remote_files_bom_and_missing_keys(path: Path) -> None:
    text = b'\xef\xbb\xbf{"info": {"a": 1}, "annotations": [{"id": 1}, {"id": 2}], "licenses": null, "images": []}'
    with fsspec.open("memory://documents/file.json", "wb") as file:
        file.write(text)
    for url in ("memory://documents/file.json", _write(path, text), f"file://{path}"):
        with open_document(url) as document:
            assert [table["id"].to_pylist() for _, table in document.columns("annotations", SCHEMA)] == [[1, 2]]
            assert document.value("info", dict, {}) == {"a": 1}
            assert document.value("licenses", list, []) == []
            assert document.value("nothing", list, [3]) == [3]
            assert not document.has("licenses")
            assert not document.has("nothing")
            assert not list(document.batches("nothing"))
            assert not list(document.batches("images"))
            assert len(document) == len(text)
            assert document.num_bytes("annotations") == len('[{"id": 1}, {"id": 2}]')


def test_arrow_is_stricter_than_the_twin(path: Path) -> None:
    rows = f'{{"id": 1, "area": 1e999, "extra": 1e999, "bbox": [{2**53 + 1}, 1{"0" * 400}]}}, {{"id": 2, "id": 3}}'
    with open_document(_write(path, f'{{"annotations": [{rows}]}}')) as document:
        (table,) = (table for _, table in document.columns("annotations", SCHEMA))
    assert table.to_pylist() == [
        {"id": 1, "bbox": [2.0**53, float("inf")], "area": float("inf"), "name": None},
        {"id": 3, "bbox": None, "area": None, "name": None},
    ]


def test_halves_of_surrogate_pairs_are_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = r'{"info": {"a": "\ud800", "b": "\\ud800 \ud83d\ude00"}, "annotations": [{"id": 7, "name": "\udc00"}]}'
    with caplog.at_level(logging.WARNING), open_document(_write(path, text)) as document:
        assert document.value("info", dict, {}) == {"a": "\ufffd", "b": "\\ud800 😀"}
        assert [table["name"].to_pylist() for _, table in document.columns("annotations", SCHEMA)] == [["\ufffd"]]
    assert "2 unpaired surrogates, the first at byte 16" in caplog.text
    assert path.read_text() == text


def test_sizes_that_are_nan_are_not_stated(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = r'{"images": [{"height":NaN, "width" : NaN}, {"height": 5, "width": NaN, "a": "\"width\": NaN\ud800"}]}'
    with caplog.at_level(logging.WARNING), open_document(_write(path, text)) as document:
        assert [images for _, images in document.batches("images")] == [
            [{"height": 0, "width": 0}, {"height": 5, "width": 0, "a": '"width": NaN\ufffd'}]
        ]
    assert "3 heights or widths are NaN, which is not valid JSON, and are read as not stated" in caplog.text
    assert path.read_text() == text
    with pytest.raises(InputError, match="invalid character"), open_document(_write(path, '{"score": NaN}')):
        pass


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty (0 bytes)"),
        (b'{"images": [{"id": 1}, {"id"', "it ends too early, at byte 28"),
        (b'{"images": [1,, 2]}', "invalid character at byte 14"),
        (b'{"images": [NaN]}', "invalid character at byte 12"),
        (b'{"images": [Infinity]}', "at byte 12"),
        (b'\xef\xbb\xbf{"images": [NaN]}', "at byte 15"),
        (b'{"images": []} {}', "trailing characters at byte 15"),
        (b'{"info": "\xe4"}', "not valid UTF-8 at byte 10"),
        (b'{"info": "' + "ä".encode() * 2**20 + b'\xff"}', f"not valid UTF-8 at byte {10 + 2**21}"),
        (b'{"info": "\\ud800', "ends too early"),
        (b"[{}]", "holds a list, not an object (is it a list of results?"),
        (b"17", "holds a single value, not an object"),
        (b"\x1f\x8b\x08\x00", "compressed with gzip"),
        (b'{"images": [1], "annotations": [], "images": []}', 'gives "images" twice, first at byte 1'),
        (b'{"a": 1, "images": [1, 2, 3], "images": []}', 'gives "images" twice, first at byte 9'),
        (b'{"images": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_cannot_be_opened(path: Path, content: bytes, told: str) -> None:
    with pytest.raises(InputError) as refused, open_document(_write(path, content)):
        pass
    assert str(refused.value).startswith(str(path))
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("annotations", "told"),
    [
        ('{"id": 1}', "`annotations` is an object, not a list"),
        ('[{"id": 1}, {"id": "12"}]', 'annotations[1]: id "12" is not an integer'),
        ('[{"id": 1.0}]', "annotations[0]: id 1.0 is not an integer"),
        ('[{"id": true}]', "annotations[0]: id true is not an integer"),
        ('[{"id": 9223372036854775808}]', "id 9223372036854775808 is not an integer of 64 bits"),
        ('[{"id": 3, "area": "12"}]', 'annotations[0] (id 3): area "12" is not a number'),
        ('[{"id": 3, "bbox": [1, 2, "3", 4]}]', '(id 3): bbox [1, 2, "3", 4] is not a list of numbers'),
        ('[{"id": 3, "bbox": {"x": 1}}]', '(id 3): bbox {"x": 1} is not a list of numbers'),
        ('[{"id": 3, "name": 4}]', "(id 3): name 4 is not a text"),
        ('[{"id": 1}, null]', "annotations[1] is null, not an object"),
        ("[null]", "annotations[0] is null, not an object"),
        ('[{"id": 1}, 5, {"id": 1}]', "annotations[1] is a number, not an object"),
        ('[[{"id": 1}]]', "annotations[0] is a list, not an object"),
    ],
)
@pytest.mark.parametrize("max_bytes", [1, 2**20])
def test_elements_that_do_not_fit(path: Path, annotations: str, told: str, max_bytes: int) -> None:
    url = _write(path, f'{{"annotations": {annotations}}}')
    with open_document(url) as document, pytest.raises(InputError) as refused:
        list(document.columns("annotations", SCHEMA, max_bytes=max_bytes))
    assert str(refused.value).startswith(url)
    assert told in str(refused.value)


def test_a_field_that_must_be_there(path: Path) -> None:
    schema = pa.schema([pa.field("id", pa.int64(), nullable=False)])
    with (
        open_document(_write(path, '{"images": [{"id": 1}, {"id": null}]}')) as document,
        pytest.raises(InputError, match=r"images\[1\] has no id"),
    ):
        list(document.columns("images", schema))


def test_values_of_another_type_and_files_that_are_not_there(path: Path) -> None:
    with (
        open_document(_write(path, '{"info": [], "licenses": ' + "9" * 5000 + "}")) as document,
    ):
        with pytest.raises(InputError, match="`info` is a list, not an object"):
            document.value("info", dict, {})
        with pytest.raises(InputError, match="`licenses` cannot be read"):
            document.value("licenses", list, [])
    for url in (f"{path}.none", str(path.parent), "memory://documents/none.json"):
        with pytest.raises(InputError, match=r"cannot read .*: "), open_document(url):
            pass
