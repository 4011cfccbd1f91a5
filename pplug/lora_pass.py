"""A pass of stacked training: the users' tokens one after another, and attention that sees each user apart.

Two ways of attention: that of transformers' interface, for any base and device, and one for a CPU that takes a user's
tokens from the projections to the values in one step, so that what lies between stays in the cache: turned by their
places, laid out as padded rows, multiplied, and laid back.
Shapes: M tokens of all users, T of one, R its rows, L its longest row, H heads, K heads of keys, d width of a head.
"""

from collections.abc import Callable, Sequence
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
LIKE = 0.75
"""Share of the longest row's length that a row has at least in a group that is padded to it."""
_NOTHING_TO_DO = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
                  "output_router_logits", "return_dict"}  # fmt: skip
"""Arguments of a base's attention that change nothing here: the base is in eval mode and knows its own positions."""


class _Rows:
    """Rows of like lengths of one user, as attention sees them: padded to the longest at their ends."""

    def __init__(self, lengths: Sequence[int], head: int, start: int, size: int, device: Any) -> None:
        """`start`: place of the first row's own first token among the user's, behind the head that all rows share; the
        user's first rows, which begin with the head, take it for theirs. `size`: number of tokens that are theirs."""
        first = start == head
        self.count, self.longest, self.head, self.first = len(lengths), max(lengths), head, first
        self.own = slice(0 if first else start, start + size)
        into = np.zeros((self.count, self.longest), np.int64)
        out_of = np.zeros(self.own.stop - self.own.start, np.int64)
        read = np.zeros((self.count, 1, self.longest, 1), np.float32)
        into[:, :head] = np.arange(head)
        out_of[: head if first else 0] = np.arange(head if first else 0)
        for row, length in enumerate(lengths):
            end = start + length - head
            into[row, head:length] = np.arange(start, end)
            out_of[start - self.own.start : end - self.own.start] = row * self.longest + np.arange(head, length)
            read[row, 0, 0 if first and not row else head : length] = 1
            start = end
        self.tokens = start - self.own.start
        """Number of own tokens before those that fill the last block of ALIGN."""
        self.into, self.out_of = torch.from_numpy(into.ravel()).to(device), torch.from_numpy(out_of).to(device)
        self.read = torch.from_numpy(read).to(device)
        """1 where a place of the padded rows is a token that attention is read at: each token once."""
        self._places: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._seen: dict[int, Tensor] = {}
        self._unseen: dict[int, Tensor] = {}

    def seen(self, window: int) -> Tensor:
        """True where a place reads another: itself and the `window` - 1 before it, (longest, longest)."""
        if window not in self._seen:
            each = torch.ones(self.longest, self.longest, dtype=torch.bool, device=self.into.device)
            self._seen[window] = each.tril() & each.triu(1 - window)
        return self._seen[window]

    def causal(self, window: int | None = None) -> Tensor:
        """-1e30 where `seen` is False and 0 where it is True, (longest, longest); without a window, that of all places.
        A CPU adds it to the scores."""
        window = self.longest if window is None else min(window, self.longest)
        if window not in self._unseen:
            seen = self.seen(window)
            self._unseen[window] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -1e30)
        return self._unseen[window]

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float, window: int | None = None) -> Tensor:
        """Causal attention within each row at these rows' own tokens, (., H, d).

        Args:
            window: number of places that one sees, its own among them; None: all before it.
        """
        q, k, v = (
            x.index_select(0, self.into).unflatten(0, (self.count, self.longest)).transpose(1, 2)
            for x in (q_THd, k_TKd, v_TKd)
        )
        seen = self.seen(window) if q.is_cuda and window and window < self.longest else None
        if q.is_cuda and seen is None:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, self.out_of)
        share = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(share, 1) if share > 1 else x for x in (k, v))
        if seen is not None:  # with heads that several share, no kernel but the plain products takes a mask
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
        else:  # on a CPU the fused backward is several times slower than plain products for short rows
            scores = torch.baddbmm(
                self.causal(window).to(q.dtype), q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=scale
            )
            weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
            out = (weights @ v.flatten(0, 1)).unflatten(0, q.shape[:2])
        return out.transpose(1, 2).flatten(0, 1).index_select(0, self.out_of)

    def places(self, heads: int, share: int) -> tuple[Tensor, Tensor]:
        """Indices of each (row, head, place) among (token, head), and of each (own token, head) among these.

        Args:
            share: number of heads that read each head of the tokens.
        """
        if (heads, share) not in self._places:
            each = torch.arange(heads, device=self.into.device)
            into = self.into.view(self.count, 1, -1) * (heads // share) + (each // share)[:, None]
            row, place = self.out_of // self.longest, self.out_of % self.longest
            out_of = (row[:, None] * heads + each) * self.longest + place[:, None]
            self._places[heads, share] = into.flatten(), out_of.flatten()
        return self._places[heads, share]

    def padded(self, x: Tensor, heads: int, share: int, width: int) -> Tensor:
        """Values of tokens and heads as padded rows, (R H, L, d)."""
        into, _ = self.places(heads, share)
        return x.reshape(-1, width).index_select(0, into).view(-1, self.longest, width)

    def add_back(self, x: Tensor, heads: int, share: int, out_TKd: Tensor) -> None:
        """Puts the gradient of padded rows, (R H, L, d), where their own tokens stand, and adds to that of the head
        what each row gives it; of heads that read the same one, the sum."""
        x = x.view(self.count, heads // share, share, *x.shape[1:]).sum(2) if share > 1 else x
        x = x.view(self.count, heads // share, *x.shape[-2:])
        rows = x[1:] if self.first else x  # the first row's head is among the own tokens
        shared = rows[:, :, : self.head].sum(0).transpose(0, 1) if self.head and len(rows) else None
        _, out_of = self.places(heads // share, 1)
        own = out_TKd[self.own]
        torch.index_select(x.reshape(-1, x.shape[-1]), 0, out_of, out=own.view(-1, x.shape[-1]))
        own[self.tokens :] = 0
        if shared is not None:
            out_TKd[: self.head] += shared


class _Block:
    """One user's tokens in a pass: where they stand, and the groups of rows as which attention sees them."""

    def __init__(self, part: Part, device: Any) -> None:
        head = part.head
        self.size = -(-part.tokens // ALIGN) * ALIGN
        ids, position = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        ids[:head], position[:head] = part.rows[0][0][:head], np.arange(head)
        at: list[np.ndarray] = []
        labels: list[int] = []
        ends = [head]
        for tokens, wanted in part.rows:
            start, end = ends[-1], ends[-1] + len(tokens) - head
            ids[start:end], position[start:end] = tokens[head:], np.arange(head, len(tokens))
            at.append(np.arange(end - len(wanted), end))
            labels += wanted
            ends.append(end)
        spare = -len(labels) % ALIGN  # whole blocks of logits, too
        self.ids, self.position = ids, position
        self.label_at = np.concatenate([*at, np.zeros(spare, np.int64)]).astype(np.int64)
        self.labels = torch.tensor(labels + [IGNORED] * spare, device=device)
        lengths = [len(tokens) for tokens, _ in part.rows]
        self.longest = max(lengths)
        ends[-1] = self.size
        self.groups = [
            _Rows(lengths[first:last], head, ends[first], ends[last] - ends[first], device)
            for first, last in _like(lengths)
        ]

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor, scale: float, window: int | None) -> Tensor:
        """Causal attention within each row, (T, H, d)."""
        return torch.cat([rows.attend(q_THd, k_TKd, v_TKd, scale, window) for rows in self.groups])


def _like(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """First row and end of each group of rows of like lengths; the shortest rows come first."""
    groups, end = [], len(lengths)
    while end:
        start = end - 1
        while start and lengths[start - 1] >= LIKE * lengths[end - 1]:
            start -= 1
        groups.append((start, end))
        end = start
    return groups[::-1]


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
    if softcap is not None:
        raise ValueError("stacked training knows plain causal attention: this base caps its scores")
    window = more.pop("sliding_window") if "sliding_window" in more else _window_of(module)
    asked = [name for name, value in more.items() if name not in _NOTHING_TO_DO and value is not None]
    if asked or is_causal is False:
        what = ", ".join(sorted(asked)) or "is_causal=False"
        raise ValueError(f"stacked training knows plain causal attention: this base asks for {what} too")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    split = zip(*(x[0].transpose(0, 1).split(stack.sizes) for x in (query, key, value)), strict=True)
    each = zip(stack.blocks, split, strict=True)
    out = [block.attend(q, k, v, scale, window or None) for block, (q, k, v) in each]
    return torch.cat(out)[None], None


def _window_of(module: Any) -> int | None:
    """The window of an attention that leaves it to the mask, which a stack has none of (Qwen2-MoE, PhiMoE): the
    layer's own, or the config's where layers are all alike."""
    config = getattr(module, "config", None)
    alike = getattr(config, "layer_types", None) is None
    window: int | None = getattr(config, "sliding_window", None) if alike else None
    return getattr(module, "sliding_window", window)


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
            q_turned, k_turned = _turned(q_T, scale * cos, scale * sin), _turned(k_T, cos, sin)
            for rows in block.groups:
                q_p = rows.padded(q_turned, heads, 1, d)
                k_p, v_p = (rows.padded(x, heads, share, d) for x in (k_turned, v_T))
                scores = torch.bmm(q_p, k_p.transpose(1, 2)).add_(rows.causal())
                weights = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)
                found, (_, out_of) = torch.bmm(weights, v_p).view(-1, d), rows.places(heads, 1)
                torch.index_select(found, 0, out_of, out=out_T[rows.own].view(-1, d))
                kept += [q_p, k_p, v_p, weights]
        ctx.scale, ctx.stack, ctx.heads, ctx.share = scale, stack, heads, share
        ctx.save_for_backward(cos_Md, sin_Md, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stack, heads, share = ctx.stack, ctx.heads, ctx.share
        cos_Md, sin_Md, *kept = ctx.saved_tensors
        d, of_q = cos_Md.shape[1], torch.empty_like(grad)
        of_k, of_v = (grad.new_empty(len(grad), grad.shape[1] // share) for _ in range(2))
        split = zip(*(x.split(stack.sizes) for x in (grad.contiguous(), cos_Md, sin_Md, of_q, of_k, of_v)), strict=True)
        each = zip(kept[0::4], kept[1::4], kept[2::4], kept[3::4], strict=True)
        for block, (grad_T, cos, sin, q_T, k_T, v_T) in zip(stack.blocks, split, strict=True):
            to_q = grad.new_empty(block.size, heads, d)
            to_k, to_v = grad.new_empty(block.size, heads // share, d), v_T.view(block.size, -1, d)
            for rows, (q_p, k_p, v_p, weights) in zip(block.groups, each, strict=False):  # each: of later blocks too
                g = rows.padded(grad_T, heads, 1, d)
                g.view(rows.count, heads, rows.longest, d).mul_(rows.read)
                of_weights = torch.bmm(g, v_p.transpose(1, 2))
                of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                rows.add_back(torch.bmm(of_scores, k_p), heads, 1, to_q)
                rows.add_back(torch.bmm(of_scores.transpose(1, 2), q_p), heads, share, to_k)
                rows.add_back(torch.bmm(weights.transpose(1, 2), g), heads, share, to_v)
            _turned_back(to_q, ctx.scale * cos, ctx.scale * sin, q_T)
            _turned_back(to_k, cos, sin, k_T)
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


def _normed(norm: nn.Module | None, x: Tensor, cos_Md: Tensor) -> Tensor:
    """(1, M, H d), each head's values behind the norm, where there is one."""
    return x if norm is None else norm(x.unflatten(-1, (-1, cos_Md.shape[1]))).flatten(-2)


def _quick_forward(module: Any, own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, position_embeddings: Any = None, stack: Pass | None = None, **given: Any) -> Any:
        # one that is not each layer's own is the config's (Mistral)
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        if stack is None or (window and window < max(block.longest for block in stack.blocks)):
            return own(hidden_states=hidden_states, position_embeddings=position_embeddings, stack=stack, **given)
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        q, k, v = (project(hidden_states) for project in (module.q_proj, module.k_proj, module.v_proj))
        q, k = (_normed(getattr(module, name, None), x, cos) for name, x in (("q_norm", q), ("k_norm", k)))
        return module.o_proj(_Attend.apply(q[0], k[0], v[0], cos, sin, module.scaling, stack)[None]), None

    return forward
