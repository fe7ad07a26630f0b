"""Folders of one user and one process: made, locked, told apart, removed."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.errors import PreflightError
from owlsam_ray.parallel.private_folder import (
    PREFIX,
    PrivateFolder,
    make_short_folder,
    remove_abandoned,
    temporary_roots,
)


def abandoned(root: Path) -> Path:
    """What a killed process leaves: the system gives its lock back."""
    folder = PrivateFolder.make(root)
    (folder.path / "r" / "logs").mkdir(parents=True)
    (folder.path / "r" / "logs" / "driver.log").write_text("words", encoding="utf-8")
    os.close(folder.lock)
    return folder.path


def test_a_folder_is_of_this_user_alone_and_goes_at_the_end(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = PrivateFolder.make(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.lstat().st_mode) == 0o700
    assert [path.name for path in folder.path.iterdir()] == ["lock"]
    folder.remove()
    assert list(tmp_path.iterdir()) == []


def test_what_was_left_goes_and_what_lives_stays(tmp_path: Path) -> None:
    left = [abandoned(tmp_path), abandoned(tmp_path)]
    live = PrivateFolder.make(tmp_path)
    (tmp_path / "owlsam-isolated-x").mkdir(mode=0o700)
    assert sorted(remove_abandoned([tmp_path, tmp_path / "gone"])) == sorted(left)
    assert sorted(tmp_path.iterdir()) == sorted([live.path, tmp_path / "owlsam-isolated-x"])
    live.remove()


def test_a_lock_of_another_process_is_seen_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from owlsam_ray.parallel.private_folder import PrivateFolder\n"
        "print(PrivateFolder.make(pathlib.Path(sys.argv[1])).path, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert remove_abandoned([tmp_path]) == []
        process.kill()
        process.wait()
    assert remove_abandoned([tmp_path]) == [path]


@pytest.mark.parametrize("what", ["link", "file", "open to all", "young without lock", "of another user"])
def test_what_is_not_known_to_be_ours_stays(tmp_path: Path, what: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    path = tmp_path / f"{PREFIX}odd"
    if what == "link":
        path.symlink_to(elsewhere)
    elif what == "file":
        path.touch(0o700)
    elif what == "young without lock":
        path.mkdir(0o700)
    else:
        abandoned(tmp_path).rename(path)
        if what == "open to all":
            path.chmod(0o755)
        elif os.getuid() == 0:
            os.chown(path, 65534, 65534)
        else:
            pytest.skip("only root can give a folder away")
    assert remove_abandoned([tmp_path]) == []
    assert path.exists()
    assert (elsewhere / "precious").exists()


def test_a_folder_without_lock_goes_once_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / f"{PREFIX}odd"
    path.mkdir(0o700)
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    assert remove_abandoned([tmp_path]) == [path]


def test_a_link_inside_is_removed_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "label.json").touch()
    path = abandoned(tmp_path)
    (path / "r" / "session_latest").symlink_to(tmp_path / "precious")
    assert remove_abandoned([tmp_path]) == [path]
    assert (tmp_path / "precious" / "label.json").exists()


def test_a_maker_that_is_taken_for_a_dead_one_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep may see a folder between its making and its lock."""
    taken: list[Path] = []
    open_file = os.open

    def sweep_first(path: Path, *arguments: int, **options: Any) -> int:
        descriptor = open_file(path, *arguments, **options)
        if not taken:
            taken.append(Path(path).parent)
            assert remove_abandoned([tmp_path]) == taken
        return descriptor

    monkeypatch.setattr(os, "open", sweep_first)
    folder = PrivateFolder.make(tmp_path)
    assert [folder.path] == list(tmp_path.iterdir())
    assert folder.path != taken[0]
    folder.remove()


@pytest.mark.parametrize("length", [21, 22, 60, 200])
def test_sockets_go_where_their_paths_are_short_enough(tmp_path: Path, length: int) -> None:
    inside = 66
    short = Path("/tmp")
    long = tmp_path / ("n" * max(1, length - len(str(tmp_path)) - 1))
    long.mkdir()
    folder, wanted = make_short_folder(inside, roots=[long, short])
    try:
        assert len(os.fsencode(folder.path)) + inside <= 107
        assert folder.path.parent == short
        assert wanted is not None
        assert wanted.path.parent == long
    finally:
        for each in (folder, wanted):
            if each is not None:
                each.remove()


def test_the_wish_of_the_user_is_taken_where_it_is_short() -> None:
    folder, wanted = make_short_folder(66, roots=[Path("/tmp"), Path("/var/tmp")])
    folder.remove()
    assert (folder.path.parent, wanted) == (Path("/tmp"), None)


def test_umlauts_count_as_bytes(tmp_path: Path) -> None:
    root = tmp_path / "ä"
    root.mkdir()
    room = 107 - len(str(root)) - 1 - len(PREFIX) - 8
    with pytest.raises(PreflightError, match=f"a path of {len(str(root)) + 1 + room + 1 + len(PREFIX) + 8} bytes"):
        make_short_folder(room, roots=[root])


def test_no_place_at_all_names_the_way_out(tmp_path: Path) -> None:
    long = tmp_path / ("n" * 90)
    long.mkdir()
    with pytest.raises(PreflightError) as raised:
        make_short_folder(66, roots=[long, Path("/gone")])
    told = str(raised.value)
    assert "RAY_TMPDIR" in told
    assert "'/gone': No such file or directory" in told
    assert "bytes" in told
    assert list(long.iterdir()) == []


def test_roots_begin_with_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/a")
    monkeypatch.setenv("TMPDIR", "/b")
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    assert temporary_roots()[:3] == [Path("/a"), Path("/tmp"), Path("/run/user/7")]
    monkeypatch.delenv("RAY_TMPDIR")
    assert temporary_roots()[0] == Path("/b")
    monkeypatch.delenv("TMPDIR")
    assert temporary_roots()[0] == Path("/tmp")
