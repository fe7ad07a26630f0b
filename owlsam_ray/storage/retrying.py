"""Send requests to storage: choose the client, limit concurrency, retry, and translate the final error."""

import contextlib
import errno
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import fsspec
import tenacity
from fsspec.implementations.local import LocalFileSystem

from owlsam_ray.errors import InputError, OwlsamError, StorageSetupError, shown
from owlsam_ray.storage.clients import KINDS, Client, open_client
from owlsam_ray.storage.faults import Fault, described, understand, warn_once
from owlsam_ray.storage.secrets import masked, masked_url

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class StoragePolicy:
    """How remote storage is accessed and retried."""

    retries: int = 6
    """Retries after throttling, a server error, a cut connection or a timeout."""
    backoff_s: float = 0.5
    """Seconds before the first retry; doubled each time. A random part of up to half is subtracted."""
    max_backoff_s: float = 30.0
    """Maximum seconds between two tries."""
    timeout_s: float = 60.0
    """Seconds until a connection attempt or a pending answer is given up."""
    concurrency: int = 64
    """Concurrent requests of one process."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts that an address found in data may name although they are link-local; see `addresses.HostRules`."""


class _State:
    """State shared by all threads of a process."""

    def __init__(self, policy: StoragePolicy) -> None:
        self.policy = policy
        self.slots = threading.BoundedSemaphore(policy.concurrency)
        self.mine = threading.local()

    @contextlib.contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one of the request slots. Reentrant: a signal handler may interrupt a thread that has or awaits one."""
        if getattr(self.mine, "busy", False):
            yield
            return
        self.mine.busy = True
        try:
            with self.slots:
                yield
        finally:
            self.mine.busy = False


_state = _State(StoragePolicy())


def configure(policy: StoragePolicy) -> None:
    """Set how all threads of this process access storage, from their next request on."""
    global _state
    if policy != _state.policy:
        _state = _State(policy)


def policy() -> StoragePolicy:
    """How this process accesses storage, so that other processes can do the same."""
    return _state.policy


def _start_anew() -> None:
    """Reset the slots in a forked process, which must not wait for slots held by its parent's threads."""
    global _state
    _state = _State(_state.policy)


os.register_at_fork(after_in_child=_start_anew)


