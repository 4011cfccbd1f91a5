"""Parts of a plug that the paper's form does not have; each is made only where the plug's config asks for it.

Shapes: B users, T items of all users (ragged), D encoder width, P persona tokens, H LLM width, L labels,
W weightings (1, or P where each persona token has its own).

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901, eq. 3-4.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

AGE_RATE = 10.0
"""Factor of the learned weights of age. AdamW moves a weight by about the learning rate per step, so that 300 steps of
the paper's 1e-4 would leave a plain weight near .01, where one of .25 was found to be of use."""


def projector(d_in: int, d_hidden: int, d_out: int) -> nn.Sequential:
    """Two Linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(d_in, d_hidden), nn.GELU(), nn.Linear(d_hidden, d_out))


def starts_at_zero(mlp: nn.Sequential) -> nn.Sequential:
    """The same projector with a last layer of zeros, so that it adds nothing at the first step."""
    with torch.no_grad():
        for parameter in mlp[2].parameters():
            parameter.zero_()
    return mlp


def segment_softmax(scores_T: Tensor, owner_T: Tensor, users: int) -> Tensor:
    """Softmax within each owner's entries, (T,) float32. An owner without entries adds nothing."""
    highest = scores_T.new_full((users,), -torch.inf).scatter_reduce(0, owner_T, scores_T.detach(), "amax")
    exp = torch.exp(scores_T - highest[owner_T])
    total = exp.new_zeros(users).index_add(0, owner_T, exp)
    return exp / total[owner_T]


def _rank(owner_T: Tensor, counts_B: Tensor) -> Tensor:
    """Place of each item counted from its owner's newest, which has 0; (T,) float32."""
    last_B = counts_B.long().cumsum(0) - 1
    return (last_B[owner_T] - torch.arange(len(owner_T), device=owner_T.device)).float()


class ItemWeights(nn.Module):
    """Weights of a user's items, for each weighting w:

        softmax_i( (s_w x + k_w) . h_i / temperature + a_w log(1 + rank_i) + b_w log(1 + days_i) )

    x is the query's vector (none: its product is left out) and rank counts from the newest item, which has 0. In the
    paper's form ([1], eq. 3) there is one weighting with s = 1, and k, a and b are not there. With weightings of their
    own, the persona tokens begin between the paper's weights (the first, s = 1) and equal ones (the last, s = 0).
    """

    def __init__(self, dim: int, tokens: int, *, own: bool, by_query: bool, ages: int, temperature: float) -> None:
        """`own`: every persona token has a weighting of its own; `ages`: 0, 1 (rank), or 2 (rank and days)."""
        super().__init__()
        self.temperature, self.own, self.ages = temperature, own, ages
        if own:
            if by_query:
                self.token_likeness = nn.Parameter(torch.linspace(1, 0, tokens))  # s
            self.token_query = nn.Parameter(torch.zeros(tokens, dim))  # k
        if ages:
            self.age = nn.Parameter(torch.zeros(tokens if own else 1, ages))  # a, b

    def forward(
        self, items_TD: Tensor, owner_T: Tensor, counts_B: Tensor, query_BD: Tensor | None, days_T: Tensor | None
    ) -> Tensor:
        """(T, W) float32; the weights of each user sum to 1. `counts_B`: number of items per user."""
        with torch.autocast(items_TD.device.type, enabled=False):
            scores_TW = None
            if query_BD is not None:
                likeness_T = (items_TD.float() * query_BD.float()[owner_T]).sum(-1) / self.temperature
                scores_TW = likeness_T.unsqueeze(-1)
            if self.own:
                asked_TP = items_TD.float() @ self.token_query.t() / self.temperature
                scores_TW = asked_TP if scores_TW is None else asked_TP + scores_TW * self.token_likeness
            if self.ages:
                age_TW = AGE_RATE * (self._ages(owner_T, counts_B, days_T) @ self.age.t())
                scores_TW = age_TW if scores_TW is None else scores_TW + age_TW
            if scores_TW is None:
                return (1.0 / counts_B[owner_T]).unsqueeze(-1)
            users = len(counts_B)
            return torch.stack([segment_softmax(one_T, owner_T, users) for one_T in scores_TW.unbind(1)], dim=1)

    def _ages(self, owner_T: Tensor, counts_B: Tensor, days_T: Tensor | None) -> Tensor:
        """log(1 + rank), and log(1 + days) where they count; (T, 1 or 2) float32."""
        rank_T = _rank(owner_T, counts_B)
        ages = [rank_T] if days_T is None or self.ages == 1 else [rank_T, days_T.float()]
        return torch.log1p(torch.stack(ages, dim=1))


