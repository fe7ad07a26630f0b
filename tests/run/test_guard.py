"""The three hashes of law 3: what is refused, what may change, and how it is named."""

import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray.config.base import Section
from owlsam_ray.config.run import FREE_FIELDS, NON_LABEL_FIELDS, RunConfig
from owlsam_ray.errors import ConfigError, GuardError, IncompleteError, InputError
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.plan.plan import Plan, plan_run
from owlsam_ray.run.guard import (
    check_writable,
    fingerprint_parts,
    guard_labels,
    guard_numerics,
    numerics_of,
)
from owlsam_ray.run.paths import QUERY_FILE
from owlsam_ray.run.record import canonical_hash, load_record, run_directory
from owlsam_ray.run.run import Run, open_run
from tests.drawn_images import draw_coco


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    draw_coco(tmp_path / "data", 20)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").write_bytes(b"detector")
    (tmp_path / "sam.pt").write_bytes(b"segmenter")
    return RunConfig.model_validate(
        {
            "run": str(tmp_path / "run"),
            "data": {
                "source": "coco",
                "images": str(tmp_path / "data" / "images"),
                "annotations": str(tmp_path / "data" / "instances.json"),
            },
            "detector": {"weights": str(tmp_path / "weights")},
            "segment": {"weights": str(tmp_path / "sam.pt")},
        }
    )


def planned(config: RunConfig) -> Run:
    run = plan_run(config).run
    (Path(run.url) / QUERY_FILE).write_bytes(b"queries")
    return run


def parts_of(run: Run) -> dict[str, Any]:
    weights = {"detector": Path(run.config.detector.weights), "segmenter": Path(run.config.segment.weights)}
    return fingerprint_parts(run, weights=weights)


