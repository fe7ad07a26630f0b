"""What a process sets before it calls a model, so that results are the same in every process."""

import torch


def fix_arithmetic(torch_threads: int) -> None:
    """Set this process's torch up for results that can be had again.

    Args:
        torch_threads: of one model call on a CPU; part of the numerics id.
    """
    torch.set_num_threads(torch_threads)
    # fp32 means fp32 (TF32 keeps ten bits of it), and a convolution must not be another one from call to call.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
