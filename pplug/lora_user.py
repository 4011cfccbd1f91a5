"""One user in stacked training: examples, weights, optimiser, order and draws. `lora` stacks users.

Shapes: T tokens, H width of a module's input, r rank.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pplug.adapter import AdapterShape, LoraConfig
from pplug.identity import stable_int
from pplug.prefix import common_head
from pplug.schedule import rate

ALIGN = 16
"""A user's tokens fill whole blocks of this many: see the head of `lora`."""


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

    Each draw takes 16 bits. On a CPU they are numpy's, from a seed that the generator gives: torch's own generator
    takes five times as long for as many bits (135,168 values, one thread).
    """
    kept, values = torch.empty(x.shape, device=x.device), x.numel()
    if x.device.type == "cpu":
        (seed,) = torch.empty(1, dtype=torch.int64).random_(generator=generator).tolist()
        many = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**64, -(-values // 4), dtype=np.uint64)
        draws = torch.from_numpy(many.view(np.int16))
    else:
        many = torch.empty(-(-values // 2), dtype=torch.int32, device=x.device)
        draws = many.random_(-(2**31), None, generator=generator).view(torch.int16)
    limit = round(dropout * 2**16) - 2**15
    torch.ge(draws[:values], limit, out=kept.view(-1))  # in one pass
    return kept


def _head(rows: Sequence[tuple[list[int], list[int]]]) -> int:
    """Number of tokens with which all rows begin and from which no label is read; 0 where it is too few to pay."""
    return len(common_head([ids[: len(ids) - len(labels) + 1] for ids, labels in rows])) if len(rows) > 1 else 0


@dataclass(frozen=True)
class Part:
    """Rows of one user in one pass: all but the last token of each example, or a part of a step's rows."""

    rows: list[tuple[list[int], list[int]]]
    """Token ids and, at the end of the row, the labels of its last len(labels) positions."""
    step_labels: int
    ends_step: bool
    head: int = 0
    """Number of tokens with which all rows begin: they stand in the pass once, before the rest of each row."""
    whole: int = 0
    """Number of tokens of the part that this one was cut from because of memory; 0: it was not cut."""
    offset: int = 0
    """Number of tokens behind that part's head and before this one's own."""

    def halves(self) -> "tuple[Part, Part]":
        """Two parts with half the rows each, whose dropout masks are those of the one."""
        at, whole = len(self.rows) // 2, self.whole or self.tokens
        first = replace(self, rows=self.rows[:at], ends_step=False, whole=whole)
        second = replace(self, rows=self.rows[at:], whole=whole, offset=self.offset + first.tokens - self.head)
        return first, second

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.rows) - self.head * (len(self.rows) - 1)

    @property
    def labels(self) -> int:
        return sum(len(labels) for _, labels in self.rows)


class User:
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
        self._drawn_from = self.generator.get_state()

    def _split(self, batch: np.ndarray) -> list[Part]:
        """A step's rows in parts of at most max_tokens_per_microbatch: by this user's rows alone."""
        rows: list[tuple[list[int], list[int]]] = []
        for index in batch:
            prompt, target = self.given.examples[index]
            # nothing stands before the first token of a target without a prompt, so nothing predicts it
            labels = target if prompt else target[1:]
            rows.append(((prompt + target)[:-1], labels))
        rows.sort(key=lambda row: len(row[0]))  # rows of like lengths are padded together
        total = sum(len(labels) for _, labels in rows)
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        size = 0
        for row in rows:
            if groups[-1] and size + len(row[0]) > self.config.max_tokens_per_microbatch:
                groups.append([])
                size = 0
            groups[-1].append(row)
            size += len(row[0])
        return [Part(group, total, group is groups[-1], _head(group)) for group in groups]

    def halve(self) -> bool:
        """Cuts the next part in two, which changes no value beyond rounding; False where it is one row."""
        if len(self.parts[0].rows) < 2:
            return False
        self.parts.extendleft(reversed(self.parts.popleft().halves()))
        return True

    def begin(self) -> None:
        """Before a pass: parts that were cut from one part draw what that one would have drawn."""
        part = self.parts[0]
        if part.whole and not part.offset:
            self._drawn_from = self.generator.get_state()
        elif part.whole:
            self.generator.set_state(self._drawn_from)

    def mask(self, x: Tensor) -> Tensor:
        """The dropout mask of the next part's values x (T, H)."""
        part, dropout = self.parts[0], self.config.dropout
        if not part.whole:
            return kept_mask(x, dropout, self.generator)
        size = -(-part.whole // ALIGN) * ALIGN
        drawn = kept_mask(x.new_empty(size, x.shape[-1]), dropout, self.generator)
        start = part.head + part.offset
        own = drawn[: part.head], drawn[start : start + part.tokens - part.head]
        return torch.cat([*own, drawn.new_ones(len(x) - part.tokens, x.shape[-1])])

    @property
    def done(self) -> bool:
        return self.step == len(self.batches)

    def pieces(self) -> list[Tensor]:
        """A and B of each module, views of theta."""
        sizes = [shape.numel() for shape in self.shapes]
        return [piece.view(shape) for piece, shape in zip(self.theta.split(sizes), self.shapes, strict=True)]

    def advance(self, part: Part, loss_sum: Tensor) -> None:
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
