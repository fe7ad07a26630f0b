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

from owlsam_ray.config.data import DataConfig
from owlsam_ray.errors import InputError
from owlsam_ray.sources import list_images, table_text

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
            "other_name": None,
            "quoted": None,
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
        (None, "https://host:8/a//b.jpg?w=1&u=c", "host:8/a/b.jpg", "https://host:8/a//b.jpg?w=1&u=c"),
        (None, "HTTP://host/b.jpg", "host/b.jpg", "http://host/b.jpg"),
        (None, "https://host/x?d=a/../b/", "host/x", "https://host/x?d=a/../b/"),
        (None, "https://host/b.jpg#top", "host/b.jpg", "https://host/b.jpg#top"),
        (None, "https://host/asset/72/", "host/asset/72%2F", "https://host/asset/72/"),
        (None, "https://host/t/../i.php?u=x", "host/t/%2E%2E/i.php", "https://host/t/../i.php?u=x"),
        (None, "s3://b/what?.jpg", "b/what?.jpg", "s3://b/what?.jpg"),
        (None, "s3://b/a\\b.jpg", "b/a%5Cb.jpg", "s3://b/a\\b.jpg"),
        ("/data", "x/../1.jpg", "1.jpg", "/data/1.jpg"),
        ("/data", "/data/x/../1.jpg", "1.jpg", "/data/1.jpg"),
        ("/data", "x//1.jpg", "x/1.jpg", "/data/x//1.jpg"),
        ("/data", "a\\1.jpg", "a%5C1.jpg", "/data/a\\1.jpg"),
        ("https://h/i", "x/1.jpg?w=2", "x/1.jpg", "https://h/i/x/1.jpg?w=2"),
        ("https://h/i", "HTTPS://h/i/x/1.jpg?w=2", "x/1.jpg", "https://h/i/x/1.jpg?w=2"),
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
    with pytest.raises(InputError, match=r"columns\.extra names 'id'.*rename the column"):
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
    rows.append({"uri": "z.jpg", "x": 1, "h": 2**70, "w": 4})
    with pytest.raises(InputError, match=rf"row {len(rows) - 1}: 1\.18\d*e\+21 is not a valid height"):
        listed(write(tmp_path, rows, "jsonl"), "/i", height="h", width="w")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_sizes_that_are_no_numbers_are_not_stated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    monkeypatch.setattr(table_text, "_BLOCK", 2048)
    rows = [{"uri": f"{n}.jpg", "h": 9, "w": 5.0} for n in range(400)]
    odd = {3: "80 px", 200: "n/a?", 201: "[]", 399: "0x10"}
    for row, value in odd.items():
        rows[row]["h"] = value
    found = listed(write(tmp_path, rows, kind), "/i", height="h", width="w")
    assert [row["height"] for row in found] == [None if n in odd else 9 for n in range(400)]
    assert {row["width"] for row in found} == {5}
    (told,) = [record.getMessage() for record in caplog.records]
    assert "4 sizes are not numbers and count as not stated, the first: row 3: '80 px' in h (columns.height)" in told
    assert "is not a number" in told


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_column_without_any_number_holds_no_sizes(tmp_path: Path, kind: str) -> None:
    file = write(tmp_path, [{"uri": f"{n}.jpg", "h": h, "w": n} for n, h in enumerate(["", "tall", "x"])], kind)
    with pytest.raises(
        InputError, match=r"'tall' in h \(columns\.height\) is not a number(.|\n)*Correct columns\.height"
    ):
        listed(file, "/i", height="h", width="w")


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
        ({"uri": "a.jpg", "key": -1}, {"id": "key"}, r"row 1: -1 is not an id from 0 to 2\^53"),
        ({"uri": "a.jpg", "key": 2**53}, {"id": "key"}, r"row 1: 9007199254740992 is not an id"),
        ({"uri": "a.jpg", "h": -2, "w": 3}, {"height": "h", "width": "w"}, r"row 1: -2(\.0)? is not a valid height"),
        ({"uri": "a.jpg", "key": 5, "n": 0.5}, {"num_bytes": "n", "id": "key"}, "row 1: 0.5 is not a valid num_bytes"),
    ],
)
def test_rows_that_cannot_be_taken(
    tmp_path: Path, kind: str, row: dict[str, Any], columns: dict[str, Any], words: str
) -> None:
    good = {key: {"key": 5, "h": 1, "w": 1, "n": 1.0}.get(key, "good.jpg") for key in row}
    file = write(tmp_path, [good, row], kind)
    with pytest.raises(InputError, match=words) as caught:
        listed(file, "/data", **columns)
    assert file in str(caught.value)


