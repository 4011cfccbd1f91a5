"""Part of the prompt stage: the items that stand in a request's prompt, found among those it may see.

Works on one bucket's histories as they lie in memory; the index of a user's words is made once for all requests that
see the same items. What is found for a request is kept with its bucket, so that hybrids find it again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.generate.visible import Found, Users
from pipelines.histories import Histories, decode_fields
from pplug import retrieval
from pplug.encoder import TextEncoder
from pplug.retrieval import Composed, RetrievalConfig, WordIndex
from pplug.tasks import TaskEntry, query


class Retriever:
    """Finds items and writes the prompts; loads the encoder once an actor, where a method is dense."""

    def __init__(
        self,
        config: RetrievalConfig,
        kinds: frozenset[str],
        entry: TaskEntry,
        tokenizer: Any,
        budget_tokens: int,
        threads: int,
    ) -> None:
        self.config, self.entry, self.tokenizer, self.budget_tokens = config, entry, tokenizer, budget_tokens
        self.encoder = None
        if "dense" in kinds:
            import torch

            torch.set_num_threads(threads)
            self.encoder = TextEncoder(config.encoder)

    def prompts(
        self,
        kind: str,
        requests: Sequence[Mapping[str, Any]],
        inputs: Sequence[str],
        users: "Users",
        reserved: Sequence[int],
    ) -> tuple[list[Composed], list[str | None]]:
        """The text of each request's prompt, and why one could not be written: an item lacks a field.

        Args:
            reserved: of the budget, the tokens that a text before it has taken already.
        """
        texts = [query(request["input"], self.entry) for request in requests]
        keys = [(kind, request["user_id"], request["request_id"]) for request in requests]
        new = [i for i, key in enumerate(keys) if key not in users.found.picks]
        vectors: dict[int, np.ndarray] = {}
        if kind == "dense" and new:
            vectors = dict(zip(new, self._vectors([texts[i] for i in new]), strict=True))
        composed: list[Composed] = []
        errors: list[str | None] = []
        for i, (request, input) in enumerate(zip(requests, inputs, strict=True)):
            prompt, error = Composed("", input), None
            try:
                if keys[i] not in users.found.picks:
                    users.found.picks[keys[i]] = self._find(kind, request, texts[i], vectors.get(i), users)
                prompt = retrieval.compose(
                    users.found.picks[keys[i]], input, self.entry, self.tokenizer, self.budget_tokens,
                    self.config.input_share, reserved[i],
                )  # fmt: skip
            except ValueError as problem:  # names the missing field, never a text
                error = str(problem)
            composed.append(prompt)
            errors.append(error)
        return composed, errors

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        assert self.encoder is not None, "a dense method needs the encoder"
        return self.encoder.encode([self.config.query_prefix + text for text in texts])

    def _find(
        self, kind: str, request: Mapping[str, Any], text: str, vector: np.ndarray | None, users: "Users"
    ) -> list[Mapping[str, str]]:
        own, k = users.own, self.config.k
        rows = users.rows(request)
        if vector is not None:
            rows = rows[own.vector_row[rows] >= 0]
        if not len(rows):
            return []
        if vector is not None:
            best = retrieval.nearest(own.vectors[own.vector_row[rows]], vector)
        elif kind == "bm25":
            best = self._index(rows, own, users.found).rank(text)
        elif kind == "recency":
            best = retrieval.recency(len(rows))
        else:
            best = retrieval.at_random(len(rows), k, json.dumps([request["user_id"], request["request_id"]]))
        return [_fields(own, row) for row in rows[best[:k]]]

    def _index(self, rows: np.ndarray, own: Histories, found: Found) -> WordIndex:
        key = (int(rows[0]), int(rows[-1]))
        if found.words is None or found.words[0] != key:
            texts = [retrieval.words(_fields(own, row), self.entry) for row in rows]
            found.words = (key, WordIndex(texts))
        return found.words[1]


def _fields(own: Histories, row: int) -> Mapping[str, str]:
    assert own.fields is not None, "retrieval reads the items' fields"
    return decode_fields(own.fields[int(row)].as_py())
