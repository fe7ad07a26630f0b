"""What an output format is: how a shard's labels become bytes, anywhere, and how these become files, in one place."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

from owlsam_ray.config.vocabulary import Category
from owlsam_ray.reduce.labels import LabelCounts, ShardLabels

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Rendered:
    """An output's part of one shard."""

    sections: dict[str, Bytes] = field(default_factory=dict)
    """By name. Those of all shards of a file are joined in manifest order, under any number of workers."""
    files: dict[str, Bytes] = field(default_factory=dict)
    """By path relative to the output's folder; each image in one shard, so each path from one shard. Only for formats
    with a file for each image: they appear as a whole folder."""
    told: dict[str, int] = field(default_factory=dict)
    """What the format itself left out, added or lost in this shard; adds up over the shards."""


@dataclass(frozen=True, slots=True)
class FileSpan:
    """The shards that go into one file of an output that is cut into several."""

    number: int
    count: int
    """Of all such files."""
    first_shard: int
    num_shards: int

    def name(self, stem: str, suffix: str) -> str:
        """`annotations.json`; of several `annotations-00000-of-00008.json`."""
        return f"{stem}{suffix}" if self.count == 1 else f"{stem}-{self.number:05d}-of-{self.count:05d}{suffix}"


@dataclass(frozen=True, slots=True)
class Head:
    """What is known once all shards are counted."""

    info: dict[str, Any]
    """The source's, with `owlsam_ray`: provenance, settings and proof; no time and no host."""
    licenses: list[Any]
    categories: tuple[Category, ...]
    counts: LabelCounts
    told: dict[str, dict[str, int]] = field(default_factory=dict)
    """By output: what these counted themselves; without those that count nothing."""

    def info_of(self, output: str) -> dict[str, Any]:
        """`info` with what this output counted in the proof; a file does not depend on which others are written."""
        told = self.told.get(output)
        if not told:
            return self.info
        own = self.info["owlsam_ray"]
        return self.info | {"owlsam_ray": own | {"proof": own.get("proof", {}) | {output: told}}}


class Parts(Protocol):
    """Where an output finds what was rendered, when all shards are done."""

    head: Head
    spans: tuple[FileSpan, ...]

    def size(self, section: str, span: FileSpan | None = None) -> int:
        """Bytes of a section of this output, in one span or in all."""

    def copy(self, section: str, out: IO[bytes], span: FileSpan | None = None, *, without_last: int = 0) -> None:
        """Write a section to a file, without its last bytes."""

    def read(self, section: str, shown: Callable[[IO[bytes]], None], span: FileSpan | None = None) -> None:
        """Call a function with each fragment of a section, opened, in manifest order."""

    def open(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A file of the output directory, which appears whole or not at all."""

    def install_folder(self, name: str, more: dict[str, bytes]) -> int:
        """Put all `files` of this output, and then some more, into this folder of the output directory; how many."""


class Output(Protocol):
    """A format. Goes to other processes, so it holds settings only."""

    @property
    def name(self) -> str:
        """As in `reduce.formats`."""

    def render(self, labels: ShardLabels) -> Rendered:
        """Called for each shard, in any process, in any order."""

    def assemble(self, parts: Parts) -> list[str]:
        """Called once, in the process that reduces; returns the names of the files and folders that it made."""
