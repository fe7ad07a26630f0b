"""Read the memory limit of this machine, container or job, and how many processes the kernel has killed for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_PROC = Path("/proc")


def memory_limit(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int | None:
    """Bytes of memory that the processes of this job may use together; None if unknown.

    The minimum of the machine's memory and of the limits of this process's control groups, version 1 and 2, up to their
    root: a scheduler sets the limit at a job's group, and this process may be in a group further down.
    """
    found = []
    with contextlib.suppress(OSError, ValueError):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for folder, version in _groups(cgroups, proc):
        name = "memory.max" if version == 2 else "memory.limit_in_bytes"
        with contextlib.suppress(OSError, ValueError):  # "max" means no limit
            found.append(int((folder / name).read_text(encoding="ascii")))
    return min(found, default=None)


def memory_kills(*, cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int | None:
    """Number of processes that the kernel has killed so far in this process's control group for lack of memory.

    For the whole machine if the group does not count; None if unknown.
    """
    for folder, version in _groups(cgroups, proc):
        found = _entry(folder / ("memory.events" if version == 2 else "memory.oom_control"), "oom_kill")
        if found is not None:
            return found
    return _entry(proc / "vmstat", "oom_kill")


def _entry(file: Path, name: str) -> int | None:
    """The number after a name, in a file of such lines; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        for line in file.read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return None


def _groups(cgroups: Path, proc: Path) -> Iterator[tuple[Path, int]]:
    """(folder, version) of the memory control groups that hold for this process, from its own up to the root."""
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
            # In a container the path may be the host's, and the container's root may be this group.
            while folder != root and root in folder.parents:
                if folder.is_dir():
                    yield folder, version
                folder = folder.parent
            yield root, version
