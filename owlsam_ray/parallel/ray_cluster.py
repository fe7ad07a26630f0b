"""Start a private Ray on this machine for the duration of an attempt, or join an existing cluster.

A Ray that is started here is private: it listens on loopback alone, every request must carry a random token, its
sockets, logs and spilled blocks are in a folder that only this user can enter, and its workers do not import from the
working directory. `stop_ray` removes all of it.
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
"""Ray opens its folder to all users (mode 0777), so it is placed inside the private one."""
_LONGEST_SOCKET = f"/{_RAY}/session_2000-01-01_00-00-00_000000_{{pid}}/sockets/plasma_store"
_OOM_RETRIES = "5"
"""Retries of a task that Ray's memory monitor ends (default: forever). The driver's value applies in any cluster."""
_TOO_SLOW = ("timed out", "timeout", "failed to start gcs", "deadline exceeded", "failed to connect", "unavailable")
"""Ray's phrases for a part of it that did not come up in time."""
_log = logging.getLogger(__name__)


class RaySettings(Protocol):
    """What `start_ray` reads of a section `resources`."""

    @property
    def ray_address(self) -> str | None:
        """An existing cluster; None: start one here."""

    @property
    def num_cpus(self) -> int | None:
        """CPUs of a Ray that is started here."""

    @property
    def object_store_mb(self) -> int | None:
        """Object store size, in MiB, of a Ray that is started here."""

    @property
    def auth_mode(self) -> str:
        """RAY_AUTH_MODE of an existing cluster."""


class _OwnImports(JobConfig):
    """A job whose workers do not get the driver's working directory and script directory first on their path."""

    def _runtime_env_has_working_dir(self) -> bool:
        """Whether workers have their own directory: Ray asks this before it adds the driver's."""
        return True


@dataclass(slots=True)
class _Session:
    """A Ray that was started here."""

    folder: PrivateFolder
    spill: PrivateFolder | None
    """Folder for blocks that do not fit in memory, if it differs from the sockets' folder."""
    before: dict[str, str | None]
    """Previous values of the environment variables."""

    @property
    def folders(self) -> list[PrivateFolder]:
        return [self.folder] if self.spill is None else [self.folder, self.spill]


_session: _Session | None = None


def start_ray(resources: RaySettings, *, level: str) -> bool:
    """Connect to a cluster, or start Ray on this machine; False if this process already had one.

    A caller that gets True must call `stop_ray` at the end.

    Raises:
        PreflightError: there is no place for Ray's files, or Ray refuses the settings.
        IncompleteError: no cluster answers at `ray_address`, or Ray does not start.
        InterruptedRunError: Ray did not come up in time; another call may succeed.
        SystemExit: SIGTERM arrived meanwhile, for which Ray has its own handler.
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
    """Leave the cluster; end a Ray that was started here, and remove its files."""
    try:
        ray.shutdown(wait_for_processes=_session is not None)  # files are removed once no process writes them
    finally:
        _clear_away()


def remove_files() -> None:
    """Remove the files of a Ray that was started here and whose processes are dead; leave everything else unchanged."""
    if _session is not None:
        for folder in _session.folders:
            folder.remove()


def _start_here(resources: RaySettings, options: dict[str, Any]) -> None:
    global _session
    roots = temporary_roots()
    if os.environ.get("RAY_TMPDIR"):
        with contextlib.suppress(OSError):  # reported later together with the other places
            roots[0].mkdir(parents=True, exist_ok=True)  # as Ray does
    for path in remove_abandoned(roots):
        _log.debug("removed %s, left by a killed process of yours", path)
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
        with _on_loopback(), _translated_errors():
            ray.init(address="local", **options)  # "local" never joins a cluster that happens to run on this machine
    except BaseException:
        with contextlib.suppress(Exception):
            ray.shutdown()
        _end_processes_of(folder.path)
        _clear_away()
        raise


def _variables_of_own(folder: Path) -> dict[str, str | None]:
    """Environment variables for Ray's processes; None: unset the variable."""
    variables: dict[str, str | None] = {
        "RAY_AUTH_MODE": "token",
        # Other users can read command lines, but not the environment.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": None,
        "RAY_REDIS_ADDRESS": None,
        # Metrics would be served to anyone, without a token.
        "RAY_enable_metrics_collection": "0",
        "RAY_task_oom_retries": _OOM_RETRIES,
        **child_variables(folder),
    }
    if any(name == "lo" for _, name in socket.if_nameindex()):
        # Workers of a training communicate directly, bypassing Ray.
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return variables


def _set_variables(before: dict[str, str | None], variables: dict[str, str | None]) -> None:
    """Set environment variables, store their previous values, and make Ray read them again."""
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
        ray.shutdown()  # does nothing if already done
    for folder in session.folders:
        folder.remove()
    _set_variables({}, session.before)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Make Ray use the loopback address as this machine's address, as it does on macOS.

    Passing the address does not work: Ray replaces 127.0.0.1 by the address of an interface.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _translated_errors() -> Iterator[None]:
    """Translate what Ray raises while it starts into this project's errors: it raises almost any kind, even OSError."""
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
                f"Ray did not start in time ({line}); this machine may be busy: run the same command again"
            ) from error
        raise IncompleteError(f"Ray does not start: {line}") from error


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[0] if lines else error)


def _end_processes_of(folder: Path) -> None:
    """End the processes of a Ray that was only partly started: nothing else knows of them."""
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
        # The nodes find the package where it is installed, as here, or else at the same path as here.
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
    """Check that something listens at the address, since Ray itself would try for minutes.

    Raises:
        IncompleteError: nothing answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # the address is "auto"
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
