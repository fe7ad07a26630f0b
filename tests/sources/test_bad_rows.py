"""Rows that no image can be read by: planned, counted, bounded, fetched as failures, and planned once."""

import io
import json
import logging
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailedImagesError, GuardError, InputError
from owlsam_ray.fetch.images import fetch_shard
from owlsam_ray.plan.plan import Plan, plan_run
from owlsam_ray.run.record import load_record
from owlsam_ray.sources.bad_rows import BAD_ROWS_FILE
from owlsam_ray.sources.row_names import distinct_name


def run_of(folder: Path, source: dict[str, Any], *, run: str = "run", max_failed: Any = 10, **plan: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": str(folder / run),
            "data": source,
            "vocabulary": {"categories": ["cat"]},
            "detector": {"weights": "w"},
            "segment": {"weights": "s.pt"},
            "plan": plan,
            "reduce": {"max_failed": max_failed},
            "resources": {"shard_size": 4},
        }
    )


def table_of(folder: Path, uris: list[Any], name: str = "t.jsonl", **columns: Any) -> dict[str, Any]:
    rows = [{"uri": uri, "key": 100 + n, "as": f"n{n}"} for n, uri in enumerate(uris)]
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"source": "table", "files": str(folder / "*.jsonl"), "columns": columns}


def planned(plan: Plan) -> list[dict[str, Any]]:
    return [row for table in plan.run.manifest.iter_images() for row in table.to_pylist()]


GOOD = [f"https://h/{n}.jpg" for n in range(9)]


@pytest.mark.parametrize("columns", [{}, {"id": "key"}, {"file_name": "as"}, {"id": "key", "file_name": "as"}])
def test_bad_rows_have_ids_and_a_place_and_are_planned_once(tmp_path: Path, columns: dict[str, str]) -> None:
    source = table_of(tmp_path, [*GOOD[:3], "UNLIKELY", *GOOD[3:6], None, *GOOD[6:], ""], **columns)
    config = run_of(tmp_path, source)
    plan = plan_run(config)
    rows = planned(plan)
    assert (plan.new, plan.bad, len(rows)) == (12, 3, 12)
    assert [row["image_id"] for row in rows] == [n + (100 if "id" in columns else 1) for n in range(12)]
    bad = {n: row for n, row in enumerate(rows) if row["container"] == "bad"}
    assert sorted(bad) == [3, 7, 11]
    assert [row["file_name"] for row in bad.values()] == [
        f"n{n}" if "file_name" in columns else f"row-t.jsonl-{n}" for n in bad
    ]
    for _ in range(2):
        again = plan_run(config, extend=True)
        assert (again.new, again.run.manifest.num_images) == (0, 12)
    table_of(tmp_path, [GOOD[0] + "x", None], name="u.jsonl", **columns)
    if "id" not in columns and "file_name" not in columns:
        more = plan_run(config, extend=True)
        assert (more.new, more.bad) == (2, 1)
        assert [row["file_name"] for row in planned(more)][12:] == ["h/0.jpgx", "row-u.jsonl-1"]
        assert plan_run(config, extend=True).new == 0


def test_they_are_fetched_as_permanent_failures_and_no_storage_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.png").write_bytes(b"123")
    source = table_of(tmp_path, ["a.png", "../b.png", None]) | {"images": str(tmp_path)}
    plan = plan_run(run_of(tmp_path, source))
    asked: list[str] = []
    read = storage.read_whole

    def note(uri: str, *, limit: int, listed: int | None = None) -> storage.Body:
        asked.append(uri)
        return read(uri, limit=limit, listed=listed)

    monkeypatch.setattr(storage, "read_whole", note)
    fetched = fetch_shard(plan.run.manifest, 0, threads=2, max_file_mb=1).to_pylist()
    assert [row["data"] for row in fetched] == [b"123", None, None]
    assert [(row["reason"], row["status_class"]) for row in fetched] == [
        (None, None),
        ("bad_uri: '../b.png' leaves data.images, or is that folder itself", "permanent"),
        ("bad_uri: None is no URI", "permanent"),
    ]
    assert asked == [str(tmp_path / "a.png")]


