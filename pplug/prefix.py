"""The tokens before the persona rows, read once and without a gradient.

Nothing that is trained stands before the first row, and later positions change nothing of what earlier ones compute.
Keys and values of these tokens are therefore made without a graph, once for the whole batch where all prompts begin
alike (a chat template's head), and the rest of each prompt goes on from them. Beginnings that differ are whole prompts
(`layout.rows=after` or `last`): `KeptBeginnings` keeps what was computed of them for the next epoch.
Shapes: B samples, S tokens of the longest beginning, N layers of the LLM, K heads of keys, F width of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from pplug.llm import FrozenLLM
from pplug.memory import is_checkpointed
from pplug.parallel import is_sharded
from pplug.splice import Prompt

FEWEST = 8
"""Tokens of the longest beginning below which a pass of their own costs more than it saves."""
FAMILIES = ("llama", "qwen2", "qwen3")
"""Families that go on from stored keys and values as tested. A layer that sees a window of places would count the
padding between a beginning and its rest."""


class KeptBeginnings:
    """Keys and values of prompts' beginnings, on the CPU, as far as they fit in so many bytes."""

    def __init__(self, limit: float) -> None:
        self._room = limit
        self._known: dict[tuple[int, ...], Tensor] = {}

    def read(self, llm: FrozenLLM, befores: Sequence[list[int]]) -> Any:
        """transformers' cache of these beginnings, padded on the left; those that are not known are read first."""
        fresh = [before for before in dict.fromkeys(map(tuple, befores)) if before not in self._known]
        new: dict[tuple[int, ...], Tensor] = {}
        if fresh:
            layers = _read(llm, fresh)[0].layers
            for place, before in enumerate(fresh):
                new[before] = torch.stack(
                    [torch.stack([pair[place, :, -len(before) :] for pair in (own.keys, own.values)]) for own in layers]
                )  # (N, 2, K, S, F)
                if new[before].nbytes <= self._room:
                    self._room -= new[before].nbytes
                    self._known[before] = new[before]
        known = self._known | new
        found = [known[tuple(before)] for before in befores]
        longest = max(map(len, befores))
        cache = DynamicCache()
        for layer in range(len(found[0])):
            shape = (len(found), *found[0].shape[2:3], longest, found[0].shape[4])
            both = [found[0].new_zeros(shape) for _ in range(2)]
            for place, own in enumerate(found):
                for pair, padded in zip(own[layer], both, strict=True):
                    padded[place, :, longest - pair.shape[1] :] = pair
            cache.update(*both, layer)
        return cache


def read_before(
    llm: FrozenLLM, prompts: Sequence[Prompt], row_counts: Sequence[int], kept: KeptBeginnings | None = None
) -> tuple[Any, Tensor]:
    """Keys and values of the tokens before the persona rows.

    Args:
        row_counts: rows of each sample. Where a prompt has neither rows nor tokens behind its beginning, the reply is
            read off the beginning itself, and all prompts are read in one piece.
        kept: what is known of beginnings that differ, for an LLM on a CPU.

    Returns:
        transformers' cache of B samples, padded on the left, and its attention mask (B, S) int64; None and (B, 0) where
        the LLM reads its prompts in one piece.
    """
    befores = [prompt.before for prompt in prompts]
    ends_there = not all(n or prompt.after for n, prompt in zip(row_counts, prompts, strict=True))
    if ends_there or max(map(len, befores)) < FEWEST or not all(befores) or not can_read_ahead(llm.model):
        return None, torch.zeros(len(befores), 0, dtype=torch.long, device=llm.embedding.weight.device)
    if all(before == befores[0] for before in befores):
        cache, mask = _read(llm, befores[:1])
        cache.batch_repeat_interleave(len(befores))
        return cache, mask.expand(len(befores), -1)
    if kept is not None:
        return kept.read(llm, befores), _mask(befores)
    return _read(llm, befores)


def _mask(befores: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, befores))
    return torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in befores])


def _read(llm: FrozenLLM, befores: Sequence[Sequence[int]]) -> tuple[Any, Tensor]:
    """The cache of these beginnings, padded on the left, and its attention mask (B, S)."""
    device = llm.embedding.weight.device
    mask = _mask(befores).to(device)
    ids = torch.tensor([[0] * (mask.shape[1] - len(row)) + list(row) for row in befores], device=device)
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        read = llm.model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    return read.past_key_values, mask


def can_read_ahead(model: Any) -> bool:
    """True if a model's tokens may be read without a gradient before the rest: nothing in the model itself is trained,
    no layer is computed twice, which would add its keys and values to the cache twice, and other workers do not have to
    read along."""
    frozen = not any(parameter.requires_grad for parameter in model.parameters())
    return frozen and goes_on(model.config) and not is_checkpointed(model) and not is_sharded(model)


def goes_on(config: Any) -> bool:
    """True if a model of this config computes the same in two passes as in one, whatever stands between them."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    return config.model_type in FAMILIES and set(kinds) == {"full_attention"}
