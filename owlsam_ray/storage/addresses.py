"""Check the hosts that URLs in data name: refuse link-local addresses and the metadata servers of clouds.

Clouds hand out credentials at link-local addresses to any process on the machine. A table of images that names such an
address, a host name that resolves to one, or a redirect to one, must not make a worker send a request there. Loopback
and private networks are allowed: clusters keep their images there.
"""

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from owlsam_ray.errors import InputError, shown

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA = tuple(
    ipaddress.ip_network(network)
    for network in (
        "100.100.100.200/32",  # Alibaba Cloud
        "168.63.129.16/32",  # Azure
        "192.0.0.192/32",  # Oracle Cloud, formerly
        "fd00:ec2::/32",  # Amazon
        "fd20:ce::254/128",  # Google
    )
)
_METADATA_NAMES = {
    "instance-data.ec2.internal",
    "metadata.azure.internal",
    "metadata.goog",
    "metadata.google.internal",
    "metadata.tencentyun.com",
}
"""Host names that resolve to such addresses; checked by name because a proxy may do the look-up."""
_HOLDS_IPV4_LAST = tuple(
    ipaddress.ip_network(network)
    for network in ("::/96", "::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48")
)
_6TO4 = ipaddress.ip_network("2002::/16")
_TEREDO = ipaddress.ip_network("2001::/32")

_WITH_HOST = frozenset({"dav", "ftp", "hdfs", "jlab", "jupyter", "sftp", "smb", "ssh", "webhdfs", "webHDFS"})
"""Schemes besides http whose URLs name the host that is contacted."""
_CHAINING = frozenset(
    {
        "archive", "async_wrapper", "asyncwrapper", "blockcache", "cached", "dask", "dir", "filecache", "generic",
        "git", "libarchive", "reference", "simplecache", "tar", "zip",
    }
)  # fmt: skip
"""Schemes that open another file system, possibly on another machine, named by the rest of the URL."""


class ForbiddenHostError(InputError):
    """An address leads to a host that data may not name."""


@dataclass(frozen=True, slots=True)
class HostRules:
    """Decides which hosts data may name, given the hosts that the user allows."""

    allowed: tuple[str, ...] = ()
    """Host names, `*.` before a domain for all names in it, addresses and networks (`169.254.7.0/24`)."""

    def allows_name(self, host: str) -> bool:
        """Whether a host is allowed by its name, whatever it resolves to."""
        name = _plain(host)
        return any(
            name == entry or (entry.startswith("*.") and name.endswith(entry[1:]))
            for entry in (_plain(each) for each in self.allowed)
        )

    def forbids(self, address: Address) -> bool:
        """Whether data may not name this address."""
        if not any(is_of_the_machine(each) for each in meanings(address)):
            return False
        networks = (_network(entry) for entry in self.allowed)
        return not any(network is not None and each in network for network in networks for each in meanings(address))

    def check_host(self, host: str, url: str) -> None:
        """Check the host of a URL by its text alone, without a look-up.

        Raises:
            ForbiddenHostError: it is a forbidden address, in any notation, or a well-known forbidden name.
        """
        if self.allows_name(host):
            return
        address = address_of(host)
        if _plain(host) in _METADATA_NAMES or (address is not None and self.forbids(address)):
            raise self.refusal(host, str(address or host), url)

    def choose(self, host: str, found: Sequence[str]) -> list[int]:
        """Indices of the addresses in `found`, to which a host name resolves, that may be contacted.

        Raises:
            ForbiddenHostError: there are addresses, and all of them are forbidden.
        """
        if self.allows_name(host):
            return list(range(len(found)))
        kept = [
            place
            for place, text in enumerate(found)
            if (address := address_of(text)) is None or not self.forbids(address)
        ]
        if found and not kept:
            raise self.refusal(host, found[0], host)
        return kept

    @staticmethod
    def refusal(host: str, address: str, url: str) -> ForbiddenHostError:
        """The error for a forbidden host."""
        where = f"leads to {address}" if address != host else "is an address"
        return ForbiddenHostError(
            f"cannot open {url}: the host {host} {where} where machines ask for their own credentials (link-local); "
            "where images do lie there, name it in storage.allowed_hosts"
        )


