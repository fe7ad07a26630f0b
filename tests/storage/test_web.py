"""Web servers behind proxies, redirects, names that change, and metadata servers, all on loopback."""

import contextlib
import ipaddress
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from owlsam_ray import storage
from owlsam_ray.errors import ImageError
from owlsam_ray.fetch.images import fetch_file, fetch_rows
from owlsam_ray.storage import StoragePolicy, addresses

Answer = tuple[int, dict[str, str], bytes]
PROXY_NAMES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass
class Server:
    """A web server on loopback that answers by a function of method and path, and remembers who asked."""

    answer: Callable[[str, str], Answer]
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [path for _, path, _ in self.asked]


@contextlib.contextmanager
def serving(answer: Callable[[str, str], Answer]) -> Iterator[Server]:
    server = Server(answer)

    class Handler(BaseHTTPRequestHandler):
        timeout = 1

        def _any(self) -> None:
            server.asked.append((self.command, self.path, dict(self.headers)))
            status, headers, body = server.answer(self.command, self.path)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_CONNECT = _any  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = False  # its end waits for them, so that no socket is left
    server.port = listener.server_address[1]
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    listener.shutdown()
    listener.server_close()


def picture(_: str, __: str) -> Answer:
    return 200, {}, b"picture"


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxies of this machine, clients of their own, no second tries."""
    for name in PROXY_NAMES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    storage.forget_clients()
    storage.configure(StoragePolicy(retries=0, timeout_s=20))
    yield
    storage.configure(StoragePolicy())
    storage.forget_clients()


def allow(*hosts: str) -> None:
    storage.configure(StoragePolicy(retries=0, timeout_s=20, allowed_hosts=hosts))


def reason_of(url: str) -> str:
    with pytest.raises(ImageError) as caught:
        fetch_file(url, max_bytes=100)
    return caught.value.reason


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Names under .test and what they lead to, an entry a look-up; the last one stays."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *arguments: Any, **named: Any) -> Any:
        if host not in known:
            return real(host, port, *arguments, **named)
        address = known[host].pop(0) if len(known[host]) > 1 else known[host][0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """127.0.0.1 as the address of a metadata server."""
    networks = (*addresses._METADATA, ipaddress.ip_network("127.0.0.1/32"))
    monkeypatch.setattr(addresses, "_METADATA", networks)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/a.tar",
        "simplecache::http://169.254.169.254/a.tar",
        "zip://a.tar::http://2852039166/a.zip",
        "filecache::http://evil.test/a.tar",
        "generic://http://169.254.169.254/a.tar",
        "ftp://evil.test/a.tar",
    ],
)
@pytest.mark.parametrize("container", ["tar", "parquet"])
def test_files_of_many_images_may_lie_nowhere_else_either(
    url: str, container: str, names: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection was made")

    names["evil.test"] = ["169.254.169.254"]
    monkeypatch.setattr(socket.socket, "connect", connect)
    row = {"uri": url, "container": container, "member": "image", "offset": 0, "length": 10}
    (outcome,) = fetch_rows([row], threads=1, max_bytes=100)
    assert isinstance(outcome, ImageError)
    assert outcome.reason.startswith("bad_uri: cannot open ")


def test_a_chain_that_the_user_wrote_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    row = {
        "uri": f"simplecache::file://{tmp_path}/a.tar",
        "container": "tar",
        "member": "image",
        "offset": 2,
        "length": 3,
    }
    assert fetch_rows([row], threads=1, max_bytes=100) == [b"234"]


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://ann:pw@169.254.169.254/?token=1",
        "http://[::ffff:169.254.169.254]/",
        "http://[64:ff9b::a9fe:a9fe]/",
        "http://[fe80::1]/",
        "http://[fd00:ec2::254]/",
        "http://100.100.100.200/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://0251.0376.0251.0376/",
        "https://169.254.169.254/",
        "http://metadata.google.internal/computeMetadata/v1/",
    ],
)
def test_addresses_are_refused_before_anything_is_sent(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(socket.socket, "connect", connect)
    reason = reason_of(url)
    assert reason.startswith("bad_uri: cannot open ")
    assert "storage.allowed_hosts" in reason
    assert "pw" not in reason
    assert "token" not in reason


def test_names_are_judged_by_what_they_lead_to(names: dict[str, list[str]]) -> None:
    names["evil.test"] = ["169.254.169.254"]
    assert "the host evil.test leads to 169.254.169.254" in reason_of("http://evil.test/a.png")


def test_a_name_that_changes_gets_no_second_look_up(names: dict[str, list[str]], guarded: None) -> None:
    with serving(picture) as server:
        names["rebind.test"] = ["127.0.0.2", "127.0.0.1"]  # only the first one may be asked; nobody listens there
        url = f"http://rebind.test:{server.port}/a.png"
        assert reason_of(url).startswith("fetch_failed: ClientConnectorError")
        storage.forget_clients()
        assert "the host rebind.test leads to 127.0.0.1" in reason_of(url)
        assert server.asked == []


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/", "http://2852039166/", "http://evil.test/", "http://[::ffff:169.254.169.254]/",
     "file:///etc/passwd"],
)  # fmt: skip
def test_redirects_are_judged_like_addresses(target: str, names: dict[str, list[str]]) -> None:
    names["evil.test"] = ["169.254.169.254"]
    with serving(lambda _, __: (302, {"Location": target}, b"")) as server:
        assert reason_of(f"{server.url}/a.png").startswith("bad_uri: ")
        assert server.paths == ["/a.png"]


def test_redirects_elsewhere_are_followed() -> None:
    with serving(picture) as other, serving(lambda _, __: (302, {"Location": f"{other.url}/b.png"}, b"")) as server:
        assert fetch_file(f"{server.url}/a.png", max_bytes=100) == b"picture"
        assert other.paths == ["/b.png"]


def test_sizes_are_asked_of_no_other_hosts() -> None:
    for call in (storage.num_bytes, storage.exists, storage.read_bytes):
        with pytest.raises(addresses.ForbiddenHostError):
            call("http://169.254.169.254/a.png")


@pytest.mark.parametrize("allowed", ["127.0.0.1", "127.0.0.0/8", "home.test"])
def test_allowed_hosts_are_asked(allowed: str, names: dict[str, list[str]], guarded: None) -> None:
    names["home.test"] = ["127.0.0.1"]
    with serving(picture) as server:
        url = f"http://home.test:{server.port}/a.png"
        assert "the host home.test leads to 127.0.0.1" in reason_of(url)
        allow(allowed)
        assert fetch_file(url, max_bytes=100) == b"picture"


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_a_proxy_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(picture) as proxy:
        monkeypatch.setenv(name, f"http://ann:pw@127.0.0.1:{proxy.port}")
        assert fetch_file("http://images.invalid/a.png?x=1", max_bytes=100) == b"picture"
        method, path, headers = proxy.asked[0]
        assert (method, path) == ("GET", "http://images.invalid/a.png?x=1")
        assert headers["Proxy-Authorization"] == "Basic YW5uOnB3"


def test_a_proxy_without_a_scheme_and_for_other_hosts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(picture) as proxy, serving(picture) as server:
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy.port}")
        for excepted in ("127.0.0.1", "localhost,127.0.0.1", "127.0.0.0/8", "*", f"127.0.0.1:{server.port}"):
            for name in ("no_proxy", "NO_PROXY"):
                monkeypatch.setenv(name, excepted)
                assert fetch_file(f"{server.url}/a.png", max_bytes=100) == b"picture"
                monkeypatch.delenv(name)
        assert len(server.asked) == 10
        assert proxy.asked == []
        monkeypatch.setenv("no_proxy", "images.invalid,10.0.0.0/8")
        assert fetch_file(f"{server.url}/a.png", max_bytes=100) == b"picture"
        assert proxy.paths == [f"{server.url}/a.png"]


def test_https_goes_through_a_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda _, __: (403, {}, b"")) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        reason_of("https://images.invalid/a.png")
        assert [(method, path) for method, path, _ in proxy.asked] == [("CONNECT", "images.invalid:443")]


def test_behind_a_proxy_addresses_and_known_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(picture) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        for host in ("169.254.169.254", "2852039166", "[fe80::1]", "metadata.google.internal"):
            assert "storage.allowed_hosts" in reason_of(f"http://{host}/a.png")
        assert proxy.asked == []


def test_a_proxy_may_stand_anywhere(
    monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]], guarded: None
) -> None:
    names["proxy.test"] = ["127.0.0.1"]
    with serving(picture) as proxy:
        monkeypatch.setenv("http_proxy", f"http://proxy.test:{proxy.port}")
        assert fetch_file("http://images.invalid/a.png", max_bytes=100) == b"picture"


def test_passwords_of_netrc_go_nowhere(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("default login ann password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serving(picture) as server:
        fetch_file(f"{server.url}/a.png", max_bytes=100)
        assert "Authorization" not in server.asked[0][2]


def test_gcs_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(picture) as proxy:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://gcs.invalid:80")
        monkeypatch.setenv("http_proxy", proxy.url)
        assert storage.read_range("gs://bucket/a.png", 0, 100) == b"picture"
        assert proxy.paths[-1].startswith("http://gcs.invalid")  # google's own search for credentials goes before


def test_s3_goes_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(picture) as proxy:
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "eu"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.invalid")
        monkeypatch.setenv("http_proxy", proxy.url)
        assert storage.read_range("s3://bucket/a.png", 0, 100) == b"picture"
        assert proxy.paths[0].startswith("http://s3.invalid/bucket/a.png")


def test_a_metadata_server_still_gives_credentials(
    monkeypatch: pytest.MonkeyPatch, guarded: None, tmp_path: Any
) -> None:
    role = {"Code": "Success", "AccessKeyId": "ASIAROLE", "SecretAccessKey": "x", "Token": "t", "Type": "AWS-HMAC"}
    role |= {"LastUpdated": "2020-01-01T00:00:00Z", "Expiration": "2099-01-01T00:00:00Z"}

    def metadata(method: str, path: str) -> Answer:
        if path == "/latest/api/token":
            return 200, {"X-aws-ec2-metadata-token-ttl-seconds": "600"}, b"token"
        is_list = path.endswith("security-credentials/")
        return 200, {}, b"role" if is_list else json.dumps(role).encode()

    with serving(metadata) as cloud, serving(picture) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, str(tmp_path / "none"))
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", cloud.url)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        assert storage.read_range("s3://bucket/a.png", 0, 100) == b"picture"
        assert "ASIAROLE" in server.asked[0][2]["Authorization"]
        assert "storage.allowed_hosts" in reason_of(f"{cloud.url}/latest/meta-data/")