def test_they_are_told_listed_and_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = ["x", "y", "z", "w", "https://h/a\\b.jpg", None]
    source = table_of(tmp_path, [*GOOD, *odd])
    with pytest.raises(FailedImagesError) as caught:
        plan_run(run_of(tmp_path, source, max_failed=4))
    told = str(caught.value.args[0])
    assert "5 of 15 rows lead to no image, and reduce.max_failed (4) allows 4, so nothing is planned" in told
    assert f"5 bad_uri: row 9 of {tmp_path}/t.jsonl: 'x' is no URL" in told
    assert "and 2 more" in told
    assert "1 quoted: 'h/a\\\\b.jpg': file_name holds a NUL or a backslash, now 'h/a%5Cb.jpg'" in told
    assert load_record(str(tmp_path / "run")) is None
    with caplog.at_level(logging.WARNING):
        assert plan_run(run_of(tmp_path, source, max_failed=5)).bad == 5
    assert "5 of 15 rows become failed rows" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run" / BAD_ROWS_FILE).read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0] == {
        "file_name": "row-t.jsonl-9",
        "uri": f"{tmp_path}/t.jsonl",
        "row": 9,
        "reason": "bad_uri: 'x' is no URL: set data.images to the folder that it lies below",
    }


def test_a_share_of_the_rows_bounds_them_too(tmp_path: Path) -> None:
    source = table_of(tmp_path, [*(f"https://h/{n}.jpg" for n in range(999)), "UNLIKELY"])
    assert plan_run(run_of(tmp_path, source, max_failed=0.001)).bad == 1
    with pytest.raises(FailedImagesError):
        plan_run(run_of(tmp_path, source, run="other", max_failed=0.0009))


def test_they_can_be_refused(tmp_path: Path) -> None:
    source = table_of(tmp_path, [*GOOD, "x", "https://h/a\\b.jpg"])
    with pytest.raises(InputError, match=r"plan\.bad_names is refuse(.|\n)*1 bad_uri: (.|\n)*1 quoted: "):
        plan_run(run_of(tmp_path, source, bad_names="refuse"))
    with pytest.raises(InputError, match="1 quoted: "):
        plan_run(run_of(tmp_path, table_of(tmp_path, [*GOOD, "https://h/a\\b.jpg"]), bad_names="refuse"))
    assert plan_run(run_of(tmp_path, table_of(tmp_path, GOOD), bad_names="refuse")).new == 9


def test_a_table_of_bad_rows_alone_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none of 2 rows leads to an image(.|\n)*is no URL: set data\.images"):
        plan_run(run_of(tmp_path, table_of(tmp_path, ["a.jpg", "b.jpg"])))


def test_verifying_counts_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"123")
    source = table_of(tmp_path, ["a.png", "../b.png", "c.png"]) | {"images": str(tmp_path)}
    with pytest.raises(FailedImagesError, match=r"2 of 3 images would fail \(1 bad_uri, 1 missing\)"):
        plan_run(run_of(tmp_path, source, verify="exists", max_failed=1))


def test_names_that_clash_after_all_are_told_apart(tmp_path: Path) -> None:
    """A quoted name that is another image's own; URLs that differ in their query; a row called like an image."""
    uris = ["https://h/a\\b.jpg", "https://h/a%5Cb.jpg", "https://h/p?id=1", "https://h/p?id=2", "https://h/p"]
    source = table_of(tmp_path, uris)
    config = run_of(tmp_path, source)
    rows = planned(plan_run(config))
    names = [row["file_name"] for row in rows]
    assert [row["uri"] for row in rows] == uris
    assert len(set(names)) == 5
    assert (names[1], names[4]) == ("h/a%5Cb.jpg", "h/p")
    assert all(
        name.startswith(begin) for name, begin in zip(names, ["h/a%5Cb~", "h/a%5C", "h/p~", "h/p~"], strict=False)
    )
    assert plan_run(config, extend=True).new == 0
    with pytest.raises(InputError, match=r"'h/p~.*' is listed twice"):
        plan_run(run_of(tmp_path, table_of(tmp_path, [*uris, uris[3]]), run="other"))


