"""Items of several users as tensors: what a plug computes personas from.

Shapes: B users, T items of all users (ragged), D encoder width, P persona tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pplug.items import UserItems


class ItemFacts(NamedTuple):
    """Facts about items beside their vectors; a plug that uses them refuses to go without."""

    labels_T: Tensor | None = None
    """Row of each item's label among the plug's, (T,) int64, or token ids of its answer, (T, P); below 0: none."""
    days_T: Tensor | None = None
    """Age of each item in days; zeros for all items of a user whose times are not known."""


NO_FACTS = ItemFacts()


def ragged(items: Sequence[UserItems], dim: int, device: Any) -> tuple[Tensor, Tensor, ItemFacts]:
    """Items of several users as `PersonaPlug.personas` takes them: vectors (T, D) float32, owners (T,), and facts.

    Args:
        dim: D; the vectors of a user without any may have no width.
    """
    vectors = np.concatenate([own.vectors.reshape(-1, dim) for own in items])
    owners = np.repeat(np.arange(len(items)), [len(own) for own in items])
    labels, days = _joined([own.labels for own in items]), _joined([own.days for own in items])

    def on_device(values: np.ndarray | None, kind: type) -> Any:
        return None if values is None else torch.from_numpy(values.astype(kind)).to(device)

    facts = ItemFacts(on_device(labels, np.int64), on_device(days, np.float32))
    return on_device(vectors, np.float32), on_device(owners, np.int64), facts


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
