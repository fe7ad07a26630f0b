"""Render shards in parallel: each chunk of shards becomes a few fragment files in a scratch folder.

Fragments are in manifest order. A process holds one shard at a time, so memory does not grow with the run. The outputs
decide what the fragments become.
"""

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa

from owlsam_ray import storage
from owlsam_ray.reduce.decisions import Decisions
from owlsam_ray.reduce.folder import FOLDER_ENTRIES, put_folder
from owlsam_ray.reduce.formats.protocol import FileSpan, Head, Output
from owlsam_ray.reduce.labels import LabelCounts, Overlay, read_labels
from owlsam_ray.run.manifest import Manifest
from owlsam_ray.run.proof import ShardRules

_FOLDER = "tree"
_BLOCK = 2**22


@dataclass(frozen=True, slots=True)
class ReduceJob:
    """What all chunks of a reduce have in common."""

    manifest: Manifest
    rules: ShardRules
    decisions: Decisions
    outputs: tuple[Output, ...]
    scratch: str
    """Folder of the fragments: a path, or a URL that all workers can reach."""
    overlay: Overlay | None = None
    """Reviewers' corrections."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Shards that one worker reads one after the other, all of the same span."""

    job: ReduceJob
    number: int
    span: int
    shards: tuple[int, ...]


@dataclass(slots=True)
class ChunkResult:
    """Counts and sizes of a finished chunk."""

    number: int
    span: int
    num_images: int = 0
    counts: LabelCounts = field(default_factory=LabelCounts)
    sizes: dict[tuple[str, str], int] = field(default_factory=dict)
    """Bytes by (output, section)."""
    num_files: dict[str, int] = field(default_factory=dict)
    """Number of files by output, for outputs with one file for each image."""
    format_counts: dict[str, Counter[str]] = field(default_factory=dict)
    """Each output's own counts, by output."""


def write_chunk(chunk: Chunk) -> ChunkResult:
    """Prove, decide and render the shards of a chunk, and write the fragments to the scratch folder.

    Raises:
        IncompleteError: a shard cannot be trusted.
        OSError: storage refused.
    """
    pa.set_cpu_count(1)  # each worker has a core of its own, and threads would only add memory
    job = chunk.job
    result = ChunkResult(chunk.number, chunk.span)
    with ExitStack() as stack:
        files: dict[tuple[str, str], IO[bytes]] = {}
        for shard in chunk.shards:
            labels = read_labels(job.manifest, shard, job.rules, job.decisions, job.overlay)
            result.num_images += labels.images.num_rows
            result.counts.add(labels.counts)
            for output in job.outputs:
                rendered = output.render(labels)
                result.format_counts.setdefault(output.name, Counter()).update(rendered.counts)
                for section, data in rendered.sections.items():
                    key = (output.name, section)
                    if key not in files:
                        files[key] = stack.enter_context(_create(_fragment(job.scratch, key, chunk.number)))
                        result.sizes[key] = 0
                    files[key].write(data)
                    result.sizes[key] += len(data)
                for path, data in rendered.files.items():
                    with _create(storage.join(job.scratch, _FOLDER, output.name, path)) as file:
                        file.write(data)
                result.num_files[output.name] = result.num_files.get(output.name, 0) + len(rendered.files)
    return result


def _fragment(scratch: str, key: tuple[str, str], number: int) -> str:
    return storage.join(scratch, f"{key[0]}.{key[1]}.{number:08d}")


def _create(url: str) -> AbstractContextManager[IO[bytes]]:
    """Open a scratch file for writing. It is read only after its writer has ended: no rename, no sync."""
    if "://" in url:
        return storage.open_atomic(url)
    os.makedirs(os.path.dirname(url), exist_ok=True)
    return open(url, "wb")


def _open(url: str) -> AbstractContextManager[IO[bytes]]:
    return storage.open_input(url) if "://" in url else open(url, "rb")


class Fragments:
    """The fragments of one output, as `outputs.Parts`."""

    def __init__(
        self,
        job: ReduceJob,
        output: str,
        out_url: str,
        head: Head,
        spans: tuple[FileSpan, ...],
        chunks: Sequence[ChunkResult],
    ) -> None:
        self.head, self.spans = head, spans
        self._job, self._output, self._out_url = job, output, out_url
        self._chunks: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        """By section: (span, bytes, URL) of each fragment, in manifest order."""
        for chunk in sorted(chunks, key=lambda each: each.number):
            for (name, section), size in chunk.sizes.items():
                if name == output and size:
                    place = _fragment(job.scratch, (name, section), chunk.number)
                    self._chunks[section].append((chunk.span, size, place))
        self._num_files = sum(chunk.num_files.get(output, 0) for chunk in chunks)

    def size(self, section: str, span: FileSpan | None = None) -> int:
        """Bytes of a section."""
        return sum(size for size, _ in self._of(section, span))

    def copy(self, section: str, out: IO[bytes], span: FileSpan | None = None, *, without_last: int = 0) -> None:
        """Write a section to a file, without its last bytes."""
        left = self.size(section, span) - without_last
        for size, place in self._of(section, span):
            wanted = min(size, left)
            left -= wanted
            with _open(place) as file:
                wanted -= _copy_in_kernel(file, out, wanted)
                while wanted > 0:
                    block = file.read(min(_BLOCK, wanted))
                    if not block:
                        raise OSError(f"{place} is shorter than what was written there")
                    out.write(block)
                    wanted -= len(block)

    def read(self, section: str, shown: Callable[[IO[bytes]], None], span: FileSpan | None = None) -> None:
        """Open each fragment of a section in turn and pass it to a function."""
        for _, place in self._of(section, span):
            with _open(place) as file:
                shown(file)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file of the output directory, which appears complete or not at all."""
        with storage.open_stream(storage.join(self._out_url, name)) as file:
            yield file

    def install_folder(self, name: str, more: dict[str, bytes]) -> int:
        """Install the rendered files, then those of `more`, in a folder of the output directory; return how many.

        Other names in the folder stay. The last entry of `more` marks the rest as complete: its earlier version is
        removed first. On a local disk each folder of files appears at once and replaces the earlier one; on an object
        store, where nothing can be renamed, the files are copied one by one.
        """
        source, target = storage.join(self._job.scratch, _FOLDER, self._output), storage.join(self._out_url, name)
        for entry in reversed(FOLDER_ENTRIES[1:]):
            storage.remove(storage.join(target, entry))
        if "://" in target or "://" in source:
            for path, _ in storage.walk_files(source):
                storage.write_atomic(storage.join(target, path), storage.read_bytes(storage.join(source, path)))
        else:
            os.makedirs(target, exist_ok=True)
            put_folder(os.path.join(source, FOLDER_ENTRIES[0]), os.path.join(target, FOLDER_ENTRIES[0]))
        for path, data in more.items():
            storage.write_atomic(storage.join(target, path), data)
        return self._num_files + len(more)

    def _of(self, section: str, span: FileSpan | None) -> list[tuple[int, str]]:
        return [(size, place) for number, size, place in self._chunks[section] if span is None or number == span.number]


def _copy_in_kernel(source: IO[bytes], out: IO[bytes], wanted: int) -> int:
    """Copy between two local files inside the kernel; return how many bytes could be copied this way."""
    copied = 0
    with contextlib.suppress(OSError, AttributeError, ValueError):  # not files, two file systems, or an old kernel
        out.flush()
        ends = source.fileno(), out.fileno()
        while copied < wanted:
            step = os.copy_file_range(*ends, wanted - copied)
            if step == 0:
                break
            copied += step
        out.seek(0, os.SEEK_END)
    return copied
