"""Make temporary folders that only this user can enter, for Ray's sockets, logs and spilled blocks.

The process removes its folder at the end. It holds a lock in it, which the system releases however the process ends,
so that folders in use differ from those left by killed processes.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from owlsam_ray.errors import PreflightError, shown

PREFIX = "owlsam-ray-"
_LOCK = "lock"
_RANDOM = 8
"""Characters that `tempfile.mkdtemp` adds to a name."""
_WITHOUT_LOCK_S = 3600.0
"""A folder without a lock that is younger may still be in the making; an older one was left by a killed process."""
_REMOVALS = 10
_PAUSE_S = 0.2
_LONGEST_SOCKET = 107
"""Maximum bytes of a socket's path; macOS allows three fewer."""


@dataclass(frozen=True, slots=True)
class PrivateFolder:
    """A folder of mode 0700 that is removed at the end, or by the next call if this process is killed."""

    path: Path
    lock: int
    """File descriptor that holds the lock."""

    @classmethod
    def make(cls, root: Path) -> Self:
        """Create a folder below `root`.

        Raises:
            OSError: the root does not exist, is not writable, is full, or does not support locks.
        """
        while True:
            path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))  # mode 0700, whatever the umask
            lock = -1
            try:
                lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.exists():
                    return cls(path, lock)
            except (BlockingIOError, FileNotFoundError):
                pass  # another process has just mistaken it for an abandoned folder
            except OSError:
                shutil.rmtree(path, ignore_errors=True)
                if lock >= 0:
                    os.close(lock)
                raise
            if lock >= 0:
                os.close(lock)

    def remove(self) -> None:
        """Remove the folder even while others still write into it; failures are silent: the next call tries again."""
        _remove(self.path)
        with contextlib.suppress(OSError):
            os.close(self.lock)


def make_short_folder(inside: int, *, roots: Iterable[Path]) -> tuple[PrivateFolder, PrivateFolder | None]:
    """A folder with room for socket paths, and one where the user wants large files if that is elsewhere.

    Args:
        inside: bytes of the longest path of a socket inside the folder, with its leading slash.
        roots: where to make the folder, the user's choice first.

    Raises:
        PreflightError: no root is writable and short enough.
    """
    reasons = []
    wanted: PrivateFolder | None = None
    for number, root in enumerate(roots):
        needed = len(os.fsencode(root)) + 1 + len(PREFIX) + _RANDOM + inside
        try:
            if needed <= _LONGEST_SOCKET:
                return PrivateFolder.make(root), wanted
            reasons.append(f"a socket in {shown(str(root))} would have a path of {needed} bytes")
            if number == 0:
                wanted = PrivateFolder.make(root)
        except OSError as error:
            reasons.append(f"{shown(str(root))}: {error.strerror or error}")
    if wanted is not None:
        wanted.remove()
    raise PreflightError(
        f"no folder for Ray's sockets, whose paths may have at most {_LONGEST_SOCKET} bytes: {'; '.join(reasons)}. "
        "Set RAY_TMPDIR to a folder with a short path on this machine that you can write to."
    )


def temporary_roots() -> list[Path]:
    """Candidate roots: what Ray would take, then paths that are short on every system."""
    wanted = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    named = [wanted, "/tmp", os.environ.get("XDG_RUNTIME_DIR"), "/var/tmp", tempfile.gettempdir()]  # noqa: S108
    return list(dict.fromkeys(Path(os.path.abspath(name)) for name in named if name))


def remove_abandoned(roots: Iterable[Path]) -> list[Path]:
    """Remove what killed processes of this user left; nothing of a live process, and nothing of other users.

    Args:
        roots: where such folders may be.

    Returns:
        The folders that were removed.
    """
    removed = []
    for root in roots:
        try:
            found = sorted(Path(entry.path) for entry in os.scandir(root) if entry.name.startswith(PREFIX))
        except OSError:
            continue
        removed += [path for path in found if _remove_if_abandoned(path)]
    return removed


def _remove_if_abandoned(path: Path) -> bool:
    try:
        found = path.lstat()  # a link is not one of our folders
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
            return False
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if not path.is_dir() or abs(time.time() - found.st_mtime) < _WITHOUT_LOCK_S:
            return False
        _remove(path)
        return True
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        _remove(path)
        return True
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    """Remove a folder into which processes that are about to end may still write."""
    for attempt in range(_REMOVALS):
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():
            return
        time.sleep(_PAUSE_S if attempt < _REMOVALS - 1 else 0.0)
