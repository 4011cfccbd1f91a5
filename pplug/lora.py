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

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pplug.adapter import AdapterShape, LoraConfig, StackConfig, target_modules
from pplug.identity import stable_int
from pplug.norms import use_fast_rmsnorm
from pplug.objective import IGNORED
from pplug.schedule import rate
from pplug.stackable import Example, own_losses, probe_examples, refuse_unlike

ALIGN = 16
"""A user's tokens fill whole blocks of this many: see the head of this file."""
_ATTENTION = "pplug_stack"
_NOTHING_TO_DO = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states",
                  "output_router_logits", "return_dict"}  # fmt: skip
"""Arguments of a base's attention that change nothing here: the base is in eval mode and knows its own positions."""


@dataclass(frozen=True)
class UserExamples:
    """A user's examples: token ids of each prompt and of its target (EOS included)."""

    user_id: str
    examples: Sequence[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Fitted:
    """A trained adapter. `weights`: module name -> A (r, in), B (out, r), float32; `loss`: last epoch's, per token."""

    user_id: str
    weights: dict[str, tuple[Tensor, Tensor]]
    n_examples: int
    steps: int
    loss: float


def user_seed(seed: int, user_id: str) -> int:
    """63 bits for everything that is drawn for this user."""
    return stable_int(f"{seed}:{user_id}") >> 1


def initial_weights(shape: AdapterShape, modules: "dict[str, nn.Linear]", seed: int) -> list[Tensor]:
    """A (r, in) and B (out, r) of each module, in turn: A uniform as PEFT (and nn.Linear) does, B zero."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for module in modules.values():
        a = torch.empty(shape.rank, module.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        out += [a, torch.zeros(module.out_features, shape.rank)]
    return out


def plan_steps(n: int, config: LoraConfig, seed: int) -> list[np.ndarray]:
    """Example indices of each step of a user with n examples: every epoch in an order of its own."""
    batches = []
    for epoch in range(config.epochs):
        order = np.random.default_rng((seed, epoch)).permutation(n)
        batches += [order[start : start + config.batch_size] for start in range(0, n, config.batch_size)]
    return batches


def kept_mask(x: Tensor, dropout: float, generator: torch.Generator) -> Tensor:
    """1 where a value of x (T, H) is kept, else 0, float32; dropout is exact to 1 / 65,536.

    Two draws come out of one of the generator's 32-bit numbers: less than half the time of bernoulli_.
    """
    draws = torch.empty(-(-x.numel() // 2), dtype=torch.int32, device=x.device).random_(
        -(2**31), None, generator=generator
    )
    limit = round(dropout * 2**16) - 2**15
    return (draws.view(torch.int16)[: x.numel()] >= limit).to(torch.float32).view(x.shape)


@dataclass(frozen=True)
class _Part:
    """Rows of one user in one pass: all but the last token of each example, or a part of a step's rows."""

    rows: list[tuple[list[int], list[int]]]
    """Token ids and, at the end of the row, the labels of its last len(labels) positions."""
    step_labels: int
    ends_step: bool

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows)

    @property
    def labels(self) -> int:
        return sum(len(labels) for _, labels in self.rows)


