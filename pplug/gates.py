"""silu(g) * u of an MLP on a CPU, some rows at a time, so that what lies between its steps stays in the cache.

Operator by operator each step reads and writes tensors as wide as the MLP, of which a pass over some thousand tokens
has more than any cache holds. Its two inputs alone are kept for the backward.
Shapes: ... any, F width of the MLP.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_VALUES = 2**15
"""Number of values that are worked on at once: 128 KiB in float32."""
_TOLERANCE = 1e-5


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty_like(gate)
        for g, u, o in _pieces(gate, up, out):
            torch.mul(F.silu(g), u, out=o)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        for g, u, d, to_gate, to_up in _pieces(gate, up, grad.contiguous(), of_gate, of_up):
            torch.mul(F.silu(g), d, out=to_up)
            torch.ops.aten.silu_backward.grad_input(d * u, g, grad_input=to_gate)
        return of_gate, of_up


def _pieces(*tensors: Tensor) -> Any:
    rows = max(1, _VALUES // tensors[0].shape[-1])
    return zip(*(x.flatten(0, -2).split(rows) for x in tensors), strict=True)


def _forward(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


def use_quick_gates(model: nn.Module) -> int:
    """Gives this way of computing to every MLP on a CPU that makes down(silu(gate(x)) * up(x)) of x.

    An MLP counts as such when it has these three linear modules and gives the same on random values.

    Returns:
        How many were changed.
    """
    changed = 0
    for module in model.modules():
        names = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        if names != {"gate_proj", "up_proj", "down_proj"}:
            continue
        weight = module.gate_proj.weight
        if weight.device.type != "cpu" or "forward" in vars(module):
            continue
        x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        with torch.no_grad():
            if torch.allclose(module(x), _forward(module, x), rtol=_TOLERANCE, atol=_TOLERANCE):
                module.forward = _forward.__get__(module)
                changed += 1
    return changed
