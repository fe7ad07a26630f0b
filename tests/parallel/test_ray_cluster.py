"""A Ray that is started here lets nobody in, imports nothing from the working directory, and is told rightly."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

import owlsam_ray
from owlsam_ray.config.resources import ResourcesConfig
from owlsam_ray.parallel import private_folder, ray_cluster
from owlsam_ray.parallel.executors import map_in_order
from owlsam_ray.parallel.private_folder import PREFIX
from owlsam_ray.parallel.ray_cluster import start_ray, stop_ray
from tests.finetune.drawn import SEGMENTER, draw_sets, write_job
from tests.parallel.ray_processes import LOOPBACK, command_lines, family, listening
from tests.parallel.test_ray_watch import start as start_command
from tests.parallel.test_ray_watch import write_run
from tests.runs import ROOT, TinyRun, environment

SMALL = ResourcesConfig(num_cpus=2, object_store_mb=100)
NOBODY = 65534
OF_USERS = ("statistics.py", "timm/__init__.py", "numpy.py", "fractions.py")
"""Names of modules that ours import, one way or another."""


def write_modules_of_users(folder: Path) -> Path:
    for name in OF_USERS:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"raise ImportError('this is the {name} of a user')\n", encoding="utf-8")
    return folder


@dataclass(frozen=True)
class Started:
    """A Ray of ours, and what a test wants to know of it."""

    folder: Path
    token: str
    home: Path
    scratch: Path
    ports: dict[int, str]
    pids: set[int]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Started]:
    """One start for all tests that look at it, from a user's folder, in a home of its own; then all as it was."""
    home = tmp_path_factory.mktemp("home")
    scratch = tmp_path_factory.mktemp("longer-than-the-path-of-a-socket-may-be-as-some-schedulers-set-it-for-a-job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.setenv("RAY_AUTH_TOKEN", "what the user has for another cluster")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.delenv("RAY_TMPDIR", raising=False)
        patch.setenv("TMPDIR", str(scratch))
        patch.chdir(write_modules_of_users(tmp_path_factory.mktemp("work")))
        before, had = dict(os.environ), set(listening(family(os.getpid())))
        assert start_ray(SMALL, level="error")
        try:
            ray.get(ray.remote(lambda: None).remote())  # a worker that worked
            session = ray_cluster._session
            assert session is not None
            pids = family(os.getpid())
            ports = {port: address for port, address in listening(pids).items() if port not in had}
            yield Started(session.folder.path, os.environ["RAY_AUTH_TOKEN"], home, scratch, ports, pids)
        finally:
            stop_ray()
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "PYTHONSAFEPATH", "PYTHONPATH", "GLOO_SOCKET_IFNAME"):
            assert os.environ.get(name) == before.get(name)
        assert not session.folder.path.exists()
        assert list(scratch.iterdir()) == []


def test_another_user_is_refused_at_every_port(started: Started) -> None:
    assert len(started.ports) >= 6, f"GCS, raylet (two), driver, worker, runtime env agent: {started.ports}"
    request = {
        "ports": sorted(started.ports),
        "folder": str(started.folder),
        "sockets": [str(path) for path in started.folder.rglob("*") if path.is_socket()],
        "uid": NOBODY if os.getuid() == 0 else None,
    }
    assert len(request["sockets"]) >= 2  # type: ignore[arg-type]
    without = {name: value for name, value in environment().items() if name != "RAY_AUTH_TOKEN"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "parallel" / "ray_attack.py"), json.dumps(request)],
        env=without | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen, answered, pages, asked = (json.loads(line) for line in done.stdout.splitlines())
    assert (seen, answered, pages) == ([], [], [])
    assert asked["methods"] > 100
    assert asked["grpc"] >= 5  # all but the runtime env agent, which speaks HTTP


