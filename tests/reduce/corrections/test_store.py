"""Rows by shard: every shard gets its own back, in their order, from a disk and from an object store."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from owlsam_ray.reduce.corrections.store import ShardRows, read_rows

SCHEMA = pa.schema([pa.field("number", pa.int64()), pa.field("text", pa.binary())])


@pytest.mark.parametrize("root", ["disk", "memory://rows"])
def test_each_shard_reads_its_own_rows(tmp_path: Path, root: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    for round_ in range(6):
        total = choose.choice([0, 1, 50, 9000])
        shards = np.array([choose.randrange(40) * 1000 for _ in range(total)], np.int64)
        rows = [{"number": number, "text": choose.choice([None, b"", b"x" * 40])} for number in range(total)]
        base = str(tmp_path) if root == "disk" else f"{root}-{seed}"
        store = ShardRows(f"{base}/{round_}.arrow", SCHEMA)
        with store.spool() as add:
            start = 0
            while start < total:
                size = choose.choice([1, 7, 5000])
                add(shards[start : start + size], pa.Table.from_pylist(rows[start : start + size], SCHEMA))
                start += size
        for shard in [*range(0, 40_000, 1000), 3, -1]:
            own = [rows[place] for place in np.flatnonzero(shards == shard)]
            found = read_rows(store.url, shard)
            assert (found.to_pylist() if found is not None else []) == own