def bad(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a bad row."""
    return row["container"], row["file_name"], row["offset"], row["member"]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("", "'' is no URI"),
        ("../a.jpg", "'../a.jpg' leaves data.images, or is that folder itself"),
        ("x/../../a.jpg", "'x/../../a.jpg' leaves data.images, or is that folder itself"),
        ("..", "'..' leaves data.images, or is that folder itself"),
        ("/etc/passwd", "'/etc/passwd' does not lie below data.images /data"),
        ("/data/../etc/passwd", "'/data/../etc/passwd' leaves data.images, or is that folder itself"),
        ("/database/a.jpg", "'/database/a.jpg' does not lie below data.images /data"),
        ("local:///etc/passwd", "'local:///etc/passwd' does not lie below data.images /data"),
        ("FILE:///etc/passwd", "'file:///etc/passwd' does not lie below data.images /data"),
        ("file://host/a.jpg", "'file://host/a.jpg' is no file on this machine: three slashes follow file:"),
        ("https://", "'https://' names neither host nor path"),
        ("simplecache::file:///x", "'simplecache::file:///x' is a chain of file systems (::)"),
        ("zip://a.jpg::/x.zip", "'zip://a.jpg::/x.zip' is a chain of file systems (::)"),
        ("zz9://me:pw@a/b.jpg", "'zz9://***@a/b.jpg' has a scheme that cannot be opened (Protocol not known: zz9)"),
        ("a\0b.jpg", "'a\\x00b.jpg' holds a NUL"),
    ],
)
def test_rows_that_no_image_is_read_by_keep_their_place(tmp_path: Path, kind: str, uri: str, why: str) -> None:
    rows = [{"uri": each, "as": f"n/{n}.jpg"} for n, each in enumerate(("good.jpg", uri, "good2.jpg"))]
    file = write(tmp_path, rows, kind)
    found = listed(file, "/data")
    assert [row["file_name"] for row in found] == ["good.jpg", f"row-list.{kind}-1", "good2.jpg"]
    assert [row["container"] for row in found] == [None, "bad", None]
    assert bad(found[1]) == ("bad", f"row-list.{kind}-1", 1, f"bad_uri: {why}")
    assert found[1]["uri"] == file
    named = listed(file, "/data", file_name="as")
    assert bad(named[1]) == ("bad", "n/1.jpg", 1, f"bad_uri: {why}")
    assert [row["file_name"] for row in named] == ["n/0.jpg", "n/1.jpg", "n/2.jpg"]


def test_schemes_that_need_more_than_a_url_make_their_rows_bad(tmp_path: Path) -> None:
    uris = ["https://h/a.jpg", "ftp://h/a.jpg", "dir://h/a.jpg", "reference://h/a.jpg"]
    found = listed(write(tmp_path, [{"uri": uri} for uri in uris], "csv"))
    assert [row["container"] for row in found] == [None, "bad", "bad", "bad"]
    assert all("has a scheme that cannot be opened (" in row["member"] for row in found[1:])


def test_a_package_that_is_missing_is_no_fault_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def get_class(scheme: str) -> Any:
        raise ImportError("install s3fs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", get_class)
    with pytest.raises(InputError, match="install s3fs"):
        listed(write(tmp_path, [{"uri": "s3://h/a.jpg"}], "csv"))


def test_names_that_a_column_gives_are_made_safe(tmp_path: Path) -> None:
    names = ["ok.jpg", "/abs.jpg", "a\\b", "x\0y", "../up.jpg", "./a", "a//b", "100%\\", "a%5Cb", "https://h/i?u=1"]
    rows = [{"uri": f"https://h/{n}/", "as": name} for n, name in enumerate(names)]
    found = listed(write(tmp_path, rows, "parquet"), file_name="as")
    assert [row["file_name"] for row in found] == [
        "ok.jpg", "%2Fabs.jpg", "a%5Cb", "x%00y", "%2E%2E/up.jpg", "%2E/a", "a/%2Fb", "100%25%5C", "a%5Cb",
        "https:/%2Fh/i?u=1",
    ]  # fmt: skip
    assert [row["uri"] for row in found] == [row["uri"] for row in rows]
    assert [row["quoted"] is None for row in found] == [True, *[False] * 7, True, False]
    assert [row["other_name"] is None for row in found] == [True, *[False] * 7, True, False]
    assert {row["container"] for row in found} == {None}


def test_rows_without_the_name_that_a_column_should_give(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"uri": "a.jpg", "as": "n.jpg"},
        {"uri": "b.jpg", "as": ""},
        {"uri": "c.jpg", "as": None},
    ]
    found = listed(write(tmp_path, rows, "jsonl"), "/data", file_name="as")
    assert [bad(row) for row in found[1:]] == [
        ("bad", "row-list.jsonl-1", 1, "bad_name: '' in as is no name"),
        ("bad", "row-list.jsonl-2", 2, "bad_name: None in as is no name"),
    ]
    cells: list[dict[str, Any]] = [{"image": b"1", "as": "n"}, {"image": b"2", "as": None}]
    found = listed(write(tmp_path, cells, "parquet"), bytes="image", file_name="as")
    assert bad(found[1]) == ("bad", "row-list.parquet-1", 1, "bad_name: None in as is no name")
    assert bad(found[0]) == ("parquet", "n", 0, "image")


def test_rows_of_several_files_and_blocks_have_names_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_text, "_BLOCK", 64)
    for name in ("x/list", "y/list"):
        (tmp_path / name).parent.mkdir()
        write(tmp_path, [{"uri": f"{n}.jpg" if n % 10 else "../x"} for n in range(30)], "csv", name=name)
    found = [row for row in listed(f"{tmp_path}/*/list.csv", "/data") if row["container"] == "bad"]
    assert [row["file_name"] for row in found] == [
        f"row-{name}%2Flist.csv-{number}" for name in "xy" for number in (0, 10, 20)
    ]
    assert len({row["other_name"] for row in found}) == 6


def test_urls_that_differ_in_their_query_alone(tmp_path: Path) -> None:
    rows = [{"uri": f"https://h/p.jpg?id={n}&sig=SECRET"} for n in range(3)]
    found = listed(write(tmp_path, rows, "csv"))
    assert {row["file_name"] for row in found} == {"h/p.jpg"}
    assert len({row["other_name"] for row in found}) == 3
    assert "SECRET" not in json.dumps([row | {"uri": None} for row in found])


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_ids_that_are_texts_are_kept_and_the_images_numbered(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"uri": "a.jpg", "sku": "A-7"}, {"uri": "b.jpg", "sku": "008"}]
    file = write(tmp_path, rows, kind)
    config = DataConfig.model_validate(
        {"source": "table", "files": file, "images": "/data", "columns": {"id": "sku", "extra": ["uri"]}}
    )
    listing = list_images(config)
    found = [row for table in listing.tables for row in table.to_pylist()]
    assert not listing.has_ids
    assert [row["image_id"] for row in found] == [None, None]
    assert [json.loads(row["extra"]) for row in found] == [
        {"uri": "a.jpg", "sku": "A-7"},
        {"uri": "b.jpg", "sku": "008"},
    ]
    assert f"columns.id 'sku' holds texts, such as 'A-7' in row 0 of {file}: they are kept as 'sku'" in caplog.text


def test_ids_that_are_texts_late_and_under_a_name_that_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_text, "_BLOCK", 64)
    write(tmp_path, [{"uri": f"{n}.jpg", "id": n} for n in range(40)], "csv", name="a")
    write(tmp_path, [{"uri": f"b{n}.jpg", "id": n if n < 30 else f"n{n}"} for n in range(40)], "csv", name="b")
    listing = list_images(
        DataConfig.model_validate(
            {"source": "table", "files": f"{tmp_path}/*.csv", "images": "/data", "columns": {"id": "id"}}
        )
    )
    extras = [json.loads(text) for table in listing.tables for text in table["extra"].to_pylist()]
    assert not listing.has_ids
    assert [extras[n] for n in (0, 79)] == [{"source_id": "0"}, {"source_id": "n39"}]


def test_null_values(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"uri": "a.jpg", "key": 1}, {"uri": None, "key": None}]
    for kind in ("parquet", "jsonl"):
        found = listed(write(tmp_path, rows, kind), "/data")
        assert bad(found[1]) == ("bad", f"row-list.{kind}-1", 1, "bad_uri: None is no URI")
        with pytest.raises(
            InputError, match=r"row 1: None is not an id(.|\n)*Without columns.id the images are numbered"
        ):
            listed(write(tmp_path, rows, kind), "/data", id="key")


def test_values_that_are_no_texts_make_their_rows_bad(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_bytes(b'{"uri": "a.jpg"}\n{"uri": 5}\n{"uri": "\xff.jpg"}\n{"uri": ["x"]}\n{}\n')
    found = listed(f"{tmp_path}/list.jsonl", "/data")
    assert [bad(row) for row in found[1:]] == [
        ("bad", f"row-list.jsonl-{n}", n, "bad_uri: None is no URI") for n in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_sizes_that_are_floats_or_not_stated(tmp_path: Path, kind: str) -> None:
    sizes = [(96.0, 128.0, 5.0), (0.0, 0.0, 0.0), (-1.0, -1.0, -1.0), (float("nan"), float("nan"), float("nan"))]
    rows = [{"uri": f"{n}.jpg", "h": h, "w": w, "n": size} for n, (h, w, size) in enumerate(sizes)]
    found = listed(write(tmp_path, rows, kind), "/i", height="h", width="w", num_bytes="n")
    assert [(row["height"], row["width"], row["num_bytes"]) for row in found] == [(96, 128, 5), *[(None,) * 3] * 3]


def test_all_kinds_of_odd_values_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"uri": f"{n}.jpg", "key": -1 if n > 3 else n, "h": 0.5 if n > 30 else 3, "w": 4} for n in range(40)]
    with pytest.raises(InputError) as caught:
        listed(write(tmp_path, rows, "parquet"), "/i", id="key", height="h", width="w")
    told = str(caught.value)
    assert told.count("\n  row ") == 5
    assert "row 4: -1 is not an id from 0 to 2^53" in told
    assert "row 31: 0.5 is not a valid height" in told
    assert "and 40 more" in told


def test_urls_of_any_form_take_a_name_of_their_own(tmp_path: Path) -> None:
    for uri in ("https://h/a/", "https://h/i?u=a/../b"):
        (row,) = listed(write(tmp_path, [{"uri": uri, "as": "a.jpg"}], "csv"), "/data", file_name="as")
        assert (row["file_name"], row["uri"]) == ("a.jpg", uri)


def test_no_password_gets_into_a_name(tmp_path: Path) -> None:
    (row,) = listed(write(tmp_path, [{"uri": "https://me:secret@host/a@b.jpg"}], "csv"))
    assert (row["file_name"], row["uri"]) == ("host/a@b.jpg", "https://me:secret@host/a@b.jpg")


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a.jpg"]), pa.array(["b.jpg"])], names=["uri", "uri"])
    pq.write_table(table, tmp_path / "twice.parquet")
    (tmp_path / "twice.csv").write_text("uri,uri\na.jpg,b.jpg\n")
    for name in ("twice.parquet", "twice.csv"):
        with pytest.raises(InputError, match=r"has the column 'uri' \(columns\.uri\) more than once"):
            listed(str(tmp_path / name), "/data")


def test_a_table_without_a_root_takes_urls_only(tmp_path: Path) -> None:
    rows = [{"uri": uri} for uri in ("a.jpg", "/data/a.jpg", "file:///data/a.jpg", "https://h/a.jpg")]
    found = listed(write(tmp_path, rows, "csv"))
    assert [row["container"] for row in found] == ["bad", "bad", "bad", None]
    assert all("is no URL: set data.images" in row["member"] for row in found[:3])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("list.xlsx", b"x", "is not a table: its name ends in none of .parquet"),
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
        ("list.jsonl", b'{"uri": "a.jpg"}\n\n[1]', "row 1: is a list, not an object"),
        ("list.jsonl", b"nope\n", "row 0: is not valid JSON"),
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


@pytest.mark.parametrize(("line", "why"), [("[7]", "is a list"), ("tail }", "is not valid JSON"), ('"t"', "is a str")])
def test_lines_that_are_no_objects_are_bad_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: str, why: str
) -> None:
    file = tmp_path / "list.jsonl"
    file.write_text(
        "".join(f"{text}\n" for text in (line, '{"uri": "a.jpg", "n": 1}', line, '{"uri": "b.jpg", "n": 2}'))
    )
    rows = listed(str(file), "/i", extra=["n"])
    assert [row["file_name"] for row in rows] == ["row-list.jsonl-0", "a.jpg", "row-list.jsonl-2", "b.jpg"]
    assert [row["member"] for row in rows] == ["bad_uri: None is no URI", None] * 2
    assert [row["offset"] for row in rows] == [0, None, 2, None]
    assert f"2 lines are not JSON objects and count as rows without values, the first: row 0: {why}" in caplog.text
    with pytest.raises(InputError, match=f"row 0: {why}"):
        listed(str(file), "/i", id="n")


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


@pytest.mark.parametrize("ids", [[1.0, 2.0], [b"1", b"2"], [True, False]])
def test_ids_of_another_type_are_refused_with_a_way_out(tmp_path: Path, ids: list[object]) -> None:
    file = tmp_path / "list.parquet"
    pq.write_table(pa.table({"uri": ["1.jpg", "2.jpg"], "id": ids}), file)
    with pytest.raises(InputError, match=r"not integers; without it the images are numbered"):
        listed(str(file), "/data", id="id")
