"""Send requests to web servers through the environment's proxies, and never to a host that data may not name.

Both are decided for each request, including redirects. A name is looked up once: the address that was checked is the
one that is connected to. A proxy looks names up itself, so that with a proxy only addresses in the URL can be checked.
"""

import ipaddress
import socket
from typing import Any
from urllib.request import getproxies, proxy_bypass

import aiohttp
import yarl
from aiohttp.abc import AbstractResolver, ResolveResult

from owlsam_ray.storage.addresses import HostRules, address_of
from owlsam_ray.storage.secrets import masked_url


def proxy_for(url: yarl.URL) -> yarl.URL | None:
    """The proxy that the environment names for a URL: `http_proxy`, `https_proxy`, `all_proxy`, except for `no_proxy`.

    Lower or upper case, as urllib reads them; in addition, `no_proxy` may list networks (`10.0.0.0/8`). Proxies of
    kinds other than http and https are not used.
    """
    proxies = getproxies()
    text = proxies.get(url.scheme) or proxies.get("all")
    host = url.raw_host
    if not text or not host or proxy_bypass(f"[{host}]:{url.port}" if ":" in host else f"{host}:{url.port}"):
        return None
    address = address_of(host)
    for entry in proxies.get("no", "").split(","):
        entry = entry.strip().strip("[]")
        if entry == host:
            return None
        try:
            if address is not None and "/" in entry and address in ipaddress.ip_network(entry, strict=False):
                return None
        except ValueError:
            continue
    proxy = yarl.URL(text if "://" in text else f"http://{text}")
    return proxy if proxy.scheme in ("http", "https") and proxy.host else None


class ProxiedRequest(aiohttp.ClientRequest):
    """A request that goes through the environment's proxy.

    aiohttp's own `trust_env` would also send passwords from the user's `.netrc` to hosts named by data, and it fails
    where `.netrc` has an entry for a host that is accessed with a token.
    """

    def __init__(self, method: str, url: yarl.URL, *, proxy: yarl.URL | None = None, **options: Any) -> None:
        proxy = proxy or proxy_for(url)
        if proxy is not None and proxy.user is not None:
            options["proxy_auth"] = aiohttp.BasicAuth.from_url(proxy)
            proxy = proxy.with_user(None)
        super().__init__(method, url, proxy=proxy, **options)


def checked_request(rules: HostRules) -> type[ProxiedRequest]:
    """A request class that refuses hosts that data may not name, as far as the URL's text shows."""

    class CheckedRequest(ProxiedRequest):
        def __init__(self, method: str, url: yarl.URL, **options: Any) -> None:
            rules.check_host(url.raw_host or "", masked_url(str(url)))
            super().__init__(method, url, **options)

    return CheckedRequest


class CheckedResolver(AbstractResolver):
    """Resolves names to addresses, without those that data may not name."""

    def __init__(self, rules: HostRules, resolver: AbstractResolver | None = None) -> None:
        self._rules = rules
        self._resolver = resolver or aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Look up a name.

        Raises:
            ForbiddenHostError: all its addresses are forbidden.
        """
        found = await self._resolver.resolve(host, port, family)
        if host in _proxy_hosts():  # the user's choice
            return found
        return [found[place] for place in self._rules.choose(host, [entry["host"] for entry in found])]

    async def close(self) -> None:
        """Close the wrapped resolver."""
        await self._resolver.close()


def _proxy_hosts() -> set[str | None]:
    texts = [text for name, text in getproxies().items() if name in ("http", "https", "all")]
    return {yarl.URL(text if "://" in text else f"http://{text}").raw_host for text in texts}
