"""How a Ray that does not start is told, and where its files go: without a start."""

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.errors import IncompleteError, InterruptedRunError, PreflightError
from owlsam_ray.parallel import executors, ray_cluster, ray_watch
from owlsam_ray.parallel.ray_cluster import start_ray
from owlsam_ray.parallel.signals import SIGNALS, as_interrupts, interrupt
from tests.runs import TinyRun

SMALL = ResourcesConfig(num_cpus=2, object_store_mb=100)


class _Parts:
    """Ray, as far as a start that goes wrong needs it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
        self.options: dict[str, Any] = {}
        self.token: str | None = None

        def init(**options: Any) -> None:
            self.options, self.token = options, os.environ.get("RAY_AUTH_TOKEN")
            Path(options.get("_temp_dir", os.devnull)).mkdir(exist_ok=True)
            raise error

        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", init)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Exception("The current node timed out during startup. This could happen"), InterruptedRunError, "run the"),
        (TimeoutError("Timed out after 20 seconds"), InterruptedRunError, "Ray did not start in time"),
        (RuntimeError("Failed to start GCS. Last connection error: x"), InterruptedRunError, "run the same command"),
        (OSError("validate_socket_filename failed: AF_UNIX path length"), IncompleteError, "Ray does not start: val"),
        (PermissionError(13, "Permission denied", "/tmp/x"), IncompleteError, "Ray does not start"),
        (KeyError("CPU"), IncompleteError, "Ray does not start: 'CPU'"),
        (ValueError("the minimum allowed is 78643200"), PreflightError, "the minimum allowed is 78643200"),
    ],
)
def test_a_start_that_fails_is_told_as_rays(
    monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type[Exception], words: str
) -> None:
    before = dict(os.environ)
    parts = _Parts(monkeypatch, error)
    with pytest.raises(kind, match=words):
        start_ray(SMALL, level="info")
    assert parts.token is not None
    assert not Path(parts.options["_temp_dir"]).parent.exists()
    assert os.environ.get("RAY_AUTH_TOKEN") == before.get("RAY_AUTH_TOKEN")


def test_a_signal_while_ray_starts_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _Parts(monkeypatch, SystemExit(1))
    with pytest.raises(SystemExit):
        start_ray(SMALL, level="info")
    assert not Path(parts.options["_temp_dir"]).parent.exists()


def test_a_slow_start_is_one_line_and_call_again(
    tiny: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from owlsam_ray.cli.main import main

    _Parts(monkeypatch, Exception("The current node timed out during startup."))
    fake = ["--set", "detector={model: fake}", "--set", "segment={model: fake}"]
    code = main(["annotate", str(tiny.run_file), "--run", str(tmp_path / "run"), *fake])
    out, log = capsys.readouterr()
    assert (code, len(out.splitlines()), json.loads(out)["exit_code"]) == (75, 1, 75)
    assert "Traceback" not in log
    assert "storage" not in json.loads(out)["error"]


def test_a_long_temporary_folder_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Sockets go where their paths are short enough, blocks that memory cannot hold to where the user wants them."""
    long = tmp_path / ("scratch-of-a-node-" * 4)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    caplog.set_level(logging.DEBUG, "owlsam_ray")
    parts = _Parts(monkeypatch, KeyError("enough seen"))
    with pytest.raises(IncompleteError):
        start_ray(SMALL, level="info")
    socket_path = f"{parts.options['_temp_dir']}/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    assert len(socket_path) <= 107
    assert Path(parts.options["object_spilling_directory"]).parent == long
    assert list(long.iterdir()) == []


@pytest.mark.parametrize(("wanted", "limit"), [(None, "5"), ("0", "0")])
def test_the_retries_of_tasks_that_a_cluster_ends_for_memory_are_bounded(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, limit: str
) -> None:
    """The driver counts them, for ever by default; a user may have set another number."""
    name = "RAY_task_oom_retries"
    monkeypatch.setenv(name, wanted or "")
    if wanted is None:
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_cluster, "_check_answers", lambda address: None)
    found: list[str | None] = []
    monkeypatch.setattr(ray_cluster, "Config", _Reads(lambda: found.append(os.environ.get(name))))
    _Parts(monkeypatch, ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"))
    with pytest.raises(IncompleteError):
        start_ray(ResourcesConfig(ray_address="10.0.0.1:6379"), level="info")
    assert found == [limit]


@pytest.mark.parametrize("is_ours", [True, False])
def test_a_reduce_on_ray_hears_of_a_signal_to_the_whole_job(monkeypatch: pytest.MonkeyPatch, is_ours: bool) -> None:
    """Or what ends Ray along with it would be counted as a loss; handlers of other programs are left to Ray."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def start_with_a_handler(*_: object, **__: object) -> bool:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return False

    monkeypatch.setattr(ray_cluster, "start_ray", start_with_a_handler)
    monkeypatch.setattr(ray_watch, "watch_ray", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(executors, "_ray_in_order", lambda *_: iter([signal.getsignal(signal.SIGTERM)]))
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if is_ours:
            as_interrupts()
        assert list(executors.map_in_order(len, ["a"], 1, "ray", SMALL)) == [interrupt if is_ours else signal.SIG_IGN]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Reads:
    """Where Ray reads its environment anew."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look

    def initialize(self, _: str) -> None:
        self._look()


def test_a_cluster_gets_its_own_way_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auth_mode` and the user's token are for the cluster at `ray_address`; nothing of ours is in the way."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the cluster")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(ray_cluster, "_check_answers", lambda address: None)
    parts = _Parts(monkeypatch, ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"))
    with pytest.raises(IncompleteError, match=r"RAY_AUTH_MODE=token, as resources\.auth_mode says"):
        start_ray(ResourcesConfig(ray_address="10.0.0.1:6379", auth_mode="token"), level="info")
    assert (parts.token, os.environ["RAY_AUTH_MODE"]) == ("of the cluster", "token")
    assert parts.options["address"] == "10.0.0.1:6379"
    assert "_temp_dir" not in parts.options
