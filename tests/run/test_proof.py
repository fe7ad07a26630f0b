"""Each rule of a shard can fail, without those before it, and the first row that breaks one is named."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from owlsam_ray.errors import FailureClass, IncompleteError
from owlsam_ray.records import Prediction
from owlsam_ray.run.proof import ShardRules, first_problem, prove_shard, rules_of
from owlsam_ray.run.shards import write_shard
from owlsam_ray.schema import PREDICTION_SCHEMA, predictions_to_table
from tests.reduce.formats.test_coco import RLE, K, detected

Row = dict[str, Any]
RULES = ShardRules("f", ids_per_image=K, num_labels=2, num_prompts=2, numerics=frozenset({"n"}))
FAILURE = {"status": "failed", "reason": "truncated", "status_class": "permanent"}


def table_of(rows: list[Row], choose: random.Random) -> pa.Table:
    """The rows in one piece, or in two as a file's row groups are."""
    table = pa.Table.from_pylist(rows, PREDICTION_SCHEMA)
    cut = choose.randrange(len(rows) + 1)
    return choose.choice([table, pa.concat_tables([table.slice(0, cut), table.slice(cut)])])


def good_row(kind: str, choose: random.Random) -> Row:
    if kind == "failed":
        prediction = Prediction(image_id=0, failure=("truncated", FailureClass.PERMANENT))
    else:
        count = 0 if kind == "empty" else choose.randrange(2, 5)
        prediction = detected(0, [0.9] * count, masks=kind == "masked")
    row: Row = predictions_to_table([prediction]).to_pylist()[0]
    if kind == "failed" and choose.random() < 0.5:
        row |= {name: [] for name, value in row.items() if pa.types.is_list(PREDICTION_SCHEMA.field(name).type)}
    return row


def good_rows(choose: random.Random, most: int = 8) -> list[Row]:
    kinds = ("failed", "empty", "masked", "unmasked")
    return [good_row(choose.choice(kinds), choose) for _ in range(choose.randrange(most))]


def with_one(values: list[Any], value: Any, choose: random.Random) -> list[Any]:
    place = choose.randrange(len(values))
    return [*values[:place], value, *values[place + 1 :]]


def not_finite(name: str, choose: random.Random) -> float | None:
    is_float = pa.types.is_floating(PREDICTION_SCHEMA.field(name).type.value_type)
    return choose.choice([None, float("nan"), float("inf"), -float("inf")]) if is_float else None


Break = Callable[[str, random.Random], tuple[str, Callable[[Row], Row]]]
"""Name of a column, if the rule is about one → the kind of a good row, and what breaks the rule in it."""

BREAKS: dict[str, Break] = {
    "unknown status {status}": lambda _, choose: (
        choose.choice(["failed", "empty", "masked"]),
        lambda row: {"status": choose.choice(["fine", "", "OK"])},
    ),
    "failed without a reason": lambda _, choose: (
        "failed",
        lambda row: {choose.choice(["reason", "status_class"]): choose.choice([None, ""])},
    ),
    "failed with detections": lambda _, choose: (
        choose.choice(["masked", "unmasked"]),
        lambda row: FAILURE,
    ),
    "null instead of a list: ": lambda name, choose: (
        choose.choice(["empty", "masked", "unmasked"]),
        lambda row: {name: None},
    ),
    "status ok with 0 detections": lambda _, choose: ("empty", lambda row: {"status": "ok"}),
    "status empty with {count} detections": lambda _, choose: ("masked", lambda row: {"status": "empty"}),
    "its lists differ in length: det_index and ": lambda name, choose: (
        choose.choice(["masked", "unmasked"]),
        lambda row: {name: choose.choice([[], row[name][1:], row[name] * 2])},
    ),
    "null: ": lambda name, choose: (choose.choice(["empty", "masked"]), lambda row: {name: None}),
    "null or not finite: ": lambda name, choose: (
        choose.choice(["masked", "unmasked"]),
        lambda row: {name: with_one(row[name], not_finite(name, choose), choose)},
    ),
    "det_index {indices} is not strictly ascending within 0…{last_index}": lambda _, choose: (
        choose.choice(["masked", "unmasked"]),
        lambda row: {
            "det_index": choose.choice(
                [row["det_index"][::-1], [-1, *row["det_index"][1:]], [*row["det_index"][:-1], K], [1] * len(row["x0"])]
            )
        },
    ),
    "a label outside the {num_labels} categories": lambda _, choose: (
        "unmasked",
        lambda row: {"label": with_one(row["label"], choose.choice([-1, 2]), choose)},
    ),
    "a prompt outside the {num_prompts} queries": lambda _, choose: (
        "unmasked",
        lambda row: {"prompt_id": with_one(row["prompt_id"], choose.choice([-1, 2]), choose)},
    ),
    "no mask, but a value of ": lambda name, choose: (
        "unmasked",
        lambda row: {name: with_one(row[name], choose.choice([0, 1]), choose)},
    ),
    "a mask with null or not finite ": lambda name, choose: (
        "masked",
        lambda row: {name: with_one(row[name], not_finite(name, choose), choose)},
    ),
    "{rle_counts!r:.40} is not a compressed RLE": lambda _, choose: (
        "masked",
        lambda row: {"rle_counts": with_one(row["rle_counts"], choose.choice([b"\xff", b"`", b"/", b"O"]), choose)},
    ),
    (
        "a mask of {covered} among {pixels} pixels, but the image has {height}x{width} and the stated area is "
        "{mask_area}"
    ): (
        lambda _, choose: (
            "masked",
            lambda row: choose.choice(
                [
                    {"mask_area": with_one(row["mask_area"], 7, choose)},
                    {"rle_counts": with_one(row["rle_counts"], choose.choice([RLE, b"", b"4"]), choose)},
                    {"height": row["width"], "width": row["width"]},
                ]
            ),
        )
    ),
}


