"""Hosts that data may name, by what the text of an address tells."""

import socket
from typing import Any

import pytest

from owlsam_ray.errors import ImageError
from owlsam_ray.fetch.images import fetch_file
from owlsam_ray.storage.addresses import (
    ForbiddenHostError,
    HostRules,
    address_of,
    check_by_look_up,
    check_entry,
    data_uri_error,
    host_of,
)

HOSTS = [
    "169.254.169.254",
    "169.254.0.1",
    "169.254.169.254.",
    "2852039166",
    "0xa9fea9fe",
    "0xA9.0xFE.0xA9.0xFE",
    "0251.0376.0251.0376",
    "169.254.43518",
    "169.16689662",
    "fe80::1",
    "fe80::1%eth0",
    "febf::1",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "::169.254.169.254",
    "::ffff:0:169.254.169.254",
    "64:ff9b::169.254.169.254",
    "64:ff9b:1::a9fe:a9fe",
    "2002:a9fe:a9fe::",
    "2001:0:0:0:0:0:5601:5601",
    "fd00:ec2::254",
    "fd20:ce::254",
    "100.100.100.200",
    "168.63.129.16",
    "metadata.google.internal",
    "Metadata.Google.Internal.",
]


@pytest.mark.parametrize("host", HOSTS)
def test_addresses_of_the_machine_are_refused_in_any_notation(host: str) -> None:
    with pytest.raises(ForbiddenHostError, match=r"storage\.allowed_hosts"):
        HostRules().check_host(host, "a URL")


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "::1", "10.1.2.3", "192.168.1.1", "fd12::1", "8.8.8.8", "2130706433", "localhost", "a.example",
        "169.254.example", "64:ff9b::8.8.8.8", "100.100.100.201", "169.253.1.1", "0x", "1.2.3.4.5", "",
    ],
)  # fmt: skip
def test_other_hosts_are_taken(host: str) -> None:
    HostRules().check_host(host, "a URL")


@pytest.mark.parametrize(
    ("entry", "host"),
    [
        ("169.254.7.1", "169.254.7.1"),
        ("169.254.7.1", "::ffff:169.254.7.1"),
        ("169.254.7.1", "0xa9fe0701"),
        ("169.254.7.0/24", "169.254.7.200"),
        ("fe80::/10", "fe80::2"),
        ("[fe80::2]", "fe80::2"),
        ("Metadata.Google.Internal", "metadata.google.internal"),
        ("*.google.internal", "metadata.google.internal"),
    ],
)
def test_hosts_are_allowed_by_name_address_or_network(entry: str, host: str) -> None:
    assert check_entry(entry) == entry
    with pytest.raises(ForbiddenHostError):
        HostRules(("169.254.8.1", "other.example")).check_host(host, "a URL")
    HostRules(("other.example", entry)).check_host(host, "a URL")


@pytest.mark.parametrize("entry", ["http://h", "h:80", "a b", "a/b", "*", "169.254.0.0/99"])
def test_entries_that_are_no_hosts_are_refused(entry: str) -> None:
    with pytest.raises(ValueError, match="is not a host"):
        check_entry(entry)


def test_of_many_addresses_the_good_ones_are_asked() -> None:
    found = ["169.254.1.1", "10.0.0.1", "fe80::1%2", "::1"]
    assert HostRules().choose("h.example", found) == [1, 3]
    assert HostRules(("h.example",)).choose("h.example", found) == [0, 1, 2, 3]
    with pytest.raises(ForbiddenHostError, match=r"the host h\.example leads to 169\.254\.1\.1"):
        HostRules().choose("h.example", ["169.254.1.1", "fe80::1"])


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("generic://http://h/a.png", "generic:// opens other file systems"),
        ("GENERIC://file:///etc/passwd", "GENERIC:// opens other file systems"),
        ("reference://a.json", "reference:// opens other file systems"),
        ("zip://a.png::http://h/a.zip", "zip:// opens other file systems"),
        ("simplecache::http://h/a.png", "it chains file systems"),
        ("filecache::s3://bucket/a.png", "it chains file systems"),
        ("blockcache::file:///etc/passwd", "it chains file systems"),
        ("dask://h:1/a.png", "dask:// opens other file systems"),
        ("ftp://u:p@169.254.169.254:80/a.png", "the host 169.254.169.254 is an address where machines ask"),
        # Python 3.13 looks into such an address itself, so the rest of the sentence differs.
        ("http://[::ffff:169.254.169.254]:80/", "the host ::ffff:169.254.169.254 "),
        ("webhdfs://2852039166/a.png", "the host 2852039166 leads to 169.254.169.254 where"),
    ],
)
def test_uris_of_data_that_are_refused(uri: str, error: str) -> None:
    found = data_uri_error(uri, HostRules())
    assert found is not None
    assert found.startswith(error)
    with pytest.raises(ImageError) as caught:
        fetch_file(uri, max_bytes=10)
    assert caught.value.reason.startswith("bad_uri: cannot open ")
    assert error in caught.value.reason
    assert str(caught.value.failure_class) == "permanent"


@pytest.mark.parametrize(
    "uri",
    ["/data/a::b.png", "a.png", "s3://bucket/a::b.png", "gs://b/169.254.169.254", "https://h:443/a.png", "file:///a.png",
     "memory://a", "hf://datasets/a/b/c.png", "ftp://h/a.png", "http://127.0.0.1/a", "http://10.0.0.1/a"],
)  # fmt: skip
def test_uris_of_data_that_are_taken(uri: str) -> None:
    assert data_uri_error(uri, HostRules()) is None


@pytest.mark.parametrize(
    ("url", "host"),
    [("ftp://u:p@h:21/a", "h"), ("http://[fe80::1%25x]:80/", "fe80::1%25x"), ("http://h", "h"), ("http://h?x@y", "h")],
)
def test_the_host_of_a_url(url: str, host: str) -> None:
    assert host_of(url) == host


def test_names_are_looked_up_where_the_client_looks_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(host: str, *_: Any, **__: Any) -> list[Any]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("169.254.169.254" if host == "evil.test" else "10.1.1.1", 0))
        ]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    check_by_look_up("ftp://good.test/a.png", HostRules())
    check_by_look_up("ftp://evil.test/a.png", HostRules(("evil.test",)))
    with pytest.raises(ForbiddenHostError, match=r"the host evil\.test leads to 169\.254\.169\.254"):
        check_by_look_up("ftp://evil.test/a.png", HostRules())


def test_addresses_in_old_notations() -> None:
    assert str(address_of("0x7f.1")) == "127.0.0.1"
    assert address_of("a.example") is None
    assert address_of("999.1.1.1") is None
