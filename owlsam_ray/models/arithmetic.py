"""Set up torch in a process so that a model gives the same results in every process."""

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