def check_entry(entry: str) -> str:
    """Check an entry of `HostRules.allowed`, and return it.

    Raises:
        ValueError: it is neither a name nor an address or a network.
    """
    name = _plain(entry)
    if _network(entry) is None and not re.fullmatch(r"(\*\.)?[^\s/*?#@:\[\]]+", name):
        raise ValueError(
            f"{shown(entry)} is not a host: give a name (images.example, *.example), an address or a network"
        )
    return entry


def is_of_the_machine(address: Address) -> bool:
    """Whether an address is link-local, or one where a cloud serves metadata about the machine itself."""
    return address.is_link_local or any(
        address in network for network in _METADATA if network.version == address.version
    )


def meanings(address: Address) -> list[Address]:
    """The address and the IPv4 addresses embedded in it: mapped, translated (NAT64), or at the end of a tunnel."""
    found: list[Address] = [address]
    if isinstance(address, ipaddress.IPv6Address):
        plain = ipaddress.IPv6Address(int(address))  # without the scope id (interface)
        if any(plain in network for network in _HOLDS_IPV4_LAST):
            found.append(ipaddress.IPv4Address(int(plain) & 0xFFFFFFFF))
        if plain in _6TO4:
            found.append(ipaddress.IPv4Address((int(plain) >> 80) & 0xFFFFFFFF))
        if plain in _TEREDO:
            found.append(ipaddress.IPv4Address(~int(plain) & 0xFFFFFFFF))
        found[0] = plain
    return found


def address_of(host: str) -> Address | None:
    """Parse a host as an address, in any notation that resolvers accept (`0xa9fea9fe`, `2852039166`); None: a name."""
    text = _plain(host)
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        pass
    if re.fullmatch(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", text):
        try:
            return ipaddress.IPv4Address(socket.inet_aton(text))
        except OSError:
            return None
    return None


def data_uri_error(uri: str, rules: HostRules) -> str | None:
    """Why a URI found in data is refused; None when it may be opened. Nothing is looked up.

    Args:
        uri: path or URL of an image.
        rules: decides which hosts are allowed.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.\-]*)://", uri)
    if scheme is None:
        return "it chains file systems" if "://" in uri else None
    name = scheme[1]
    if name.lower() in _CHAINING:
        return f"{name}:// opens other file systems"
    if name.lower() in ("http", "https") or name in _WITH_HOST:
        host = host_of(uri)
        try:
            rules.check_host(host, uri)
        except ForbiddenHostError as error:
            return str(error).partition(": ")[2]
    return None


def container_error(uri: str, rules: HostRules) -> str | None:
    """Why a tar or Parquet file named by a manifest is refused; None when it may be opened.

    Users may name such files through a chain of file systems (`simplecache::s3://…`). No link of the chain may lead to
    a host that data may not name. The hosts of a chain are looked up, since the clients inside it check nothing.
    """
    chain = uri.split("::")
    for link in chain:
        scheme, separator, _ = link.partition("://")
        host = host_of(link)
        if not separator or not host:
            continue
        if scheme.lower() == "generic":
            return data_uri_error(link, rules)
        try:
            if scheme.lower() in ("http", "https") or scheme in _WITH_HOST:
                rules.check_host(host, link)
                if len(chain) > 1 or needs_look_up(link):
                    check_by_look_up(link, rules)
        except ForbiddenHostError as error:
            return str(error).partition(": ")[2]
    return None


def needs_look_up(uri: str) -> bool:
    """Whether the URL's client cannot be given the address to contact, so that the name must be checked beforehand."""
    return uri.partition("://")[0] in _WITH_HOST


def check_by_look_up(uri: str, rules: HostRules) -> None:
    """Check the host of a URL by the addresses to which its name currently resolves.

    Raises:
        ForbiddenHostError: data may not name one of them.
    """
    host = host_of(uri)
    if not host or rules.allows_name(host):
        return
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return  # opening the URL will fail in the same way
    for text in found:
        address = address_of(text)
        if address is not None and rules.forbids(address):
            raise rules.refusal(host, text, uri)


def host_of(url: str) -> str:
    """The host in a URL, without brackets; empty if there is none."""
    authority = re.split(r"[/?#\\]", url.partition("://")[2], maxsplit=1)[0].rpartition("@")[2]
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.rpartition(":")[0] if re.search(r":\d*$", authority) else authority


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").casefold()


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(_plain(entry), strict=False)
    except ValueError:
        return None
