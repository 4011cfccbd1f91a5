"""Cross-entropy over a large vocabulary in pieces, so that its logits never exist whole.

64 targets of 128 tokens over 128,256 words are 8,192 x 128,256 logits: 4.2 GB in float32, three times. Their
cross-entropy is a sum over positions, so the head works on some positions at a time and computes them again in the
backward pass. How a family makes logits of its last hidden states (scales, caps, biases) is left to its own code.
Shapes: N positions, H LLM width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

LOGITS = 2**25
"""Number of logits that may exist at once: 128 MiB in float32. Fewer than that are computed whole."""
IGNORED = -100


class _Outputs:
    """Stands for what a model's body returns: the hidden states, and nothing else under any other name."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, at: Any) -> Any:
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


class BodyAndHead:
    """A language model taken apart: a body that ends in hidden states, and what makes logits of these."""

    def __init__(self, model: Any) -> None:
        """`model`: a causal or an encoder-decoder model of transformers, with a LoRA of PEFT or without.

        Raises:
            ValueError: no part of the model is such a body.
        """
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        for body in (self.model.base_model, self.model.get_decoder()):
            self.body = body
            if body is not self.model and self._is_body():
                return
        raise ValueError(f"{type(self.model).__name__} cannot be taken apart into a body and a head")

    @torch.no_grad()
    def _is_body(self) -> bool:
        ids = torch.arange(4, device=self.model.get_input_embeddings().weight.device)[None]
        given = {"input_ids": ids, "use_cache": False}
        if self.model.config.is_encoder_decoder:
            given["decoder_input_ids"] = ids
        try:
            got = self.logits(self.hidden(**given)[0])
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):  # another kind of body
            return False
        want = self.model(**given).logits[0]
        return got.shape == want.shape and torch.allclose(got.float(), want.float(), rtol=1e-2, atol=1e-2)

    def hidden(self, **given: Any) -> Tensor:
        """The body's last hidden states (B, L, H), for the inputs of the model's own forward."""
        kept: list[Tensor] = []

        def take(module: Any, args: Any, out: Any) -> _Outputs:
            kept.append(out[0])
            return _Outputs(out[0][:1, -1:])  # one position has logits: the model goes on with it

        hook = self.body.register_forward_hook(take)
        try:
            self.model(**given)
        finally:
            hook.remove()
        return kept[0]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """(N, V), as the model's own forward makes them of these hidden states."""
        ids = torch.zeros(1, 1, dtype=torch.long, device=hidden_NH.device)
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if self.model.config.is_encoder_decoder:
            given |= {"decoder_input_ids": ids, "encoder_outputs": (hidden_NH[None],)}
        own = vars(self.body).get("forward")
        self.body.forward = lambda *args, **kwargs: _Outputs(hidden_NH[None])
        try:
            return self.model(**given).logits[0]
        finally:
            if own is None:
                del self.body.forward
            else:
                self.body.forward = own


def taken_apart(model: Any) -> BodyAndHead | None:
    """The model's body and head; None where it has no such parts, so that its logits are computed whole."""
    try:
        return BodyAndHead(model)
    except ValueError:
        return None


def vocabulary(model: Any) -> int:
    """Number of logits of one position."""
    return int(model.get_output_embeddings().weight.shape[0])


def losses_in_pieces(
    parts: BodyAndHead, hidden_NH: Tensor, labels_N: Tensor, rows: int, reduction: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of some positions, `rows` of them at a time.

    Args:
        hidden_NH: hidden states of the positions.
        labels_N: token ids; IGNORED counts nothing.
        reduction: sum, or none for that of each position.

    Returns:
        (the loss in float32: a scalar or (N,), (N,) bool: the label is the likeliest token).
    """

    def piece(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = parts.logits(hidden)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction=reduction)
        return loss, logits.argmax(-1) == labels

    found = []
    for hidden, labels in zip(hidden_NH.split(rows), labels_N.split(rows), strict=True):
        if torch.is_grad_enabled():
            found.append(checkpoint(piece, hidden, labels, use_reentrant=False))
        else:
            found.append(piece(hidden, labels))
    losses = [loss for loss, _ in found]
    loss = torch.cat(losses) if reduction == "none" else sum(losses[1:], losses[0])
    return loss, torch.cat([exact for _, exact in found])
