"""Store rows by shard in one file, from which any process can read a shard's rows."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from owlsam_ray import storage

_BATCH = 4096
_INDEX = ".index"


@dataclass(frozen=True, slots=True)
class ShardRows:
    """A file to be written: Arrow, with one record batch for each shard that has rows, and an index."""

    url: str
    schema: pa.Schema

    @contextlib.contextmanager
    def spool(self) -> Iterator[Callable[[NDArray[np.int64], pa.Table], None]]:
        """Yield a function that takes (N,) shards and N rows, in any order; the file exists on exit.

        Rows are kept in a local temporary file, so memory does not grow with them. The rows of a shard keep their
        order.
        """
        with tempfile.TemporaryDirectory(prefix="owlsam-rows-") as folder:
            path = os.path.join(folder, "rows.arrow")
            shards, places = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
            with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, self.schema) as writer:
                number = 0

                def add(own: NDArray[np.int64], table: pa.Table) -> None:
                    nonlocal number
                    for batch in table.combine_chunks().to_batches(max_chunksize=_BATCH):
                        writer.write_batch(batch)
                        rows = np.arange(batch.num_rows)
                        places.append(np.stack([np.full(batch.num_rows, number), rows], axis=1))
                        number += 1
                    shards.append(own)

                yield add
            self._write_sorted(path, np.concatenate(shards), np.concatenate(places))

    def _write_sorted(self, path: str, shards: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        order = np.argsort(shards, kind="stable")
        shards, places = shards[order], places[order]
        starts = np.flatnonzero(np.diff(shards, prepend=-1))
        ends = np.append(starts[1:], len(shards))[: len(starts)]
        with (
            pa.memory_map(path) as source,
            pa.ipc.open_file(source) as reader,
            storage.open_atomic(self.url) as sink,
            pa.ipc.new_file(sink, self.schema) as writer,
        ):
            for start, end in zip(starts, ends, strict=True):
                own = places[start:end]
                pieces = [
                    reader.get_batch(int(number)).take(pa.array(own[own[:, 0] == number, 1]))
                    for number in np.unique(own[:, 0])
                ]
                (batch,) = pa.Table.from_batches(pieces, self.schema).combine_chunks().to_batches()
                writer.write_batch(batch)
        storage.write_atomic(self.url + _INDEX, shards[starts].astype("<i8").tobytes())


def read_rows(url: str, shard: int) -> pa.RecordBatch | None:
    """Read the rows of one shard; None: it has none.

    Raises:
        OSError: storage gave up.
    """
    reader, shards = _open(url)
    place = int(np.searchsorted(shards, shard))
    return reader.get_batch(place) if place < len(shards) and shards[place] == shard else None


@lru_cache(maxsize=1)
def _open(url: str) -> tuple[pa.ipc.RecordBatchFileReader, NDArray[np.int64]]:
    """Open the file once per process. A name is used for one reduce only, so it never means another file."""
    is_local = storage.is_local(storage.open_filesystem(url)[0])
    reader = pa.ipc.open_file(pa.memory_map(url) if is_local else storage.open_input(url))
    return reader, np.frombuffer(storage.read_bytes(url + _INDEX), "<i8")
