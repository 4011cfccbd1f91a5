"""A kernel of torch whose gradients are wrong, and that all models of this package leave out.

cuDNN's attention is what torch 2.11 to 2.13 take by default on an H100 or H200 where a mask is given. Its backward pass
gives a gradient that is no number where the padded length of a pass is 64 more than a multiple of 128 and a row sees
next to nothing, as padding does [1]. On an H200 four of four trainings of a plug beside SmolLM2-135M ended so, each at
its first pass of such a length (docs/cluster.md). torch's other kernels are clean. Without a gradient it gains little
here: it makes a plan for each new shape, and nearly every batch of texts has one of its own.

[1] https://github.com/pytorch/pytorch/issues/196678
"""

import torch


def leave_out_cudnn_attention() -> None:
    """Has this process compute attention by torch's other kernels; without a GPU this changes nothing."""
    torch.backends.cuda.enable_cudnn_sdp(False)
