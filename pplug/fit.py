"""Fits a plug: samples -> batches of like length -> loss on targets -> one AdamW step over all workers.

Route: Samples (token ids of prompts, targets, queries; item vectors by range) -> plan_epoch -> Fitter.step, .validate.
Every choice (order, dropped items, held-out users) depends on the seed and the sample alone, never on the number of
workers: two workers take the same steps as one, each on its share of the same batch.
Shapes: B samples of a batch, T their items (ragged), D encoder width, R rows per sample.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, section 4, and the authors' code (optimiser settings).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field

from pplug.history import NO_TIME, age_days
from pplug.identity import stable_int
from pplug.items import UserItems
from pplug.schedule import rate
from pplug.settings import Settings, renamed


class FitConfig(Settings):
    """Sets how a plug is trained. The defaults are those of the paper or of its code."""

    epochs: int = Field(2, gt=0)
    """Number of passes over the samples."""
    batch_size: int = Field(64, gt=0)
    """Number of samples per step, over all workers."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate of the plug, reached at the end of the warm-up."""
    query_learning_rate: float | None = Field(None, ge=0)
    """Learning rate of the query encoder; default: learning_rate. With 0 the encoder stays the copy that it is at the
    start, and each query is encoded once."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of AdamW."""
    warmup_fraction: float = renamed("warmup", 0.05, ge=0, lt=1)
    """Fraction of the steps over which the learning rate rises; then it falls linearly to zero."""
    max_grad_norm: float = renamed("clip", 1.0, gt=0)
    """Norm of the gradient over all parameters above which it is scaled down."""
    item_dropout: float = Field(0.5, ge=0, lt=1)
    """Upper limit u of the fraction of items left out. Each epoch leaves out int(n*U(0, u)) + 1 random items of a
    sample with more than two; 0 leaves out none."""
    history_dropout: float = Field(0.0, ge=0, lt=1)
    """Fraction of samples trained without their history, so that users without one do no worse than with the plain LLM.
    0 as published."""
    max_target_tokens: int = Field(128, gt=1)
    """Number of tokens that a target may have, EOS included; a longer one is cut."""
    max_tokens_per_microbatch: int = renamed("micro_tokens", 16_384, gt=0)
    """Padded prompt and target tokens of one forward pass. The limit bounds memory and changes no result."""
    val_fraction: float = renamed("held_out", 0.1, gt=0, lt=1)
    """Fraction of the train users whose samples choose the checkpoint instead of training."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format in which query encoder and projector multiply matrices. auto takes bfloat16 where it is native."""
    seed: int = 0
    """Seed of the first weights, the order of the samples, the items left out and the users held out."""


@dataclass(frozen=True)
class Samples:
    """Samples of a training. `spans[i]` = (shard, start, stop): the item vectors of sample i, oldest first."""

    prompts: Sequence[Any]
    targets: Sequence[list[int]]
    queries: Sequence[list[int]]
    owners: Sequence[str]
    spans: np.ndarray
    shards: Sequence[np.ndarray]
    facts: Sequence[np.ndarray] | None = None
    """Per shard (V, 2) int64: row of each item's label, and its time in microseconds (history.NO_TIME: none)."""
    as_of: np.ndarray | None = None
    """(N,) int64, time at which the items' ages count; where it is before the newest item's, that one's counts."""

    def __len__(self) -> int:
        return len(self.targets)

    def items(self, index: int) -> UserItems:
        """Vectors in 16 or 32 bits, memory-mapped; labels and ages where the samples have any."""
        shard, start, stop = self.spans[index]
        vectors = self.shards[shard][start:stop]
        if self.facts is None or self.as_of is None:
            return UserItems(vectors)
        labels, times = self.facts[shard][start:stop].T
        return UserItems(vectors, labels, age_days(times, max(self.as_of[index], times.max(initial=NO_TIME))))

    def lengths(self) -> np.ndarray:
        """Tokens of prompt and target."""
        return np.array([len(p) + len(t) for p, t in zip(self.prompts, self.targets, strict=True)], np.int64)


