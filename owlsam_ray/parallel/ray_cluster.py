"""Ray itself: started on this machine for the time of an attempt, or joined where it runs.

A Ray that is started here is nobody else's: it listens on loopback alone, every request must bring a random token, its
sockets, logs and spilled blocks lie in a folder that only this user can enter, and its workers do not import from the
working directory. `stop_ray` takes all of it away again.
"""

import atexit
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ray
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]  # its stub lacks them
from ray.exceptions import AuthenticationError
from ray.job_config import JobConfig

from owlsam_ray.errors import IncompleteError, InterruptedRunError, OwlsamError, PreflightError, one_line
from owlsam_ray.parallel.allocation import export_ray_environment
from owlsam_ray.parallel.child_imports import child_variables, children_find_package, package_root
from owlsam_ray.parallel.private_folder import PrivateFolder, make_short_folder, remove_abandoned, temporary_roots

_RAY = "r"
"""Ray gives its folder away to everybody (mode 0777), so it lies inside the private one."""
_LONGEST_SOCKET = f"/{_RAY}/session_2000-01-01_00-00-00_000000_{{pid}}/sockets/plasma_store"
_OOM_RETRIES = "5"
"""Of a task that Ray's own memory monitor ends, whoever started Ray: the driver counts. The default is for ever."""
_TOO_SLOW = ("timed out", "timeout", "failed to start gcs", "deadline exceeded", "failed to connect", "unavailable")
"""In the words of Ray: a part of it did not come up in time."""
_log = logging.getLogger(__name__)


class RaySettings(Protocol):
    """What `start_ray` reads of a section `resources`."""

    @property
    def ray_address(self) -> str | None:
        """An existing cluster; None: start one here."""

    @property
    def num_cpus(self) -> int | None:
        """CPUs of the one that is started."""

    @property
    def object_store_mb(self) -> int | None:
        """Object store of the one that is started."""

    @property
    def auth_mode(self) -> str:
        """Ray's RAY_AUTH_MODE of an existing cluster."""


class _OwnImports(JobConfig):
    """A job whose workers do not get the driver's working directory and script directory first on their path."""

    def _runtime_env_has_working_dir(self) -> bool:
        """Whether workers have a directory of their own: what Ray asks before it adds the driver's."""
        return True


@dataclass(slots=True)
class _Session:
    """A Ray that was started here."""

    folder: PrivateFolder
    spill: PrivateFolder | None
    """Where blocks go that memory cannot hold, when that is another place than the sockets'."""
    before: dict[str, str | None]
    """Environment variables as they were."""

    @property
    def folders(self) -> list[PrivateFolder]:
        return [self.folder] if self.spill is None else [self.folder, self.spill]


_session: _Session | None = None


def start_ray(resources: RaySettings, *, level: str) -> bool:
    """Connect to a cluster, or start Ray on this machine; False when this process already had one.

    Whoever gets True calls `stop_ray` at the end.

    Raises:
        PreflightError: no place for Ray's files, or settings that Ray refuses.
        IncompleteError: no cluster answers at `ray_address`, or Ray does not start.
        InterruptedRunError: Ray did not come up in time; another call may do better.
        SystemExit: SIGTERM came meanwhile, for which Ray has a handler of its own.
    """
    if ray.is_initialized():
        return False
    export_ray_environment(resources.auth_mode)
    quiet = logging.INFO if level == "debug" else logging.ERROR
    options: dict[str, Any] = {"logging_level": quiet, "log_to_driver": level == "debug"}
    if resources.ray_address is None:
        _start_here(resources, options)
    else:
        _join(resources.ray_address, resources.auth_mode, options)
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(quiet)
    return True


def stop_ray() -> None:
    """Leave the cluster; end a Ray that was started here, with its files."""
    try:
        ray.shutdown(wait_for_processes=_session is not None)  # files are removed once nobody writes them any more
    finally:
        _clear_away()


def remove_files() -> None:
    """Remove the files of a Ray that was started here, whose processes are dead; the rest of it is as it was."""
    if _session is not None:
        for folder in _session.folders:
            folder.remove()