def leaves(section: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from leaves(kind, (*prefix, name))
        else:
            yield (*prefix, name)


def changed(config: RunConfig, path: tuple[str, ...]) -> RunConfig:
    """The config with another value in one field, unvalidated: only the hash is asked."""
    if len(path) == 1:
        value = getattr(config, path[0])
        other = {bool: lambda: not value, int: lambda: value + 1, float: lambda: value + 0.01}.get(type(value))
        return config.model_copy(update={path[0]: other() if other else f"other than {value}"})
    section = changed(getattr(config, path[0]), path[1:])
    return config.model_copy(update={path[0]: section})


def test_every_field_is_in_the_fingerprint_or_on_the_list(config: RunConfig) -> None:
    run = planned(config)
    before = canonical_hash(parts_of(run))
    walked = 0
    for path in leaves(RunConfig):
        weights = {"detector": Path(config.detector.weights), "segmenter": Path(config.segment.weights)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydantic's, at values that it would not have let in
            after = canonical_hash(fingerprint_parts(replace(run, config=changed(config, path)), weights=weights))
        assert (after == before) == (path[0] in NON_LABEL_FIELDS), path
        walked += 1
    assert walked > 40
    free = {"run", "plan", "storage", "resources", "fakes", "reduce", "evaluate", "report", "logging"}
    assert free >= FREE_FIELDS
    assert free | {"data"} >= NON_LABEL_FIELDS


@pytest.mark.parametrize("what", ["detector weights", "segmenter weights", "embeddings", "queries", "categories"])
def test_what_else_is_in_the_fingerprint(config: RunConfig, tmp_path: Path, what: str) -> None:
    run = planned(config)
    record, before = run.record, parts_of(run)
    if what == "detector weights":
        (tmp_path / "weights" / "model.safetensors").write_bytes(b"other")
    elif what == "segmenter weights":
        (tmp_path / "sam.pt").write_bytes(b"other")
    elif what == "embeddings":
        (tmp_path / "run" / QUERY_FILE).write_bytes(b"other")
    elif what == "queries":
        record = record.model_copy(update={"queries": record.queries[1:]})
    else:
        record = record.model_copy(update={"categories": record.categories[:1]})
    guarded = guard_labels(planned(config), before)
    assert guarded.record.fingerprint == canonical_hash(before)
    assert load_record(run.url) == guarded.record
    (tmp_path / "run" / QUERY_FILE).write_bytes(b"other" if what == "embeddings" else b"queries")
    with pytest.raises(GuardError, match="were made with other weights or settings") as caught:
        guard_labels(guarded, parts_of(replace(run, record=record)))
    assert {
        "detector weights": "weights.detector",
        "segmenter weights": "weights.segmenter",
        "embeddings": "query_embeddings",
    }.get(what, what) in str(caught.value)
    assert guard_labels(guarded, before) == guarded


def test_lost_queries_are_told(config: RunConfig, tmp_path: Path) -> None:
    run = planned(config)
    (tmp_path / "run" / QUERY_FILE).unlink()
    with pytest.raises(IncompleteError, match=r"query_embeddings\.safetensors is missing"):
        parts_of(run)


def test_a_plan_is_kept_and_a_changed_config_refused(config: RunConfig) -> None:
    plan = plan_run(config)
    assert (plan.new, plan.listed) == (plan.run.manifest.num_images, plan.run.manifest.num_images)
    assert plan_run(config) == Plan(plan.run, 0)
    free = config.model_copy(update={"resources": config.resources.model_copy(update={"shard_size": 3})})
    assert plan_run(free).run.manifest == plan.run.manifest
    other = config.model_copy(
        update={"detector": config.detector.model_copy(update={"score_floor": 0.5, "labels": "best"})}
    )
    with pytest.raises(GuardError) as caught:
        plan_run(other)
    assert "detector.labels: 'multi' -> 'best'" in str(caught.value)
    assert "detector.score_floor: 0.05 -> 0.5" in str(caught.value)
    assert "may change freely: plan, storage, resources, reduce, evaluate, logging" in str(caught.value)


def test_a_changed_layout_is_refused(config: RunConfig, tmp_path: Path) -> None:
    plan_run(config)
    tree = json.loads((tmp_path / "run" / "manifest" / "part-0000.json").read_text())
    changed = {"shard_size": 4, "num_shards": -(-tree["num_rows"] // 4)}
    (tmp_path / "run" / "manifest" / "part-0000.json").write_text(json.dumps(tree | changed))
    with pytest.raises(GuardError, match="has the layout hash"):
        plan_run(config)


def test_a_half_written_plan_is_made_again(config: RunConfig, tmp_path: Path) -> None:
    plan = plan_run(config)
    (tmp_path / "run" / "run.json").unlink()
    assert plan_run(config) == plan


def test_predictions_without_a_record_are_left_alone(config: RunConfig, tmp_path: Path) -> None:
    plan_run(config)
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "predictions").mkdir()
    (tmp_path / "run" / "predictions" / "shard-00000000.parquet").write_bytes(b"")
    with pytest.raises(GuardError, match=r"holds predictions but no run\.json"):
        plan_run(config)


def test_a_damaged_record_is_named(config: RunConfig, tmp_path: Path) -> None:
    assert load_record(str(tmp_path / "run")) is None
    plan_run(config)
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(GuardError, match=r"run\.json is damaged"):
        load_record(str(tmp_path / "run"))


def test_numerics(config: RunConfig) -> None:
    run = planned(config)
    one, other = (
        numerics_of(
            allocate(config.resources.model_copy(update={"detector_batch": batch}), num_cpus=2, num_gpus=0), "fp32"
        )
        for batch in (4, 7)
    )
    assert {"device", "dtype", "detector_batch", "torch", "transformers", "torch_threads"} <= set(one)
    run = guard_numerics(run, one, allow_change=False)
    first = run.record.numerics_id
    assert guard_numerics(run, one, allow_change=False) == run
    with pytest.raises(GuardError, match=r"detector_batch: 4 -> 7") as caught:
        guard_numerics(run, other, allow_change=False)
    assert "--allow-numerics-change" in str(caught.value)
    run = guard_numerics(run, other, allow_change=True)
    assert run.record.numerics == (one, other)
    assert run.record.numerics_id != first
    assert load_record(run.url) == run.record


def test_attempts_that_begin_together_do_not_forget_each_others_numerics(config: RunConfig) -> None:
    planned(config)
    one, two = open_run(config), open_run(config)
    assert one is not None
    assert two is not None
    guard_numerics(one, {"device": "cuda"}, allow_change=False)
    with pytest.raises(GuardError, match="device: 'cuda' -> 'cpu'"):
        guard_numerics(two, {"device": "cpu"}, allow_change=False)
    both = guard_numerics(two, {"device": "cpu"}, allow_change=True)
    assert both.record.numerics == ({"device": "cuda"}, {"device": "cpu"})
    assert load_record(both.url) == both.record


def test_numerics_do_not_depend_on_the_number_of_actors(config: RunConfig) -> None:
    one, two = (
        numerics_of(allocate(config.resources.model_copy(update={"actors": actors}), num_cpus=2, num_gpus=0), "fp32")
        for actors in (1, 2)
    )
    assert one == two


def test_no_run_directory(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="--run DIR"):
        run_directory(config.model_copy(update={"run": None}))


@pytest.mark.parametrize("run", ["/proc/nothing/here", "/dev/null/run"])
def test_an_unwritable_directory_is_named(run: str) -> None:
    with pytest.raises(InputError, match=f"cannot write to the run directory {run}"):
        check_writable(run)
