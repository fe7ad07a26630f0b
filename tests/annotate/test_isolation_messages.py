"""Messages between a worker process and its parent: what is sent comes out equal, and no odd line is taken for one."""

import errno
import io
from pathlib import Path

import pytest

from owlsam_ray.annotate.isolation_messages import (
    Alive,
    Done,
    LabelGroup,
    MessageError,
    ModelRaised,
    Overran,
    Raised,
    Ready,
    Reply,
    Request,
    Setup,
    receive_replies,
    receive_requests,
    send,
)
from owlsam_ray.config.run import RunConfig
from owlsam_ray.config.vocabulary import Category
from owlsam_ray.errors import OwlsamError, PreflightError, WeightsError
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import allocate
from owlsam_ray.run.record import RunRecord
from owlsam_ray.vocabulary import Query

CONFIG = RunConfig.model_validate(
    {
        "run": "/runs/ü",
        "data": {"source": "folder", "images": "/images"},
        "vocabulary": {"categories": ["café"]},
        "detector": {"model": "fake"},
        "segment": {"model": "fake"},
        "suppress": {"thresholds": {"café": 0.25}},
    }
)
REQUESTS: list[Request] = [
    Setup(
        shard=7,
        folder="/tmp/x",
        config=CONFIG,
        record=RunRecord(
            owlsam_version="1",
            config=CONFIG.model_dump(mode="json"),
            categories=(Category(id=1, name="café"),),
            queries=(Query(label=0, prompts=("a café",)),),
            ids_per_image=100,
            layout_hash="0",
            numerics=({"dtype": "fp32"},),
        ),
        allocation=allocate(CONFIG.resources, num_cpus=2, num_gpus=0),
        models=ModelPaths(Path("/w/owl"), Path("/w/sam.pt")),
    ),
    LabelGroup(positions=(0, 5), path="/tmp/x/group-1.arrow"),
]
REPLIES: list[Reply] = [
    Ready(),
    Alive(),
    Done(stage_s={"decode": 0.1, "detect": 1e-9}),
    Overran(reason="hang: no end within 3 s", image_ids=(-(2**62), 2**62)),
    ModelRaised(reason="model_error: KeyError: '\\n\udcff'"),
    Raised(name="OSError", arguments=(28, None, "/ü")),
]


def test_messages_come_out_equal_one_a_line() -> None:
    requests, replies = io.StringIO(), io.StringIO()
    for request in REQUESTS:
        send(requests, request)
    for reply in REPLIES:
        send(replies, reply)
    assert replies.getvalue().isascii()
    assert len(replies.getvalue().splitlines()) == len(REPLIES)
    requests.seek(0)
    replies.seek(0)
    assert list(receive_requests(requests)) == REQUESTS
    assert list(receive_replies(replies)) == REPLIES


def test_a_cut_line_is_dropped() -> None:
    """Wherever the sender was killed."""
    whole = io.StringIO()
    for reply in (Ready(), Done(stage_s={"decode": 1.0})):
        send(whole, reply)
    first = len(whole.getvalue().splitlines()[0])
    for size in range(len(whole.getvalue())):
        received = list(receive_replies(io.StringIO(whole.getvalue()[:size])))
        assert received == ([Ready()] if size > first else [])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "Expecting value"),
        ("Segmentation fault", "Segmentation fault is not a message: Expecting value"),
        ("\ufffd\ufffd", "Expecting value"),
        ('{"kind": "ready"} {"kind": "ready"}', "Extra data"),
        ("[" * 100_000, "is not a message"),
        ("[]", "is not a message"),
        ("{}", "kind"),
        ('{"kind": "trouble", "reason": "?"}', "'trouble' found using 'kind' does not match"),
        ('{"kind": "group", "positions": [0], "path": "x"}', "'group' found"),
        ('{"kind": "done"}', "stage_s Field required"),
        ('{"kind": "done", "stage_s": {"decode": "long"}}', "unable to parse string as a number"),
        ('{"kind": "overrun", "reason": "r", "image_ids": ["x"]}', "unable to parse string as an integer"),
        ('{"kind": "alive", "more": 1}', "Extra inputs are not permitted"),
    ],
)
def test_what_is_not_a_reply_is_refused(line: str, words: str) -> None:
    received = receive_replies(io.StringIO(f'{{"kind": "ready"}}\n{line}\n{{"kind": "alive"}}\n'))
    assert next(received) == Ready()
    with pytest.raises(MessageError) as caught:
        next(received)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_reply_is_not_a_request() -> None:
    with pytest.raises(MessageError, match="'ready' found"):
        next(receive_requests(io.StringIO('{"kind": "ready"}\n')))


@pytest.mark.parametrize(
    "error",
    [
        WeightsError("no weights at /w"),
        PreflightError("a call does not fit"),
        ConnectionResetError("gone"),
        OSError(errno.ENOSPC, "No space left on device", "/x"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_in_the_parent(error: OwlsamError | OSError) -> None:
    stream = io.StringIO()
    send(stream, Raised.of(error))
    stream.seek(0)
    (reply,) = receive_replies(stream)
    assert isinstance(reply, Raised)
    raised = reply.error()
    assert (type(raised), str(raised)) == (type(error), str(error))
    assert getattr(raised, "errno", None) == getattr(error, "errno", None)
    assert getattr(raised, "filename", None) == getattr(error, "filename", None)


@pytest.mark.parametrize("name", ["SomeClientError", "MessageError", "SystemExit", "shown", "__doc__"])
def test_an_error_of_another_type_is_an_os_error(name: str) -> None:
    raised = Raised(name=name, arguments=("gone",)).error()
    assert (type(raised), str(raised)) == (OSError, "gone")
