"""The rules over columns tell the same as the rules row by row."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.records import Prediction
from owlsam_ray.run.proof import ShardRules, _is_clean, _problem, prove_shard
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from tests.reduce.formats.test_coco import K, detected

RULES = ShardRules("f", ids_per_image=K, num_labels=2, num_prompts=2, numerics=frozenset({"n"}))
ODD = [None, -1, 0, 1, 2, 5, 6, 7, 8, 48]
ODD_TEXTS = [None, "", "fine", "ok", "empty", "failed", "truncated"]


def rows_of_a_shard(choose: random.Random) -> list[dict[str, Any]]:
    rows = [
        choose.choice(
            [
                detected(image_id, [0.9] * choose.randrange(4), masks=choose.random() < 0.8),
                Prediction(image_id=image_id, failure=("truncated", FailureClass.PERMANENT)),
            ]
        )
        for image_id in range(choose.randrange(6))
    ]
    found: list[dict[str, Any]] = predictions_to_table(rows).to_pylist()
    return found


def spoil(row: dict[str, Any], choose: random.Random) -> str:
    """Change one value of a row; returns which."""
    name = choose.choice(PREDICTION_SCHEMA.names)
    if choose.random() < 0.1 and row["status"] != "failed":
        row |= {"status": "failed", "reason": "truncated", "status_class": "permanent"}
        return "failed with detections"
    if choose.random() < 0.1 and row["rle_counts"]:
        row["rle_counts"] = [None, *row["rle_counts"][1:]]
        return "mask without pixels"
    kind = PREDICTION_SCHEMA.field(name).type
    if name == "image_id":
        return name
    if not pa.types.is_list(kind):
        row[name] = choose.choice(ODD_TEXTS if pa.types.is_string(kind) else ODD)
        row["status"] = row["status"] or "ok"
    elif not row[name] or choose.random() < 0.2:
        row[name] = choose.choice([None, [], [None]])
    else:
        values = list(row[name])
        odd = [None, b"", b"4", b"`1", values[0]] if name == "rle_counts" else ODD
        odd = [*odd, float("nan"), float("inf")] if pa.types.is_floating(kind.value_type) else odd
        values[choose.randrange(len(values))] = choose.choice(odd)
        row[name] = values
    return name


def test_columns_and_rows_agree() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    verdicts: Counter[tuple[str, bool]] = Counter()
    for _ in range(3000):
        rows = rows_of_a_shard(choose)
        spoilt = spoil(choose.choice(rows), choose) if rows and choose.random() < 0.9 else ""
        problems = [_problem(row, RULES) for row in rows]
        table = pa.Table.from_pylist(rows, PREDICTION_SCHEMA)
        assert _is_clean(table, RULES) == (not any(problems)), (rows, problems)
        verdicts[spoilt, not any(problems)] += 1
    assert all(verdicts[name, False] for name in PREDICTION_SCHEMA.names if name != "image_id")
    assert verdicts["failed with detections", False] > 20
    assert verdicts["mask without pixels", False] > 20
    assert verdicts["", True] > 100
    assert verdicts["", False] == 0


def test_large_shards_are_proven_whole(tmp_path: Path) -> None:
    rows = [detected(image_id, [0.9, 0.8]) for image_id in range(200)]
    table = predictions_to_table(rows)

    def write(table: pa.Table, numerics: str = "n") -> None:
        write_shard(str(tmp_path), 0, table, fingerprint="f", numerics=numerics, stage_s={})

    write(table)
    footer, proven = prove_shard(str(tmp_path), 0, range(200), RULES)
    assert proven.equals(table)
    assert footer.counts == {"ok": 200, "empty": 0, "failed": 0}
    entries = table.to_pylist()
    entries[150]["mask_area"] = [6, 7]
    write(pa.Table.from_pylist(entries, PREDICTION_SCHEMA))
    with pytest.raises(IncompleteError, match="image 150: a mask of 6 among 48 pixels"):
        prove_shard(str(tmp_path), 0, range(200), RULES)
    write(table, numerics="other")
    with pytest.raises(IncompleteError, match="no attempt of the run used its numerics other"):
        prove_shard(str(tmp_path), 0, range(200), RULES)


def test_a_shard_without_rows(tmp_path: Path) -> None:
    write_shard(str(tmp_path), 0, PREDICTION_SCHEMA.empty_table(), fingerprint="f", numerics="n", stage_s={})
    assert prove_shard(str(tmp_path), 0, [], RULES)[0].num_rows == 0