def _start_here(resources: RaySettings, options: dict[str, Any]) -> None:
    global _session
    roots = temporary_roots()
    if os.environ.get("RAY_TMPDIR"):
        with contextlib.suppress(OSError):  # which is told with the other places
            roots[0].mkdir(parents=True, exist_ok=True)  # as Ray does
    for path in remove_abandoned(roots):
        _log.debug("removed %s, which a killed process of yours left", path)
    inside = len(_LONGEST_SOCKET.format(pid=os.getpid()))
    folder, spill = make_short_folder(inside, roots=roots)
    _session = _Session(folder, spill, {})
    atexit.register(_clear_away)
    try:
        _set_variables(_session.before, _variables_of_own(folder.path))
        options |= {"num_cpus": resources.num_cpus, "include_dashboard": False, "job_config": _OwnImports()}
        options["_temp_dir"] = str(folder.path / _RAY)
        if spill is not None:
            options["object_spilling_directory"] = str(spill.path)
        if resources.object_store_mb is not None:
            options["object_store_memory"] = resources.object_store_mb * 2**20
        with _on_loopback(), _told_rightly():
            ray.init(address="local", **options)  # "local" never joins a cluster that happens to run on this machine
    except BaseException:
        with contextlib.suppress(Exception):
            ray.shutdown()
        _end_processes_of(folder.path)
        _clear_away()
        raise


def _variables_of_own(folder: Path) -> dict[str, str | None]:
    """Environment variables for Ray's processes; None: to be unset."""
    variables: dict[str, str | None] = {
        "RAY_AUTH_MODE": "token",
        # Other users can read command lines, but no environment.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": None,
        "RAY_REDIS_ADDRESS": None,
        # Numbers for anyone who asks, without a token.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_oom_retries": _OOM_RETRIES,
        **child_variables(folder),
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # Workers of a training talk to each other past Ray.
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


def _set_variables(before: dict[str, str | None], variables: dict[str, str | None]) -> None:
    """Set environment variables, remember what they were, and have Ray read them anew."""
    for name, value in variables.items():
        before[name] = os.environ.get(name)
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _clear_away() -> None:
    """Remove the files of a Ray that has ended, and restore the environment."""
    global _session
    session, _session = _session, None
    if session is None:
        return
    atexit.unregister(_clear_away)
    with contextlib.suppress(Exception):
        ray.shutdown()  # does nothing where that was done
    for folder in session.folders:
        folder.remove()
    _set_variables({}, session.before)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray take the address of loopback for that of this machine, as it does on macOS.

    An address that it is given is no way: it replaces 127.0.0.1 by that of an interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _told_rightly() -> Iterator[None]:
    """What Ray raises while it starts, as errors of ours: it raises nearly every kind, OSError too."""
    try:
        yield
    except OwlsamError:
        raise
    except ValueError as error:
        raise PreflightError(f"Ray refuses these resources: {_first_line(error)}") from error
    except Exception as error:
        line = _first_line(error)
        if isinstance(error, TimeoutError) or any(words in str(error).lower() for words in _TOO_SLOW):
            raise InterruptedRunError(
                f"Ray did not come up in time ({line}); this machine may be busy: call the same command again"
            ) from error
        raise IncompleteError(f"Ray does not start: {line}") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else error)


def _end_processes_of(folder: Path) -> None:
    """End the parts of a Ray that was started by halves: nobody else knows of them."""
    if not sys.platform.startswith("linux"):
        return
    wanted = os.fsencode(f"{folder}/")
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                os.kill(int(entry.name), signal.SIGKILL)


def _join(address: str, auth_mode: str, options: dict[str, Any]) -> None:
    _check_answers(address)
    os.environ.setdefault("RAY_task_oom_retries", _OOM_RETRIES)
    Config.initialize("")  # an earlier start in this process may have read another mode
    AuthenticationTokenLoader.instance().reset_cache()
    if not address.startswith("ray://"):
        # On the nodes the package is found as it is here, or where it lies here.
        paths = [] if children_find_package() else [str(package_root())]
        options["job_config"] = _OwnImports(_py_driver_sys_path=paths)
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, AuthenticationError) as error:
        raise IncompleteError(
            f"cannot join the cluster at resources.ray_address {one_line(address)}: {_first_line(error)} (does "
            f"it run with RAY_AUTH_MODE={auth_mode}, as resources.auth_mode says, and the same token?)"
        ) from error


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes.

    Raises:
        IncompleteError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise IncompleteError(
            f"no cluster answers at resources.ray_address {one_line(address)}: {error.strerror or error}"
        ) from None


def cluster_totals() -> dict[str, float]:
    """CPUs, GPUs and object store bytes of the cluster."""
    totals = ray.cluster_resources()
    return {
        "num_cpus": totals.get("CPU", 0.0),
        "num_gpus": totals.get("GPU", 0.0),
        "store_bytes": totals.get("object_store_memory", 0.0),
    }
