"""B A x of many users in one long row of tokens, in few passes over memory.

Operator by operator, torch would keep the input times its mask beside the input, join and split the users' values for
the forward pass and once more for the backward. Here each user's products write to their own part of one tensor, and
the masked input is made again in the backward pass. A user's products have shapes of that user alone.
Shapes: M tokens of all users, T of one, H width of the input, O of the output, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Down(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MH: Tensor, scale: float, sizes: Sequence[int], masks: Sequence[Tensor], *a_rH: Tensor
    ) -> Tensor:
        low = torch.empty(len(x_MH), len(a_rH[0]), device=x_MH.device)
        for x, mask, a, out in zip(x_MH.split(sizes), masks or [None] * len(a_rH), a_rH, low.split(sizes), strict=True):
            torch.mm(_masked(x, mask), a.t(), out=out)
        ctx.scale, ctx.sizes, ctx.users = scale, sizes, len(a_rH)
        ctx.save_for_backward(x_MH, *a_rH, *masks)
        return low.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Mr: Tensor) -> tuple[Tensor | None, ...]:
        x_MH, *rest = ctx.saved_tensors
        a_rH, masks = rest[: ctx.users], rest[ctx.users :] or [None] * ctx.users
        of_a: list[Tensor | None] = [None] * ctx.users
        of_x = torch.empty(x_MH.shape, device=x_MH.device) if ctx.needs_input_grad[0] else None
        into = of_x.split(ctx.sizes) if of_x is not None else [None] * ctx.users
        scaled = (grad_Mr * ctx.scale).split(ctx.sizes)
        for user, (x, mask, a, grad, out) in enumerate(
            zip(x_MH.split(ctx.sizes), masks, a_rH, scaled, into, strict=True)
        ):
            if ctx.needs_input_grad[4 + user]:
                of_a[user] = torch.mm(grad.t(), _masked(x, mask))
            if out is not None:
                torch.mm(grad, a, out=out)
                if mask is not None:
                    out.mul_(mask)
        return (None if of_x is None else of_x.to(x_MH.dtype)), None, None, None, *of_a


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_MO: Tensor, low_Mr: Tensor, sizes: Sequence[int], *b_Or: Tensor) -> Tensor:
        delta = torch.empty(out_MO.shape, device=out_MO.device)
        for low, b, into in zip(low_Mr.split(sizes), b_Or, delta.split(sizes), strict=True):
            torch.mm(low, b.t(), out=into)
        ctx.sizes = sizes
        ctx.save_for_backward(low_Mr, *b_Or)
        return delta.add_(out_MO).to(out_MO.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:
        low_Mr, *b_Or = ctx.saved_tensors
        of_low = torch.empty_like(low_Mr)
        of_b: list[Tensor | None] = [None] * len(b_Or)
        parts = zip(
            low_Mr.split(ctx.sizes), b_Or, grad_MO.float().split(ctx.sizes), of_low.split(ctx.sizes), strict=True
        )
        for user, (low, b, grad, into) in enumerate(parts):
            torch.mm(grad, b, out=into)
            if ctx.needs_input_grad[3 + user]:
                of_b[user] = torch.mm(grad.t(), low)
        return grad_MO, of_low, None, *of_b


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x.float() if mask is None else x.float() * mask


def down(x_MH: Tensor, a_rH: Sequence[Tensor], masks: Sequence[Tensor], scale: float, sizes: Sequence[int]) -> Tensor:
    """`scale` A x of each user's tokens, (M, r) float32.

    Args:
        masks: (T, H) float32 of each user, by which x is multiplied; none: it is taken as it is.
        sizes: number of tokens of each user.
    """
    return _Down.apply(x_MH, scale, sizes, masks, *a_rH)


def add_up(out_MO: Tensor, low_Mr: Tensor, b_Or: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """out + B low of each user's tokens: summed in float32, and of the type of `out`."""
    return _AddUp.apply(out_MO, low_Mr, sizes, *b_Or)
