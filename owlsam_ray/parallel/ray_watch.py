"""Watch the processes that Ray depends on, the local raylet and the GCS, and end this process if one dies.

If one of them dies, the driver cannot continue, and Ray's C++ code ends it with exit code 1 as soon as it notices
(seconds later for the raylet, a minute for the GCS), without notice to the Python code. The watch notices first, and
ends the process in an orderly way (see `ending`).
"""

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import ray

from owlsam_ray.errors import InterruptedRunError, OwlsamError
from owlsam_ray.parallel.ending import end_process
from owlsam_ray.parallel.ray_cluster import remove_files

_NAMES = {"raylet": "Ray's raylet", "gcs_server": "Ray's GCS"}
_LOOK_S = 0.1
_ASK_GCS_S = 5.0
_EXPLAIN_S = 10.0
"""Seconds to count the loss of a GCS, which Ray's own code notices after a minute; that of a raylet, after seconds."""
_GCS_PATIENCE_S = 40.0
"""Seconds in which a GCS that is restarted elsewhere is back; 20 seconds later Ray itself gives up."""


@dataclass(slots=True)
class _Process:
    """A process of Ray that must stay alive."""

    name: str
    pid: int
    popen: "subprocess.Popen[bytes] | None" = None
    """None: another process started it."""
    pidfd: int = -1
    """-1: this system has no pidfd, and the process is polled."""

    def is_dead(self) -> bool:
        if self.popen is not None:
            return self.popen.poll() is not None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False

    def how(self) -> str:
        """How it ended, as far as is known."""
        code = self.popen.poll() if self.popen is not None else None
        if code is None:
            return "died"
        if code >= 0:
            return f"ended with exit code {code}"
        with contextlib.suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
        return f"was killed by signal {-code}"


@dataclass(slots=True)
class _Watch:
    processes: list[_Process]
    gcs_address: tuple[str, int] | None
    """Address of a GCS that is not one of our processes."""
    on_death: Callable[[str], None]
    also: Callable[[], str | None] = lambda: None
    stop: threading.Event = field(default_factory=threading.Event)
    last_heard: float = field(default_factory=time.monotonic)
    next_asked: float = field(default_factory=lambda: time.monotonic() + _ASK_GCS_S)

    def run(self) -> None:
        poll = select.poll()
        for process in self.processes:
            with contextlib.suppress(OSError, AttributeError):  # already gone; or no such call on this system
                process.pidfd = os.pidfd_open(process.pid)
                poll.register(process.pidfd, select.POLLIN)
        while not self.stop.is_set():
            ended = {descriptor for descriptor, _ in poll.poll(_LOOK_S * 1000)}
            self.look(ended)
        for process in self.processes:
            if process.pidfd >= 0:
                os.close(process.pidfd)

    def look(self, ended: Collection[int] = ()) -> None:
        """Report a death; `ended`: descriptors of processes that have ended."""
        for process in self.processes:
            if process.pidfd in ended or process.is_dead():
                self.on_death(f"{_NAMES[process.name]} (process {process.pid}) {process.how()}")
        cause = self.also()
        if cause is not None:
            self.on_death(cause)
        if self.gcs_address is not None and time.monotonic() >= self.next_asked:
            if _answers(self.gcs_address):
                self.last_heard = time.monotonic()
            elif time.monotonic() - self.last_heard > _GCS_PATIENCE_S:
                host, port = self.gcs_address
                self.on_death(f"Ray's GCS at {host}:{port} has not answered for {_GCS_PATIENCE_S:g} s")
            self.next_asked = time.monotonic() + _ASK_GCS_S


@contextlib.contextmanager
def watch_ray(
    explain: Callable[[str], OwlsamError] | None = None, *, also: Callable[[], str | None] = lambda: None
) -> Iterator[None]:
    """End this process in an orderly way if Ray dies while this context lasts.

    Leave this context before `ray.shutdown`. If Ray is found dead at the end, the context does not return either: any
    error that led there is a consequence.

    Args:
        explain: makes the error that the process ends with from the cause; may access storage. Default: interrupted,
            call again.
        also: called at regular intervals; if it returns a cause, the process ends as well.
    """

    def on_death(cause: str) -> None:
        # Ray would print the last lines of the raylet's log.
        ray._private.worker.print_to_stdstream = lambda *_, **__: None
        otherwise = InterruptedRunError(f"{cause}: run the same command again")
        seconds = {} if cause.startswith(_NAMES["raylet"]) else {"explain_s": _EXPLAIN_S}
        end_process(
            lambda: explain(cause) if explain is not None else otherwise, otherwise, **seconds, at_last=_kill_ours
        )

    processes = _processes()
    watch = _Watch(processes, _foreign_gcs(processes), on_death, also)
    thread = threading.Thread(target=watch.run, name="owlsam-ray-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.stop.set()
        thread.join()
        watch.look()


def _processes() -> list[_Process]:
    """Raylet and GCS, if they are processes of this machine."""
    node = getattr(ray._private.worker, "_global_node", None)
    started = getattr(node, "all_processes", {})
    found = [_Process(name, info.process.pid, info.process) for name in _NAMES for info in started.get(name, ())]
    if node is not None and not any(process.name == "raylet" for process in found):
        pid = _listener(node.raylet_socket_name)
        if pid:
            found.append(_Process("raylet", pid))
    return found


def _listener(path: str | None) -> int | None:
    """The process that listens on a local socket; None if unknown."""
    if path is None or not hasattr(socket, "SO_PEERCRED"):
        return None
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(5)
        asking.connect(path)
        pid, _, _ = struct.unpack("3i", asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(pid) or None
    return None


def _foreign_gcs(processes: list[_Process]) -> tuple[str, int] | None:
    if any(process.name == "gcs_server" for process in processes):
        return None
    try:
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        return host.strip("[]"), int(port)
    except (AttributeError, RuntimeError, ValueError):  # a Ray client, which has no GCS address
        return None


def _answers(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=_ASK_GCS_S).close()
    except OSError:
        return False
    return True


def _kill_ours() -> None:
    """Kill what is left of a Ray that this process started, and remove its files; workers end without a raylet."""
    node = getattr(ray._private.worker, "_global_node", None)
    for started in getattr(node, "all_processes", {}).values():
        for info in started:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                info.process.kill()
                info.process.wait(timeout=1)
    remove_files()
