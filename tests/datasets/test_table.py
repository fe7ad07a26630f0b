"""Tables: the same rows in every format, where images lie, and rows that cannot be taken."""

import csv
import gzip
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray.datasets import list_images, table_text
from owlsam_ray.errors import InputError
from owlsam_ray.settings import DataConfig

FORMATS = ["parquet", "csv", "tsv", "jsonl", "csv.gz", "jsonl.gz"]


def encode(rows: list[dict[str, Any]], kind: str) -> bytes:
    """Rows as a file; only Parquet and JSONL have null and structures."""
    buffer = io.BytesIO()
    if kind.endswith(".gz"):
        return gzip.compress(encode(rows, kind.removesuffix(".gz")))
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), buffer, row_group_size=7)
        return buffer.getvalue()
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(folder: Path, rows: list[dict[str, Any]], kind: str, name: str = "list") -> str:
    path = folder / f"{name}.{kind}"
    path.write_bytes(encode(rows, kind))
    return str(path)


def listed(files: str | list[str], images: str | None = None, **columns: Any) -> list[dict[str, Any]]:
    config = DataConfig.model_validate({"source": "table", "files": files, "images": images, "columns": columns})
    listing = list_images(config)
    rows = [row for table in listing.tables for row in table.to_pylist()]
    assert listing.has_ids == ("id" in columns)
    return rows


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    rows = [
        {"path": f"a b/ü{n}.jpg", "key": 100 + n, "h": 10 + n, "w": 20, "size": 999, "set": "val", "note": f"n{n}"}
        for n in range(30)
    ]
    found = listed(
        write(tmp_path, rows, kind),
        "s3://bucket/images/",
        uri="path",
        id="key",
        height="h",
        width="w",
        num_bytes="size",
        split="set",
        extra=["note", "key"],
    )
    assert found == [
        {
            "image_id": 100 + n,
            "file_name": f"a b/ü{n}.jpg",
            "uri": f"s3://bucket/images/a b/ü{n}.jpg",
            "container": None,
            "member": None,
            "offset": None,
            "length": None,
            "num_bytes": 999,
            "height": 10 + n,
            "width": 20,
            "split": "val",
            "extra": json.dumps({"note": f"n{n}", "key": 100 + n}),
        }
        for n in range(30)
    ]


@pytest.mark.parametrize(
    ("images", "uri", "name", "whole"),
    [
        ("/data", "x/1.jpg", "x/1.jpg", "/data/x/1.jpg"),
        ("/data", "./x/1.jpg", "x/1.jpg", "/data/x/1.jpg"),
        ("/data", "/data/x/1.jpg", "x/1.jpg", "/data/x/1.jpg"),
        ("/data/", "file:///data/x/1.jpg", "x/1.jpg", "file:///data/x/1.jpg"),
        ("s3://b/i", "x/1.jpg", "x/1.jpg", "s3://b/i/x/1.jpg"),
        ("s3://b/i", "s3://b/i/x/1.jpg", "x/1.jpg", "s3://b/i/x/1.jpg"),
        ("s3://b/i", "s3://b/ix/1.jpg", "b/ix/1.jpg", "s3://b/ix/1.jpg"),
        (None, "s3://b/i/x/1.jpg", "b/i/x/1.jpg", "s3://b/i/x/1.jpg"),
        (None, "https://host:8/a//b.jpg?w=1&u=c", "host:8/a/b.jpg?w=1&u=c", "https://host:8/a//b.jpg?w=1&u=c"),
        ("/data", "https://host/b.jpg", "host/b.jpg", "https://host/b.jpg"),
    ],
)
def test_where_an_image_lies(tmp_path: Path, images: str | None, uri: str, name: str, whole: str) -> None:
    (row,) = listed(write(tmp_path, [{"uri": uri}], "csv"), images)
    assert (row["file_name"], row["uri"]) == (name, whole)
    (row,) = listed(write(tmp_path, [{"uri": uri, "as": "n/1.jpg"}], "csv"), images, file_name="as")
    assert (row["file_name"], row["uri"]) == ("n/1.jpg", whole)


