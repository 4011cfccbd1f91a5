"""The last layer of an LLM at some tokens alone: those that the loss reads.

Keys and values of the last layer are needed of every token, but all that stands behind its attention is read at the
places of the labels alone: a tenth of the tokens of a prompt with a short reply. Of four layers' products that is a
fifth. Each token's own values come out as before, since what is left out works on each token by itself.
"""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor, nn

_CHILDREN = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
"""Parts of a layer that adds attention, then an MLP, to what it was given, each behind a norm of its own."""


def shorten(layer: nn.Module, tokens: Callable[[], Tensor | None], whole: Collection[nn.Module]) -> Callable[[], None]:
    """Makes a layer give the values of some tokens alone.

    Args:
        layer: a model's last one. Whether its own forward computes the same is for the caller to compare.
        tokens: places of these tokens, asked for in each forward pass; None: that pass gives all.
        whole: modules that have to see all tokens.

    Returns:
        What takes it back.

    Raises:
        ValueError: the layer has other parts, or one of `whole` stands behind its attention.
    """
    children = dict(layer.named_children())
    end = getattr(children.get("self_attn"), "o_proj", None)
    if children.keys() != _CHILDREN or not isinstance(end, nn.Linear):
        raise ValueError(f"{type(layer).__name__} has other parts than {', '.join(sorted(_CHILDREN))}")
    if not {end, *children["mlp"].modules()}.isdisjoint(whole):
        raise ValueError("a module behind the attention has to see all tokens")

    def chosen(x_1MH: Tensor) -> Tensor:
        at = tokens()
        return x_1MH if at is None else x_1MH.index_select(1, at)

    def forward(hidden_states: Tensor, **given: Any) -> Tensor:
        found, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **given)
        hidden = chosen(hidden_states) + found
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    hook = end.register_forward_pre_hook(lambda module, given: (chosen(given[0]),))
    layer.forward = forward

    def undo() -> None:
        hook.remove()
        del layer.forward

    return undo