def test_the_right_token_is_let_in(started: Started) -> None:
    """So what refuses the others is the token."""
    port = int(ray.get_runtime_context().gcs_address.rpartition(":")[2])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        assert ask(b"", timeout=20, metadata=(("authorization", f"Bearer {started.token}"),))
        with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
            ask(b"", timeout=20, metadata=(("authorization", f"Bearer {started.token[:-1]}"),))


def test_it_listens_on_loopback_alone(started: Started) -> None:
    assert {port: address for port, address in started.ports.items() if address not in LOOPBACK} == {}


def test_the_token_is_random_and_nowhere_to_be_read(started: Started) -> None:
    assert len(started.token) == 64
    assert started.token != "what the user has for another cluster"
    secret = started.token.encode()
    assert not [line for line in command_lines(started.pids) if secret in line]
    files = [path for path in started.folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if secret in path.read_bytes()]
    assert not (started.home / ".ray").exists()


def test_its_folder_is_of_this_user_alone(started: Started) -> None:
    found = started.folder.lstat()
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o700, os.getuid())
    assert started.folder.name.startswith(PREFIX)


def test_blocks_spill_where_the_user_wants_them_and_nobody_else_can_look(started: Started) -> None:
    """The sockets cannot lie there: the path is too long for them."""
    [spill] = started.scratch.iterdir()
    assert stat.S_IMODE(spill.lstat().st_mode) == 0o700
    assert started.scratch not in started.folder.parents
    raylet = [line for line in command_lines(started.pids) if b"--fallback_directory=" in line]
    assert raylet
    assert all(f"--fallback_directory={spill}".encode() in line for line in raylet)


def test_workers_import_nothing_from_the_working_directory(started: Started) -> None:
    def look() -> tuple[list[str], list[str]]:
        from importlib.util import find_spec

        names = ("statistics", "fractions", "numpy", "timm", "owlsam_ray")
        return sys.path, [str(getattr(find_spec(name), "origin", None)) for name in names]

    path, found = ray.get(ray.remote(look).remote())
    assert not [entry for entry in path if Path(entry or ".").resolve() == Path.cwd()]
    library, installed = Path(os.__file__).parent, Path(ray.__file__).parents[1]
    assert [Path(file).resolve().parent for file in found] == [
        *(library.resolve(), library.resolve()),
        *(installed.resolve() / "numpy", installed.resolve() / "timm"),
        Path(owlsam_ray.__file__).resolve().parent,
    ]


def test_tasks_of_reduce_run_on_it(started: Started) -> None:
    assert list(map_in_order(len, ["a", "bb", ""], 2, "ray", SMALL)) == [1, 2, 0]


def test_a_folder_of_a_live_run_is_left_alone(started: Started) -> None:
    assert started.folder not in private_folder.remove_abandoned([started.folder.parent])
    assert (started.folder / "r").is_dir()


# Whole commands -------------------------------------------------------------------------------------------------------


def watch(command: list[str], cwd: Path, **variables: str) -> tuple[int, dict[int, str], dict[str, Any], str]:
    """Run a command to its end; returns its exit code, where its family listened meanwhile, its summary, its log."""
    seen: dict[int, str] = {}
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment() | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def look() -> None:
        while process.poll() is None:
            seen.update(listening(family(process.pid)))
            time.sleep(0.2)

    watcher = threading.Thread(target=look)
    watcher.start()
    out, log = process.communicate(timeout=500)
    watcher.join()
    return process.returncode, seen, json.loads(out.splitlines()[-1]), log


