"""Forward pass of a frozen encoder: transformers' own, or, for a BERT in bfloat16 on a CPU, the same in fewer passes.

A layer is four products with packed weights, bias, GELU and residual sum inside them (oneDNN), one attention with the
mask made once a batch, two norms. Beside transformers' modules: 1.3 times the texts a second (MiniLM, u-boot's texts,
two cores with AMX, torch 2.13), and fewer roundings, since GELU and sum see the product's float32. In float32 it gains
next to nothing, and the model's own forward is used.
Shapes: B texts, L tokens of the longest, D width.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

Forward = Callable[[Tensor, Tensor], Tensor]
"""Token ids (B, L) and mask (B, L), 1 where a token is real -> hidden states (B, L, D)."""

FAMILIES = ("bert", "roberta", "xlm-roberta")
"""Model types whose layers are BERT's; they differ in their embeddings, which are the model's own here."""


def native_bf16() -> bool:
    """True if this processor multiplies bfloat16 by itself."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@lru_cache(maxsize=1)
def bf16_is_quicker() -> bool:
    """True if this processor multiplies bfloat16 quicker than float32: with AMX always, with AVX512-BF16 as measured.

    Beside each other, one core of an AMD with AVX512-BF16 was 2.1 times as quick in bfloat16 as in float32, one of an
    Intel without AMX .5 times (torch 2.13). One thread's processor time tells it on a busy machine too.
    """
    if not native_bf16() or torch.cpu._is_amx_tile_supported():
        return native_bf16()
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    sides = {dtype: (torch.ones(256, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)) for dtype in best}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for _ in range(8):  # in turn, and the best of each: the first one prepares
                for dtype, (left, right) in sides.items():
                    start = time.thread_time()
                    torch.nn.functional.linear(left, right)
                    best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best[torch.bfloat16] < best[torch.float32]


def forward_of(model: nn.Module, dtype: torch.dtype) -> Forward:
    """The quickest forward pass there is here of a frozen encoder; products are in `dtype`, whatever the weights are.

    The weights are those of now: a model that is trained needs its own forward.
    """
    device = next(model.parameters()).device
    native = device.type == "cpu" and native_bf16() and torch.backends.mkldnn.is_available()
    if native and dtype == torch.bfloat16 and FusedBert.fits(model):
        return FusedBert(model, dtype)
    cast = dtype != next(model.parameters()).dtype

    def forward(tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=cast):
            return model(input_ids=tokens_BL, attention_mask=mask_BL).last_hidden_state

    return forward


@dataclass(frozen=True)
class _Product:
    """x W^T + b, the weight packed as oneDNN wants it."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, linears: list[nn.Linear], dtype: torch.dtype) -> "_Product":
        """Joins layers that have the same input: their outputs stand side by side."""
        weight = torch.cat([linear.weight.detach() for linear in linears]).to(dtype).contiguous()
        bias = torch.cat([linear.bias.detach() for linear in linears]).to(dtype)
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight), bias)

    def __call__(self, x: Tensor, then: str = "none") -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "none")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "add")


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, norm: nn.LayerNorm, dtype: torch.dtype) -> "_Norm":
        return cls(norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class FusedBert:
    """A `Forward` for models of `FAMILIES`, on a CPU."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        config: Any = model.config
        self.embeddings, self.dtype, self.heads = model.embeddings, dtype, config.num_attention_heads
        self.layers = []
        for layer in model.encoder.layer:  # type: ignore[union-attr]
            own, output = layer.attention.self, layer.attention.output
            self.layers.append(
                (
                    _Product.of([own.query, own.key, own.value], dtype),
                    _Product.of([output.dense], dtype),
                    _Norm.of(output.LayerNorm, dtype),
                    _Product.of([layer.intermediate.dense], dtype),
                    _Product.of([layer.output.dense], dtype),
                    _Norm.of(layer.output.LayerNorm, dtype),
                )
            )

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """True if the model is what this class computes."""
        config: Any = model.config
        return config.model_type in FAMILIES and config.hidden_act == "gelu" and not config.is_decoder

    def __call__(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        B, L = tokens_BL.shape
        x = self.embeddings(input_ids=tokens_BL).to(self.dtype)
        D = x.shape[-1]
        x, bias = x.view(B * L, D), self._bias(mask_BL)
        for qkv, out, norm, up, down, last_norm in self.layers:
            q, k, v = (part.transpose(1, 2) for part in qkv(x).view(B, L, 3, self.heads, -1).unbind(2))
            mixed = scaled_dot_product_attention(q, k, v, attn_mask=bias)
            x = norm(out.plus(mixed.transpose(1, 2).reshape(B * L, D), x))
            x = last_norm(down.plus(up(x, then="gelu"), x))
        return x.view(B, L, D)

    def _bias(self, mask_BL: Tensor) -> Tensor | None:
        """-inf where a key is padding, (B, 1, L, L) without taking room for it; None where no text is padded."""
        if bool(mask_BL.all()):
            return None
        B, L = mask_BL.shape
        bias = torch.zeros(B, 1, 1, L, dtype=self.dtype)
        return bias.masked_fill_(mask_BL[:, None, None] == 0, -torch.inf).expand(B, 1, L, L)
