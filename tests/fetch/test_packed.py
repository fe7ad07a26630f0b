"""Members of tar files and cells of Parquet files, against reading them one by one with `tarfile` and pyarrow."""

import io
import random
import tarfile
from collections import deque
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import FailureClass, ImageError
from owlsam_ray.fetch import packed
from owlsam_ray.fetch.packed import Cell, FetchTask, Member, Outcome, join_members, tar_tasks

LARGEST = 10**6


def make_tar(path: Path, sizes: list[int], *, seed: int) -> dict[str, bytes]:
    """A tar file with members of these sizes; returns them by name."""
    chance = random.Random(seed)
    content = {f"{number:05d}.jpg": chance.randbytes(size) for number, size in enumerate(sizes)}
    with tarfile.open(path, "w") as tar:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return content


def members_of(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(number, entry.offset_data, entry.size) for number, entry in enumerate(tar)]


def read(uri: str, members: list[Member], *, max_bytes: int = LARGEST) -> dict[int, Outcome]:
    tasks = tar_tasks(uri, members, max_bytes=max_bytes)
    return dict(outcome for task in tasks for outcomes in task() for outcome in outcomes)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    reads: list[tuple[int, int]] = []
    original = storage.read_range

    def counted(url: str, start: int, length: int) -> bytes:
        reads.append((start, length))
        return original(url, start, length)

    monkeypatch.setattr(storage, "read_range", counted)
    return reads


@pytest.mark.parametrize("seed", range(20))
def test_spans_hold_every_member_once_and_are_small(seed: int) -> None:
    print(f"seed {seed}")
    chance = random.Random(seed)
    members, offset = [], 0
    for number in range(chance.randint(0, 200)):
        offset += chance.choice([0, 512, 2**17, 2**20])
        members.append(Member(number, offset, length := chance.choice([0, 1, 100_000, 5 * 2**20, 30 * 2**20])))
        offset += length
    chance.shuffle(members)
    spans = join_members(members)
    assert sorted(member.position for span in spans for member in span.members) == list(range(len(members)))
    for span in spans:
        assert span.end - span.start <= packed._SPAN or len(span.members) == 1
        assert all(span.start <= m.offset and m.offset + m.length <= span.end for m in span.members)
    in_order = [member.offset for span in spans for member in span.members]
    assert in_order == sorted(in_order)


def test_neighbours_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = make_tar(tmp_path / "a.tar", [random.Random(0).randint(0, 40_000) for _ in range(300)], seed=1)
    members = members_of(tmp_path / "a.tar")
    reads = count_reads(monkeypatch)
    random.Random(2).shuffle(members)
    assert read(str(tmp_path / "a.tar"), members) == dict(enumerate(content.values()))
    assert len(reads) == 1
    reads.clear()
    few = [member for member in members if member.position in (3, 4, 290)]
    assert read(str(tmp_path / "a.tar"), few).keys() == {3, 4, 290}
    assert len(reads) == 2
    assert sum(length for _, length in reads) < 400_000


def test_too_large_members_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = list(make_tar(tmp_path / "a.tar", [1000, 5_000_000, 1000, 1001], seed=1).values())
    reads = count_reads(monkeypatch)
    outcomes = read(str(tmp_path / "a.tar"), members_of(tmp_path / "a.tar"))
    assert [outcomes[0], outcomes[2], outcomes[3]] == [content[0], content[2], content[3]]
    assert isinstance(outcomes[1], ImageError)
    assert outcomes[1].reason == "too_large: more than 1 MB"
    assert sum(length for _, length in reads) < 10_000


