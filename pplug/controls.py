"""The control of another person: the same method with what belongs to somebody else."""

from collections.abc import Sequence
from typing import TypeVar

from pplug.identity import stable_int

T = TypeVar("T")


def drawn_for(owner_id: str, others: Sequence[T]) -> T:
    """One of what belongs to other people, drawn by the person's id, so that every run draws alike.

    Args:
        others: at least one.
    """
    return others[stable_int(f"other:{owner_id}") % len(others)]
