"""Run a sequence of checks, report each in one line, and continue after failures."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

from owlsam_ray.errors import IncompleteError, OwlsamError

T = TypeVar("T")
P = ParamSpec("P")


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """Result of a step."""

    value: T
    detail: str
    """Text for the user."""
    error: OwlsamError | None = None
    """Failure of a step that still has a value."""


@dataclass(slots=True)
class Steps:
    """Runs and reports steps one by one; keeps the first error."""

    say: Callable[[str], None]
    reported: list[dict[str, Any]] = field(default_factory=list)
    first_error: OwlsamError | None = None

    def run(self, name: str, work: Callable[P, Done[T]], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Run a step and return its value; None if it raises."""
        start = time.monotonic()
        value = None
        try:
            done = work(*args, **kwargs)
            value, detail, error = done.value, done.detail, done.error
        except OwlsamError as raised:
            detail, error = "", raised
        except OSError as raised:
            detail, error = "", IncompleteError(f"storage error: {raised}")
        if error is not None:
            self.first_error = self.first_error or error
            detail = str(error.args[0])
        self._report(name, "✓" if error is None else "✗", time.monotonic() - start, detail)
        return value

    def skip(self, name: str) -> None:
        """Report that a step is not tried because a step it needs failed."""
        self._report(name, "–", 0.0, "not tried: a step that it needs failed")

    def _report(self, name: str, mark: str, seconds: float, detail: str) -> None:
        ok = {"✓": True, "✗": False}.get(mark)
        self.reported.append({"step": name, "ok": ok, "seconds": round(seconds, 1), "detail": detail})
        self.say(f"{mark} {name:<14} {seconds:6.1f} s  {detail}")
