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
rows padded to that user's longest. Words that all rows of a user's step begin with (a chat template's head, the task's
own words) stand there once, so that dropout draws one mask for them and not one per row. Logits are computed at target
positions only, and so is what stands behind the attention of the last layer.
Shapes: U users of a pass, M tokens of all of them, R rows of one user, L its longest row, T its tokens, r rank.

[1] "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401 (OPPU).
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pplug import memory
from pplug.adapter import LoraConfig, StackConfig, target_modules
from pplug.kernels import leave_out_cudnn_attention
from pplug.last_layer import shorten
from pplug.logits import IGNORED, LOGITS, losses_in_pieces, taken_apart, vocabulary
from pplug.lora_pass import ATTENTION, Pass, use_quick_attention
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
from pplug.low_rank import add_up, down
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


def _mask(user: User, x: Tensor, cut: Cut | None) -> Tensor:
    """The dropout mask of a user's values: of a part of them, that part of the mask of all."""
    if cut is None or not cut.by_input:
        return user.mask(x)
    return user.mask(x.new_empty(len(x), cut.width))[:, cut.part]


class StackedTrainer:
    """Trains adapters on one frozen causal base, which it takes over: hooks and attention stay in place."""

    def __init__(self, model: Any, config: LoraConfig, stack: StackConfig | None = None) -> None:
        """Raises ValueError: the base lacks a target module, computes attention in a way of its own, mixes users, or
        lets no gradient pass."""
        leave_out_cudnn_attention()
        self.model, self.config, self.stack = model.requires_grad_(False).eval(), config, stack or StackConfig()
        self.modules = target_modules(model, config.shape.targets)
        self.device = next(model.parameters()).device
        self._pass: Pass | None = None
        probes = probe_examples(model.get_input_embeddings().weight.shape[0], ALIGN)
        alone = own_losses(model, probes[:2])  # as long as the model has its own attention
        self._parts = taken_apart(model)
        use_fast_rmsnorm(model)
        model.set_attn_implementation(ATTENTION)
        if model.config._attn_implementation != ATTENTION:  # transformers only warns
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
        self._ends_short = False
        refuse_unlike(model, alone, self._each_loss(probes[:2]), self._each_loss([probes[2], probes[1]])[1])
        whole = [prompt + target for prompt, target in probes]
        self._use_shortcuts([(row[: ALIGN // 2], row[ALIGN // 2 :]) for row in whole])
        self._refuse_no_gradient(probes[0])
        self.token_bytes, self.pair_bytes = self._probe()
        given = self.stack.memory_gib
        if given is None:
            free = memory.FREE_SHARE * memory.free_bytes(self.device) if self.device.type == "cuda" else 8 * 2**30
        self.memory_bytes = free if given is None else given * 2**30
        if self._together:
            least = torch.tensor(self.memory_bytes, dtype=torch.float64, device=self.device)
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
            self.memory_bytes = float(least)

    @torch.enable_grad()
    def _refuse_no_gradient(self, example: Example) -> None:
        """Raises ValueError: nothing goes back from the loss to an adapter, as quantised layers keep it back."""
        user = self.enter(UserExamples("", [example]))
        [loss] = self.losses(Pass([user], self.device))
        if not loss.requires_grad or not bool(torch.autograd.grad(loss, user.theta)[0].any()):
            raise ValueError(
                f"no gradient passes through {type(self.model).__name__} to an adapter, as its layers are quantised or "
                "computed without one; train on the original, and have this copy serve what was trained there "
                "(llm.serves)"
            )

    def _use_shortcuts(self, examples: Sequence[Example]) -> None:
        """Changes how the base computes wherever its losses stay the same."""
        self._kept_if_same(lambda: use_quick_attention(self.model), examples)
        layers = memory.layers_of(self.model)
        if layers and not self._together:  # others compute their part of a layer at the same time
            self._kept_if_same(lambda: self._shorten(layers[-1]), examples)

    def _shorten(self, layer: nn.Module) -> Callable[[], None]:
        try:
            undo = shorten(layer, lambda: self._pass.label_at if self._pass else None, [*self.modules.values()])
        except ValueError:
            return lambda: None
        self._ends_short = True

        def take_back() -> None:
            undo()
            self._ends_short = False

        return take_back

    def _kept_if_same(self, change: Callable[[], Callable[[], None]], examples: Sequence[Example]) -> bool:
        """Changes how the base computes, and takes it back where its losses are others then.

        Args:
            change: returns what takes it back.
        """
        before = self._each_loss(examples)
        undo = change()
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 1e-2
        try:
            pairs = zip(before, self._each_loss(examples), strict=True)
            same = all(torch.allclose(one, two, rtol=tolerance) for one, two in pairs)
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            same = False
        if not same:
            undo()
        return same

    def pass_bytes(self, parts: Iterable[Part]) -> float:
        """Memory of a pass over these parts, beside the adapters."""
        parts = list(parts)
        labels = sum(part.labels for part in parts)
        if self._parts is not None:
            labels = min(labels, self._label_rows)
        rows = [len(ids) for part in parts for ids, _ in part.rows]  # a head that rows share is counted in each of them
        return sum(n * (self.token_bytes + n * self.pair_bytes) for n in rows) + labels * self.label_bytes

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
        inputs, dropout, cut = given[0].flatten(0, -2), self.config.dropout, self._cuts[place]
        if len(inputs) != sum(stack.sizes):
            name = list(self.modules)[place]
            raise ValueError(f"target {name}: it works on other rows than the tokens, so users cannot share a pass")
        a, b = ([pieces[2 * place + side] for pieces in stack.pieces] for side in (0, 1))
        if cut is not None:
            a, b = [cut.inner(one) for one in a], [cut.outer(one) for one in b]
        each = zip(stack.users, inputs.split(stack.sizes), strict=True)
        masks = [_mask(user, x, cut) for user, x in each] if dropout else []
        low = down(inputs, a, masks, self.config.shape.scale / (1 - dropout), stack.sizes)
        if cut is not None:
            low = cut.joined(low)
        return add_up(out.flatten(0, -2), low, b, stack.sizes).view(out.shape)

    def losses(self, stack: Pass, reduction: str = "sum") -> list[Tensor]:
        """Each user's cross-entropy over the labels of this pass: summed, or of each label."""
        given = {"input_ids": stack.ids, "position_ids": stack.position, "use_cache": False, "stack": stack}
        sizes = [len(block.labels) for block in stack.blocks]
        parts = self._parts if sum(sizes) > self._label_rows else None
        self._pass = stack
        try:
            if parts is None:
                out = self.model(**given, logits_to_keep=0 if self._ends_short else stack.label_at).logits[0]
            else:
                out = parts.hidden(**given)[0]
                out = out if self._ends_short else out.index_select(0, stack.label_at)
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

    def _probe(self) -> tuple[float, float]:
        """Bytes that a pass takes per token, and per pair of tokens of a row, which attention keeps on a CPU.

        Counted on passes over one short row and a longer one. Where layers are computed again, what one of them keeps
        meanwhile comes to what all of them keep.
        """

        def kept(size: int) -> float:
            user = self.enter(UserExamples("", [([0] * size, [0])]))
            own = [*self.model.parameters(), user.theta]
            count = memory.kept_bytes(partial(self.losses, Pass([user], self.device)), own)
            return max(0.0, count - ALIGN * self.label_bytes) / size

        sizes = [ALIGN, 4 * ALIGN]
        try:
            per_token = np.array([kept(size) for size in sizes])
        except (IndexError, ValueError):  # the base reads no row of that length
            del sizes[1]
            per_token = np.array([kept(ALIGN)])
        if memory.wanted(self.stack.checkpointing, self.device):
            layers = memory.checkpoint_layers(self.model, self._again)
            per_token = np.array([kept(size) for size in sizes]) + per_token / layers if layers else per_token
        short, long = per_token[0], per_token[-1]  # each a + b L
        per_pair = max(0.0, (long - short) / (4 * ALIGN - ALIGN))
        return max(0.0, short - per_pair * ALIGN), per_pair
