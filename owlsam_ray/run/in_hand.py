"""Breadcrumbs: which shards were in whose hands when a process died.

While an actor works on a shard there is a small file of its own for the two under `RUN/attempts/in-hand/`. It is
removed at the end of the work, but not when the process dies. So a marker of another process is a strike against the
shard: something in it may have killed that process, or the process was killed from outside. With `MAX_DEATHS` of them
the shard is given to isolation (`isolate.py`), which finds out.
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
from owlsam_ray.run.attempts import ATTEMPTS

IN_HAND = "in-hand"
MAX_DEATHS = 2
"""From here on a shard is redone by itself. One strike can be bad luck: the shards of a machine that went away."""
_NAME = re.compile(r"shard-(\d+)\.(.+)\.json")
_log = logging.getLogger(__name__)


class InHandMarker(BaseModel):
    """A shard in the hand of a process."""

    model_config = ConfigDict(extra="ignore")

    shard: int
    worker: str
    attempt: str
    host: str
    notes: str | None = None
    """Path on that host of a file that tells which images were being worked on."""
    image_ids: tuple[int, ...] = ()
    """Images that the process itself found to hang, or to take too much memory, before it ended itself."""
    reason: str | None = None
    """What it found."""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"shard-{self.shard:08d}.{self.worker}.json"


def new_worker_name() -> str:
    """A name for this process that no other has."""
    return f"{re.sub(r'[^A-Za-z0-9-]', '_', socket.gethostname())[:64]}-{secrets.token_hex(6)}"


def _folder(run_url: str) -> str:
    return storage.join(run_url, ATTEMPTS, IN_HAND)


def write(run_url: str, marker: InHandMarker) -> None:
    """Write a marker, over an earlier one of the same worker."""
    storage.write_atomic(
        storage.join(_folder(run_url), marker.name), json.dumps(marker.model_dump(mode="json")).encode()
    )


@contextlib.contextmanager
def held(run_url: str, marker: InHandMarker) -> Iterator[None]:
    """Keep a marker while a shard is worked on.

    An error that nobody expected leaves it behind, as a death does: an image may have caused it.

    Raises:
        OSError: storage refused.
    """
    write(run_url, marker)
    try:
        yield
    except (OwlsamError, OSError):  # no matter of the images
        storage.remove(storage.join(_folder(run_url), marker.name))
        raise
    storage.remove(storage.join(_folder(run_url), marker.name))


def list_markers(run_url: str) -> dict[int, list[str]]:
    """Names of the markers of each shard that has any: one listing."""
    found: dict[int, list[str]] = defaultdict(list)
    for name in storage.list_names(_folder(run_url)):
        match = _NAME.fullmatch(name)
        if match is not None:
            found[int(match[1])].append(name)
    return dict(found)


def deaths(markers: Mapping[int, Sequence[str]]) -> dict[int, int]:
    """How many processes died, or live, with each shard in their hands."""
    return {shard: len(names) for shard, names in markers.items()}


def suspects(run_url: str, names: Sequence[str]) -> frozenset[int]:
    """Image ids that the markers of a shard, and the notes on this host that they name, hold against images."""
    # Imported here: the driver asks for strikes only.
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
    """Remove the markers of an attempt that ended its processes itself, but those that tell why one had to end."""
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
    """Remove the markers of shards that are done, or that were given back in an orderly way."""
    for shard, names in list_markers(run_url).items():
        if shard in shards:
            for name in names:
                url = storage.join(_folder(run_url), name)
                _remove_notes(url)
                storage.remove(url)


def _remove_notes(url: str) -> None:
    """Remove the file on this host that a marker names: its process is dead, or has begun another one."""
    from owlsam_ray.parallel.work_slots import SLOT_FILES

    try:
        marker = InHandMarker.model_validate_json(storage.read_bytes(url))
    except (FileNotFoundError, ValidationError):
        return
    notes = Path(marker.notes) if marker.notes is not None and marker.host == socket.gethostname() else None
    # No other file: the run directory may be somebody else's.
    if notes is not None and notes.name.startswith(SLOT_FILES) and notes.parent == Path(tempfile.gettempdir()):
        with contextlib.suppress(OSError):
            notes.unlink()