def test_roots_and_paths_that_are_written_differently(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for root in ("imgs", "./x/../imgs/", f"{tmp_path}//imgs", f"file://{tmp_path}/imgs"):
        uris = [f"{tmp_path}/imgs/a.jpg", f"{tmp_path}//imgs//b.jpg", f"local://{tmp_path}/imgs/c.jpg", "d.jpg"]
        found = listed(write(tmp_path, [{"uri": uri} for uri in uris], "jsonl"), root)
        assert [row["file_name"] for row in found] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg"]
        assert [row["uri"] for row in found[:3]] == uris[:3]


def test_mixed_schemes_in_one_table(tmp_path: Path) -> None:
    rows = [{"uri": each} for each in ("a.jpg", "s3://b/c.jpg", "https://h/d.jpg", "/data/e.jpg", "memory://f/g.jpg")]
    found = listed(write(tmp_path, rows, "jsonl"), "/data")
    assert [row["file_name"] for row in found] == ["a.jpg", "b/c.jpg", "h/d.jpg", "e.jpg", "f/g.jpg"]


def test_files_in_order_with_rows_in_order(tmp_path: Path) -> None:
    for part in (2, 0, 1):
        write(tmp_path, [{"uri": f"{part}-{n}.jpg"} for n in range(3)], "csv", name=f"part-{part}")
    expected = [f"{part}-{n}.jpg" for part in range(3) for n in range(3)]
    for pattern in (f"{tmp_path}/*.csv", f"{tmp_path}/part-{{0..2}}.csv"):
        assert [row["file_name"] for row in listed(pattern, "/i")] == expected
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/tables/a.parquet", encode([{"uri": "x.jpg"}], "parquet"))
    assert [row["uri"] for row in listed("memory://tables/*.parquet", "/i")] == ["/i/x.jpg"]


def test_pictures_in_the_rows(tmp_path: Path) -> None:
    rows = [{"image": {"bytes": bytes([n]), "path": f"{n}.png"}, "label": n} for n in range(9)]
    for name in ("a/train", "b/train"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path, rows, "parquet", name=name)
    found = listed(f"{tmp_path}/*/*.parquet", bytes="image.bytes", extra=["label"])
    assert [row["file_name"] for row in found[8:10]] == ["a/train.parquet/00000008", "b/train.parquet/00000000"]
    assert {key: found[10][key] for key in ("uri", "container", "member", "offset", "extra")} == {
        "uri": f"{tmp_path}/b/train.parquet",
        "container": "parquet",
        "member": "image.bytes",
        "offset": 1,
        "extra": '{"label": 1}',
    }
    bare = listed(f"{tmp_path}/a/train.parquet", bytes="image.bytes")
    assert [(row["file_name"], row["offset"]) for row in bare] == [(f"train.parquet/{n:08d}", n) for n in range(9)]
    named = listed(f"{tmp_path}/a/train.parquet", bytes="image.bytes", file_name="image.path")
    assert [row["file_name"] for row in named] == [f"{n}.png" for n in range(9)]


def test_nested_and_odd_extras(tmp_path: Path) -> None:
    rows = [{"uri": "a.jpg", "meta": {"url": "u", "score": float("nan")}, "day": date(2026, 1, 2), "raw": b"\xff"}]
    (row,) = listed(write(tmp_path, rows, "parquet"), "/i", extra=["meta", "day", "raw"])
    assert json.loads(row["extra"]) == {"meta": {"url": "u", "score": None}, "day": "2026-01-02", "raw": "\ufffd"}
    nested = [{"meta": {"where": "a.jpg", "n": n}, "tags": ["x"]} for n in range(2)]
    found = listed(write(tmp_path, nested, "jsonl"), "/i", uri="meta.where", id="meta.n", extra=["tags"])
    assert [(row["image_id"], row["file_name"], row["extra"]) for row in found] == [
        (0, "a.jpg", '{"tags": ["x"]}'),
        (1, "a.jpg", '{"tags": ["x"]}'),
    ]


def test_extras_that_would_replace_what_image_records_have(tmp_path: Path) -> None:
    file = write(tmp_path, [{"uri": "a.jpg", "id": "x"}], "csv")
    with pytest.raises(InputError, match=r"columns\.extra holds 'id'.*rename the column"):
        listed(file, "/i", extra=["id"])


def test_csv_values_over_lines_and_borders_of_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What looks like a row inside quotes is none, wherever the file is cut for reading; values stay as written."""
    monkeypatch.setattr(table_text, "_BLOCK", 4096)
    notes = ['x\n9.jpg,8\n"7.jpg",', "007", "1.50", "NA", "", "true", "2026-01-02"]
    rows = [{"uri": f"{n}.jpg", "note": notes[n % len(notes)], "h": "" if n % 2 else n + 1, "w": 5} for n in range(999)]
    file = write(tmp_path, rows, "csv")
    found = listed(file, "/i", extra=["note", "h"], height="h", width="w")
    assert [row["file_name"] for row in found] == [row["uri"] for row in rows]
    assert [json.loads(row["extra"]) for row in found] == [
        {"note": row["note"], "h": row["h"] if row["h"] != "" else None} for row in rows
    ]
    assert [row["file_name"] for row in listed(file, "/i")] == [row["uri"] for row in rows]
    rows[800]["h"] = "80 px"
    with pytest.raises(InputError, match=r"row 800: '80 px' in h \(columns\.height\) is no integer"):
        listed(write(tmp_path, rows, "csv"), "/i", height="h", width="w")
    (tmp_path / "inches.csv").write_text('uri,note\na.jpg,a 5" pipe\nb.jpg,x\n')
    assert len(listed(f"{tmp_path}/inches.csv", "/i")) == 2


def test_json_lines_of_different_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows may leave out what others have, and extras keep their own type and spelling."""
    monkeypatch.setattr(table_text, "_BLOCK", 512)
    values = [1, "2026-01-02T03:04:05", None, 10**30, 1.5, [1, "a"], {"b": {"c": "ü"}}, True, float("nan")]
    rows: list[dict[str, Any]] = [{"uri": f"{n}.jpg"} for n in range(60)]
    rows += [{"uri": f"{60 + n}.jpg", "x": value, "h": 3, "w": 4} for n, value in enumerate(values)]
    found = listed(write(tmp_path, rows, "jsonl"), "/i", extra=["x", "x.b.c"], height="h", width="w")
    assert [row["height"] for row in found] == [None] * 60 + [3] * len(values)
    expected = [None] * 60 + values[:-1] + [None]
    assert [json.loads(row["extra"])["x"] for row in found] == expected
    assert [json.loads(row["extra"])["x.b.c"] for row in found if "ü" in row["extra"]] == ["ü"]
    with pytest.raises(InputError, match=r"has no column 'y' \(columns\.extra\)"):
        listed(write(tmp_path, rows, "jsonl"), "/i", extra=["y"])
    rows.append({"uri": "z.jpg", "x": 1, "h": "3", "w": 4})
    with pytest.raises(InputError, match=rf"row {len(rows) - 1}: '3' in h \(columns\.height\) is no integer"):
        listed(write(tmp_path, rows, "jsonl"), "/i", height="h", width="w")
    rows[-1]["h"] = 2**70
    with pytest.raises(InputError, match=f"row {len(rows) - 1}: {2**70} in h"):
        listed(write(tmp_path, rows, "jsonl"), "/i", height="h", width="w")


def test_columns_with_a_dot_in_their_name(tmp_path: Path) -> None:
    for kind in ("parquet", "csv"):
        (row,) = listed(write(tmp_path, [{"a.b": "x.jpg", "a": 1}], kind), "/i", uri="a.b")
        assert row["file_name"] == "x.jpg"


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("row", "columns", "words"),
    [
        ({"url": "a.jpg"}, {}, r"has no column 'uri' \(columns\.uri\); did you mean columns\.uri=url\? It has: url$"),
        ({"picture": "a.jpg"}, {}, r"has no column 'uri'.* It has: picture"),
        (
            {"uri": "a.jpg", "key": 1},
            {"id": "kye"},
            r"has no column 'kye' \(columns\.id\); did you mean columns\.id=key",
        ),
        ({"uri": ""}, {}, r"row 1: '' in uri is no URI"),
        ({"uri": "../a.jpg"}, {}, r"row 1: '\.\./a\.jpg': file_name leaves the root"),
        ({"uri": "x/../../a.jpg"}, {}, "row 1: .*leaves the root"),
        ({"uri": "/etc/passwd"}, {}, "row 1: '/etc/passwd' does not lie below data.images /data"),
        ({"uri": "/data/../etc/passwd"}, {}, "row 1: .*leaves the root"),
        ({"uri": "file:///etc/passwd"}, {}, "row 1: .* does not lie below data.images /data"),
        ({"uri": "/database/a.jpg"}, {}, "does not lie below data.images /data"),
        ({"uri": "local:///etc/passwd"}, {}, "row 1: .* does not lie below data.images /data"),
        ({"uri": "file://host/a.jpg"}, {}, "row 1: .* three slashes follow file:"),
        ({"uri": "https://h/a/"}, {}, r"row 1: 'h/a/': .*holds an empty part.*\n.*columns\.file_name"),
        ({"uri": "zz9://a/b.jpg"}, {}, "cannot open 'zz9://a/b.jpg'"),
        ({"uri": "a.jpg", "key": -1}, {"id": "key"}, r"row 1: -1 is no id from 0 to 2\^53"),
        ({"uri": "a.jpg", "key": 2**53}, {"id": "key"}, r"row 1: 9007199254740992 is no id"),
        ({"uri": "a.jpg", "h": 0, "w": 3}, {"height": "h", "width": "w"}, "row 1: 0 is no height"),
        ({"uri": "a.jpg", "as": "/abs.jpg"}, {"file_name": "as"}, "row 1: '/abs.jpg': file_name is not relative"),
    ],
)
def test_rows_that_cannot_be_taken(
    tmp_path: Path, kind: str, row: dict[str, Any], columns: dict[str, Any], words: str
) -> None:
    good = {key: {"key": 5, "h": 1, "w": 1}.get(key, "good.jpg") for key in row}
    file = write(tmp_path, [good, row], kind)
    with pytest.raises(InputError, match=words) as caught:
        listed(file, "/data", **columns)
    assert file in str(caught.value) or "zz9" in words


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_ids_as_texts_are_refused(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, [{"uri": "a.jpg", "key": "x7"}, {"uri": "b.jpg", "key": "x8"}], kind)
    with pytest.raises(InputError, match=r"list\.") as caught:
        listed(file, "/data", id="key")
    assert {
        "parquet": "column 'key' (columns.id) holds string, not integers",
        "csv": "row 0: 'x7' in key (columns.id) is no integer\n  row 1: 'x8'",
        "jsonl": "row 0: 'x7' in key (columns.id) is no integer\n  row 1: 'x8'",
    }[kind] in str(caught.value)


