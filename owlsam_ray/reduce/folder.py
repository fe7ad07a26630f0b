"""Claim the output directory of a reduce, provide scratch space, and remove only files that owlsam wrote.

Users keep other files there, sometimes by accident: only names that no other tool gives are deleted.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Collection, Iterator

import msgspec

from owlsam_ray import storage
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import InputError
from owlsam_ray.run.attempts import SETUP, Attempt, Slice, live_attempts, process_name, safe_file_name
from owlsam_ray.run.claim import claim
from owlsam_ray.run.paths import ATTEMPTS, DAMAGED, MANIFEST, PREDICTIONS, RUN_FILE

SUMMARY_FILE, UNFINISHED_FILE = "reduce.json", "reduce.unfinished"
_OF_A_RUN = (MANIFEST, PREDICTIONS, ATTEMPTS, DAMAGED)
_SCRATCH = "owlsam-fragments-"
_IS_SCRATCH = re.compile(rf"{_SCRATCH}[0-9a-f]{{8}}")
_IS_TEMPORARY = re.compile(r"\.tmp-.+-[0-9a-f]{32}")
_IS_ATTEMPT = re.compile(r"\d{8}T\d{6}Z-.+-\d+-[0-9a-f]{6}-setup(\.ended\.json|\.fenced|\.stop)")
_IS_HALF_ATTEMPT = re.compile(r"\.tmp-\d{8}T\d{6}Z-(.+)-(\d+)-[0-9a-f]{6}-setup\.[a-z.]+-[0-9a-f]{32}")
_IS_OURS = re.compile(
    r"(annotations|lvis|label_studio)(-\d{5,}-of-\d{5,})?\.json|failures\.jsonl|results\.json|corrections_report\.json"
    r"|label_studio_config\.xml|(annotations|images)\.parquet|yolo(_segment)?"
)
FOLDER_ENTRIES = ("labels", "train.txt", "renamed.jsonl", "data.yaml")
"""Entries of a YOLO folder that owlsam writes; users put their images beside them."""


@contextlib.contextmanager
def claimed_folder(config: RunConfig, out_url: str) -> Iterator[tuple[Attempt, str]]:
    """Claim a directory for writing; yield the attempt and a scratch folder for the fragments, removed on exit.

    Raises:
        InputError: the directory cannot be written, or is a run directory.
        AttemptLiveError: another call writes there.
    """
    _check_place(out_url)
    try:
        storage.try_writing(out_url)
    except OSError as error:
        raise InputError(
            f"cannot write to {out_url}: {error.strerror or error}. Free space or fix its permissions, or choose "
            "another directory with --out."
        ) from None
    try:
        with (
            claim(
                out_url,
                scope=SETUP,
                part=Slice(),
                heartbeat_s=config.resources.heartbeat_s,
                takeover_s=config.resources.takeover_s,
            ) as attempt,
            _scratch(config, out_url) as scratch,
        ):
            yield attempt, scratch
    finally:
        with contextlib.suppress(OSError):
            _forget_attempts(out_url)


def _place_of(out_url: str) -> str:
    return os.path.realpath(out_url) if "://" not in out_url else out_url.rstrip("/")


def _check_place(out_url: str) -> None:
    """Refuse to write where a run keeps its own files.

    Raises:
        InputError: names the run.
    """
    place = _place_of(out_url)
    if storage.exists(storage.join(place, RUN_FILE)):
        raise InputError(f"{out_url} is a run directory: write to a folder in it, or elsewhere")
    folder = place
    while name := folder.rpartition("/")[2]:
        folder = folder.rpartition("/")[0]
        if name in _OF_A_RUN and storage.exists(storage.join(folder or "/", RUN_FILE)):
            raise InputError(
                f"{out_url} is in {name}/ of the run {folder}, which holds only the run's own files: choose another "
                "directory with --out"
            )


def check_inputs(config: RunConfig, out_url: str) -> None:
    """Refuse to overwrite an input file.

    Raises:
        InputError: names the file.
    """
    read = {
        "reduce.corrections": config.reduce.corrections,
        "reduce.corrections_base": config.reduce.corrections_base,
        "reduce.operating_points": config.reduce.operating_points,
        "data.annotations": config.data.annotations,
        "evaluate.ground_truth": config.evaluate.ground_truth,
    }
    place = _place_of(out_url)
    for setting, url in read.items():
        if url is None:
            continue
        folder, _, name = (os.path.realpath(url) if "://" not in url else url).rpartition("/")
        if folder == place and (_IS_OURS.fullmatch(name) or name == SUMMARY_FILE):
            raise InputError(
                f"{url} ({setting}) is in the output directory, under a name that reduce itself writes: move it "
                "elsewhere, or choose another directory with --out"
            )


def check_foreign(out_url: str, names: Collection[str]) -> None:
    """Refuse to overwrite files that no reduce has written.

    Args:
        out_url: the directory.
        names: files and folders that will be written.

    Raises:
        InputError: names the first of them that exists.
    """
    if storage.exists(storage.join(out_url, UNFINISHED_FILE)):
        return
    there = set(storage.list_names(out_url))
    for name in sorted(there & set(names) - (_listed(out_url) or set())):
        entries = storage.list_names(storage.join(out_url, name)) if name.startswith("yolo") else [name]
        if set(entries) & {*FOLDER_ENTRIES, name}:
            raise InputError(
                f"{out_url} holds {name}, which reduce did not write: move it, or choose another directory with --out"
            )


def _forget_attempts(out_url: str) -> None:
    """Remove dead claims, and the attempts folder if nothing else is in it: it is not a place to look for history.

    A live claim is never removed: one that exists by now belongs to another call.
    """
    if live_attempts(out_url):
        return
    folder = storage.join(out_url, ATTEMPTS)
    for name in storage.list_names(folder):
        if _IS_ATTEMPT.fullmatch(name):
            storage.remove(storage.join(folder, name))
    if "://" not in folder:
        for name in storage.temporary_files(folder):
            if _is_of_a_killed_call(name):
                os.unlink(os.path.join(folder, name))
        os.rmdir(folder)


def _is_of_a_killed_call(name: str) -> bool:
    """Whether a call on this machine was killed while it wrote this claim."""
    half = _IS_HALF_ATTEMPT.fullmatch(name)
    return half is not None and half[1] == safe_file_name(socket.gethostname()) and not process_name(int(half[2]))


@contextlib.contextmanager
def _scratch(config: RunConfig, out_url: str) -> Iterator[str]:
    """Yield a folder for the fragments, removed on exit; first remove what killed reduces of this directory left."""
    if "://" not in out_url:
        for name in storage.temporary_files(out_url):  # the claim ensures that no other call writes here
            if _IS_TEMPORARY.fullmatch(name):
                os.unlink(os.path.join(out_url, name))
    root = config.reduce.scratch
    if root is None and "://" in out_url and config.reduce.executor == "local":
        with tempfile.TemporaryDirectory(prefix="owlsam-reduce-") as folder:
            yield folder
        return
    root = plain_url(root or out_url)
    if config.reduce.scratch is None:
        for name in storage.list_names(root):
            if _IS_SCRATCH.fullmatch(name):
                _remove_tree(storage.join(root, name))
    folder = storage.join(root, f"{_SCRATCH}{secrets.token_hex(4)}")
    try:
        yield folder
    finally:
        _remove_tree(folder)


def plain_url(url: str) -> str:
    """Convert a URL of a local file to a path; return other URLs unchanged."""
    filesystem, path = storage.open_filesystem(url)
    return path if storage.is_local(filesystem) else url


def begin_files(out_url: str) -> set[str]:
    """Mark the directory as unfinished; return the files and folders of earlier reduces into it that have our names.

    Until the next reduce completes, there is no `reduce.json` to say which files belong together, but a mark says that
    a reduce has written them.
    """
    before = _listed(out_url) or set()
    mark = storage.join(out_url, UNFINISHED_FILE)
    if storage.exists(mark):
        before |= {name for name in storage.list_names(out_url) if _IS_OURS.fullmatch(name)}
    storage.write_atomic(mark, b"A reduce into this directory did not end: call it again.\n")
    storage.remove(storage.join(out_url, SUMMARY_FILE))
    return before


def end_files(out_url: str, summary: bytes) -> None:
    """Write `reduce.json`, which says that the output is complete, and remove the mark."""
    storage.write_atomic(storage.join(out_url, SUMMARY_FILE), summary)
    storage.remove(storage.join(out_url, UNFINISHED_FILE))


def _listed(out_url: str) -> set[str] | None:
    """Names of ours that `reduce.json` lists; None: there is no such file."""
    try:
        files = msgspec.json.decode(storage.read_bytes(storage.join(out_url, SUMMARY_FILE)))["files"]
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, KeyError, TypeError):
        files = None
    names = files if isinstance(files, list) else []
    return {name for name in names if isinstance(name, str) and _IS_OURS.fullmatch(name)}


def remove_output(out_url: str, name: str) -> None:
    """Delete a file of an earlier reduce, or owlsam's own entries in a folder of one."""
    url = storage.join(out_url, name)
    if not name.startswith("yolo"):
        storage.remove(url)
        return
    for entry in reversed(FOLDER_ENTRIES):
        if entry == "labels":
            _remove_tree(storage.join(url, entry))
        else:
            storage.remove(storage.join(url, entry))
    if "://" not in url:
        with contextlib.suppress(OSError):  # the folder holds other files
            os.rmdir(url)


def put_folder(source: str, target: str) -> None:
    """Replace a local folder with a complete one, by renaming both."""
    around, name = os.path.split(target)
    stale = re.compile(rf"\.tmp-{re.escape(name)}-[0-9a-f]{{32}}(\.old)?")
    for each in os.listdir(around):
        if stale.fullmatch(each):
            _remove_tree(os.path.join(around, each))
    aside = os.path.join(around, f".tmp-{name}-{secrets.token_hex(16)}")
    os.makedirs(source, exist_ok=True)
    shutil.move(source, aside)  # copies if the fragments are on another file system
    old = f"{aside}.old"
    if os.path.lexists(target):
        os.rename(target, old)
    os.rename(aside, target)
    if os.path.lexists(old):
        shutil.rmtree(old, ignore_errors=True)


def _remove_tree(url: str) -> None:
    """Delete a folder of ours and all its contents, if it exists; for a link, only the link."""
    if "://" not in url:
        if os.path.islink(url):
            os.unlink(url)
        else:
            shutil.rmtree(url, ignore_errors=True)
        return
    for path, _ in storage.walk_files(url):
        storage.remove(storage.join(url, path))
