"""Handle model calls that run out of GPU memory: detect them, and suggest a batch size that fits."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from owlsam_ray.errors import PreflightError

_Result = TypeVar("_Result")


def unless_out_of_memory(call: Callable[[], _Result]) -> _Result | None:
    """Return the result of a call; None if it runs out of memory.

    The error is dropped before returning, because it keeps alive the frames it passed through and their tensors.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return call()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the allocator's cached blocks may be too small
    return None


def does_not_fit(setting: str, size: int, call: Callable[[int], object], *, step: int = 1) -> PreflightError:
    """Create the error for a model call that runs out of memory; it names a size that fits, if there is one.

    Args:
        setting: name of the batch size in `resources`.
        size: the size that does not fit.
        call: makes the call with another size.
        step: tried sizes are multiples of this.
    """
    smaller = size // 2 // step * step
    while smaller >= step:
        if unless_out_of_memory(partial(call, smaller)) is not None:
            return PreflightError(
                f"a model call with resources.{setting} {size} runs out of GPU memory, but one with {smaller} does "
                f"not: run again with --set resources.{setting}={smaller}. This changes the numerics: a run with "
                "finished shards also needs --allow-numerics-change."
            )
        smaller = smaller // 2 // step * step
    return PreflightError(
        f"a model call runs out of GPU memory at any resources.{setting} ({size} was requested): use a GPU with "
        "more memory, set resources.dtype=bf16, or leave the GPU to one actor (resources.gpus_per_actor=1)."
    )