class _User:
    """One user in training: own weights, optimiser, schedule, generator and order."""

    def __init__(self, given: UserExamples, config: LoraConfig, modules: dict[str, nn.Linear], device: Any) -> None:
        self.given, self.config = given, config
        seed = user_seed(config.seed, given.user_id)
        start = initial_weights(config.shape, modules, seed)
        self.shapes = [tensor.shape for tensor in start]
        # one leaf a user: one optimiser state, one norm, and its pieces' gradients come back in one concatenation
        self.theta = nn.Parameter(torch.cat([tensor.flatten() for tensor in start]).to(device))
        self.optimizer = torch.optim.AdamW([self.theta], lr=config.learning_rate, weight_decay=config.weight_decay)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.batches = plan_steps(len(given.examples), config, seed)
        self.step, self.parts = 0, deque(self._split(self.batches[0]))
        self.last_loss, self.last_labels = torch.zeros((), device=device), 0

    def _split(self, batch: np.ndarray) -> list[_Part]:
        """A step's rows in parts of at most max_tokens_per_microbatch: by this user's rows alone."""
        rows: list[tuple[list[int], list[int]]] = []
        for index in batch:
            prompt, target = self.given.examples[index]
            # nothing stands before the first token of a target without a prompt, so nothing predicts it
            labels = target if prompt else target[1:]
            rows.append(((prompt + target)[:-1], labels))
        total = sum(len(labels) for _, labels in rows)
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        size = 0
        for row in rows:
            if groups[-1] and size + len(row[0]) > self.config.max_tokens_per_microbatch:
                groups.append([])
                size = 0
            groups[-1].append(row)
            size += len(row[0])
        return [_Part(group, total, group is groups[-1]) for group in groups]

    @property
    def done(self) -> bool:
        return self.step == len(self.batches)

    def pieces(self) -> list[Tensor]:
        """A and B of each module, views of theta."""
        sizes = [shape.numel() for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(self.theta.split(sizes), self.shapes, strict=True)]

    def advance(self, part: _Part, loss_sum: Tensor) -> None:
        """After a backward pass: counts the part, and at a step's end clips and steps."""
        self.parts.popleft()
        per_epoch = len(self.batches) // self.config.epochs
        if self.step >= len(self.batches) - per_epoch:
            self.last_loss, self.last_labels = self.last_loss + loss_sum.detach(), self.last_labels + part.labels
        if not part.ends_step:
            return
        nn.utils.clip_grad_norm_([self.theta], self.config.max_grad_norm)
        self.optimizer.param_groups[0]["lr"] = self.config.learning_rate * rate(
            self.step, len(self.batches), self.config.warmup_fraction
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not self.done:
            self.parts.extend(self._split(self.batches[self.step]))


class _Block:
    """One user's tokens in a pass: where they stand, and how attention sees them as padded rows."""

    def __init__(self, part: _Part, device: Any) -> None:
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

    def __init__(self, users: list[_User], device: Any) -> None:
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
        use_fast_rmsnorm(model)
        model.set_attn_implementation(_ATTENTION)
        if model.config._attn_implementation != _ATTENTION:  # transformers only warns
            raise ValueError(f"{type(model).__name__} computes attention in a way of its own: it cannot be stacked")
        for place, module in enumerate(self.modules.values()):
            module.register_forward_hook(partial(self._add, place))
        self._adapter_bytes = 20 * sum(
            config.shape.rank * (module.in_features + module.out_features) for module in self.modules.values()
        )  # float32: weights, gradient (twice while its pieces are put together), two moments
        self.label_bytes = 12 * model.get_output_embeddings().weight.shape[0]  # logits, in float32, and softmax
        refuse_unlike(model, alone, self._each_loss(probes[:2]), self._each_loss([probes[2], probes[1]])[1])
        self.token_bytes = self._probe()

    def fit(self, users: Iterable[UserExamples]) -> Iterator[Fitted]:
        """Each user's adapter, in the order in which they finish.

        Raises:
            ValueError: a user has no example, or one without a target token that anything stands before.
        """
        waiting, active = iter(users), deque[_User]()
        coming = next(waiting, None)
        while active or coming is not None:
            chosen: list[_User] = []
            tokens, memory = 0, float(len(active) * self._adapter_bytes)
            while active or coming is not None:
                if not active:
                    assert coming is not None
                    active.append(self.enter(coming))
                    coming = next(waiting, None)
                    memory += self._adapter_bytes
                part = active[0].parts[0]
                tokens += -(-part.tokens // ALIGN) * ALIGN
                memory += part.tokens * self.token_bytes + part.labels * self.label_bytes
                if chosen and (tokens > self.stack.tokens or memory > self.stack.memory_gib * 2**30):
                    break
                chosen.append(active.popleft())
            self.take_step(chosen)
            for user in chosen:
                if user.done:
                    yield self._fitted(user)
                else:
                    active.append(user)

    def enter(self, given: UserExamples) -> _User:
        lacking = [i for i, (prompt, target) in enumerate(given.examples) if len(target) < (1 if prompt else 2)]
        if not given.examples or lacking:
            what = f"example {lacking[0]} has no target to learn" if lacking else "no example"
            raise ValueError(f"a user with {len(given.examples)} examples: {what}; set such users aside before")
        return _User(given, self.config, self.modules, self.device)

    def _add(self, place: int, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Forward hook of a target module: adds each user's alpha / r * B A x to that user's tokens."""
        stack = self._pass
        if stack is None:
            return out
        dropout, deltas = self.config.dropout, []
        scale = self.config.shape.scale / (1 - dropout)
        for user, pieces, x in zip(stack.users, stack.pieces, given[0][0].split(stack.sizes), strict=True):
            x = x.float()
            if dropout:
                x = x * kept_mask(x, dropout, user.generator)
            deltas.append(F.linear(F.linear(x, pieces[2 * place]) * scale, pieces[2 * place + 1]))
        return (out + torch.cat(deltas)[None]).to(out.dtype)

    def losses(self, stack: Pass, reduction: str = "sum") -> list[Tensor]:
        """Each user's cross-entropy over the labels of this pass: summed, or of each label."""
        self._pass = stack
        try:
            logits = self.model(
                input_ids=stack.ids,
                position_ids=stack.position,
                use_cache=False,
                logits_to_keep=stack.label_at,
                stack=stack,
            ).logits[0]
        finally:
            self._pass = None
        per_user = logits.split([len(block.labels) for block in stack.blocks])
        return [
            F.cross_entropy(part.float(), block.labels, ignore_index=IGNORED, reduction=reduction)
            for part, block in zip(per_user, stack.blocks, strict=True)
        ]

    @torch.no_grad()
    def _each_loss(self, examples: Sequence[Example]) -> list[Tensor]:
        """Cross-entropy of each target token of some texts, each another user's, in one pass."""
        users = [self.enter(UserExamples(f"{i}", [example])) for i, example in enumerate(examples)]
        return self.losses(Pass(users, self.device), "none")

    def take_step(self, users: list[_User]) -> None:
        stack = Pass(users, self.device)
        losses = self.losses(stack)
        total = sum(
            (loss / part.step_labels for loss, part in zip(losses, stack.parts, strict=True)),
            torch.zeros((), device=self.device),
        )
        total.backward()
        for user, part, loss in zip(users, stack.parts, losses, strict=True):
            user.advance(part, loss)

    def _fitted(self, user: _User) -> Fitted:
        pieces = [piece.detach().clone() for piece in user.pieces()]
        weights = {name: (pieces[2 * i], pieces[2 * i + 1]) for i, name in enumerate(self.modules)}
        loss = float(user.last_loss) / max(1, user.last_labels)
        return Fitted(user.given.user_id, weights, len(user.given.examples), len(user.batches), loss)

    def _probe(self) -> float:
        """Bytes that a pass keeps for its backward, a token: counted on a pass over ALIGN tokens."""
        kept: dict[int, int] = {}
        own = {parameter.data_ptr() for parameter in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        user = self.enter(UserExamples("", [([0] * ALIGN, [0])]))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = self.losses(Pass([user], self.device))
        del losses
        return max(0.0, sum(kept.values()) - ALIGN * self.label_bytes) / ALIGN
