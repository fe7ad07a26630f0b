"""What somebody else on the machine may try against the ports and sockets of a Ray: `python ray_attack.py REQUEST`.

REQUEST is JSON: `ports`, `folder`, `uid` (to become; null: stay, which is weaker). Prints what was not refused.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import socket
import sys
from typing import Any

import grpc
import ray.core.generated

_REFUSED = {"UNAUTHENTICATED", "UNIMPLEMENTED"}
"""The latter: this port has no such service."""
_PAGES = ("GET /", "GET /metrics", "GET /api/version", "POST /get_or_create_runtime_env", "POST /get_runtime_envs_info")
# Not among Ray's modules of Python.
_MORE = ("/ray.rpc.ObjectManagerService/Push", "/ray.rpc.ObjectManagerService/Pull", "/ray.rpc.RayletDriver/InitClient")


def methods() -> list[str]:
    """Every method of every service that Ray has."""
    found = set(_MORE)
    for module in pkgutil.iter_modules(ray.core.generated.__path__):
        if not module.name.endswith("_pb2"):
            continue
        described = importlib.import_module(f"ray.core.generated.{module.name}").DESCRIPTOR
        for service in described.services_by_name.values():
            found |= {f"/{service.full_name}/{method.name}" for method in service.methods}
    return sorted(found)


def ask_grpc(port: int, paths: list[str]) -> list[str] | None:
    """What answers in any other way than by a refusal; with no token, and now and then with a wrong one.

    None: the port speaks something else.
    """
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    try:
        grpc.channel_ready_future(channel).result(timeout=2)
    except grpc.FutureTimeoutError:
        return None
    asked = [
        (path, channel.unary_unary(path).future(b"", timeout=20, metadata=metadata))
        for path in paths
        for metadata in ((), (("authorization", "Bearer " + "0" * 64),))[: 1 + path.endswith("Info")]
    ]
    let_in = []
    for path, answer in asked:
        code = answer.code().name
        if code not in _REFUSED:
            let_in.append(f"{port} {path}: {code}")
    channel.close()
    return let_in


def ask_http(port: int) -> list[str]:
    """Pages that are given out."""
    let_in = []
    for page in _PAGES:
        request = f"{page} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        answer = b""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=3) as connection:
            connection.sendall(request.encode())
            connection.settimeout(1)
            answer = connection.recv(100)
        if answer.startswith(b"HTTP/1") and answer.split()[1] not in (b"401", b"403"):
            let_in.append(f"{port} {page}: {answer!r}")
    return let_in


def look_into(folder: str, sockets: list[str]) -> list[str]:
    """What of a folder can be seen, and which of its sockets takes a connection."""
    let_in = []
    with contextlib.suppress(PermissionError):
        let_in.append(f"{folder}: {os.listdir(folder)}")
    for path in sockets:
        with contextlib.suppress(PermissionError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            let_in.append(path)
    return let_in


def main(request: dict[str, Any]) -> None:
    paths = methods()
    if request["uid"] is not None:
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
        print(json.dumps(look_into(request["folder"], request["sockets"])))
    else:
        print("[]")
    answers = {port: ask_grpc(port, paths) for port in request["ports"]}
    print(json.dumps([each for found in answers.values() for each in found or ()]))
    print(json.dumps([each for port in request["ports"] for each in ask_http(port)]))
    print(json.dumps({"methods": len(paths), "grpc": sum(found is not None for found in answers.values())}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
