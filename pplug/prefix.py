"""The tokens before the persona rows, read once and without a gradient.

Nothing that is trained stands before the first row, and later positions change nothing of what earlier ones compute.
Keys and values of these tokens are therefore made without a graph, once for the whole batch where all prompts begin
alike (a chat template's head), and the rest of each prompt goes on from them. Beginnings that differ are whole prompts
(`layout.rows=after` or `last`): what they have in common, which is the template's head and the task's own words, is
read once as well, and `KeptBeginnings` keeps what was computed for the next epoch.
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

    def __init__(self, limit: float, befores: Sequence[list[int]]) -> None:
        """`befores`: all beginnings that may be asked for."""
        self._room = limit
        self._head = common_head(befores)
        self._head_pairs: Tensor | None = None
        self._known: dict[tuple[int, ...], Tensor] = {}

    def read(self, llm: FrozenLLM, befores: Sequence[list[int]]) -> tuple[Any, Tensor]:
        """transformers' cache of these beginnings and its attention mask, as `read_before` gives them; those that are
        not known are read first."""
        at = len(self._head)
        if at and self._head_pairs is None:
            cache, _ = _pass(llm, [self._head])
            self._head_pairs = torch.stack([torch.stack([own.keys, own.values]) for own in cache.layers])
        rests = [tuple(before[at:]) for before in befores]
        fresh = [rest for rest in dict.fromkeys(rests) if rest not in self._known]
        new: dict[tuple[int, ...], Tensor] = {}
        if fresh:
            layers = _pass(llm, fresh, self._cache(len(fresh)))[0].layers
            for place, rest in enumerate(fresh):
                new[rest] = torch.stack(
                    [torch.stack([pair[place, :, -len(rest) :] for pair in (own.keys, own.values)]) for own in layers]
                )  # (N, 2, K, S, F)
                if new[rest].nbytes <= self._room:
                    self._room -= new[rest].nbytes
                    self._known[rest] = new[rest]
        known = self._known | new
        found = [known[rest] for rest in rests]
        longest = max(map(len, rests))
        cache = self._cache(len(rests))
        for layer in range(len(found[0])):
            shape = (len(found), *found[0].shape[2:3], longest, found[0].shape[4])
            both = [found[0].new_zeros(shape) for _ in range(2)]
            for place, own in enumerate(found):
                for pair, padded in zip(own[layer], both, strict=True):
                    padded[place, :, longest - pair.shape[1] :] = pair
            cache.update(*both, layer)
        mask = _mask(rests)
        return cache, torch.cat([mask.new_ones(len(rests), at), mask], dim=1)

    def _cache(self, samples: int) -> Any:
        """A cache of its own that holds the common head of so many samples."""
        cache = DynamicCache()
        if self._head_pairs is not None:
            for layer, pairs in enumerate(self._head_pairs):
                cache.update(*pairs.expand(-1, samples, -1, -1, -1), layer)
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
        return kept.read(llm, befores)
    return _read(llm, befores)


def common_head(befores: Sequence[list[int]]) -> list[int]:
    """Tokens with which all of them begin; none where they are so few that a pass of their own does not pay. Each of
    `befores` goes on behind them."""
    least, most = min(befores), max(befores)  # in the order of their tokens, so that these two differ first
    alike = [one == other for one, other in zip(least, most, strict=False)]
    count = min(alike.index(False) if False in alike else len(alike), min(map(len, befores)) - 1)
    return least[:count] if count >= FEWEST else []


def _mask(befores: Sequence[Sequence[int]]) -> Tensor:
    longest = max(map(len, befores))
    return torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in befores])


def _read(llm: FrozenLLM, befores: Sequence[list[int]]) -> tuple[Any, Tensor]:
    """The cache of these beginnings, padded on the left behind what they have in common, and its mask (B, S)."""
    head = common_head(befores) if len(befores) > 1 else []
    if not head:
        return _pass(llm, befores)
    cache, _ = _pass(llm, [head])
    cache.batch_repeat_interleave(len(befores))
    return _pass(llm, [before[len(head) :] for before in befores], cache)


def _pass(llm: FrozenLLM, rows: Sequence[Sequence[int]], cache: Any = None) -> tuple[Any, Tensor]:
    """The LLM's cache after these tokens, padded on the left, and its attention mask (B, S).

    Args:
        cache: what stands before them, without padding; it is written on.
    """
    device = llm.embedding.weight.device
    mask = _mask(rows).to(device)
    ids = torch.tensor([[0] * (mask.shape[1] - len(row)) + list(row) for row in rows], device=device)
    read = cache.get_seq_length() if cache is not None else 0
    whole = torch.cat([mask.new_ones(len(rows), read), mask], dim=1)
    with torch.no_grad():
        places = (whole.cumsum(1) - 1).clamp(min=0)[:, read:]
        out = llm.model.base_model(
            input_ids=ids, attention_mask=whole, position_ids=places, past_key_values=cache, use_cache=True
        )
    return out.past_key_values, whole


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
