"""Fits a plug: samples -> batches of like length -> loss on targets -> one AdamW step over all workers.

Route: Samples (token ids of prompts, targets, queries; item vectors by range) -> plan_epoch -> Fitter.step, .validate.
Every choice (order, dropped items, held-out users) depends on the seed and the sample alone, never on the number of
workers: two workers take the same steps as one, each on its share of the same batch.
Shapes: B samples of a batch, T their items (ragged), D encoder width, R rows per sample.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, section 4, and the authors' code (optimiser settings).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pplug import memory
from pplug.bert import forward_of
from pplug.encoder import best_dtype, default_batch_tokens, encode_batches, pad
from pplug.fit_config import FitConfig
from pplug.history import NO_TIME, age_days
from pplug.item_tensors import ragged
from pplug.items import UserItems
from pplug.llm import FrozenLLM
from pplug.loop import Loop
from pplug.objective import target_loss
from pplug.parallel import Mesh
from pplug.prefix import KeptBeginnings
from pplug.splice import Prompt

KEPT_SHARE = 0.4
"""Share of the free memory of a CPU in which prompts' keys and values are kept from epoch to epoch."""


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
    """Per shard (V, 2) or (V, P + 1) int64: row of each item's label, or the tokens of its answer, and its time in
    microseconds (history.NO_TIME: none)."""
    as_of: np.ndarray | None = None
    """(N,) int64, time at which the items' ages count; where it is before the newest item's, that one's counts."""
    query_vectors: torch.Tensor | None = None
    """(N, D) float32 of a query encoder that is not trained (`encode_queries`)."""

    def __len__(self) -> int:
        return len(self.targets)

    def items(self, index: int) -> UserItems:
        """Vectors in 16 or 32 bits, memory-mapped; labels and ages where the samples have any."""
        shard, start, stop = self.spans[index]
        vectors = self.shards[shard][start:stop]
        if self.facts is None or self.as_of is None:
            return UserItems(vectors)
        facts = self.facts[shard][start:stop]
        labels, times = facts[:, :-1], facts[:, -1]
        labels = labels[:, 0] if labels.shape[1] == 1 else labels
        return UserItems(vectors, labels, age_days(times, max(self.as_of[index], times.max(initial=NO_TIME))))

    def take(self, places: np.ndarray) -> "Samples":
        """The samples at some places alone."""
        return Samples(
            [self.prompts[i] for i in places],
            [self.targets[i] for i in places],
            [self.queries[i] for i in places],
            [self.owners[i] for i in places],
            self.spans[places],
            self.shards,
            self.facts,
            None if self.as_of is None else self.as_of[places],
            None if self.query_vectors is None else self.query_vectors[torch.from_numpy(places)],
        )

    def lengths(self) -> np.ndarray:
        """Tokens of prompt and target."""
        return np.array([len(p) + len(t) for p, t in zip(self.prompts, self.targets, strict=True)], np.int64)


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


def drawn(n: int, share: float, seed: int) -> np.ndarray:
    """Places of a share of n samples, one at least, in order."""
    size = min(n, max(1, round(share * n)))
    return np.sort(np.random.default_rng((seed, 3)).permutation(n)[:size])


def encode_queries(plug: Any, samples: Samples, pad_id: int, dtype: torch.dtype) -> Samples:
    """The samples with the vectors of their queries, each worker having encoded a share of them.

    A plug without a query encoder leaves them as they are.
    """
    if plug.emb_model is None or samples.query_vectors is not None:
        return samples
    device = next(plug.parameters()).device
    transformer, head = plug.query_parts()
    vectors = torch.zeros(len(samples), plug.config.encoder_dim, device=device)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own = samples.queries[rank::world]
    encoded = vectors.new_empty(len(own), vectors.shape[1])
    budget = default_batch_tokens(device, dtype, plug.config.query_max_tokens)
    encode_batches(own, forward_of(transformer, dtype), head, pad_id, budget, device, encoded)
    vectors[rank::world] = encoded
    if world > 1:
        dist.all_reduce(vectors)
    return replace(samples, query_vectors=vectors.cpu())