class LabelValues(nn.Module):
    """Rows that items add to a persona by their labels:

        sum_i w_pi (g_p e(i) + W2 GELU(W1 e(i) + b1))_p

    e(i) is the embedding of item i's label: the mean of the LLM's own token embeddings of the label, in units of the
    persona's scale, or a learned vector for an item without one. g starts at 1 and W2 at 0, so that a persona speaks
    the LLM's language from the first step. Items of one label share its value, which is computed once per batch.
    """

    def __init__(self, labels: int, llm_dim: int, tokens: int, hidden: int | None) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(labels, llm_dim))
        self.no_label = nn.Parameter(torch.zeros(1, llm_dim))
        self.gain = nn.Parameter(torch.ones(tokens, 1))
        self.mlp = starts_at_zero(projector(llm_dim, hidden or llm_dim, tokens * llm_dim))

    def forward(self, weights_TW: Tensor, owner_T: Tensor, users: int, labels_T: Tensor) -> Tensor:
        """(B, P, H). `labels_T`: row of each item's label, below 0 for none."""
        labels, width = self.vectors.shape
        rows_T = torch.where(labels_T < 0, labels, labels_T)
        present_V, place_T = torch.unique(rows_T, return_inverse=True)
        embedded_VH = torch.cat([self.vectors, self.no_label])[present_V]
        values_VPH = self.gain * embedded_VH.unsqueeze(1) + self.mlp(embedded_VH).view(-1, len(self.gain), width)
        shares = weights_TW.new_zeros(users * len(present_V), weights_TW.shape[1])
        shares = shares.index_add(0, owner_T * len(present_V) + place_T, weights_TW)  # of each label in the weights
        shares_BVP = shares.view(users, len(present_V), weights_TW.shape[1]).expand(-1, -1, len(self.gain))
        return torch.einsum("bvp,vph->bph", shares_BVP, values_VPH)


SHARPNESS = 2.5
"""First log of the factor of the cosines between what a plug says and the labels."""


class LabelGuess(nn.Module):
    """Rows that spell the labels which the plug itself takes for likely:

        g_p sum_l softmax_l(exp(s) cos(said, e(l))) t(l)_p

    said is the instruction row plus the mean persona row, e(l) label l's mean embedding, and t(l)_p the embedding of
    its p-th token, zeros behind its last. The LLM then reads the label as it reads text, and has to copy it. g starts
    at 1.
    """

    def __init__(self, labels: int, llm_dim: int, tokens: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(labels, tokens, llm_dim))
        self.gain = nn.Parameter(torch.ones(tokens, 1))
        self.sharpness = nn.Parameter(torch.tensor(SHARPNESS))

    def forward(self, said_BH: Tensor, vectors_LH: Tensor) -> Tensor:
        """(B, P, H)."""
        likeness_BL = F.normalize(said_BH, dim=-1) @ F.normalize(vectors_LH, dim=-1).T
        likely_BL = torch.softmax(self.sharpness.exp() * likeness_BL, dim=-1)
        return self.gain * torch.einsum("bl,lph->bph", likely_BL, self.tokens)


