"""Open the client libraries of object stores and web servers, with their own retries disabled.

s3fs, botocore and gcsfs retry on their own, each with its own waits, and fsspec's HTTP never does. Their retries are
disabled, so that the tries of `retrying` are the only ones and do not multiply. Only multipart uploads are left to the
libraries (`in_parts`): they repeat a single part, `retrying` could only repeat the whole file.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import fsspec

from owlsam_ray.storage.addresses import HostRules

Kind = Literal["s3", "gs", "http", "other"]
KINDS: dict[str, Kind] = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "http": "http", "https": "http"}
"""Kind by URL scheme, for the network file systems whose requests are known here."""
_SLOWEST_BYTES_PER_S = 100_000


@dataclass(frozen=True, slots=True)
class Client:
    """An open file system."""

    kind: Kind
    filesystem: Any
    errors: tuple[type[Exception], ...]
    """Errors that its operations may raise, besides programming errors."""
    timeout_s: float = 0.0

    def deadline_s(self, num_bytes: int = 0) -> float:
        """Seconds that a whole request may take, with `num_bytes` sent or received.

        The libraries detect only silence, and not always: aiohttp waits forever for a `100 Continue`, and for the rest
        after one that comes late.
        """
        return 2 * self.timeout_s + num_bytes / _SLOWEST_BYTES_PER_S

    @property
    def host(self) -> str | None:
        """The endpoint, unless it is part of the URL or the provider's own."""
        if self.kind == "s3":
            endpoint = getattr(getattr(getattr(self.filesystem, "_s3", None), "meta", None), "endpoint_url", None)
        else:
            endpoint = self.filesystem.base if self.kind == "gs" else None
        return None if endpoint is None or "amazonaws.com" in endpoint or "googleapis.com" in endpoint else endpoint


def open_client(
    protocol: str,
    *,
    timeout_s: float,
    concurrency: int,
    tries: int,
    in_parts: bool = False,
    allowed_hosts: tuple[str, ...] = (),
) -> Client:
    """The file system of a URL scheme. The same object for the same arguments, except with `in_parts`.

    Args:
        protocol: URL scheme.
        timeout_s: seconds until a connection attempt or a pending answer is given up.
        concurrency: maximum number of open connections.
        tries: tries per request; used only with `in_parts`.
        in_parts: for a large upload: each part is retried separately.
        allowed_hosts: web servers that are allowed although they are link-local.

    Raises:
        ValueError, ImportError: the scheme is unknown, or its package is not installed.
    """
    kind = KINDS.get(protocol, "other")
    if kind == "s3":
        return _open_s3(protocol, timeout_s, concurrency, tries if in_parts else None)
    if kind == "gs":
        return _open_gs(protocol, timeout_s, concurrency, in_parts)
    if kind == "http":
        return _open_http(protocol, timeout_s, concurrency, allowed_hosts)
    return Client(kind, fsspec.filesystem(protocol), (Exception,), timeout_s)  # its errors are not known


def _open_s3(protocol: str, timeout_s: float, concurrency: int, tries: int | None) -> Client:
    filesystem = fsspec.filesystem(
        protocol,
        use_listings_cache=False,
        skip_instance_cache=tries is not None,
        config_kwargs={
            "connect_timeout": timeout_s,
            "read_timeout": timeout_s,
            "max_pool_connections": concurrency,
            "retries": {"mode": "standard", "total_max_attempts": tries or 1},
        },
    )
    from aiohttp import ClientError as WebError
    from botocore.exceptions import BotoCoreError, ClientError  # type: ignore[import-untyped]

    if tries is None:
        filesystem.retries = 1  # s3fs counts the first try
    return Client("s3", filesystem, (OSError, ValueError, BotoCoreError, ClientError, WebError), timeout_s)


def _open_gs(protocol: str, timeout_s: float, concurrency: int, in_parts: bool) -> Client:
    implementation = fsspec.get_filesystem_class(protocol)
    import aiohttp
    from gcsfs.retry import ChecksumError, HttpError, NonRetryableError
    from google.api_core.exceptions import GoogleAPIError
    from google.auth.exceptions import GoogleAuthError

    filesystem = implementation(use_listings_cache=False, skip_instance_cache=in_parts)
    # A timeout argument would be seconds for a whole request; None, the default, means no timeout at all.
    filesystem.requests_timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    if filesystem.session is None and not filesystem.session_kwargs:
        filesystem.session_kwargs = fsspec.asyn.sync(filesystem.loop, _gs_session_options, concurrency)
    # Its six tries cannot be configured, so the undecorated function is called. A release without it keeps its tries.
    single = getattr(implementation._request, "__wrapped__", None)
    if single is not None and not in_parts:
        filesystem._request = functools.partial(single, filesystem)
    errors = (aiohttp.ClientError, HttpError, ChecksumError, NonRetryableError, GoogleAPIError, GoogleAuthError)
    return Client("gs", filesystem, (OSError, ValueError, *errors), timeout_s)


def _open_http(protocol: str, timeout_s: float, concurrency: int, allowed_hosts: tuple[str, ...]) -> Client:
    implementation = fsspec.get_filesystem_class(protocol)
    import aiohttp

    settings = {"timeout_s": timeout_s, "concurrency": concurrency, "allowed_hosts": allowed_hosts}
    filesystem = implementation(get_client=_web_session, client_kwargs=settings)
    return Client("http", filesystem, (OSError, ValueError, aiohttp.ClientError), timeout_s)


_AIOHTTP_CONNECTIONS = 100
"""aiohttp's default limit."""


async def _gs_session_options(concurrency: int) -> dict[str, Any]:
    """Options for a session with Google or a user's endpoint: proxies are used, hosts are not checked."""
    import aiohttp

    from owlsam_ray.storage.web import ProxiedRequest

    connector = {"connector": aiohttp.TCPConnector(limit=concurrency)} if concurrency > _AIOHTTP_CONNECTIONS else {}
    return connector | {"request_class": ProxiedRequest}


async def _web_session(*, loop: Any, timeout_s: float, concurrency: int, allowed_hosts: tuple[str, ...]) -> Any:
    import aiohttp

    from owlsam_ray.storage.web import CheckedResolver, checked_request

    rules = HostRules(allowed_hosts)
    connector = aiohttp.TCPConnector(limit=concurrency, resolver=CheckedResolver(rules))
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return aiohttp.ClientSession(loop=loop, connector=connector, timeout=timeout, request_class=checked_request(rules))
