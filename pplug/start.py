"""A plug's start: before the LLM reads any sample, the plug's rows learn to name the answer in the LLM's embeddings.

The sum of the instruction row and the mean persona row is compared with the mean token embedding of each answer: of all
answers where they are few, such as a task's labels, else of those that stand in one batch [1]. The loss is the
cross-entropy of the cosines times a learned sharpness. It teaches how items are weighed and what their vectors say, on
all samples, at a small part of the LLM's cost per sample; the LLM's own loss goes on from there.
Shapes: N samples, B of a batch, T their items (ragged), P persona tokens, H LLM width, C answers to choose among.

[1] "Representation Learning with Contrastive Predictive Coding", arXiv:1807.03748, eq. 4.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from pplug.encoder import best_dtype, pad
from pplug.fit import Samples, personas_of
from pplug.fit_config import FitConfig
from pplug.llm import FrozenLLM
from pplug.plug_parts import SHARPNESS, mean_embeddings

BATCH = 64
"""Samples of a step."""
FEW_ANSWERS = 512
"""Distinct answers up to which a sample's own is told from all of them."""
SHARPNESS_RATE = 1e-2
"""Learning rate of the cosines' factor, a log that has few steps to move in."""
VALUES_PER_PASS = 1 << 27
"""Projected values of the items of a pass, at most: half a GiB in 32 bits, some times over for the gradient."""


QUERIES_PER_PASS = 16
"""Queries of like length that a trained query encoder reads at a time."""


class Start:
    """The start of a plug. All workers take the same steps, on the same samples."""

    def __init__(self, plug: Any, llm: FrozenLLM, config: FitConfig, pad_id: int = 0) -> None:
        """`pad_id`: the id that queries of a batch are padded with."""
        self.plug, self.llm, self.config, self.pad_id = plug, llm, config, pad_id
        self.device = next(plug.parameters()).device
        self.dtype = best_dtype(config.precision, self.device)
        guess = plug.label_guess
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS, device=self.device)) if guess is None else guess.sharpness

    def learn(self, samples: Samples) -> None:
        """Trains the plug for `config.start_epochs`, its query encoder only at a rate of its own.

        Args:
            samples: without query vectors where the query encoder is trained; else with them, where the plug reads
                queries.
        """
        config, query = self.config, []
        left_out = ("emb_model.", "label_guess.")
        rest = [p for name, p in self.plug.named_parameters() if not name.startswith(left_out) and p.requires_grad]
        groups = [{"params": rest, "lr": config.learning_rate}, {"params": [self.sharpness], "lr": SHARPNESS_RATE}]
        if config.start_query_learning_rate and self.plug.emb_model is not None:
            query = [p for p in self.plug.emb_model.parameters() if p.requires_grad]
            groups.append({"params": query, "lr": config.start_query_learning_rate})
        own = [*rest, *query]
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        answers = Answers(self.llm, samples)
        steps = config.start_epochs * -(-len(samples) // BATCH)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for epoch in range(config.start_epochs):
            order = np.random.default_rng((config.seed, epoch, 2)).permutation(len(samples))
            for place in range(0, len(order), BATCH):
                batch = order[place : place + BATCH]
                optimizer.zero_grad()
                for likeness_BC, right_B in self._passes(samples, answers, batch, config.epochs + epoch):
                    (F.cross_entropy(likeness_BC, right_B, reduction="sum") / len(batch)).backward()
                nn.utils.clip_grad_norm_(own, config.max_grad_norm)
                optimizer.step()
                schedule.step()
        if dist.is_initialized():  # the same steps on different processors may differ in the last bits
            for parameter in [*own, self.sharpness]:
                dist.broadcast(parameter.data, 0)

    @torch.no_grad()
    def named(self, samples: Samples) -> float:
        """Share of the samples whose rows are most like their own answer's embedding; 1/C by chance."""
        answers, right = Answers(self.llm, samples), 0
        for place in range(0, len(samples), BATCH):
            batch = np.arange(place, min(len(samples), place + BATCH))
            for likeness_BC, right_B in self._passes(samples, answers, batch, None):
                right += int((likeness_BC.argmax(1) == right_B).sum())
        return right / max(1, len(samples))

    def _passes(
        self, samples: Samples, answers: "Answers", batch: np.ndarray, epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Sharpened cosines (B, C) and the place of the right answer (B,), in passes that fit the memory."""
        vectors_CH, right_B = answers.of(batch)
        config = self.plug.config
        most = max(1, VALUES_PER_PASS // (config.persona_tokens * config.llm_dim))
        sizes = samples.spans[batch, 2] - samples.spans[batch, 1]
        for part in np.split(np.arange(len(batch)), np.flatnonzero(np.diff(np.cumsum(sizes) // most)) + 1):
            persona_BPH, query_BD, _ = personas_of(
                self.plug, self.plug.unguessed, samples, batch[part], self.config, epoch,
                self._encoded(samples, batch[part]),
            )  # fmt: skip
            instruction_BH = self.plug.instruction(query_BD).expand(len(part), -1)
            said_BH = self.plug.said(instruction_BH, persona_BPH)
            likeness_BC = F.normalize(said_BH, dim=-1) @ vectors_CH.T
            yield self.sharpness.exp() * likeness_BC, right_B[torch.from_numpy(part).to(self.device)]

    def _encoded(self, samples: Samples, places: np.ndarray) -> Tensor | None:
        """Query vectors (B, D) of the encoder as it is now, where the samples have none; padded among their like."""
        if samples.query_vectors is not None or self.plug.emb_model is None:
            return None
        order = np.argsort([len(samples.queries[place]) for place in places], kind="stable")
        vectors = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            for start in range(0, len(order), QUERIES_PER_PASS):
                some = places[order[start : start + QUERIES_PER_PASS]]
                tokens, mask = pad([samples.queries[place] for place in some], self.pad_id)
                vectors.append(self.plug.embed_query(tokens.to(self.device), mask.to(self.device)))
        return torch.cat(vectors)[torch.from_numpy(np.argsort(order)).to(self.device)]


class Answers:
    """Embeddings of the answers that a sample's own is told from."""

    def __init__(self, llm: FrozenLLM, samples: Samples) -> None:
        self.device = llm.embedding.weight.device
        # the last token ends a reply, whatever it says
        texts = [tuple(target[:-1] or target) for target in samples.targets]
        self.distinct = list(dict.fromkeys(texts))
        place = {text: row for row, text in enumerate(self.distinct)}
        self.right = np.array([place[text] for text in texts], np.int64)
        self.llm, self.all = llm, None
        if len(self.distinct) <= FEW_ANSWERS:
            self.all = self._embedded(np.arange(len(self.distinct)))

    def of(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        """Unit vectors (C, H) of the answers to choose among, and the place of each sample's own, (B,)."""
        right = self.right[batch]
        if self.all is not None:
            return self.all, torch.from_numpy(right).to(self.device)
        present, places = np.unique(right, return_inverse=True)
        return self._embedded(present), torch.from_numpy(places).to(self.device)

    def _embedded(self, rows: np.ndarray) -> Tensor:
        return F.normalize(mean_embeddings(self.llm, [self.distinct[row] for row in rows]), dim=-1)
