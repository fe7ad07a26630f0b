"""Python processes that find this module first see a wall clock that jumps: by the seconds in $OWLSAM_TEST_CLOCK."""

import os
import time

_real = time.time
_real_gmtime = time.gmtime
_file = os.environ.get("OWLSAM_TEST_CLOCK")


def _jump() -> float:
    try:
        with open(_file or "", encoding="ascii") as file:
            return float(file.read() or 0.0)
    except (OSError, ValueError):
        return 0.0


def _time() -> float:
    return _real() + _jump()


def _gmtime(seconds: float | None = None) -> time.struct_time:
    return _real_gmtime(_time() if seconds is None else seconds)


if _file:
    setattr(time, "time", _time)  # noqa: B010 (by a name that no type checker looks up)
    setattr(time, "gmtime", _gmtime)  # noqa: B010