def test_addresses_that_differ_in_their_scheme_or_slashes_are_two_images(tmp_path: Path) -> None:
    uris = [
        "https://h/1.jpg",
        "HTTP://h/1.jpg",
        "s3://h/1.jpg",
        "https://h//1.jpg",
        "https://h/2.jpg",
        "http://h/3.jpg",
    ]
    source = table_of(tmp_path, uris)
    names = [row["file_name"] for row in planned(plan_run(run_of(tmp_path, source)))]
    assert [*names[:3], *names[4:]] == ["h/1.jpg", "http/h/1.jpg", "s3/h/1.jpg", "h/2.jpg", "h/3.jpg"]
    assert names[3].startswith("h/1~")
    for other in ("http://h/1.jpg", "https://h/1.jpg"):
        with pytest.raises(InputError, match="is listed twice"):
            plan_run(run_of(tmp_path, table_of(tmp_path, [*uris, other]), run="other"))


@pytest.mark.parametrize("columns", [{}, {"id": "key"}])
def test_a_name_that_is_taken_by_the_plan_is_told_apart_as_well(tmp_path: Path, columns: dict[str, str]) -> None:
    uris = ["https://h/p?id=1"]
    assert planned(plan_run(run_of(tmp_path, table_of(tmp_path, uris, **columns))))[0]["file_name"] == "h/p"
    uris += ["https://h/p?id=2"]
    config = run_of(tmp_path, table_of(tmp_path, uris, **columns))
    assert plan_run(config, extend=True).new == 1
    rows = planned(plan_run(config, extend=True))
    assert [row["uri"] for row in rows] == uris
    assert rows[0]["file_name"] == "h/p"
    assert rows[1]["file_name"].startswith("h/p~")


