"""Define output formats: a shard's labels are rendered to bytes in any process, and assembled to files in one."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.labels import LabelCounts, ShardLabels

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Rendered:
    """One output's part of a shard."""

    sections: dict[str, Bytes] = field(default_factory=dict)
    """Sections by name. Those of all shards of a file are joined in manifest order, for any number of workers."""
    files: dict[str, Bytes] = field(default_factory=dict)
    """Files by path relative to the output's folder. Each image is in one shard, so each path comes from one shard.
    Only for formats with a file for each image: the whole folder appears at once."""
    counts: dict[str, int] = field(default_factory=dict)
    """Counts of what the format itself left out, added or lost in this shard; they add up over the shards."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """The shards of one file of an output that is split into several files."""

    number: int
    count: int
    """Number of files."""
    first_shard: int
    num_shards: int

    def name(self, stem: str, suffix: str) -> str:
        """Return `annotations.json`, or with several files `annotations-00000-of-00008.json`."""
        return f"{stem}{suffix}" if self.count == 1 else f"{stem}-{self.number:05d}-of-{self.count:05d}{suffix}"


@dataclass(frozen=True, slots=True)
class Head:
    """What is known once all shards are counted."""

    info: dict[str, Any]
    """The source's info, with `owlsam_ray`: provenance, settings and proof; no time and no host."""
    licenses: list[Any]
    categories: tuple[Category, ...]
    counts: LabelCounts
    format_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Each output's own counts, by output; without outputs that count nothing."""

    def info_of(self, output: str) -> dict[str, Any]:
        """Return `info` with this output's own counts in the proof; files do not depend on other outputs."""
        counts = self.format_counts.get(output)
        if not counts:
            return self.info
        own = self.info["owlsam_ray"]
        return self.info | {"owlsam_ray": own | {"proof": own.get("proof", {}) | {output: counts}}}


class Parts(Protocol):
    """Access to what was rendered, when all shards are done."""

    head: Head
    spans: tuple[FileSpan, ...]

    def size(self, section: str, span: FileSpan | None = None) -> int:
        """Bytes of a section of this output, in one span or in all."""

    def copy(self, section: str, out: IO[bytes], span: FileSpan | None = None, *, without_last: int = 0) -> None:
        """Write a section to a file, except its last `without_last` bytes."""

    def read(self, section: str, shown: Callable[[IO[bytes]], None], span: FileSpan | None = None) -> None:
        """Open each fragment of a section in turn, in manifest order, and pass it to a function."""

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """Open a file of the output directory, which appears complete or not at all."""

    def install_folder(self, name: str, more: dict[str, bytes]) -> int:
        """Install all `files` of this output, then those of `more`, in a folder of the output directory; how many."""


class Output(Protocol):
    """A format. Sent to other processes, so it holds settings only."""

    @property
    def name(self) -> str:
        """Name in `reduce.formats`."""

    def render(self, labels: ShardLabels) -> Rendered:
        """Render a shard; called once for each, in any process, in any order."""

    def assemble(self, parts: Parts) -> list[str]:
        """Write the files; called once, in the main process; returns the names of the files and folders."""
