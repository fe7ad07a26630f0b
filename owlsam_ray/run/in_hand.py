"""In-hand markers: files that record which process was working on which shard when it died.

While an actor works on a shard, a small file for this pair is under `RUN/attempts/in-hand/`. It is removed when the
work ends, but not when the process dies. A marker left by another process therefore counts against the shard: an image
in it may have killed that process, or the process was killed from outside. After `MAX_DEATHS` of them the shard goes to
isolation (`annotate/isolate.py`), which finds the cause.
"""

import contextlib
import json
import logging
import re
import secrets
import socket
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from owlsam_ray import storage
from owlsam_ray.errors import OwlsamError
from owlsam_ray.run.paths import ATTEMPTS, IN_HAND

MAX_DEATHS = 2
"""Deaths from which a shard is redone in isolation. One can be bad luck, such as a machine that went away."""
_NAME = re.compile(r"shard-(\d+)\.(.+)\.json")
_log = logging.getLogger(__name__)


class InHandMarker(BaseModel):
    """A shard that a process is working on."""

    model_config = ConfigDict(extra="ignore")

    shard: int
    worker: str
    attempt: str
    host: str
    notes: str | None = None
    """Path on that host of a file that lists the images being worked on."""
    image_ids: tuple[int, ...] = ()
    """Images that the process found to hang or to use too much memory before it ended itself."""
    reason: str | None = None
    """What the process found."""

    @property
    def name(self) -> str:
        """Name of the marker's file."""
        return f"shard-{self.shard:08d}.{self.worker}.json"


def new_worker_name() -> str:
    """Unique name for this process."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '_', socket.gethostname())[:64]}-{secrets.token_hex(6)}"


def _folder(run_url: str) -> str:
    return storage.join(run_url, ATTEMPTS, IN_HAND)


def write(run_url: str, marker: InHandMarker) -> None:
    """Write a marker; it replaces an earlier one of the same shard and worker."""
    storage.write_atomic(
        storage.join(_folder(run_url), marker.name), json.dumps(marker.model_dump(mode="json")).encode()
    )


@contextlib.contextmanager
def held(run_url: str, marker: InHandMarker) -> Iterator[None]:
    """Keep a marker while a shard is worked on.

    An unexpected error leaves the marker behind, just like a death: an image may have caused it.

    Raises:
        OSError: storage failed.
    """
    write(run_url, marker)
    try:
        yield
    except (OwlsamError, OSError):  # not caused by the images
        storage.remove(storage.join(_folder(run_url), marker.name))
        raise
    storage.remove(storage.join(_folder(run_url), marker.name))


def list_markers(run_url: str) -> dict[int, list[str]]:
    """Marker names by shard, for shards that have any, from one listing."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in storage.list_names(_folder(run_url)):
        match = _NAME.fullmatch(name)
        if match is not None:
            found[int(match[1])].append(name)
    return dict(found)


def deaths(markers: Mapping[int, Sequence[str]]) -> dict[int, int]:
    """Number of processes, dead or alive, that left a marker for each shard."""
    return {shard: len(names) for shard, names in markers.items()}


def suspects(run_url: str, names: Sequence[str]) -> frozenset[int]:
    """Ids of the images suspected by a shard's markers and by the notes on this host that these name."""
    # Imported here: the driver only counts deaths.
    from owlsam_ray.parallel.work_slots import read_slots

    found: set[int] = set()
    for name in names:
        try:
            marker = InHandMarker.model_validate_json(storage.read_bytes(storage.join(_folder(run_url), name)))
        except (FileNotFoundError, ValidationError):
            continue
        found.update(marker.image_ids)
        if marker.notes is not None and marker.host == socket.gethostname() and Path(marker.notes).is_file():
            for _, image_ids in read_slots(Path(marker.notes)):
                found.update(image_ids)
    return frozenset(found)


def release(run_url: str, attempt: str) -> None:
    """Remove the markers of an attempt that ended its processes itself, except those with a reason."""
    for names in list_markers(run_url).values():
        for name in names:
            url = storage.join(_folder(run_url), name)
            try:
                marker = InHandMarker.model_validate_json(storage.read_bytes(url))
            except (FileNotFoundError, ValidationError):
                continue
            if marker.attempt == attempt and marker.reason is None:
                storage.remove(url)


def clear(run_url: str, shards: Collection[int]) -> None:
    """Remove the markers of shards that are done or were released properly."""
    for shard, names in list_markers(run_url).items():
        if shard in shards:
            for name in names:
                url = storage.join(_folder(run_url), name)
                _remove_notes(url)
                storage.remove(url)


def _remove_notes(url: str) -> None:
    """Remove the notes file on this host that a marker names: its process is dead or uses a new file."""
    from owlsam_ray.parallel.work_slots import SLOT_FILES

    try:
        marker = InHandMarker.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, ValidationError):
        return
    notes = Path(marker.notes) if marker.notes is not None and marker.host == socket.gethostname() else None
    # Only such files: the run directory, and so the path, may be untrusted.
    if notes is not None and notes.name.startswith(SLOT_FILES) and notes.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            notes.unlink()