def test_rows_that_were_bad_when_they_were_planned_do_not_stop_an_extension(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan_run(run_of(tmp_path, table_of(tmp_path, [GOOD[0], "x"], id="key")))
    config = run_of(tmp_path, table_of(tmp_path, GOOD[:3], id="key"))
    assert plan_run(config, extend=True).new == 1
    assert "1 rows without a usable image when they were planned stay failed rows" in caplog.text
    with pytest.raises(GuardError, match=r"the id of 'h/8\.jpg' \(id 100\)"):
        plan_run(run_of(tmp_path, table_of(tmp_path, [GOOD[8]], id="key")), extend=True)


def test_files_of_annotations(tmp_path: Path) -> None:
    (tmp_path / "i" / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png", "d.png", "e\\f.png"):
        (tmp_path / "i" / name).write_bytes(name.encode())
    names = ["a.png", "./b.png", "sub//c.png", f"{tmp_path}/i/d.png", "e\\f.png", "../x.png", None]
    tree = {"images": [{"id": 9 - n, "file_name": name} for n, name in enumerate(names)]}
    (tmp_path / "list.json").write_text(json.dumps(tree))
    config = run_of(
        tmp_path, {"source": "coco", "images": str(tmp_path / "i"), "annotations": str(tmp_path / "list.json")}
    )
    plan = plan_run(config)
    rows = planned(plan)
    assert [(row["image_id"], row["file_name"]) for row in rows] == [
        (9, "a.png"), (8, "b.png"), (7, "sub/c.png"), (6, "d.png"), (5, "e%5Cf.png"), (4, "row-list.json-5"),
        (3, "row-list.json-6"),
    ]  # fmt: skip
    fetched = [
        row for shard in (0, 1) for row in fetch_shard(plan.run.manifest, shard, threads=1, max_file_mb=1).to_pylist()
    ]
    assert [row["data"] for row in fetched] == [b"a.png", b"b.png", b"sub/c.png", b"d.png", b"e\\f.png", None, None]
    assert plan_run(config, extend=True).new == 0
    tree["images"].append({"id": 20, "file_name": "b.png"})
    (tmp_path / "list.json").write_text(json.dumps(tree))
    both = planned(plan_run(config.model_copy(update={"run": str(tmp_path / "both")})))
    assert [row["file_name"] for row in both if row["uri"].endswith("/b.png")] == ["%2E/b.png", "b.png"]


def test_rows_of_parquet_that_share_one_path(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As data sets that were uploaded from memory have them: nothing of the hint may drop images."""
    rows = [{"image": {"bytes": bytes([n]), "path": "image.png"}} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    columns = {"bytes": "image.bytes", "file_name": "image.path"}
    source = {"source": "table", "files": str(tmp_path / "t.parquet"), "columns": columns}
    with pytest.raises(InputError) as caught:
        plan_run(run_of(tmp_path, source))
    assert "leave out columns.file_name" in str(caught.value)
    assert "plan.duplicates" not in str(caught.value)
    assert plan_run(run_of(tmp_path, source, duplicates="first")).new == 1
    assert "leave out columns.file_name" in caplog.text
    del columns["file_name"]
    assert plan_run(run_of(tmp_path, source, run="other")).new == 6
    twice = table_of(tmp_path, [GOOD[0], GOOD[0]])
    with pytest.raises(InputError, match=r"With plan\.duplicates=first an image that is listed twice counts once"):
        plan_run(run_of(tmp_path, twice, run="twice"))


def odd_folder(root: Path) -> dict[str, Any]:
    """Files whose names clash once they are quoted; each holds its name."""
    root.mkdir()
    for name in (b"a.png", b"\xfc.png", b"%FC.png", b"x\\y.png"):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(name)
    return {"source": "folder", "images": str(root)}


def odd_tar(path: Path) -> dict[str, Any]:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("a.png", "ü.png", "%FC.png", "x\\y.png"):
            member = tarfile.TarInfo(name)
            member.size = len(name.encode("latin-1"))
            tar.addfile(member, io.BytesIO(name.encode("latin-1")))
    return {"source": "webdataset", "files": str(path)}


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
def test_odd_names_of_files_and_members_are_planned_once_and_read(tmp_path: Path, kind: str) -> None:
    source = odd_folder(tmp_path / "d") if kind == "folder" else odd_tar(tmp_path / "d.tar")
    config = run_of(tmp_path, source)
    plan = plan_run(config)
    assert (plan.new, plan.bad) == (4, 0)
    begin = "" if kind == "folder" else "d.tar/"
    escaped = distinct_name(f"{begin}%FC.png", f"{begin}\udcfc.png")
    names = {f"{begin}a.png": b"a.png", f"{begin}%FC.png": b"%FC.png", f"{begin}x%5Cy.png": b"x\\y.png"}
    names[escaped] = b"\xfc.png"
    fetched = fetch_shard(plan.run.manifest, 0, threads=2, max_file_mb=1)
    assert fetched["reason"].to_pylist() == [None] * 4
    assert {
        row["file_name"]: data for row, data in zip(planned(plan), fetched["data"].to_pylist(), strict=True)
    } == names
    listed = [json.loads(line) for line in (tmp_path / "run" / BAD_ROWS_FILE).read_text().splitlines()]
    assert sorted(line["file_name"] for line in listed) == sorted([escaped, f"{begin}x%5Cy.png"])
    for _ in range(2):
        assert plan_run(config, extend=True).new == 0
    with pytest.raises(InputError, match=r"plan\.bad_names is refuse(.|\n)*2 quoted: "):
        plan_run(run_of(tmp_path, source, run="other", bad_names="refuse"))


def test_files_whose_names_are_no_utf8_move_with_their_folder(tmp_path: Path) -> None:
    plan_run(run_of(tmp_path, odd_folder(tmp_path / "d%41")))
    (tmp_path / "d%41").rename(tmp_path / "e%42")
    config = run_of(tmp_path, {"source": "folder", "images": str(tmp_path / "e%42")})
    moved = plan_run(config)
    assert moved.new == 0
    fetched = fetch_shard(moved.run.manifest, 0, threads=2, max_file_mb=1)
    assert set(fetched["data"].to_pylist()) == {b"a.png", b"\xfc.png", b"%FC.png", b"x\\y.png"}
    assert plan_run(config, extend=True).new == 0


def test_keys_that_cannot_be_asked_for_keep_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["b.png", "c/../d.png"]
    monkeypatch.setattr(storage, "is_directory", lambda url: True)
    monkeypatch.setattr(storage, "walk_files", lambda url: ((key, 7) for key in keys))
    config = run_of(tmp_path, {"source": "folder", "images": "memory://set"})
    plan = plan_run(config)
    assert (plan.new, plan.bad) == (2, 1)
    keys.insert(0, "a.png")  # the bad one is another row of the listing by now
    assert plan_run(config, extend=True).new == 1
    assert plan_run(config, extend=True).new == 0
    with pytest.raises(InputError, match=r"1 bad_name: memory://set/c/%2E%2E/d.png: 'c/../d.png' holds a part"):
        plan_run(run_of(tmp_path, {"source": "folder", "images": "memory://set"}, run="o", bad_names="refuse"))
