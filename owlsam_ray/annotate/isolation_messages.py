"""Messages between `isolate.py` and its worker process: one JSON object per line, over pipes.

The parent sends one `Setup`, then one `LabelGroup` after another. The worker sends `Ready` once its models are loaded,
`Alive` every second, and `Done` for each group; or, before it ends itself, why: `Overran`, `ModelRaised` or `Raised`.
"""

import builtins
import json
from collections.abc import Iterator
from typing import IO, Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from owlsam_ray import errors
from owlsam_ray.config.run import RunConfig
from owlsam_ray.errors import OwlsamError, one_line
from owlsam_ray.models.weights import ModelPaths
from owlsam_ray.parallel.allocation import Allocation
from owlsam_ray.run.record import RunRecord


class MessageError(OSError):
    """A line is not a message."""


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Setup(_Message):
    """The shard, and everything that the worker needs to label its images."""

    kind: Literal["setup"] = "setup"
    shard: int
    folder: str
    """Local folder for the worker's slot file."""
    config: RunConfig
    record: RunRecord
    allocation: Allocation
    models: ModelPaths


class LabelGroup(_Message):
    """Label some images of the shard."""

    kind: Literal["group"] = "group"
    positions: tuple[int, ...]
    """Positions in the shard."""
    path: str
    """Arrow file for the rows."""


class Ready(_Message):
    """The models are loaded."""

    kind: Literal["ready"] = "ready"


class Alive(_Message):
    """The worker makes progress, or waits for a group."""

    kind: Literal["alive"] = "alive"


class Done(_Message):
    """The rows of a group are in its file, in any order."""

    kind: Literal["done"] = "done"
    stage_s: dict[str, float]
    """Busy seconds of each stage."""


class Overran(_Message):
    """Images hang or use too much memory (see `inference.watchdog.Overrun`)."""

    kind: Literal["overrun"] = "overrun"
    reason: str
    image_ids: tuple[int, ...]


class ModelRaised(_Message):
    """Labelling raised an exception that one of the images may have caused."""

    kind: Literal["model_error"] = "model_error"
    reason: str


class Raised(_Message):
    """An error that no image caused."""

    kind: Literal["error"] = "error"
    name: str
    """Name of the error's type."""
    arguments: tuple[int | str | None, ...]

    @classmethod
    def of(cls, error: OwlsamError | OSError) -> Self:
        """Describe an error such that an equal one can be created."""
        if isinstance(error, OSError) and error.errno is not None:
            file_names = [error.filename] if isinstance(error.filename, str) else []
            return cls(name=type(error).__name__, arguments=(error.errno, error.strerror, *file_names))
        return cls(name=type(error).__name__, arguments=(str(error),))

    def error(self) -> OwlsamError | OSError:
        """Create the error again; one of an unknown type, such as a storage client's, becomes an OSError."""
        kind: Any = getattr(errors, self.name, getattr(builtins, self.name, None))
        if not (isinstance(kind, type) and issubclass(kind, (OwlsamError, OSError))):
            kind = OSError
        return kind(*self.arguments)


Request = Setup | LabelGroup
Reply = Ready | Alive | Done | Overran | ModelRaised | Raised
M = TypeVar("M")
_REQUESTS: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_REPLIES: TypeAdapter[Reply] = TypeAdapter(Annotated[Reply, Field(discriminator="kind")])


def send(stream: IO[str], message: Request | Reply) -> None:
    """Write a message as one line, and flush.

    Raises:
        OSError: the other end is gone.
    """
    stream.write(json.dumps(message.model_dump(mode="json")) + "\n")
    stream.flush()


def receive_requests(stream: IO[str]) -> Iterator[Request]:
    """Yield the requests of a stream until it ends.

    A last line without a line end is dropped: the sender was killed while it wrote it.

    Raises:
        MessageError: a line is not a request.
    """
    return _receive(stream, _REQUESTS)


def receive_replies(stream: IO[str]) -> Iterator[Reply]:
    """Yield the replies of a stream, as `receive_requests` does requests.

    Raises:
        MessageError: a line is not a reply.
    """
    return _receive(stream, _REPLIES)


def _receive(stream: IO[str], messages: TypeAdapter[M]) -> Iterator[M]:
    for line in stream:
        if not line.endswith("\n"):
            return
        try:
            message = messages.validate_python(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise MessageError(f"{one_line(line, 80)} is not a message: {one_line(error)}") from None
        yield message
