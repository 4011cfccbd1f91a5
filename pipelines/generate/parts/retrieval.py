"""Parts `random`, `recency`, `bm25` and `dense`: items of the history, found among those a request may see.

Works on one bucket's histories as they lie in memory; the index of a user's words is made once for all requests that
see the same items. The items found for a request are kept with its bucket, so that hybrids find them again.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from infra import device
from infra.errors import InputError
from pipelines import tables
from pipelines.generate.parts.base import BucketView, Drafts, GenerateRun, Needs, Part, Worker
from pipelines.generate.visible import VisibleItems
from pipelines.histories import Histories, decode_fields
from pipelines.methods import PartInfo
from pplug import retrieval
from pplug.encoder import TextEncoder, encoder_id, refuse_another_encoder
from pplug.retrieval import Composed, RetrievalConfig, WordIndex, count_tokens
from pplug.tasks import query


class Retrieval(Part):
    group = "retrieval"

    def __init__(self, config: RetrievalConfig, kinds: frozenset[str], encoder_id: str = "") -> None:
        """`encoder_id`: identity of the encoder that `dense` compares with; empty where no method does."""
        self.config, self.kinds, self.encoder_id = config, kinds, encoder_id
        self.encoder: TextEncoder | None = None
        self._view: BucketView | None = None
        self._found: dict[tuple[str, str, str], np.ndarray] = {}
        """Rows of the items, best first, by kind, user and request. Two users may call their requests alike."""
        self._words: tuple[tuple[int, int], WordIndex] | None = None
        """The last user's index, and the first and last item in it: requests come user by user."""

    @classmethod
    def open(cls, run: GenerateRun) -> Self:
        config, task, methods = run.config, run.task, run.methods_with("retrieval")
        if task.retrieval is None:
            raise InputError(
                f"methods {methods}: task {task.name} does not say how items stand in a prompt; give a task entry with "
                "`retrieval` (--task FILE)"
            )
        try:
            config.retrieval.room(config.llm.layout.max_input_tokens)
        except ValueError as error:
            raise InputError(f"retrieval.{error}") from error
        identity = ""
        if "dense" in run.kinds("retrieval"):
            if config.retrieval.encoder.own is not None:
                raise InputError(
                    f"retrieval.encoder.model={config.retrieval.encoder.model}: `dense` compares items with the "
                    "request's vector, and no encoder belongs to these vectors; take bm25, recency or random"
                )
            try:
                rule = task.item_template(config.retrieval.encoder.with_label)
                identity = encoder_id(config.retrieval.encoder, rule)
            except (FileNotFoundError, ValueError) as error:
                raise InputError(f"retrieval.encoder: {error}") from error
            name = tables.embeddings_name(identity)
            run.read_vectors(tables.snapshot(config.tables, name, config.as_of_version))
        return cls(config.retrieval, run.kinds("retrieval"), identity)

    def identities(self) -> dict[str, str]:
        return {"encoder_id": self.encoder_id} if self.encoder_id else {}

    def needs(self) -> Needs:
        return Needs(items=True, fields=True)

    def load(self, worker: Worker) -> None:
        self.task, self.tokenizer = worker.task, worker.prompt_builder.words
        self.limit = worker.llm.layout.max_input_tokens
        self.budget = self.config.room(self.limit)
        if "dense" in self.kinds:
            import torch

            torch.set_num_threads(worker.cpu.torch_threads())
            own = self.config.encoder
            try:
                self.encoder = TextEncoder(own, device.assigned())
                refuse_another_encoder(own, self.task.item_template(own.with_label), self.encoder_id)
            except ValueError as error:
                raise InputError(f"retrieval.encoder: {error}") from error

    def look(self, view: BucketView) -> None:
        self._view, self._found, self._words = view, {}, None

    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        assert self._view is not None and self._view.items is not None, "retrieval reads items"
        reserved = [self._reserved(text) for text in drafts.prefixes]
        texts, problems = self._prompts(part, drafts.requests, drafts.inputs, self._view.items, reserved)
        for i, (text, problem) in enumerate(zip(texts, problems, strict=True)):
            drafts.fail(i, problem)
            drafts.prefixes[i] += text.prefix
            drafts.inputs[i] = text.suffix
            drafts.notes[i] += ["input_cut"] * text.cut
        if part.name == "dense":
            drafts.encoder_id = self._view.encoder_id
            for request, notes in zip(drafts.requests, drafts.notes, strict=True):
                if "items_without_vector" not in notes and self._view.items.lacks_vectors(request):
                    notes.append("items_without_vector")

    def _reserved(self, text: str) -> int:
        """Counts the tokens that a text before retrieval's takes of retrieval's own budget, which may be below the
        prompt's."""
        taken = count_tokens(text, self.tokenizer) if text else 0
        return max(0, taken - (self.limit - self.budget))

    def _prompts(
        self,
        part: PartInfo,
        requests: Sequence[Mapping[str, Any]],
        inputs: Sequence[str],
        users: VisibleItems,
        reserved: Sequence[int],
    ) -> tuple[list[Composed], list[str | None]]:
        """The text of each request's prompt, and why one could not be written: an item lacks a field."""
        kind, k = part.name, part.items or self.config.k
        texts = [query(request["input"], self.task) for request in requests]
        found = f"{kind}@{k}" if kind == "random" else kind  # of the others the first k are the k best
        keys = [(found, request["user_id"], request["request_id"]) for request in requests]
        new = [i for i, key in enumerate(keys) if key not in self._found]
        vectors: dict[int, np.ndarray] = {}
        if kind == "dense" and new:
            vectors = dict(zip(new, self._vectors([texts[i] for i in new]), strict=True))
        composed: list[Composed] = []
        errors: list[str | None] = []
        for i, (request, input) in enumerate(zip(requests, inputs, strict=True)):
            prompt, error = Composed("", input), None
            try:
                if keys[i] not in self._found:
                    self._found[keys[i]] = self._find(kind, k, request, texts[i], vectors.get(i), users)
                items = [_fields(users.texts, row) for row in self._found[keys[i]][:k]]
                prompt = retrieval.compose(
                    items, input, self.task, self.tokenizer, self.budget, self.config.input_share, reserved[i]
                )
            except ValueError as problem:  # names the missing field, never a text
                error = str(problem)
            composed.append(prompt)
            errors.append(error)
        return composed, errors

    def _vectors(self, texts: Sequence[str]) -> np.ndarray:
        assert self.encoder is not None, "a dense method needs the encoder"
        return self.encoder.encode_queries(texts, self.config.query_prefix)

    def _find(
        self, kind: str, k: int, request: Mapping[str, Any], text: str, vector: np.ndarray | None, users: VisibleItems
    ) -> np.ndarray:
        rows = users.rows(request)
        if vector is not None:
            rows = rows[users.own.vector_row[rows] >= 0]
        if not len(rows):
            return rows
        if vector is not None:
            best = retrieval.nearest(users.own.vectors[users.own.vector_row[rows]], vector)
        elif kind == "bm25":
            best = self._index(rows, users.texts).rank(text)
        elif kind == "recency":
            best = retrieval.recency(len(rows))
        elif kind == "random":
            best = retrieval.at_random(len(rows), k, json.dumps([request["user_id"], request["request_id"]]))
        else:
            raise AssertionError(f"{kind}: no way to find items by it")
        return rows[best]

    def _index(self, rows: np.ndarray, own: Histories) -> WordIndex:
        key = (int(rows[0]), int(rows[-1]))
        if self._words is None or self._words[0] != key:
            texts = [retrieval.words(_fields(own, row), self.task) for row in rows]
            self._words = (key, WordIndex(texts))
        return self._words[1]


def _fields(own: Histories, row: int) -> Mapping[str, str]:
    assert own.fields is not None, "retrieval reads the items' fields"
    return decode_fields(own.fields[int(row)].as_py())