def test_null_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"uri": "a.jpg", "key": 1}, {"uri": None, "key": None}]
    for kind in ("parquet", "jsonl"):
        with pytest.raises(InputError, match="row 1: None in uri is no URI"):
            listed(write(tmp_path, rows, kind), "/data")
        rows[1]["uri"] = "b.jpg"
        with pytest.raises(InputError, match="row 1: None is no id"):
            listed(write(tmp_path, rows, kind), "/data", id="key")
        rows[1]["uri"] = None


def test_many_offences_are_counted(tmp_path: Path) -> None:
    file = write(tmp_path, [{"uri": "/etc/x"}] * 40, "parquet")
    with pytest.raises(InputError) as caught:
        listed(file, "/data")
    assert str(caught.value).count("\n  row ") == 5
    assert "and 35 more" in str(caught.value)


def test_names_of_their_own_hide_no_way_out_of_the_root(tmp_path: Path) -> None:
    for uri in ("../secret.jpg", "/data/../../secret.jpg", "x/../../secret.jpg"):
        with pytest.raises(InputError, match=r"row 0: .*secret\.jpg': file_name leaves the root"):
            listed(write(tmp_path, [{"uri": uri, "as": "a.jpg"}], "csv"), "/data", file_name="as")
    for uri in ("simplecache::file:///etc/x", "zip://a.jpg::/etc/x.zip"):
        with pytest.raises(InputError, match="is a chain of file systems"):
            listed(write(tmp_path, [{"uri": uri, "as": "a.jpg"}], "csv"), "/data", file_name="as")