def broken(problem: str, choose: random.Random) -> Row:
    """A row that breaks the rule with this problem, and none before it."""
    name = "" if problem in BREAKS else problem.rpartition(" ")[2]
    kind, change = BREAKS[problem.removesuffix(name)](name, choose)
    row = good_row(kind, choose)
    return row | change(row)


PROBLEMS = [rule.problem for rule in rules_of(predictions_to_table([]), RULES)]


def test_rules_are_many_and_differ() -> None:
    assert len(PROBLEMS) == len(set(PROBLEMS)) > 60


@pytest.mark.parametrize("problem", PROBLEMS)
def test_each_rule_can_fail_and_none_before_it(problem: str) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    for _ in range(6):
        rows = good_rows(choose)
        good = table_of(rows, choose)
        assert not any(rule.broken.any() for rule in rules_of(good, RULES))
        assert first_problem(good, RULES) is None
        place = choose.randrange(len(rows) + 1)
        bad = table_of([*rows[:place], broken(problem, choose), *rows[place:]], choose)
        fired = next(rule for rule in rules_of(bad, RULES) if rule.broken.any())
        assert fired.problem == problem
        assert fired.first()[0] == place
        if fired.row_of is not None:
            assert set(fired.row_of[fired.broken]) == {place}
        else:
            assert fired.broken.sum() == 1
        found = first_problem(bad, RULES)
        assert found is not None
        assert found[0] == place
        assert found[1].startswith(problem.partition("{")[0])
        assert "{" not in found[1]


def test_the_first_bad_row_is_named_whatever_its_rule() -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    choose = random.Random(seed)
    for _ in range(40):
        before, after = good_rows(choose), good_rows(choose)
        first = broken(choose.choice(PROBLEMS), choose)
        others = [broken(choose.choice(PROBLEMS), choose) for _ in range(3)]
        found = first_problem(table_of([*before, first, *after, *others], choose), RULES)
        alone = first_problem(table_of([first], choose), RULES)
        assert found is not None
        assert alone is not None
        assert found == (len(before), alone[1])


@pytest.mark.parametrize(
    ("problem", "values", "words"),
    [
        ("unknown status {status}", {"status": "a\x1b" * 200}, r"unknown status 'a\\x1ba\\x1b.*…"),
        (
            "det_index {indices} is not strictly ascending within 0…{last_index}",
            {"det_index": [0, 3, 2]},
            r"det_index \[0, 3, 2\]",
        ),
        ("{rle_counts!r:.40} is not a compressed RLE", {"rle_counts": [b"\xff" * 900]}, r"b'(\\xff){9}\\x is not"),
    ],
)
def test_messages_show_values_cut_and_escaped(problem: str, values: Row, words: str) -> None:
    count = max((len(value) for value in values.values() if isinstance(value, list)), default=1)
    row = predictions_to_table([detected(0, [0.9] * count)]).to_pylist()[0] | values
    found = first_problem(pa.Table.from_pylist([row], PREDICTION_SCHEMA), RULES)
    assert found is not None
    assert len(found[1]) < 200
    assert re.match(words, found[1]), found


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