def held_out(owner_id: str, share: float, seed: int) -> bool:
    """True if this person's samples choose the checkpoint instead of training; id and seed decide it."""
    return stable_int(f"{seed}:{owner_id}") / 2**64 < share


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


def kept_items(n: int, config: FitConfig, epoch: int, sample: int) -> np.ndarray:
    """Indices of the items, out of n, that a sample keeps in an epoch, in order (the authors' augmentation, drawn on
    line)."""
    if config.history_dropout:
        if np.random.default_rng((config.seed, epoch, sample, 1)).random() < config.history_dropout:
            return np.arange(0)
    if config.item_dropout == 0 or n <= 2:
        return np.arange(n)
    rng = np.random.default_rng((config.seed, epoch, sample))
    dropped = min(n - 1, int(n * rng.uniform(0, config.item_dropout)) + 1)
    return np.sort(rng.permutation(n)[dropped:])


def micro_batches(indices: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Splits a batch so that samples x longest stays within the budget, longest first."""
    order = indices[np.argsort(-lengths[indices], kind="stable")]
    out, start = [], 0
    while start < len(order):
        size = max(1, budget // int(lengths[order[start]]))
        out.append(order[start : start + size])
        start += size
    return out


class Fitter:
    """Plug, optimiser and schedule of one worker; it takes steps and validates."""

    def __init__(
        self,
        plug: Any,
        llm: Any,
        config: FitConfig,
        train: Samples,
        validation: Samples,
        *,
        rank: int = 0,
        world: int = 1,
        pad_id: int = 0,
    ) -> None:
        import torch

        from pplug.encoder import best_dtype

        self.plug, self.llm, self.config = plug, llm, config
        self.train, self.validation, self.rank, self.world, self.pad_id = train, validation, rank, world, pad_id
        self.device = next(plug.parameters()).device
        self.dtype = best_dtype(config.precision)
        self._lengths = {id(s): s.lengths() for s in (train, validation)}
        self._frozen_queries: dict[int, dict[int, Any]] = {}
        steps = math.ceil(len(train) / config.batch_size) * config.epochs
        query = list(plug.emb_model.parameters()) if plug.emb_model is not None else []
        query_lr = config.learning_rate if config.query_learning_rate is None else config.query_learning_rate
        if query_lr == 0:
            self._frozen_queries = {id(train): {}, id(validation): {}}
            for parameter in query:
                parameter.requires_grad_(False)
        own = {id(parameter) for parameter in query}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in plug.parameters() if id(p) not in own], "lr": config.learning_rate},
            {"params": [p for p in query if p.requires_grad], "lr": query_lr},
        ]
        self.parameters = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: rate(step, steps, config.warmup_fraction)
        )

    def soft_prompts(self, samples: Samples, indices: np.ndarray, epoch: int | None) -> tuple[Any, list[int]]:
        """Instruction and persona rows (B, 1+P, H) of samples, and how many of them stand in each prompt."""
        import torch

        from pplug.plug import ragged

        config, plug = self.config, self.plug.config
        items = []
        for index in indices:
            own = samples.items(index)
            if plug.trained_without_history:
                own = own.take(np.arange(0))
            elif epoch is not None:
                own = own.take(kept_items(len(own), config, epoch, int(index)))
            items.append(own)
        items_TD, owner_T, facts = ragged(items, plug.encoder_dim, self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            rows = self.plug.forward_ragged(
                items_TD, owner_T, len(indices), self.query_vectors(samples, indices), facts
            )
        counts = [1 + plug.persona_tokens * bool(len(own)) for own in items]
        return rows, counts

    def query_vectors(self, samples: Samples, indices: np.ndarray) -> Any:
        """Query vectors (B, D); those of a query encoder that is not trained are computed once per sample."""
        import torch

        from pplug.encoder import pad

        if self.plug.emb_model is None:
            return None
        cache = self._frozen_queries.get(id(samples))
        if cache is not None and all(int(i) in cache for i in indices):
            return torch.stack([cache[int(i)] for i in indices])
        tokens, mask = pad([samples.queries[i] for i in indices], self.pad_id)
        query = self.plug.embed_query(tokens.to(self.device), mask.to(self.device))
        if cache is not None:
            cache |= {int(i): x for i, x in zip(indices, query.detach(), strict=True)}
        return query

    def loss(self, samples: Samples, indices: np.ndarray, epoch: int | None) -> tuple[Any, Any]:
        from pplug.objective import target_loss

        rows, counts = self.soft_prompts(samples, indices, epoch)
        prompts = [samples.prompts[i] for i in indices]
        return target_loss(self.llm, prompts, rows, counts, [samples.targets[i] for i in indices])

    def step(self, batch: np.ndarray, epoch: int) -> float:
        """One optimiser step on a global batch; this worker computes its share.

        Returns:
            Loss per target token of the whole batch.
        """
        import torch

        tokens = sum(len(self.train.targets[i]) for i in batch)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in micro_batches(
            batch[self.rank :: self.world], self._lengths[id(self.train)], self.config.max_tokens_per_microbatch
        ):
            loss, _ = self.loss(self.train, part, epoch)
            (loss / tokens).backward()
            total += loss.detach() / tokens
        sum_gradients(self.parameters, self.world)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        return self._sum(total).item()

    def validate(self) -> dict[str, float]:
        """Loss per target token and share of targets that greedy decoding would write, on the held-out users."""
        import torch

        totals = torch.zeros(2, device=self.device)
        mine = np.arange(len(self.validation))[self.rank :: self.world]
        with torch.no_grad():
            for part in micro_batches(mine, self._lengths[id(self.validation)], self.config.max_tokens_per_microbatch):
                loss, exact = self.loss(self.validation, part, None)
                totals += torch.stack([loss, exact.sum()])
        loss, exact = self._sum(totals).tolist()
        tokens = sum(len(target) for target in self.validation.targets)
        return {"val_loss": loss / max(1, tokens), "val_exact": exact / max(1, len(self.validation))}

    def _sum(self, value: Any) -> Any:
        import torch.distributed as dist

        if self.world > 1:
            dist.all_reduce(value)
        return value

    def state(self) -> dict[str, Any]:
        """Optimiser, schedule and generators; the plug is saved apart."""
        import torch

        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        import torch

        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["torch_rng"])


def sum_gradients(parameters: Sequence[Any], world: int) -> None:
    """Sums gradients over workers in one message: each worker's loss is already divided by the global tokens."""
    import torch
    import torch.distributed as dist

    if world == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for parameter, piece in zip(parameters, flat.split([g.numel() for g in grads]), strict=True):
        parameter.grad = piece.view_as(parameter)


def run_epochs(
    fitter: Fitter,
    done: int,
    best: float,
    on_step: Callable[[int, int, float], None],
    on_checkpoint: Callable[[int, dict[str, float], bool], None],
    checkpoint_steps: int,
) -> None:
    """Trains from step `done` to the end; validates at each epoch's end, and saves then and every some steps.

    Args:
        done: steps already taken (a resumed run goes on at the next batch of the same plan).
        best: lowest validation loss so far (inf at the start).
        on_step: called with (steps done, steps in all, loss).
        on_checkpoint: called with (steps done, metrics, whether this is the best so far).
        checkpoint_steps: 0 saves at the end of an epoch only.
    """
    config = fitter.config
    lengths = fitter.train.lengths()
    per_epoch = math.ceil(len(lengths) / config.batch_size)
    total = per_epoch * config.epochs
    for epoch in range(config.epochs):
        if (epoch + 1) * per_epoch <= done:
            continue
        batches = plan_epoch(lengths, config.batch_size, config.seed, epoch)
        losses = []
        for place, batch in enumerate(batches):
            step = epoch * per_epoch + place + 1
            if step <= done:
                continue
            losses.append(fitter.step(batch, epoch))
            on_step(step, total, losses[-1])
            at_end = place + 1 == len(batches)
            if not at_end and not (checkpoint_steps and step % checkpoint_steps == 0):
                continue
            metrics = {"step": step, "epoch": epoch, "train_loss": float(np.mean(losses))}
            if at_end:
                metrics |= fitter.validate()
            is_best = at_end and metrics["val_loss"] < best
            best = min(best, metrics.get("val_loss", best))
            on_checkpoint(step, metrics | {"best_val_loss": best}, is_best)
