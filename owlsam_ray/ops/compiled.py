"""Compile loops over bytes with numba, at their first call; cached on disk if that is writable."""

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function by numba, at its first call."""
    try:
        return numba.njit(function, cache=True, nogil=True)
    except RuntimeError:  # neither the package's folder nor the user's cache is writable
        return numba.njit(function, nogil=True)