def forget_clients() -> None:
    """Drop open clients, so that the next request reads endpoints and credentials from the environment again."""
    for scheme in KINDS:
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path inside it. Its own methods do not retry.

    Raises:
        InputError: the scheme is unknown.
        StorageSetupError: its package is not installed.
    """
    client, path = open_url(url)
    return client.filesystem, path


def open_url(url: str, *, in_parts: bool = False) -> tuple[Client, str]:
    """The client of a path or URL, and the path inside its file system; `in_parts`: for a large upload.

    Raises:
        InputError: the scheme is unknown.
        StorageSetupError: its package is not installed.
    """
    if "\0" in url:
        raise InputError(f"cannot open {shown(masked_url(url), 500)}: it holds a NUL")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", url)
    # `url_to_fs` takes any `::` in a file name for a chain of file systems; it is one only if it comes before `://`.
    if "://" not in url or (scheme is not None and scheme[1] in ("file", "local")):
        return Client("other", LocalFileSystem(), ()), LocalFileSystem._strip_protocol(url)
    policy, is_opening = _state.policy, False
    try:
        if scheme is None:
            filesystem, path = fsspec.core.url_to_fs(url)
            return Client("other", filesystem, (Exception,), policy.timeout_s), str(path)
        if scheme[1] not in KINDS:
            fsspec.get_filesystem_class(scheme[1])
        is_opening = True
        client = open_client(
            scheme[1],
            timeout_s=policy.timeout_s,
            concurrency=policy.concurrency,
            tries=policy.retries + 1,
            in_parts=in_parts,
            allowed_hosts=policy.allowed_hosts,
        )
        is_opening = False
        if scheme[1] == "memory":  # it also takes a name with `::` for a chain
            return client, "/" + url.removeprefix("memory://").strip("/")
        return client, str(client.filesystem._strip_protocol(url))
    except ImportError as error:
        raise StorageSetupError(f"cannot open {shown(masked_url(url), 500)}: {masked(str(error))}") from None
    except OwlsamError:
        raise
    except Exception as error:  # noqa: BLE001 (any class: a plugin that does not load, or needs settings)
        if isinstance(error, TypeError) or (isinstance(error, ValueError) and not is_opening):
            raise InputError(f"cannot open {shown(masked_url(url), 500)}: {masked(str(error))}") from None
        warn_once(url.partition("://")[0] + "://", error)
        raise StorageSetupError(f"cannot open {shown(masked_url(url), 500)}: {described(error)}") from None


class _FaultError(Exception):
    """Passes the error of one try to the decision about the next."""

    def __init__(self, fault: Fault, error: Exception) -> None:
        super().__init__(fault.what)
        self.fault = fault
        self.error = error


def ask(client: Client, url: str, request: Callable[[], T]) -> T:
    """Make one request, retrying while that is worthwhile.

    Raises:
        OSError, InputError: as the package `storage` documents.
    """
    if is_local(client.filesystem) or not client.errors:
        return request()
    state = _state

    def once() -> T:
        try:
            with state.slot():
                return request()
        except OwlsamError:
            raise
        except client.errors as error:
            raise _FaultError(understand(error, is_foreign=client.kind == "other"), error) from None

    policy = state.policy
    grows = tenacity.wait_exponential(multiplier=policy.backoff_s, max=policy.max_backoff_s)
    tries = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda e: isinstance(e, _FaultError) and e.fault.is_worth_a_retry),
        stop=tenacity.stop_after_attempt(policy.retries + 1),
        wait=lambda attempt: grows(attempt) * random.uniform(0.5, 1.0),
        reraise=True,
    )
    try:
        return tries(once)
    except _FaultError as last:
        failure = last
    _raise(client, url, failure, tries.statistics["attempt_number"])
    raise AssertionError("unreachable")


def _raise(client: Client, url: str, failure: _FaultError, num_tries: int) -> None:
    fault, error = failure.fault, failure.error
    if client.kind == "other" and not isinstance(error, OSError):
        warn_once(url.partition("://")[0] + "://", error)
    url = masked_url(url)
    if fault.kind == "as_is" and (type(error) is not OSError or error.errno is not None):
        raise error
    host = f" at {masked(client.host)}" if client.host else ""
    message = f"{fault.what} ({url}{host}, {num_tries} {'try' if num_tries == 1 else 'tries'})"
    if fault.kind == "anonymous":
        raise StorageSetupError(f"no credentials for {url}{host}: {fault.what}. {_CREDENTIALS.get(client.kind, '')}")
    if fault.kind == "no_package":
        raise StorageSetupError(f"cannot open {shown(url, 500)}: {fault.what}")
    if fault.kind == "bad_request":
        raise InputError(f"cannot open {shown(url, 500)}: {fault.what}")
    numbers = {"missing": errno.ENOENT, "forbidden": errno.EACCES, "expired": errno.EKEYEXPIRED, "beyond": errno.EINVAL}
    number = numbers.get(fault.kind, errno.ETIMEDOUT if "Timeout" in type(error).__name__ else errno.EIO)
    raise OSError(number, message)


_CREDENTIALS = {
    "s3": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN), or AWS_PROFILE; AWS_ENDPOINT_URL "
    "for another provider; FSSPEC_S3_ANON=true for a public bucket.",
    "gs": "Set GOOGLE_APPLICATION_CREDENTIALS to a key file, or log in with gcloud auth application-default login.",
}


def is_local(filesystem: Any) -> bool:
    """Whether the file system is the local one, where files can be synced and renamed."""
    return isinstance(filesystem, LocalFileSystem)


def join(root: str, *names: str) -> str:
    """A path or URL below another."""
    return "/".join([root.rstrip("/") or "/", *names]) if root != "/" else "/" + "/".join(names)
