"""Stacked training: many users' LoRA adapters share each forward and backward pass of one frozen base.

Route: users' examples (token ids) -> StackedTrainer.fit -> each user's adapter as soon as it is finished. Each pass
takes the next batch of as many users as fit; a user who has finished leaves, and the next one comes in.

No user's result depends on who else is in the stack. Order, initial weights and dropout masks come from the user's own
seed; loss, clipping, AdamW and schedule are the user's own. The bits, too: what is a user's own (attention, A and B,
loss) is computed in shapes that depend on that user alone; what is shared (the base's linear layers, norms,
activations) works row by row on one long row of tokens, where each user's tokens start at a multiple of ALIGN. A
matrix product on a CPU gives a row the same bits wherever it stands among such blocks; on a GPU the library may choose
another kernel for another number of rows, so there a result is equal up to rounding only.

No padding: the tokens of all rows stand one after another, with their own positions; only attention, per user, sees
rows padded to that user's longest. Logits are computed at target positions only.
Shapes: U users of a pass, M tokens of all of them, R rows of one user, L its longest row, T its tokens, r rank.

[1] "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401 (OPPU).
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pplug import memory
from pplug.adapter import LoraConfig, StackConfig, target_modules
from pplug.logits import IGNORED, LOGITS, losses_in_pieces, taken_apart, vocabulary
from pplug.lora_user import (
    ALIGN,
    Fitted,
    Part,
    User,
    UserExamples,
    initial_weights,
    kept_mask,
    plan_steps,
    user_seed,
)
from pplug.norms import use_fast_rmsnorm
from pplug.parallel import Cut, is_spread
from pplug.stackable import Example, own_losses, probe_examples, refuse_unlike

__all__ = [
    "Fitted",
    "Pass",
    "StackedTrainer",
    "UserExamples",
    "initial_weights",
    "kept_mask",
    "plan_steps",
    "user_seed",
]
_ATTENTION = "pplug_stack"
_NOTHING_TO_DO = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
                  "output_router_logits", "return_dict"}  # fmt: skip
"""Arguments of a base's attention that change nothing here: the base is in eval mode and knows its own positions."""


