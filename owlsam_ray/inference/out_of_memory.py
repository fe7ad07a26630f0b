"""Calls that may not fit into memory: smaller ones instead, or what to set."""

import contextlib
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch

from owlsam_ray.errors import PreflightError

_Result = TypeVar("_Result")


def unless_out_of_memory(call: Callable[[], _Result]) -> _Result | None:
    """What a call gives; None when memory runs out.

    Nothing of a failed call is left then: as long as its error lives, so do the frames that it came through, and their
    tensors.
    """
    with contextlib.suppress(torch.OutOfMemoryError):
        return call()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the allocator keeps for later may be in pieces that are too small
    return None


def does_not_fit(setting: str, size: int, call: Callable[[int], object], *, step: int = 1) -> PreflightError:
    """The error of a model call that runs out of memory, with the size that fits.

    Args:
        setting: of `resources`.
        size: that does not fit.
        call: makes a call of another size.
        step: sizes are multiples of it.
    """
    smaller = size // 2 // step * step
    while smaller >= step:
        if unless_out_of_memory(partial(call, smaller)) is not None:
            return PreflightError(
                f"a model call with resources.{setting} {size} runs out of GPU memory, and one with {smaller} does "
                f"not: call again with --set resources.{setting}={smaller}. That is other numerics: a run that has "
                "finished shards needs --allow-numerics-change as well."
            )
        smaller = smaller // 2 // step * step
    return PreflightError(
        f"a model call runs out of GPU memory, whatever resources.{setting} is ({size} was asked for): take a GPU with "
        "more memory, set resources.dtype=bf16, or leave the GPU to one actor (resources.gpus_per_actor=1)."
    )