class AnswerValues(nn.Module):
    """Rows that spell what a user's items answer:

        g_p sum_i softmax_i(exp(s) x . h_i + a log(1 + rank_i)) t(i)_p

    t(i)_p is the embedding of the p-th token of item i's answer by the LLM, in units of the persona's scale, zeros
    behind its last and for a token that no answer of the training has. x and rank are those of `ItemWeights`; the
    weights are sharper than those of the vectors, since the mean of many answers says little. g starts at 1 and a at 0.
    """

    def __init__(self, vocabulary: int, llm_dim: int, tokens: int, *, by_query: bool) -> None:
        super().__init__()
        self.register_buffer("ids", torch.zeros(vocabulary, dtype=torch.int64))
        self.register_buffer("vectors", torch.zeros(vocabulary, llm_dim))
        self.gain = nn.Parameter(torch.ones(tokens, 1))
        self.age = nn.Parameter(torch.zeros(()))
        if by_query:
            self.sharpness = nn.Parameter(torch.tensor(SHARPNESS / AGE_RATE))

    def forward(
        self, items_TD: Tensor, owner_T: Tensor, counts_B: Tensor, query_BD: Tensor | None, answers_TP: Tensor
    ) -> Tensor:
        """(B, P, H) float32. `answers_TP`: token ids, below 0 for none."""
        with torch.autocast(items_TD.device.type, enabled=False):
            scores_T = AGE_RATE * self.age * torch.log1p(_rank(owner_T, counts_B))
            if query_BD is not None:
                likeness_T = (items_TD.float() * query_BD.float()[owner_T]).sum(-1)
                scores_T = scores_T + torch.exp(AGE_RATE * self.sharpness) * likeness_T
            weights_T = segment_softmax(scores_T, owner_T, len(counts_B))
            counts = counts_B.long()
            rows = []
            for tokens_T in answers_TP.unbind(1):
                place_T = torch.searchsorted(self.ids, tokens_T.contiguous()).clamp(max=len(self.ids) - 1)
                spelt_T = weights_T * (self.ids[place_T] == tokens_T)
                rows.append(
                    F.embedding_bag(
                        place_T, self.vectors, counts.cumsum(0) - counts, mode="sum", per_sample_weights=spelt_T
                    )
                )
            return self.gain * torch.stack(rows, dim=1)


class Center(nn.Module):
    """Vectors as they differ from other users': (h - m) / s, with the mean m over the users of the training and the
    spread s of their items around it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(()))

    def forward(self, items_TD: Tensor) -> Tensor:
        return (items_TD - self.mean) / self.spread

    def learn(self, users: Sequence[np.ndarray]) -> None:
        """Takes mean and spread from users' items, (n, D) each; users without items do not count."""
        known = [items for items in users if len(items)]
        if not known:
            return
        mean = sum(items.mean(0, dtype=np.float64) for items in known) / len(known)
        squares = sum(float(((items - mean) ** 2).sum()) for items in known)
        spread = max(1e-6, (squares / sum(map(len, known))) ** 0.5)
        self.mean.copy_(torch.from_numpy(mean))
        self.spread.fill_(spread)


def label_vectors(llm: Any, labels: Sequence[str]) -> Tensor:
    """Mean of the LLM's token embeddings of each label, (L, H) float32; its tokens are those of an answer.

    Raises:
        ValueError: a label has no tokens.
    """
    ids = llm.prompt_builder.words.ids(list(labels))
    refuse_empty_labels(labels, ids)
    return mean_embeddings(llm, ids)


@torch.no_grad()
def label_tokens(llm: Any, labels: Sequence[str], count: int) -> Tensor:
    """The LLM's embeddings of each label's first tokens, (L, count, H) float32, zeros behind its last."""
    device, ids = llm.embedding.weight.device, llm.prompt_builder.words.ids(list(labels))
    out = torch.zeros(len(ids), count, llm.dim)
    for place, row in enumerate(ids):
        first = row[:count]
        out[place, : len(first)] = llm.embedding(torch.tensor(first, device=device)).float().cpu()
    return out


@torch.no_grad()
def token_vectors(llm: Any, ids: Sequence[int]) -> Tensor:
    """The LLM's embeddings of these tokens, (V, H) float32."""
    return llm.embedding(torch.tensor(list(ids), device=llm.embedding.weight.device)).float().cpu()


@torch.no_grad()
def mean_embeddings(llm: Any, ids: Sequence[Sequence[int]]) -> Tensor:
    """Mean of the LLM's embeddings of each text's tokens, (n, H) float32."""
    device = llm.embedding.weight.device
    return torch.stack([llm.embedding(torch.tensor(row, device=device)).float().mean(0) for row in ids])


def refuse_empty_labels(labels: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """Raises a ValueError where a label has no tokens."""
    empty = [label for label, row in zip(labels, ids, strict=True) if not len(row)]
    if empty:
        raise ValueError(
            f"the label {empty[0]!r} has no tokens in this LLM's tokenizer ({len(empty)} such of {len(labels)}), so "
            "that it can neither be a value nor an answer; leave it out of the task's labels, or set "
            "shape.label_values=false"
        )