class _Block:
    """One user's tokens in a pass: where they stand, and how attention sees them as padded rows."""

    def __init__(self, part: Part, device: Any) -> None:
        lengths = np.array([len(ids) for ids, _ in part.rows])
        starts = np.concatenate([[0], np.cumsum(lengths)])
        self.size = -(-int(starts[-1]) // ALIGN) * ALIGN
        self.rows, self.longest = len(lengths), int(lengths.max())
        ids, position = np.zeros(self.size, np.int64), np.zeros(self.size, np.int64)
        into, out_of = np.zeros((self.rows, self.longest), np.int64), np.zeros(self.size, np.int64)
        at: list[np.ndarray] = []
        labels: list[int] = []
        for row, (tokens, wanted) in enumerate(part.rows):
            start, end = int(starts[row]), int(starts[row + 1])
            ids[start:end], position[start:end] = tokens, np.arange(end - start)
            into[row, : end - start] = np.arange(start, end)
            out_of[start:end] = row * self.longest + np.arange(end - start)
            at.append(np.arange(end - len(wanted), end))
            labels += wanted
        spare = -len(labels) % ALIGN  # whole blocks of logits, too
        self.ids, self.position = ids, position
        self.label_at = np.concatenate([*at, np.zeros(spare, np.int64)]).astype(np.int64)
        self.labels = torch.tensor(labels + [IGNORED] * spare, device=device)
        self.into = torch.from_numpy(into.ravel()).to(device)
        self.out_of = torch.from_numpy(out_of).to(device)
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


def _mask(user: User, x: Tensor, cut: Cut | None) -> Tensor:
    """The dropout mask of a user's values: of a part of them, that part of the mask of all."""
    if cut is None or not cut.by_input:
        return user.mask(x)
    return user.mask(x.new_empty(len(x), cut.width))[:, cut.part]


AttentionInterface.register(_ATTENTION, _attention)


class StackedTrainer:
    """Trains adapters on one frozen causal base, which it takes over: hooks and attention stay in place."""

    def __init__(self, model: Any, config: LoraConfig, stack: StackConfig | None = None) -> None:
        """Raises ValueError: the base lacks a target module, computes attention in a way of its own, or mixes users."""
        self.model, self.config, self.stack = model.requires_grad_(False).eval(), config, stack or StackConfig()
        self.modules = target_modules(model, config.shape.targets)
        self.device = next(model.parameters()).device
        self._pass: Pass | None = None
        probes = probe_examples(model.get_input_embeddings().weight.shape[0], ALIGN)
        alone = own_losses(model, probes[:2])  # as long as the model has its own attention
        self._parts = taken_apart(model)
        use_fast_rmsnorm(model)
        model.set_attn_implementation(_ATTENTION)
        if model.config._attn_implementation != _ATTENTION:  # transformers only warns
            raise ValueError(f"{type(model).__name__} computes attention in a way of its own: it cannot be stacked")
        self._cuts = [Cut.of(module) for module in self.modules.values()]
        self._together = is_spread(model)  # other workers do the same steps, each on its part of the base
        for place, module in enumerate(self.modules.values()):
            module.register_forward_hook(partial(self._add, place))
        self.adapter_bytes = 20 * sum(
            config.shape.rank * (module.in_features + module.out_features) for module in self.modules.values()
        )  # float32: weights, gradient (twice while its pieces are put together), two moments
        words = vocabulary(model)
        self.label_bytes = 12 * words  # logits, in float32, and softmax
        self._label_rows = max(ALIGN, LOGITS // words // ALIGN * ALIGN)
        refuse_unlike(model, alone, self._each_loss(probes[:2]), self._each_loss([probes[2], probes[1]])[1])
        self.token_bytes = self._probe()
        given = self.stack.memory_gib
        if given is None:
            free = memory.FREE_SHARE * memory.free_bytes(self.device) if self.device.type == "cuda" else 8 * 2**30
        self.memory_bytes = free if given is None else given * 2**30
        if self._together:
            least = torch.tensor(self.memory_bytes, dtype=torch.float64, device=self.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            self.memory_bytes = float(least)

    def pass_bytes(self, parts: Iterable[Part]) -> float:
        """Memory of a pass over these parts, beside the adapters."""
        parts = list(parts)
        labels = sum(part.labels for part in parts)
        if self._parts is not None:
            labels = min(labels, self._label_rows)
        return sum(part.tokens for part in parts) * self.token_bytes + labels * self.label_bytes

    def fit(self, users: Iterable[UserExamples]) -> Iterator[Fitted]:
        """Each user's adapter, in the order in which they finish.

        Raises:
            ValueError: a user has no example, or one without a target token that anything stands before.
        """
        waiting, active = iter(users), deque[User]()
        coming = next(waiting, None)
        while active or coming is not None:
            chosen: list[User] = []
            tokens = 0
            while active or coming is not None:
                if not active:
                    assert coming is not None
                    active.append(self.enter(coming))
                    coming = next(waiting, None)
                room = self.memory_bytes - (len(chosen) + len(active)) * self.adapter_bytes
                while not chosen and self.pass_bytes([active[0].parts[0]]) > room and active[0].halve():
                    pass  # the first user too keeps to the budget, as far as an example allows
                part = active[0].parts[0]
                tokens += -(-part.tokens // ALIGN) * ALIGN
                needed = self.pass_bytes([*(user.parts[0] for user in chosen), part])
                if chosen and (tokens > self.stack.tokens or needed > room):
                    break
                chosen.append(active.popleft())
            self.take_step(chosen)
            for user in chosen:
                if user.done:
                    yield self._fitted(user)
                else:
                    active.append(user)

    def enter(self, given: UserExamples) -> User:
        lacking = [i for i, (prompt, target) in enumerate(given.examples) if len(target) < (1 if prompt else 2)]
        if not given.examples or lacking:
            what = f"example {lacking[0]} has no target to learn" if lacking else "no example"
            raise ValueError(f"a user with {len(given.examples)} examples: {what}; set such users aside before")
        return User(given, self.config, self.modules, self.device)

    def _add(self, place: int, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of a target module: adds each user's alpha / r * B A x to that user's tokens."""
        stack = self._pass
        if stack is None:
            return out
        inputs, dropout, lows, cut = given[0].flatten(0, -2), self.config.dropout, [], self._cuts[place]
        if len(inputs) != sum(stack.sizes):
            name = list(self.modules)[place]
            raise ValueError(f"target {name}: it works on other rows than the tokens, so users cannot share a pass")
        scale = self.config.shape.scale / (1 - dropout)
        for user, pieces, x in zip(stack.users, stack.pieces, inputs.split(stack.sizes), strict=True):
            x = x.float()
            if dropout:
                x = x * _mask(user, x, cut)
            a = pieces[2 * place]
            lows.append(F.linear(x, a if cut is None else cut.inner(a)) * scale)
        if cut is not None:
            lows = list(cut.joined(torch.cat(lows)).split(stack.sizes))
        b_of = (pieces[2 * place + 1] for pieces in stack.pieces)
        deltas = [F.linear(low, b if cut is None else cut.outer(b)) for low, b in zip(lows, b_of, strict=True)]
        return (out + torch.cat(deltas).view(out.shape)).to(out.dtype)

    def losses(self, stack: Pass, reduction: str = "sum") -> list[Tensor]:
        """Each user's cross-entropy over the labels of this pass: summed, or of each label."""
        given = {"input_ids": stack.ids, "position_ids": stack.position, "use_cache": False, "stack": stack}
        sizes = [len(block.labels) for block in stack.blocks]
        parts = self._parts if sum(sizes) > self._label_rows else None
        self._pass = stack
        try:
            if parts is None:
                out = self.model(**given, logits_to_keep=stack.label_at).logits[0]
            else:
                out = parts.hidden(**given)[0].index_select(0, stack.label_at)
        finally:
            self._pass = None
        per_user = zip(out.split(sizes), stack.blocks, strict=True)
        if parts is not None:  # pieces of a size that depends on the user alone
            rows = self._label_rows
            return [losses_in_pieces(parts, x, block.labels, rows, reduction)[0] for x, block in per_user]
        return [
            F.cross_entropy(logits.float(), block.labels, ignore_index=IGNORED, reduction=reduction)
            for logits, block in per_user
        ]

    def _again(self) -> tuple[Any, Any]:
        """For a layer that is computed twice: the second time it sees the same pass and draws the same masks."""
        stack = self._pass
        if stack is None:
            return nullcontext(), nullcontext()
        states = [user.generator.get_state() for user in stack.users] if self.config.dropout else []
        return nullcontext(), self._same_again(stack, states)

    @contextmanager
    def _same_again(self, stack: Pass, states: list[Tensor]) -> Iterator[None]:
        before, later = self._pass, [user.generator.get_state() for user in stack.users]
        self._pass = stack
        for user, state in zip(stack.users, states, strict=False):
            user.generator.set_state(state)
        try:
            yield
        finally:
            self._pass = before
            for user, state in zip(stack.users, later, strict=True):
                user.generator.set_state(state)

    @torch.no_grad()
    def _each_loss(self, examples: Sequence[Example]) -> list[Tensor]:
        """Cross-entropy of each target token of some texts, each another user's, in one pass."""
        users = [self.enter(UserExamples(f"{i}", [example])) for i, example in enumerate(examples)]
        return self.losses(Pass(users, self.device), "none")

    def take_step(self, users: list[User]) -> None:
        """Takes the next part of each of these users; where memory does not suffice, in two passes and so on.

        Raises:
            RuntimeError: a single example does not fit.
        """
        states = [user.generator.get_state() for user in users]
        try:
            losses, gradients = self._gradients(users)
        except RuntimeError as error:
            if self._together or not memory.is_out_of_memory(error) or not (len(users) > 1 or users[0].halve()):
                raise
        else:
            for user, loss, gradient in zip(users, losses, gradients, strict=True):
                user.theta.grad = gradient if user.theta.grad is None else user.theta.grad + gradient
                user.advance(user.parts[0], loss)
            return
        memory.set_free()
        fits = self.pass_bytes(user.parts[0] for user in users) / 2 + len(users) * self.adapter_bytes
        self.memory_bytes = min(self.memory_bytes, fits)
        for user, state in zip(users, states, strict=True):
            user.generator.set_state(state)
        half = len(users) // 2
        for some in (users[:half], users[half:]) if half else (users,):
            self.take_step(some)

    def _gradients(self, users: list[User]) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Losses and gradients of the users' next parts; nothing of a user is changed but what has been drawn."""
        for user in users:
            user.begin()
        stack = Pass(users, self.device)
        losses = self.losses(stack)
        total = sum(
            (loss / part.step_labels for loss, part in zip(losses, stack.parts, strict=True)),
            torch.zeros((), device=self.device),
        )
        gradients = torch.autograd.grad(total, [user.theta for user in users])
        if self._together:
            gradients = self._summed(users, gradients)
        return [loss.detach() for loss in losses], gradients

    def _summed(self, users: list[User], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The users' gradients from those of all workers, in one message."""
        whole = 1 / dist.get_world_size()
        shares = [share for cut in self._cuts for share in (cut.shares if cut else (whole, whole))]
        factors = torch.cat(
            [torch.full((shape.numel(),), share) for shape, share in zip(users[0].shapes, shares, strict=True)]
        )
        flat = torch.stack(gradients) * factors.to(self.device)
        dist.all_reduce(flat)
        return flat.unbind()

    def _fitted(self, user: User) -> Fitted:
        pieces = [piece.detach().clone() for piece in user.pieces()]
        weights = {name: (pieces[2 * i], pieces[2 * i + 1]) for i, name in enumerate(self.modules)}
        loss = float(user.last_loss) / max(1, user.last_labels)
        return Fitted(user.given.user_id, weights, len(user.given.examples), len(user.batches), loss)

    def _probe(self) -> float:
        """Bytes that a token of a pass takes, counted on a pass over ALIGN tokens.

        Where layers are computed again, what one of them keeps meanwhile comes to what all of them keep.
        """
        user = self.enter(UserExamples("", [([0] * ALIGN, [0])]))

        def kept() -> float:
            own = [*self.model.parameters(), user.theta]
            count = memory.kept_bytes(lambda: self.losses(Pass([user], self.device)), own)
            return max(0.0, count - ALIGN * self.label_bytes) / ALIGN

        every = kept()
        if not memory.wanted(self.stack.checkpointing, self.device):
            return every
        layers = memory.checkpoint_layers(self.model, self._again)
        return kept() + every / layers if layers else every