@pytest.mark.parametrize("cut", [0, 100, 600, 3000, 5500])
def test_a_cut_file_keeps_what_is_whole(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.tar"
    content = list(make_tar(path, [1000] * 4, seed=1).values())
    members = members_of(path)
    path.write_bytes(path.read_bytes()[:cut])
    outcomes = read(str(path), members)
    for member, data in zip(members, content, strict=True):
        outcome = outcomes[member.position]
        if member.offset + 1000 <= cut:
            assert outcome == data
        else:
            assert isinstance(outcome, ImageError)
            assert outcome.reason.startswith("truncated: the tar file ends")
            assert outcome.failure_class is FailureClass.PERMANENT


def test_a_missing_file_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    outcomes = read(str(tmp_path / "gone.tar"), [Member(n, 512 + 1024 * n, 9) for n in range(5)])
    assert [outcomes[n].reason for n in range(5)] == ["missing"] * 5  # type: ignore[union-attr]
    assert len(reads) == 1


def test_a_span_that_fails_is_read_member_by_member(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = list(make_tar(tmp_path / "a.tar", [1000] * 6, seed=1).values())
    members = members_of(tmp_path / "a.tar")
    original = storage.read_range

    def broken(url: str, start: int, length: int) -> bytes:
        if start <= members[3].offset < start + length:
            raise OSError(5, "bad sector")
        return original(url, start, length)

    monkeypatch.setattr(storage, "read_range", broken)
    outcomes = read(str(tmp_path / "a.tar"), members)
    failed = outcomes.pop(3)
    assert isinstance(failed, ImageError)
    assert (failed.reason, failed.failure_class) == ("fetch_failed: bad sector", FailureClass.TRANSIENT)
    assert outcomes == {n: data for n, data in enumerate(content) if n != 3}


# Parquet


def read_cells(uri: str, column: str, rows: list[int], *, max_bytes: int = LARGEST) -> list[Outcome]:
    cells = [Cell(position, row) for position, row in enumerate(rows)]
    tasks: deque[FetchTask] = deque()
    found = list(packed.read_cells(uri, column, cells, max_bytes=max_bytes, hand_over=tasks.append))
    while tasks:
        found += tasks.popleft()()
    outcomes = dict(outcome for some in found for outcome in some)
    return [outcomes[position] for position in range(len(rows))]


def images(count: int, *, seed: int = 0) -> list[bytes]:
    chance = random.Random(seed)
    return [chance.randbytes(chance.randint(0, 9000)) for _ in range(count)]


LAYOUTS: dict[str, tuple[str, Any]] = {
    "flat": ("image", lambda data: pa.array(data, pa.binary())),
    "large": ("image", lambda data: pa.array(data, pa.large_binary())),
    "structure": (
        "image.bytes",
        lambda data: pa.array(
            [{"path": "x", "bytes": d} for d in data], pa.struct([("path", pa.string()), ("bytes", pa.binary())])
        ),
    ),
    "dictionary": ("image", lambda data: pa.array(data, pa.binary()).dictionary_encode()),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("group_rows", [1, 7, 100, 1000])
def test_cells_equal_the_table(tmp_path: Path, layout: str, group_rows: int) -> None:
    path, (column, build), data = str(tmp_path / "t.parquet"), LAYOUTS[layout], images(250)
    table = pa.table({"id": range(250), "image": build(data), "a.b": build(data[::-1])})
    pq.write_table(table, path, row_group_size=group_rows)
    rows = random.Random(3).sample(range(250), 90)
    assert read_cells(path, column, rows) == [data[row] for row in rows]
    if layout == "flat":
        assert read_cells(path, "a.b", [0, 249, 17]) == [data[249], data[0], data[232]]


def test_a_row_group_is_read_once_and_only_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images(200)
    table = pa.table({"other": [bytes(9000)] * 200, "image": pa.array(data, pa.binary())})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=50, compression="none", use_dictionary=False)
    storage.write_atomic("memory://cells/t.parquet", (tmp_path / "t.parquet").read_bytes())
    reads: list[int] = []
    original = storage.reading.read_range

    def counted(url: str, start: int, length: int) -> bytes:
        reads.append(length)
        return original(url, start, length)

    monkeypatch.setattr(storage.reading, "read_range", counted)
    assert read_cells("memory://cells/t.parquet", "image", [60, 70, 99, 51]) == [data[n] for n in (60, 70, 99, 51)]
    assert sum(reads) < sum(len(d) for d in data[50:100]) + 3 * 2**18


def test_what_is_wrong_with_a_cell_or_table(tmp_path: Path) -> None:
    path = str(tmp_path / "t.parquet")
    data = [b"x", None, b"y" * 2_000_000, b"z"]
    nested = pa.array([{"bytes": d} for d in data[:3]] + [None], pa.struct([("bytes", pa.binary())]))
    pq.write_table(pa.table({"image": pa.array(data, pa.binary()), "n": [1, 2, 3, 4], "s": nested}), path)

    def reasons(column: str, rows: list[int], where: str = path) -> list[str]:
        return [o.reason if isinstance(o, ImageError) else o.decode() for o in read_cells(where, column, rows)]

    null = "missing: the table holds no image in this row"
    assert reasons("image", [0, 1, 2, 3, 4]) == [
        "x",
        null,
        "too_large: more than 1 MB",
        "z",
        "truncated: row 4 of a table of 4 rows",
    ]
    assert reasons("s.bytes", [0, 1, 3]) == ["x", null, null]
    assert reasons("picture", [0, 1]) == ["bad_table: no column picture"] * 2
    assert reasons("s", [0]) == ["bad_table: no column s"]
    assert reasons("n", [0]) == ["bad_table: column n holds no bytes"]
    assert reasons("image", [0], str(tmp_path / "gone.parquet")) == ["missing"]
    assert reasons("image", [0], str(tmp_path)) == ["not_a_file"]


@pytest.mark.parametrize("seed", range(30))
def test_damaged_tables_fail_with_a_reason(tmp_path: Path, seed: int) -> None:
    """Cut anywhere, or with bytes changed: an outcome for every cell, and no other error."""
    print(f"seed {seed}")
    chance, data, path = random.Random(seed), images(60), tmp_path / "t.parquet"
    pq.write_table(pa.table({"image": pa.array(data, pa.binary())}), path, row_group_size=20, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    if seed % 2:
        content = content[: chance.randint(0, len(content) - 1)]
    else:
        for _ in range(chance.randint(1, 20)):
            content[chance.randrange(len(content))] ^= chance.randint(1, 255)
    path.write_bytes(content)
    for outcome in read_cells(str(path), "image", list(range(60))):
        if isinstance(outcome, ImageError):
            assert outcome.reason.split(":")[0] in ("bad_table", "truncated", "missing"), outcome.reason
            assert outcome.failure_class is FailureClass.PERMANENT