def test_urls_of_any_form_take_a_name_of_their_own(tmp_path: Path) -> None:
    for uri in ("https://h/a/", "https://h/i?u=a/../b"):
        (row,) = listed(write(tmp_path, [{"uri": uri, "as": "a.jpg"}], "csv"), "/data", file_name="as")
        assert (row["file_name"], row["uri"]) == ("a.jpg", uri)


def test_no_password_gets_into_a_name(tmp_path: Path) -> None:
    (row,) = listed(write(tmp_path, [{"uri": "https://me:secret@host/a@b.jpg"}], "csv"))
    assert (row["file_name"], row["uri"]) == ("host/a@b.jpg", "https://me:secret@host/a@b.jpg")


@pytest.mark.parametrize("scheme", ["ftp", "dir", "reference", "zz9"])
def test_schemes_that_need_more_than_a_url_are_refused(tmp_path: Path, scheme: str) -> None:
    with pytest.raises(InputError, match=f"cannot open '{scheme}://h/a.jpg'"):
        listed(write(tmp_path, [{"uri": f"{scheme}://h/a.jpg"}], "csv"))


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a.jpg"]), pa.array(["b.jpg"])], names=["uri", "uri"])
    pq.write_table(table, tmp_path / "twice.parquet")
    (tmp_path / "twice.csv").write_text("uri,uri\na.jpg,b.jpg\n")
    for name in ("twice.parquet", "twice.csv"):
        with pytest.raises(InputError, match=r"has the column 'uri' \(columns\.uri\) more than once"):
            listed(str(tmp_path / name), "/data")


