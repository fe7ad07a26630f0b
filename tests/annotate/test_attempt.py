"""How an attempt ends, without Ray."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.data

from owlsam_ray.annotate import attempt as annotate
from owlsam_ray.annotate import pipeline
from owlsam_ray.annotate.attempt import AttemptOptions, annotate_run
from owlsam_ray.config.load import load_config
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import FailedImagesError
from owlsam_ray.run.attempts import Slice, ended_attempts
from tests.parallel.test_ray_watch import write_run
from tests.run.test_counts import tally_of
from tests.run.test_shards import write


def config_of(root: Path) -> RunConfig:
    run_file, _, run = write_run(root)
    return load_config([run_file], run=run)


@pytest.mark.parametrize(
    ("options", "failed", "code"),
    [
        (AttemptOptions(judge=True), 4, 1),
        (AttemptOptions(judge=True), 0, 0),
        (AttemptOptions(judge=True, part=Slice(1, 2)), 4, 0),  # no share of the run's
        (AttemptOptions(), 4, 0),
    ],
)
def test_status_tells_the_exit_code_of_the_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: AttemptOptions, failed: int, code: int
) -> None:
    config = config_of(tmp_path)
    run = SimpleNamespace(record=SimpleNamespace(fingerprint="abc" * 20))
    monkeypatch.setattr(annotate, "_set_up", lambda *_: (run, SimpleNamespace()))
    monkeypatch.setattr(annotate, "_annotate", lambda *_: {"images": 60, "failed": failed})
    if code:
        with pytest.raises(FailedImagesError) as caught:
            annotate_run(config, options)
        assert caught.value.args[1]["failed"] == 4
        assert caught.value.args[1]["fingerprint"] == ("abc" * 20)[:16]
    else:
        assert annotate_run(config, options)["failed"] == failed
    (ended,) = ended_attempts(str(config.run))
    assert ended.exit_code == code
    assert (ended.last_error or "").startswith("4 of 60 images failed" if code else "")


def test_an_interrupted_call_counts_what_was_finished_at_the_very_end(tmp_path: Path) -> None:
    tally = tally_of(tmp_path, 9)
    for shard in range(4):
        write(str(tmp_path), shard)
    tally.refresh_listing()
    write(str(tmp_path), 4)  # since the last look
    assert str(annotate._interrupted(tally, "asked to stop")) == (
        "interrupted (asked to stop): 5 of 9 shards are done; run the same command again"
    )


class _Graph:
    """Records what the stages of a graph ask of Ray."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []

    def map_batches(self, function: Any, **options: Any) -> "_Graph":
        self.stages.append(options)
        return self

    def write_datasink(self, sink: Any, **options: Any) -> None:
        self.stages.append(options["ray_remote_args"])


def test_nothing_is_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = _Graph()
    monkeypatch.setattr(ray.data, "from_arrow", lambda _: graph)
    allocation = SimpleNamespace(actors=1, cpus_per_actor=1.0, gpus_per_actor=0.0)
    context: Any = SimpleNamespace(run=SimpleNamespace(config=config_of(tmp_path)), allocation=allocation)
    pipeline.run_wave(context, [0, 1])
    fetch, actor, sink = graph.stages
    assert (fetch["max_retries"], sink["max_retries"]) == (3, 3)
    assert (actor["max_restarts"], actor["max_task_retries"]) == (8, 4)
