"""Patterns of file names, and files read side by side."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

from owlsam_ray import storage
from owlsam_ray.errors import IncompleteError, InputError
from owlsam_ray.parallel.processes import in_order
from owlsam_ray.sources.files import check_schemes, expand_braces, expand_files, relative_names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("s-{9..10}.tar", ["s-9.tar", "s-10.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a}", ["a"]),
    ],
)
def test_braces(pattern: str, names: list[str]) -> None:
    assert expand_braces(pattern) == names


def test_a_falling_range_is_refused() -> None:
    with pytest.raises(InputError, match=r"write \{001\.\.002\}"):
        expand_braces("s-{002..001}.tar")


def test_globs_on_a_disk_and_elsewhere(tmp_path: Path) -> None:
    for name in ("b/2.tar", "b/1.tar", "a/3.tar", "a/x.txt", "odd[1].tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "c.tar").mkdir()
    root = str(tmp_path)
    assert expand_files([f"{root}/*/*.tar"]) == [f"{root}/a/3.tar", f"{root}/b/1.tar", f"{root}/b/2.tar"]
    assert expand_files([f"{root}/b/2.tar", f"{root}/b/?.tar"]) == [f"{root}/b/2.tar", f"{root}/b/1.tar"]
    assert expand_files([f"{root}/**/[12].tar"]) == [f"{root}/b/1.tar", f"{root}/b/2.tar"]
    assert expand_files([f"{root}/odd[1].tar"]) == [f"{root}/odd[1].tar"], "a file that is there is no pattern"
    assert expand_files([f"file://{root}/{{a,b}}/*.tar"])[0] == f"file://{root}/a/3.tar"
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    memory.pipe_file("/set/1.csv", b"")
    assert expand_files(["memory://set/*.csv"]) == ["memory:///set/1.csv"]
    assert expand_files(["s3://bucket/{0..1}.tar"]) == ["s3://bucket/0.tar", "s3://bucket/1.tar"], "no request is made"
    for pattern in (f"{root}/*.parquet", f"{root}/gone/*", "memory://gone/*.csv"):
        with pytest.raises(InputError, match="matches no file"):
            expand_files([pattern])


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/data/x/a.tar"], ["a.tar"]),
        (["/data/x/a.tar", "/data/x/b.tar"], ["a.tar", "b.tar"]),
        (["s3://one/x/a.tar", "s3://one/y/z/a.tar"], ["x/a.tar", "y/z/a.tar"]),
        (["/data/a.tar", "/data/a/a.tar"], ["a.tar", "a/a.tar"]),
        ([], []),
    ],
)
def test_relative_names(urls: list[str], names: list[str]) -> None:
    assert relative_names(urls) == names


def test_schemes() -> None:
    check_schemes(["/a", "s3://b/c", "memory://d", "https://e/f"])
    with pytest.raises(InputError, match="cannot open 'ftpx://a/b'"):
        check_schemes(["s3://a", "ftpx://a/b", "ftpx://a/c"])


def slow_square(number: int) -> tuple[int, int]:
    time.sleep(0.01 * (3 - number % 3))
    if number == 7:
        raise InputError("seven")
    return number * number, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_other_processes_ask_storage_alike(workers: int) -> None:
    mine = storage.StoragePolicy(retries=2, timeout_s=9)
    storage.configure(mine)
    try:
        assert list(in_order(policy_there, range(2), workers)) == [mine, mine]
    finally:
        storage.configure(storage.StoragePolicy())


def policy_there(number: int) -> storage.StoragePolicy:
    return storage.policy()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    results = list(in_order(slow_square, range(7), workers))
    assert [square for square, _ in results] == [n * n for n in range(7)]
    processes = {process for _, process in results}
    assert (processes == {os.getpid()}) == (workers == 1)
    with pytest.raises(InputError, match="seven"):
        list(in_order(slow_square, range(5, 9), workers))
    assert next(in_order(slow_square, range(6), workers))[0] == 0, "and may be left early"


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(IncompleteError, match="killed from outside"):
        list(in_order(die, range(9), 2))


def sleep_and_tell(file: str) -> None:
    with open(file, "a", encoding="utf-8") as told:
        told.write(f"{os.getpid()}\n")
    time.sleep(600)


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    told = tmp_path / "pids"
    code = (
        "from owlsam_ray.parallel.processes import in_order\n"
        "from tests.sources.test_files import sleep_and_tell\n"
        f"if __name__ == '__main__':\n    list(in_order(sleep_and_tell, [{str(told)!r}] * 2, 2))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(root)})
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not told.exists() or len(told.read_text().split()) < 2):
        time.sleep(0.05)
    workers = [int(pid) for pid in told.read_text().split()]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in workers):
        time.sleep(0.05)
    assert len(workers) == 2
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