def test_a_table_without_a_root_takes_urls_only(tmp_path: Path) -> None:
    for uri in ("a.jpg", "/data/a.jpg", "file:///data/a.jpg"):
        with pytest.raises(InputError, match=r"is no URL: set data\.images"):
            listed(write(tmp_path, [{"uri": uri}], "csv"))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.xlsx", b"x", "is no table: its name ends in none of .parquet"),
        ("list.parquet", b"", "cannot be read as a table"),
        ("list.parquet", encode([{"uri": "a"}], "parquet")[:-20], "cannot be read as a table"),
        ("list.csv", b"", "cannot be read as a table: Empty CSV file"),
        ("list.csv", b"uri,n\na.jpg,1\nb.jpg\n", "cannot be read as a table: CSV parse error: .*Expected 2 columns"),
        ("list.csv", b"uri\n\xff\xfe.jpg\n", "cannot be read as a table.*UTF8"),
        ("list.csv", b"uri,n\na.jpg,1\nb.jpg,2,3\n", r"row 1 \(from 0\): Expected 2 columns, got 3"),
        (
            "list.csv",
            b'uri,note\na.jpg,x\nb.jpg,"y\nc.jpg,z\n',
            "a quote in the record that begins in line 3 is not clo",
        ),
        ("list.csv", b"uri;n\na.jpg;1\n", "is it separated by ';'"),
        ("list.jsonl", b"", "holds no row"),
        ("list.jsonl", b'{"uri": "a.jpg"}\n{"uri": ', "row 1: is not valid JSON: Expecting value"),
        ("list.jsonl", b'{"uri": "a.jpg"}\n\n[1]\n', "row 1: is a list, not an object"),
        ("list.jsonl", b"nope\n", "row 0: is not valid JSON"),
        ("list.jsonl", b'{"uri": "a.jpg"}\n{"uri": 5}\n', r"row 1: 5 in uri \(columns\.uri\) is no text"),
        ("list.jsonl", b'{"uri": "\xff.jpg"}\n', "row 0: b.* is no text"),
        ("list.csv.gz", b"uri\na.jpg\n", "cannot read .*Not a gzipped file"),
        ("list.csv.gz", gzip.compress(b"uri\na.jpg\n" * 99, mtime=0)[:-9], "ended before the end-of-stream"),
        ("list.jsonl.gz", gzip.compress(b'{"uri": "a.jpg"}\n' * 99, mtime=0)[:-9], "ended before the end-of-stream"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words) as caught:
        listed(str(tmp_path / name), "/data")
    assert name in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read .*gone\.parquet"):
        listed(str(tmp_path / "gone.parquet"), "/data")


def test_bytes_that_are_none(tmp_path: Path) -> None:
    file = write(tmp_path, [{"image": {"bytes": b"1"}, "text": "x"}], "parquet")
    with pytest.raises(InputError, match=r"columns\.bytes 'image' holds struct.*did you mean image\.bytes\?"):
        listed(file, bytes="image")
    with pytest.raises(InputError, match="holds string, not bytes"):
        listed(file, bytes="text")
    with pytest.raises(InputError, match=r"has no column 'image\.jpeg'"):
        listed(file, bytes="image.jpeg")
    with pytest.raises(InputError, match=r"columns\.bytes is for Parquet tables, and .* is csv"):
        listed(write(tmp_path, [{"image": "x"}], "csv"), bytes="image")
