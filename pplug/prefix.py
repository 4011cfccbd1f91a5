"""The tokens before the persona rows, read once and without a gradient.

Nothing that is trained stands before the first row, and later positions change nothing of what earlier ones compute.
Keys and values of these tokens are therefore made without a graph, once for the whole batch where all prompts begin
alike (a chat template's head), and the rest of each prompt goes on from them.
Shapes: B samples, S tokens of the longest beginning.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pplug.llm import FrozenLLM
from pplug.memory import is_checkpointed
from pplug.parallel import is_sharded
from pplug.splice import Prompt

FEWEST = 8
"""Tokens of the longest beginning below which a pass of their own costs more than it saves."""
FAMILIES = ("llama", "qwen2", "qwen3")
"""Families that go on from stored keys and values as tested. A layer that sees a window of places would count the
padding between a beginning and its rest."""


def read_before(llm: FrozenLLM, prompts: Sequence[Prompt]) -> tuple[Any, Tensor]:
    """Keys and values of the tokens before the persona rows.

    Returns:
        transformers' cache of B samples, padded on the left, and its attention mask (B, S) int64; None and (B, 0) where
        the LLM reads its prompts in one piece.
    """
    device, befores = llm.embedding.weight.device, [prompt.before for prompt in prompts]
    longest = max(map(len, befores))
    if longest < FEWEST or not all(befores) or not can_read_ahead(llm.model):
        return None, torch.zeros(len(befores), 0, dtype=torch.long, device=device)
    alike = all(before == befores[0] for before in befores)
    rows = befores[:1] if alike else befores
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        read = llm.model.base_model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=True)
    cache = read.past_key_values
    if alike:
        cache.batch_repeat_interleave(len(befores))
    return cache, mask.expand(len(befores), -1)


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