def personas_of(
    plug: Any,
    make: Callable[..., torch.Tensor],
    samples: Samples,
    indices: np.ndarray,
    config: FitConfig,
    epoch: int | None,
    query_BD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, list[bool]]:
    """Rows that `make`, a method of the plug, makes of the samples' items; query vectors (B, D); who has an item.

    Args:
        epoch: decides which items a sample loses; None: none.
        query_BD: vectors of the queries, where the samples have none.
    """
    shape, device = plug.config, next(plug.parameters()).device
    items = []
    for index in indices:
        own = samples.items(index)
        if shape.trained_without_history:
            own = own.take(np.arange(0))
        elif epoch is not None:
            own = own.take(kept_items(len(own), config, epoch, int(index)))
        items.append(own)
    items_TD, owner_T, facts = ragged(items, shape.encoder_dim, device)
    if query_BD is None and samples.query_vectors is not None:
        query_BD = samples.query_vectors[torch.from_numpy(indices)].to(device)
    return make(items_TD, owner_T, len(indices), query_BD, facts), query_BD, [bool(len(own)) for own in items]


class Fitter(Loop):
    """The training of a plug on one worker: it takes steps and validates."""

    def __init__(
        self,
        plug: Any,
        llm: FrozenLLM,
        config: FitConfig,
        train: Samples,
        validation: Samples,
        *,
        rank: int = 0,
        world: int = 1,
        mesh: Mesh | None = None,
        pad_id: int = 0,
    ) -> None:
        """`mesh`: this worker's place where some workers hold one LLM together; otherwise `rank` of `world`."""
        self.plug, self.llm, self.fit_config = plug, llm, config
        self.train, self.validation, self.pad_id = train, validation, pad_id
        self.dtype = best_dtype(config.precision, next(plug.parameters()).device)
        query = list(plug.emb_model.parameters()) if plug.emb_model is not None else []
        query_lr = config.learning_rate if config.query_learning_rate is None else config.query_learning_rate
        if query_lr == 0:
            for parameter in query:
                parameter.requires_grad_(False)
        own = {id(parameter) for parameter in query}
        groups: list[dict[str, Any]] = [
            {"params": [p for p in plug.parameters() if id(p) not in own], "lr": config.learning_rate},
            {"params": [p for p in query if p.requires_grad], "lr": query_lr},
        ]
        targets = np.array([len(target) for target in train.targets], np.int64)

        def train_loss(indices: np.ndarray, epoch: int) -> Any:
            return self.loss(self.train, indices, epoch)[0]

        self.rows = 1 + plug.config.persona_tokens
        lengths = train.lengths() + self.rows
        super().__init__(groups, config, lengths, targets, train_loss, mesh or Mesh(rank, world))
        keeps = self.device.type == "cpu" and config.epochs > 1 and llm.prompt_builder.layout.rows != "before"
        room = KEPT_SHARE * memory.free_bytes(self.device, self.world) if keeps else 0.0
        self.fit_memory(make_room(llm, config.checkpointing), room)
        befores = [prompt.before for own in (self.train, self.validation) for prompt in own.prompts]
        self._kept = KeptBeginnings(room, befores) if keeps else None

    def encode_queries(self) -> None:
        """Encodes each query once, where the query encoder learns no more; without this each pass encodes its own.

        The encoder must be the one that the plug keeps: call it when a checkpoint has been put in place.
        """
        if self.fit_config.query_learning_rate == 0:
            self.train = encode_queries(self.plug, self.train, self.pad_id, self.dtype)
            self.validation = encode_queries(self.plug, self.validation, self.pad_id, self.dtype)

    def soft_prompts(self, samples: Samples, indices: np.ndarray, epoch: int | None) -> tuple[Any, list[int]]:
        """Instruction and persona rows (B, 1+P, H) of samples, and how many of them stand in each prompt."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            query_BD = self.query_vectors(samples, indices)
            rows, _, known = personas_of(
                self.plug, self.plug.forward_ragged, samples, indices, self.fit_config, epoch, query_BD
            )
        return rows, [1 + self.plug.config.persona_tokens * has for has in known]

    def query_vectors(self, samples: Samples, indices: np.ndarray) -> Any:
        """Query vectors (B, D): those of the samples, or those of the encoder that is trained."""
        if samples.query_vectors is not None:
            return samples.query_vectors[torch.from_numpy(indices)].to(self.device)
        if self.plug.emb_model is None:
            return None
        tokens, mask = pad([samples.queries[i] for i in indices], self.pad_id)
        return self.plug.embed_query(tokens.to(self.device), mask.to(self.device))

    def loss(self, samples: Samples, indices: np.ndarray, epoch: int | None) -> tuple[Any, Any]:
        """Summed loss of the samples' targets, and which of these greedy decoding would write."""
        rows, counts = self.soft_prompts(samples, indices, epoch)
        prompts = [samples.prompts[i] for i in indices]
        return target_loss(self.llm, prompts, rows, counts, [samples.targets[i] for i in indices], self._kept)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Loss per target token and share of targets that greedy decoding would write, on the held-out users."""
        totals = torch.zeros(2, device=self.device)
        for part, counts in self.passes(np.arange(len(self.validation)), self.validation.lengths() + self.rows):
            loss, exact = self.loss(self.validation, part, None)
            totals += counts * torch.stack([loss, exact.sum()])
        loss, exact = self.sum(totals).tolist()
        tokens = sum(len(target) for target in self.validation.targets)
        return {"val_loss": loss / max(1, tokens), "val_exact": exact / max(1, len(self.validation))}


def make_room(llm: FrozenLLM, checkpointing: str, tokens: int = 64) -> float:
    """Has the LLM's layers computed again in the backward pass where `checkpointing` asks for it.

    Returns:
        Bytes that a token of a pass takes, counted on a pass over some tokens in the layout that the LLM has: those
        before the persona rows may be read without a graph, those behind keep all.

    Raises:
        FloatingPointError: as `refuse_no_gradient`.
    """
    refuse_no_gradient(llm)
    device = llm.embedding.weight.device
    target = [0] * 8
    words = [0] * (tokens - len(target) - 2)
    again = memory.wanted(checkpointing, device)  # with it, nothing is read ahead
    before = again or llm.prompt_builder.layout.rows == "before"
    prompt = Prompt([0], words) if before else Prompt([0, *words], [])

    def kept() -> float:
        rows = torch.zeros(1, 1, llm.dim, device=device, requires_grad=True)
        run = partial(target_loss, llm, [prompt], rows, [1], [target])
        return memory.kept_bytes(run, list(llm.model.parameters())) / tokens

    every = kept()
    if not again:
        return every
    layers = memory.checkpoint_layers(llm.model)
    return kept() + every / layers if layers else every


@torch.enable_grad()
def refuse_no_gradient(llm: FrozenLLM) -> None:
    """Refuses an LLM through which no gradient reaches a persona row.

    Raises:
        FloatingPointError: the gradient of the row is exactly 0.
    """
    rows = torch.zeros(1, 1, llm.dim, device=llm.embedding.weight.device, requires_grad=True)
    # behind the row stands another token: the loss reaches the row through the layers' matrices alone
    loss, _ = target_loss(llm, [Prompt([0], [0])], rows, [1], [[0, 0]])
    [gradient] = torch.autograd.grad(loss, rows)
    if not bool(gradient.any()):
        raise FloatingPointError(
            f"no gradient passes through {type(llm.model).__name__} to a persona row, as its layers are quantised or "
            "computed without one: a plug would learn nothing; train on the original, and have this copy serve what "
            "was trained there (llm.serves)"
        )
