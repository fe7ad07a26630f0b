"""Rows that are made to harm, or that say two things: each is told as that row's fault, in a short message."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError
from owlsam_ray.fetch.images import fetch_rows
from owlsam_ray.sources import list_images, table_text


def listed(files: Path | str, images: str | None = "/pictures", **columns: Any) -> list[dict[str, Any]]:
    data = {"source": "table", "files": str(files), "images": images, "columns": columns}
    return [row for table in list_images(DataConfig.model_validate(data)).tables for row in table.to_pylist()]


def jsonl(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


DEEP = "[" * 200_000 + "]" * 200_000
DIGITS = "8" * 6000


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"uri": "b.png", "uri": "c.png"}', "row 1: gives the key 'uri' twice"),
        ('{"uri":"b.png","n":1,"n":2}', "row 1: gives the key 'n' twice"),
        ('{"uri":"b.png","n" :1,"n"\t: 2}', "row 1: gives the key 'n' twice"),
        ('{"uri":"b.png","n":{"m":1,"m":2}}', "row 1: gives the key 'm' twice"),
        ('{"uri":"b.png","\\u006e":1,"n":2}', "row 1: gives the key 'n' twice"),
        ('{"uri":"b.png","n":NaN,"n":2}', "row 1: gives the key 'n' twice"),
    ],
)
def test_a_hostile_row_is_told_by_its_number(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        listed(jsonl(tmp_path, '{"uri": "a.png"}', line))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("line", ['{"uri":"b.png","deep":' + DEEP + "}", '{"uri":' + DEEP + "}", "[" + DIGITS + "]"])
def test_a_line_that_cannot_be_read_is_a_bad_row(tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str) -> None:
    rows = listed(jsonl(tmp_path, '{"uri": "a.png"}', line, '{"uri": "c.png"}'))
    assert [row["container"] for row in rows] == [None, "bad", None]
    assert "1 lines are not JSON objects and count as rows without values, the first: row 1: is " in caplog.text
    assert len(caplog.text) < 800


def test_an_address_of_thousands_of_digits_is_a_bad_row_with_a_short_reason(tmp_path: Path) -> None:
    rows = listed(jsonl(tmp_path, '{"uri": "a.png"}', '{"uri": ' + DIGITS + "}"))
    assert [row["container"] for row in rows] == [None, "bad"]
    assert rows[1]["member"].startswith("bad_uri")
    assert len(rows[1]["member"]) < 500


def test_what_nobody_asked_for_does_not_matter(tmp_path: Path) -> None:
    lines = [
        '{"uri": "a.png", "big": ' + DIGITS + "}",
        '{"big": ' + DIGITS + ', "uri": "b.png", "text": "it says \\"x\\": 1"}',
        '{"uri": "c.png", "in": {"uri": 1, "big": 2}, "list": [{"k": 1}, {"k": 2}]}',
    ]
    assert [row["file_name"] for row in listed(jsonl(tmp_path, *lines))] == ["a.png", "b.png", "c.png"]


def test_an_integer_of_thousands_of_digits_does_not_get_into_the_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 0: the value in big \(columns\.extra\) cannot be read"):
        listed(jsonl(tmp_path, '{"uri": "a.png", "big": ' + DIGITS + "}"), extra=["big"])
    with pytest.raises(InputError, match=r"in h \(columns\.height\) is not a "):
        listed(jsonl(tmp_path, '{"uri": "a.png", "h": ' + DIGITS + "}"), height="h", width="h")


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_without_line_breaks_does_not_fill_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(table_text, "_BLOCK", 2**16)
    monkeypatch.setattr(table_text, "_MOST_ROW", 2**20)
    content = b'{"uri": "a.png"}\n{"uri": "' + b"x" * 2**24
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(InputError, match="row 1 has more than 1 MB"):
        listed(path)


@pytest.mark.parametrize(
    ("record", "key"),
    [
        ('{"id": 2, "id": 3, "file_name": "b.png"}', "id"),
        ('{"id": 2, "file_name": "b.png", "file_name": "c.png"}', "file_name"),
        ('{"id": 2, "file_name": "b.png", "more": {"x": 1, "x": 2}}', "x"),
        ('{"id": 2, "file_name" :"b.png", "file_name"  : "b.png"}', "file_name"),
    ],
)
def test_an_image_record_that_gives_a_key_twice_is_refused(tmp_path: Path, record: str, key: str) -> None:
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    path = tmp_path / "coco.json"
    images = '{"id": 1, "file_name": "a.png"}, ' + record
    path.write_text('{"images": [' + images + '], "annotations": [], "categories": []}')
    config = DataConfig.model_validate({"source": "coco", "images": str(tmp_path), "annotations": str(path)})
    with pytest.raises(InputError, match=rf"images\[1\]: gives '{key}' twice"):
        list(list_images(config).tables)


def test_image_records_with_objects_inside_are_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    images = [{"id": 1, "file_name": "a.png", "more": {"id": 5}, "said": 'a "k": 1'}]
    (tmp_path / "coco.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    config = DataConfig.model_validate(
        {"source": "coco", "images": str(tmp_path), "annotations": str(tmp_path / "coco.json")}
    )
    assert [row["image_id"] for table in list_images(config).tables for row in table.to_pylist()] == [1]


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "kind",
    [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int8(), pa.binary())],
    ids=str,
)
def test_images_in_every_kind_of_column_of_bytes_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([png(), None, png()], pa.binary())
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
    pq.write_table(pa.table({"picture": values}), tmp_path / "t.parquet")
    rows = listed(tmp_path / "t.parquet", None, bytes="picture")
    outcomes = fetch_rows(rows, threads=2, max_bytes=10**6)
    assert [each if isinstance(each, bytes) else each.reason for each in outcomes] == [
        png(),
        "missing: the table holds no image in this row",
        png(),
    ]


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (
            pa.array(
                [[{"bytes": b"x", "path": "p"}]], pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
            ),
            "holds list<element: struct<bytes: binary, path: string>>, not bytes; each row must be one image",
        ),
        (pa.array([[("k", b"x")]], pa.map_(pa.string(), pa.binary())), "not bytes; each row must be one image"),
        (pa.array([[b"x"]], pa.large_list(pa.binary())), "not bytes; each row must be one image"),
        (pa.array([{"path": "p", "data": b"x"}]), "not bytes; did you mean picture.data?"),
        (pa.array(["x"], pa.string_view()), "holds string_view, not bytes"),
    ],
)
def test_other_columns_are_named_for_what_they_are(tmp_path: Path, column: pa.Array, said: str) -> None:
    pq.write_table(pa.table({"picture": column}), tmp_path / "t.parquet")
    with pytest.raises(InputError) as caught:
        listed(tmp_path / "t.parquet", None, bytes="picture")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            pa.list_(pa.struct([("data", pa.binary())])),
            "holds list<element: struct<data: binary>>; each row must be one image",
        ),
        (pa.map_(pa.string(), pa.binary()), "holds map<string, binary ('picture')>; each row must be one image"),
        (pa.binary(), "'picture' holds binary"),
    ],
)
def test_a_path_into_what_is_no_structure_names_what_is_there(tmp_path: Path, kind: pa.DataType, said: str) -> None:
    pq.write_table(pa.table({"picture": pa.nulls(1, kind)}), tmp_path / "t.parquet")
    with pytest.raises(InputError) as caught:
        listed(tmp_path / "t.parquet", None, bytes="picture.data")
    assert said in str(caught.value)
    assert "has no column 'picture.data' (columns.bytes): 'picture'" in str(caught.value)


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary", "large dictionary"])
def test_uris_in_every_kind_of_column_of_texts_are_read(tmp_path: Path, kind: str) -> None:
    names = ["a.png", "b/c.png", "a2.png"]
    column = pa.array(names, pa.large_string() if "large" in kind else pa.string())
    if "dictionary" in kind:
        column = column.dictionary_encode()
    elif kind == "string_view":
        column = column.cast(pa.string_view())
    pq.write_table(pa.table({"uri": column, "set": column}), tmp_path / "t.parquet")
    rows = listed(tmp_path / "t.parquet", split="set", extra=["set"])
    assert [row["file_name"] for row in rows] == names
    assert [row["split"] for row in rows] == names
    assert [json.loads(row["extra"]) for row in rows] == [{"set": name} for name in names]


@pytest.mark.parametrize("counts", [[1, 0, 1], [0, 2], [2, 0], [0, 0, 3, 0]])
@pytest.mark.parametrize(
    "columns", [{"bytes": "picture"}, {"bytes": "picture", "id": "n"}, {"uri": "name", "extra": ["n"]}]
)
def test_parts_and_row_groups_without_rows_are_passed_over(
    tmp_path: Path, counts: list[int], columns: dict[str, Any]
) -> None:
    total = 0
    (tmp_path / "parts").mkdir()
    schema = pa.schema([("picture", pa.binary()), ("n", pa.int64()), ("name", pa.string())])
    with pq.ParquetWriter(tmp_path / "groups.parquet", schema) as groups:
        for number, count in enumerate(counts):
            ids = range(total, total + count)
            content = {"picture": [png()] * count, "n": ids, "name": [f"{each}.png" for each in ids]}
            part = pa.table(
                [pa.array(content[name], kind) for name, kind in zip(schema.names, schema.types, strict=True)],
                schema=schema,
            )
            pq.write_table(part, tmp_path / "parts" / f"part-{number}.parquet")
            groups.write_table(part)
            total += count
    for files in (f"{tmp_path}/parts/part-*.parquet", tmp_path / "groups.parquet"):
        rows = listed(files, "/pictures" if "uri" in columns else None, **columns)
        assert len(rows) == total
        assert [row["length"] for row in rows] == [None] * total
        if "id" in columns:
            assert [row["image_id"] for row in rows] == list(range(total))


def test_maps_and_dates_beyond_python_in_extra(tmp_path: Path) -> None:
    maps = pa.array([[("a", 1)], [("b", 2), ("b", 3)], []], pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"uri": ["1.png", "2.png", "3.png"], "tags": maps}), tmp_path / "t.parquet")
    assert [json.loads(row["extra"])["tags"] for row in listed(tmp_path / "t.parquet", extra=["tags"])] == [
        [["a", 1]],
        [["b", 2], ["b", 3]],
        [],
    ]
    pq.write_table(pa.table({"uri": ["1.png"], "tags": maps[:1]}), tmp_path / "t.parquet")
    assert json.loads(listed(tmp_path / "t.parquet", extra=["tags"])[0]["extra"]) == {"tags": {"a": 1}}
    far = pa.array([10**15], pa.int64()).cast(pa.timestamp("ms"))
    pq.write_table(pa.table({"uri": ["1.png"], "when": far}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="cannot be converted to JSON"):
        listed(tmp_path / "t.parquet", extra=["when"])
