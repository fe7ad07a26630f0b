"""Ray itself: started on this machine for the time of an attempt, or joined where it runs."""

import logging
import socket
from typing import Any, Protocol

import ray

from owlsam_ray.resources import export_ray_environment


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
        """Ray's RAY_AUTH_MODE."""


def start_ray(resources: RaySettings, *, level: str) -> bool:
    """Connect to a cluster, or start Ray on this machine; False when this process already had one.

    Raises:
        ConnectionError: no cluster answers at `ray_address`.
    """
    if ray.is_initialized():
        return False
    _check_answers(resources.ray_address)
    export_ray_environment(resources.auth_mode)
    quiet = logging.INFO if level == "debug" else logging.ERROR
    local: dict[str, Any] = {}
    if resources.ray_address is None:
        local = {"num_cpus": resources.num_cpus, "include_dashboard": False}
        if resources.object_store_mb is not None:
            local["object_store_memory"] = resources.object_store_mb * 2**20
    ray.init(
        # "local" never joins a cluster that happens to run on this machine.
        address=resources.ray_address or "local",
        logging_level=quiet,
        log_to_driver=level == "debug",
        **local,
    )
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(quiet)
    return True


def _check_answers(address: str | None) -> None:
    """Ray itself tries for minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # none, or "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"no cluster answers at resources.ray_address {address}: {error}") from None


def cluster_totals() -> dict[str, float]:
    """CPUs, GPUs and object store bytes of the cluster."""
    totals = ray.cluster_resources()
    return {
        "num_cpus": totals.get("CPU", 0.0),
        "num_gpus": totals.get("GPU", 0.0),
        "store_bytes": totals.get("object_store_memory", 0.0),
    }