@pytest.mark.slow
def test_whole_commands_in_a_folder_with_a_users_modules(tiny: TinyRun, tmp_path: Path) -> None:
    """`annotate` and `reduce` on Ray, as a module and as the command: the same, and on loopback alone."""
    work = write_modules_of_users(tmp_path / "work")
    scratch = tmp_path / ("scratch-of-a-node-" * 4)
    scratch.mkdir()
    run = str(tmp_path / "run")
    script = [str(Path(sys.executable).parent / "owlsam")]
    for start in ([sys.executable, "-m", "owlsam_ray"], script):
        for command in (["annotate"], ["reduce", "--set", "reduce.executor=ray", "--set", "reduce.workers=2"]):
            code, seen, summary, log = watch(
                [*start, *command, str(tiny.run_file), "--run", run], work, TMPDIR=str(scratch)
            )
            assert code == 0, log[-3000:]
            assert summary["images"] == tiny.num_images
            assert set(seen.values()) <= LOOPBACK
            assert list(scratch.glob(f"{PREFIX}*")) == []
        (tmp_path / "run").rename(tmp_path / f"run-{len(start)}")
    first, second = ((tmp_path / f"run-{n}" / "coco" / "annotations.json").read_bytes() for n in (1, 3))
    assert first == second


@pytest.mark.slow
def test_a_training_of_two_workers_listens_on_loopback_alone(tmp_path: Path) -> None:
    work = write_modules_of_users(tmp_path / "work")
    job = write_job(
        tmp_path, draw_sets(tmp_path / "drawn", train=12), model=SEGMENTER, optimizer={"steps": 4, "batch_size": 4},
        checkpoint={"every": 4, "validate_every": 4},
        resources={"workers": 2, "num_cpus": 2, "torch_threads": 1, "loader_threads": 1},
    )  # fmt: skip
    command = [sys.executable, "-m", "owlsam_ray", "finetune", str(job), "--out", str(tmp_path / "out")]
    code, seen, summary, log = watch(command, work)
    assert code == 0, log[-3000:]
    assert summary["steps"] == 4
    assert len(seen) > 6
    assert {port: address for port, address in seen.items() if address not in LOOPBACK} == {}


@contextlib.contextmanager
def cluster_of_others(mode: str, token: str) -> Iterator[str]:
    """`ray start --head` as the user of a cluster would do it; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num-cpus=2", f"--object-store-memory={100 * 2**20}", "--include-dashboard=false", "--block"]
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        head = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", *options],
            env=environment() | {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        pids = set()
        try:
            deadline = time.monotonic() + 120
            while not (pids := family(head.pid)) or len(listening(pids)) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.5)
            yield f"127.0.0.1:{port}"
        finally:
            for pid in pids | family(head.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            head.wait()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "token"])
def test_a_cluster_is_joined_in_its_mode(tiny: TinyRun, tmp_path: Path, mode: str) -> None:
    work, token = write_modules_of_users(tmp_path / "work"), "f" * 64
    with cluster_of_others(mode, token) as address:
        sets = [f"--set=resources.ray_address={address}", f"--set=resources.auth_mode={mode}"]
        command = tiny.command("annotate", tmp_path / "run")
        code, _, summary, log = watch([*command, *sets], work, RAY_AUTH_TOKEN=token)
        assert (code, summary.get("done")) == (0, tiny.num_images), log[-3000:]
        if mode == "token":
            code, _, summary, _ = watch([*command, *sets, "--run", str(tmp_path / "2")], work, RAY_AUTH_TOKEN="0" * 64)
            assert code == 5
            assert "RAY_AUTH_MODE=token, as resources.auth_mode says, and the same token" in summary["error"]


@pytest.mark.slow
def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["annotate", *write_run(tmp_path, delay_s=0)]
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:  # of this test: other runs tidy up in /tmp
        monkeypatch.setenv("RAY_TMPDIR", short)
        killed = start_command(arguments, tmp_path / "log")
        deadline = time.monotonic() + 300
        while not [path for path in Path(short).rglob("*") if path.is_socket()]:
            assert killed.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        pids = family(killed.pid)
        killed.kill()
        killed.communicate()
        while any(Path(f"/proc/{pid}").exists() for pid in pids):  # its Ray ends by itself
            assert time.monotonic() < deadline
            time.sleep(0.1)
        [folder] = Path(short).iterdir()
        assert folder.name.startswith(PREFIX)
        stdout, _ = start_command(arguments, tmp_path / "log").communicate(timeout=300)
        assert json.loads(stdout)["done"] == 60
        assert list(Path(short).iterdir()) == []
