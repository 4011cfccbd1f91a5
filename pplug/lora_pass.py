"""A pass of stacked training: the users' tokens one after another, and attention that sees each user apart.

Two ways of attention: that of transformers' interface, for any base and device, and one for a CPU that takes a user's
tokens from the projections to the values in one step, so that what lies between stays in the cache: turned by their
places, laid out as padded rows, multiplied, and laid back.
Shapes: M tokens of all users, T of one, R its rows, L its longest row, H heads, K heads of keys, d width of a head.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface

from pplug.logits import IGNORED
from pplug.lora_user import ALIGN, Part, User

ATTENTION = "pplug_stack"
_NOTHING_TO_DO = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
                  "output_router_logits", "return_dict"}  # fmt: skip
"""Arguments of a base's attention that change nothing here: the base is in eval mode and knows its own positions."""


class _Block:
    """One user's tokens in a pass: where they stand, and how attention sees them as padded rows."""

    def __init__(self, part: Part, device: Any) -> None:
        head = self.head = part.head
        self.tokens = part.tokens
        self.size = -(-part.tokens // ALIGN) * ALIGN
        self.rows, self.longest = len(part.rows), max(len(ids) for ids, _ in part.rows)
        ids, position = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        into, out_of = np.zeros((self.rows, self.longest), np.int64), np.zeros(self.size, np.int64)
        ids[:head], position[:head] = part.rows[0][0][:head], np.arange(head)
        into[:, :head], out_of[:head] = np.arange(head), np.arange(head)
        at: list[np.ndarray] = []
        labels: list[int] = []
        end = head
        for row, (tokens, wanted) in enumerate(part.rows):
            start, end = end, end + len(tokens) - head
            own = np.arange(head, len(tokens))
            ids[start:end], position[start:end] = tokens[head:], own
            into[row, head : len(tokens)] = np.arange(start, end)
            out_of[start:end] = row * self.longest + own
            at.append(np.arange(end - len(wanted), end))
            labels += wanted
        spare = -len(labels) % ALIGN  # whole blocks of logits, too
        self.ids, self.position = ids, position
        self.label_at = np.concatenate([*at, np.zeros(spare, np.int64)]).astype(np.int64)
        self.labels = torch.tensor(labels + [IGNORED] * spare, device=device)
        self.into = torch.from_numpy(into.ravel()).to(device)
        self.out_of = torch.from_numpy(out_of).to(device)
        own = np.zeros((self.rows, 1, self.longest, 1), np.float32)
        for row, (tokens, _) in enumerate(part.rows):
            own[row, 0, head if row else 0 : len(tokens)] = 1
        self.own = torch.from_numpy(own).to(device)
        """1 where a place of the padded rows is a token that attention is read at: each once."""
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        later = torch.ones(self.longest, self.longest, dtype=torch.bool, device=device).triu(1)
        self.causal = torch.zeros(later.shape, device=device).masked_fill_(later, -1e30)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float) -> Tensor:
        """Causal attention within each row, (T, H, d). Rows are padded at their ends, which no real token sees."""
        q, k, v = (
            x.index_select(0, self.into).unflatten(0, (self.rows, self.longest)).transpose(1, 2)
            for x in (q_THd, k_TKd, v_TKd)
        )
        if q.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        else:  # on a CPU the fused backward is several times slower than plain products for short rows
            share = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
            scores = torch.baddbmm(
                self.causal.to(q.dtype), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale
            )
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            out = (weights @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.out_of)

    def places(self, heads: int, share: int) -> tuple[Tensor, Tensor]:
        """Indices of each (row, head, place) among (token, head), and of each (token, head) among these.

        Args:
            share: number of heads that read each head of the tokens.
        """
        if (heads, share) not in self._places:
            each = torch.arange(heads, device=self.into.device)
            into = self.into.view(self.rows, 1, -1) * (heads // share) + (each // share)[:, None]
            row, place = self.out_of // self.longest, self.out_of % self.longest
            out_of = (row[:, None] * heads + each) * self.longest + place[:, None]
            self._places[heads, share] = into.flatten(), out_of.flatten()
        return self._places[heads, share]


class Pass:
    """The users of one pass and their blocks."""

    def __init__(self, users: list[User], device: Any) -> None:
        self.users, self.parts = users, [user.parts[0] for user in users]
        self.blocks = [_Block(part, device) for part in self.parts]
        self.sizes = [block.size for block in self.blocks]
        self.pieces = [user.pieces() for user in users]
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        label_at = [start + block.label_at for start, block in zip(starts, self.blocks, strict=False)]
        self.ids = torch.from_numpy(np.concatenate([block.ids for block in self.blocks])[None]).to(device)
        self.position = torch.from_numpy(np.concatenate([block.position for block in self.blocks])[None]).to(device)
        self.label_at = torch.from_numpy(np.concatenate(label_at)).to(device)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    stack: Pass | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (1, heads, M, d) of all users, each user apart.

    Raises:
        ValueError: the base asks for something that this function does not compute.
    """
    if stack is None:
        raise ValueError("stacked training needs a base that hands its keyword arguments on to its attention")
    if softcap is not None or (sliding_window and sliding_window < max(block.longest for block in stack.blocks)):
        raise ValueError("stacked training knows plain causal attention: this base caps its scores or has a window")
    asked = [name for name, value in more.items() if name not in _NOTHING_TO_DO and value is not None]
    if asked or is_causal is False:
        what = ", ".join(sorted(asked)) or "is_causal=False"
        raise ValueError(f"stacked training knows plain causal attention: this base asks for {what} too")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = zip(*(x[0].transpose(0, 1).split(stack.sizes) for x in (query, key, value)), strict=True)
    out = [block.attend(q, k, v, scale) for block, (q, k, v) in zip(stack.blocks, split, strict=True)]
    return torch.cat(out)[None], None


AttentionInterface.register(ATTENTION, _attention)


class _Attend(torch.autograd.Function):
    """Causal attention of all users from the projections' outputs, (M, H d), (M, K d) and (M, K d), to (M, H d)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, cos_Md: Tensor, sin_Md: Tensor, scale: float, stack: Pass
    ) -> Tensor:
        d = cos_Md.shape[1]
        heads, share = q.shape[1] // d, q.shape[1] // k.shape[1]
        out, kept = torch.empty_like(q), []
        split = zip(*(x.split(stack.sizes) for x in (q, k, v, cos_Md, sin_Md, out)), strict=True)
        for block, (q_T, k_T, v_T, cos, sin, out_T) in zip(stack.blocks, split, strict=True):
            (into, out_of), (into_k, _) = block.places(heads, 1), block.places(heads, share)
            q_p = _padded(_turned(q_T, scale * cos, scale * sin), into, block, d)
            k_p, v_p = (_padded(x, into_k, block, d) for x in (_turned(k_T, cos, sin), v_T))
            scores = torch.bmm(q_p, k_p.transpose(1, 2)).add_(block.causal)
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            found = torch.bmm(weights, v_p).view(-1, d)
            torch.index_select(found, 0, out_of, out=out_T.view(-1, d))
            kept += [q_p, k_p, v_p, weights]
        ctx.scale, ctx.stack, ctx.heads, ctx.share = scale, stack, heads, share
        ctx.save_for_backward(cos_Md, sin_Md, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, heads, share = ctx.stack, ctx.heads, ctx.share
        cos_Md, sin_Md, *kept = ctx.saved_tensors
        of_q = torch.empty_like(grad)
        of_k, of_v = (grad.new_empty(len(grad), grad.shape[1] // share) for _ in range(2))
        split = zip(*(x.split(stack.sizes) for x in (grad.contiguous(), cos_Md, sin_Md, of_q, of_k, of_v)), strict=True)
        each = zip(stack.blocks, split, *(kept[i::4] for i in range(4)), strict=True)
        for block, (grad_T, cos, sin, q_T, k_T, v_T), q_p, k_p, v_p, weights in each:
            into, _ = block.places(heads, 1)
            g = _padded(grad_T, into, block, cos.shape[1])
            g.view(block.rows, heads, block.longest, -1).mul_(block.own)
            of_weights = torch.bmm(g, v_p.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            to_q = _laid_back(torch.bmm(of_scores, k_p), block, heads, 1)
            _turned_back(to_q, ctx.scale * cos, ctx.scale * sin, q_T)
            to_k = _laid_back(torch.bmm(of_scores.transpose(1, 2), q_p), block, heads, share)
            _turned_back(to_k, cos, sin, k_T)
            v_T.copy_(_laid_back(torch.bmm(weights.transpose(1, 2), g), block, heads, share).flatten(1))
        return of_q, of_k, of_v, None, None, None, None


def _turned(x: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Rotary embedding of (T, H d): (T, H, d)."""
    x, half = x.unflatten(1, (-1, cos_Td.shape[1])), cos_Td.shape[1] // 2
    out = x * cos_Td[:, None]
    out[..., :half].addcmul_(x[..., half:], sin_Td[:, None, :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin_Td[:, None, half:])
    return out


def _turned_back(x: Tensor, cos_Td: Tensor, sin_Td: Tensor, out: Tensor) -> None:
    """The gradient of what was turned, from that of the outcome: (T, H, d) -> (T, H d) in `out`."""
    half, out = cos_Td.shape[1] // 2, out.view(x.shape)
    torch.mul(x, cos_Td[:, None], out=out)
    out[..., :half].addcmul_(x[..., half:], sin_Td[:, None, half:])
    out[..., half:].addcmul_(x[..., :half], sin_Td[:, None, :half], value=-1)


def _padded(x: Tensor, into: Tensor, block: _Block, width: int) -> Tensor:
    """A user's values of tokens and heads as padded rows, (R H, L, d)."""
    return x.reshape(-1, width).index_select(0, into).view(-1, block.longest, width)


def _laid_back(x: Tensor, block: _Block, heads: int, share: int) -> Tensor:
    """The gradient of a user's tokens, (T, K, d), from that of the padded rows, (R H, L, d): that of every row, and of
    every head that reads the same one, is summed."""
    x = x.view(block.rows, heads // share, share, *x.shape[1:]).sum(2) if share > 1 else x
    x = x.view(block.rows, heads // share, *x.shape[-2:])
    if block.head and block.rows > 1:
        x[0, :, : block.head] += x[1:, :, : block.head].sum(0)
    _, out_of = block.places(heads // share, 1)
    out = x.reshape(-1, x.shape[-1]).index_select(0, out_of).view(block.size, heads // share, -1)
    out[block.tokens :] = 0
    return out


_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}


def use_quick_attention(model: nn.Module) -> Callable[[], None]:
    """Gives the attention of a model on a CPU `_Attend`, where it is made of these four projections and, maybe, norms
    of each head's queries and keys. Whether a base computes the same with it is for the caller to compare.

    Returns:
        What takes it back.
    """
    changed = []
    for module in model.modules():
        children = {name for name, _ in module.named_children()}
        if children - {"q_norm", "k_norm"} == _PROJECTIONS and module.q_proj.weight.device.type == "cpu":
            module.forward = _quick_forward(module, module.forward)
            changed.append(module)

    def undo() -> None:
        for module in changed:
            del module.forward

    return undo


def _quick_forward(module: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, position_embeddings: Any = None, stack: Pass | None = None, **given: Any) -> Any:
        window = given.get("sliding_window") or getattr(module, "sliding_window", None)
        if stack is None or (window and window < max(block.longest for block in stack.blocks)):
            return own(hidden_states=hidden_states, position_embeddings=position_embeddings, stack=stack, **given)
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        q, k, v = (project(hidden_states) for project in (module.q_proj, module.k_proj, module.v_proj))
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name, None)
            if norm is not None and name == "q_norm":
                q = norm(q.unflatten(-1, (-1, cos.shape[1]))).flatten(-2)
            elif norm is not None:
                k = norm(k.unflatten(-1, (-1, cos.shape[1]))).flatten(-2)
        return module.o_proj(_Attend.apply(q[0], k[0], v[0], cos, sin, module.scaling, stack)[None]), None

    return forward
