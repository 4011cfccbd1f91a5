"""Steps of a training, for a plug and for a base alike: one AdamW step per batch over all workers, epochs, checkpoints.

Route: plan_epoch -> micro-batches that fit the memory -> summed loss and gradients -> clipped step -> on_checkpoint.
The order of the samples depends on the seed alone, never on the number of workers: two workers take the same steps as
one, each on its share of the same batch. Only dropout, which a base has, draws other values for another number of
workers, as for another seed. A step that does not fit the memory is taken again in smaller passes.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import IntEnum
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist

from pplug import memory
from pplug.identity import stable_int
from pplug.kernels import leave_out_cudnn_attention
from pplug.parallel import Mesh
from pplug.schedule import rate


class LoopSettings(Protocol):
    """Fields that the configs of both trainings have."""

    @property
    def epochs(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def warmup_fraction(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def max_tokens_per_microbatch(self) -> int: ...
    @property
    def seed(self) -> int: ...


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Batches of sample indices for one epoch: shuffled, of like length within windows of 32 batches."""
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    window = 32 * batch_size
    batches = []
    for start in range(0, len(order), window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def micro_batches(indices: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Splits a batch so that samples x longest stays within the budget, longest first."""
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    out, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        out.append(order[start : start + size])
        start += size
    return out


class DivergedError(FloatingPointError):
    """A training has diverged and no earlier epoch has a validation loss to go back to: another try would end alike."""


class Order(IntEnum):
    """An order to a training between two steps, beside its plan; of several workers' orders the greatest counts."""

    GO_ON = 0
    SAVE = 1
    END = 2
    """Save, and take no further step."""


class Loop:
    """Optimiser, schedule and steps of one worker."""

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        config: LoopSettings,
        lengths: np.ndarray,
        target_tokens: np.ndarray,
        loss_of: Callable[[np.ndarray, int], torch.Tensor],
        mesh: Mesh,
        seeded: bool = False,
    ) -> None:
        """
        Args:
            groups: parameters with their learning rates, as AdamW takes them; a group may be empty.
            lengths, target_tokens: tokens of each sample, and those that its loss counts.
            loss_of: (sample indices, epoch) -> summed loss of their target tokens, with a graph.
            mesh: this worker's place.
            seeded: whether a step sets torch's generator, for a model that draws dropout from it.
        """
        leave_out_cudnn_attention()
        self.config, self.lengths, self.target_tokens, self.loss_of = config, lengths, target_tokens, loss_of
        self.rank, self.world, self.copies, self.seeded = mesh.rank, mesh.world, mesh.copies, seeded
        self.shards = mesh.shards
        self.parameters = [parameter for some in groups for parameter in some["params"]]
        self.device = self.parameters[0].device
        self.budget = config.max_tokens_per_microbatch
        """Padded tokens of one pass; it gets smaller where the memory does not suffice."""
        self.per_epoch = math.ceil(len(lengths) / config.batch_size)
        self.steps = self.per_epoch * config.epochs
        self.optimizer = torch.optim.AdamW(
            [some for some in groups if some["params"]], weight_decay=config.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate(step, self.steps, config.warmup_fraction)
        )

    def fit_memory(self, token_bytes: float, promised: float = 0.0) -> None:
        """Lowers the budget to what is free, at so many bytes that a token keeps for the backward pass.

        Args:
            promised: bytes of the free ones that something else will take.
        """
        sharers = self.world if self.device.type == "cpu" else 1
        free = memory.FREE_SHARE * (memory.free_bytes(self.device, sharers) - promised)
        budget = torch.tensor(max(1, min(self.budget, int(free / max(1.0, token_bytes)))), device=self.device)
        if dist.is_initialized():  # workers that hold one LLM together take the same passes
            dist.all_reduce(budget, op=dist.ReduceOp.MIN)
        self.budget = int(budget)

    def step(self, batch: np.ndarray, epoch: int) -> float:
        """One optimiser step on a global batch; this worker computes its share.

        Returns:
            Loss per target token of the whole batch.

        Raises:
            RuntimeError: a single sample does not fit the memory, or a pass of workers that hold one LLM together.
        """
        total = None
        while total is None:
            try:
                total = self._gradients(batch, epoch)
            except RuntimeError as error:
                if not memory.is_out_of_memory(error) or not self._halve(batch[self.rank :: self.world]):
                    raise
            if total is None:
                memory.set_free()
        self._sum_gradients()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return self.sum(total).item()

    def _gradients(self, batch: np.ndarray, epoch: int) -> torch.Tensor:
        tokens = int(self.target_tokens[batch].sum())
        if self.seeded:  # the same dropout after a restart
            step = self.schedule.last_epoch * self.world + self.rank
            torch.manual_seed(stable_int(f"{self.config.seed}:{step}") >> 1)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part, counts in self.passes(batch, self.lengths):
            loss = counts * self.loss_of(part, epoch)
            (loss / tokens).backward()
            total += loss.detach() / tokens
        return total

    def passes(self, indices: np.ndarray, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int]]:
        """This worker's share of some samples in passes, and whether each counts (1) or is taken for the others (0).

        Workers that put layers together take as many passes as each other.
        """
        parts = micro_batches(indices[self.rank :: self.world], lengths, self.budget)
        most = torch.tensor(len(parts), device=self.device)
        if self.shards > 1:  # before the first pass: the workers meet in each of them
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        yield from ((part, 1) for part in parts)
        for _ in range(len(parts), int(most)):
            yield indices[lengths[indices].argmin() :][:1], 0

    def _halve(self, indices: np.ndarray) -> bool:
        """Halves the budget below the largest pass that was tried; False where each pass was one sample."""
        passes = micro_batches(indices, self.lengths, self.budget)
        largest = max(len(part) * int(self.lengths[part].max()) for part in passes)
        if self.copies * self.shards > 1 or max(map(len, passes)) == 1:
            return False
        self.budget = min(self.budget, largest) // 2
        print(f"out of memory: passes have {self.budget} tokens at most from here on", flush=True)
        return True

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sums a value over those that share a batch; all workers get the same bits."""
        if self.world * self.copies > 1:
            dist.all_reduce(value)
        return value / self.copies if self.copies > 1 else value

    def agreed(self, order: Order) -> Order:
        """The greatest of all workers' orders, so that all do the same."""
        if dist.is_initialized():
            greatest = torch.tensor(int(order), device=self.device)
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
            return Order(int(greatest))
        return order

    def _sum_gradients(self) -> None:
        """Sums gradients over workers in one message: each worker's loss is already divided by the global tokens."""
        if self.world * self.copies == 1:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = self.sum(torch.cat([g.flatten() for g in grads]))
        for parameter, piece in zip(self.parameters, flat.split([g.numel() for g in grads]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def validate(self) -> dict[str, float]:
        """Metrics at an epoch's end, val_loss among them.

        Without any, each epoch's end is the best so far. A loss that is no number then leaves none to go back to: the
        newest checkpoint may be one of the steps that diverged.
        """
        return {}

    def state(self) -> dict[str, Any]:
        """Optimiser, schedule and generators; what is trained is saved apart."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_rng"])


def run_epochs(
    loop: Loop,
    done: int,
    best: float,
    on_step: Callable[[int, int, float], None],
    on_checkpoint: Callable[[int, dict[str, float], bool], None],
    checkpoint_steps: int,
    *,
    patience: int | None = None,
    worse: int = 0,
    ask: Callable[[], Order] = lambda: Order.GO_ON,
) -> bool:
    """Trains from step `done` to the end; validates at each epoch's end; saves then, every some steps and when asked.

    Args:
        done: steps already taken (a resumed run goes on at the next batch of the same plan).
        best: lowest validation loss so far (inf at the start).
        on_step: called with (steps done, steps in all, loss).
        on_checkpoint: called with (steps done, metrics, whether this is the best so far).
        checkpoint_steps: 0 saves at the end of an epoch only.
        patience: epochs without a better val_loss after which the training ends; None: never.
        worse: epochs without a better one before step `done`.
        ask: called after each step.

    Returns:
        False where it was asked to end before the end; where the loss is no number any more, it ends with True.

    Raises:
        DivergedError: the loss is no number, and no earlier epoch has a validation loss to go back to.
    """
    config = loop.config
    for epoch in range(done // loop.per_epoch, config.epochs):
        if patience is not None and worse >= patience:
            return True
        batches = plan_epoch(loop.lengths, config.batch_size, config.seed, epoch)
        losses = []
        for place, batch in enumerate(batches):
            step = epoch * loop.per_epoch + place + 1
            if step <= done:
                continue
            losses.append(loop.step(batch, epoch))
            on_step(step, loop.steps, losses[-1])
            if not math.isfinite(losses[-1]):
                _refuse_without(best, f"loss is {losses[-1]} at step {step}")
                return True
            at_end, order = place + 1 == len(batches), loop.agreed(ask())
            if not at_end and not (checkpoint_steps and step % checkpoint_steps == 0) and order is Order.GO_ON:
                continue
            metrics = {"step": step, "epoch": epoch, "train_loss": float(np.mean(losses))}
            if at_end:
                metrics |= loop.validate()
                if not math.isfinite(metrics.get("val_loss", 0.0)):
                    _refuse_without(best, f"validation loss is {metrics['val_loss']} after step {step}")
            is_best = at_end and metrics.get("val_loss", -math.inf) < best
            worse = 0 if is_best else worse + at_end
            best = min(best, metrics.get("val_loss", best))
            on_checkpoint(step, metrics | {"best_val_loss": best}, is_best)
            if order is Order.END and step < loop.steps:
                return False
    return True


def _refuse_without(best: float, what: str) -> None:
    if not math.isfinite(best):
        raise DivergedError(
            f"the {what}, and no earlier epoch has a validation loss to go back to: the training has diverged; lower "
            "its learning rate"
        )
