"""Set up torch in a process so that a model gives the same results in every process."""

import contextlib
from collections.abc import Iterator

import torch


def fix_arithmetic(torch_threads: int) -> None:
    """Set up this process's torch for reproducible results.

    Args:
        torch_threads: threads of one model call on a CPU; part of the numerics id.
    """
    torch.set_num_threads(torch_threads)
    # fp32 must be fp32 (TF32 keeps only ten bits of mantissa), and a convolution must use one algorithm in every call.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@contextlib.contextmanager
def restored_arithmetic() -> Iterator[None]:
    """Restore, at the end, everything that `fix_arithmetic` changes meanwhile."""
    threads = torch.get_num_threads()
    allow_tf32, deterministic = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.deterministic = allow_tf32, deterministic
