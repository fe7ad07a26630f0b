"""Memory of this machine, or of the part of it that a container or a job may use, and whom the kernel ended for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def memory_limit(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int | None:
    """Bytes that the processes of this job may hold together; None where nobody can tell.

    The smallest of what the machine has and of the limits of this process's control groups, version 1 and 2, up to
    their root: a scheduler sets the limit at a job's group, and ours may lie deeper.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, version in _groups(cgroups, proc):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        with contextlib.suppress(OSError, ValueError):  # "max": no limit
            found.append(int((folder / name).read_text(encoding="ascii")))
    return min(found, default=None)


def memory_kills(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int | None:
    """How many processes the kernel has ended so far in this process's control group, for want of memory.

    Of the whole machine where the group does not count; None where nobody can tell.
    """
    for folder, version in _groups(cgroups, proc):
        found = _entry(folder / ("memory.events" if version == 2 else "memory.oom_control"), "oom_kill")
        if found is not None:
            return found
    return _entry(proc / "vmstat", "oom_kill")


def _entry(file: Path, name: str) -> int | None:
    """The number after a name, in a file of such lines."""
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None


def _groups(cgroups: Path, proc: Path) -> Iterator[tuple[Path, int]]:
    """Folders of the memory controller that hold for this process, from its own group up to the root; the version."""
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        lines = []
    own = {}
    for line in lines:  # hierarchy:controllers:path
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers == "" or "memory" in controllers.split(","):
            own[2 if controllers == "" else 1] = path
    for root, version in ((cgroups, 2), (cgroups / "unified", 2), (cgroups / "memory", 1)):
        if root.is_dir():
            folder = root / own.get(version, "/").lstrip("/")
            # In a container the path may be the host's, and its root this group's.
            while folder != root and root in folder.parents:
                if folder.is_dir():
                    yield folder, version
                folder = folder.parent
            yield root, version
