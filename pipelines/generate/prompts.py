"""Stage: requests of a bucket, each with its user's history, become prompts with persona rows.

Route: bucket -> requests x methods still owed -> visible items -> plug -> rows (1+P, H) beside token ids; or -> the
user's profile, the items that retrieval finds -> the prompt's text.
The vectors stay here; only persona rows and token ids travel on.
Shapes: T items of a block's requests (ragged), D encoder width, P persona tokens, H LLM width.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.engines.adapters import AdapterIndex, AdapterName
from pipelines.generate.pending import Owed, request_key
from pipelines.generate.personas import PersonaMaker, ragged_f32
from pipelines.generate.retrieve import Retriever
from pipelines.generate.visible import Users
from pipelines.learned import LastItem, last_item
from pipelines.methods import Method
from pplug.identity import model_folder
from pplug.llm import LLMConfig, load_tokenizer
from pplug.profile import ProfileConfig, prefix
from pplug.retrieval import RetrievalConfig, count_tokens
from pplug.schemas import LAST_ITEM
from pplug.splice import PromptBuilder
from pplug.tasks import TaskEntry, query

PROMPTS = pa.schema(
    {
        "bucket": pa.int32(),
        "user_key": pa.string(),
        "request_id": pa.string(),
        "method": pa.string(),
        "user_id": pa.string(),
        "before": pa.list_(pa.int32()),
        "after": pa.list_(pa.int32()),
        "rows": pa.list_(pa.float32()),  # R*H values between before and after; empty without a plug
        "persona": pa.string(),
        "plug_id": pa.string(),
        "encoder_id": pa.string(),
        "adapter_id": pa.string(),
        "adapter_key": pa.string(),  # user_key of the adapter's owner
        "error": pa.string(),
        "notes": pa.list_(pa.string()),  # what the run's report has to count (NOTES)
    }
)
NOTES = {
    "adapter_not_used": "the user's adapter was made from items that the request may not see",
    "profile_not_used": "the user's profile was made from items that the request may not see",
    "persona_made_anew": "the stored persona was made from another history, or from another number of newest items",
    "items_without_vector": "items that the request may see have no vector yet: `refresh` has not read them",
}


AHEAD = 8
"""Blocks whose queries are encoded together: the more there are, the more alike are those of a batch."""


class BuildPrompts:
    """Stage: prompts of whole buckets, in blocks of `block_rows`.

    in:  bucket int
    out: PROMPTS, one row a request and method
    """

    def __init__(
        self,
        owed: Owed,
        methods: Sequence[Method],
        histories: Snapshot | None,
        embeddings: Snapshot | None,
        personas: Snapshot | None,
        plug_folder: str | None,
        plug_id: str | None,
        llm: LLMConfig,
        encoder_decoder: bool,
        entry: TaskEntry,
        oracle: Mapping[str, str],
        cap: int,
        block_rows: int,
        threads: int,
        adapters: Snapshot | None = None,
        retrieval: RetrievalConfig | None = None,
        profiles: Snapshot | None = None,
        profile: ProfileConfig | None = None,
    ) -> None:
        self.adapters, self.profiles = adapters, profiles
        self.owed, self.methods, self.histories, self.embeddings = owed, methods, histories, embeddings
        self.personas, self.plug_id, self.entry, self.oracle = personas, plug_id, entry, oracle
        self.cap, self.block_rows = cap, block_rows
        self.prompt_builder = PromptBuilder(
            load_tokenizer(model_folder(llm.model, llm.revision)), llm.layout, encoder_decoder
        )
        self.words = self.prompt_builder.words
        queries = any(method.plug in ("trained", "attention", "other-user") for method in methods)
        self.maker = PersonaMaker(plug_folder, threads, queries) if plug_folder else None
        kinds = frozenset(method.retrieval for method in methods if method.retrieval)
        retrieval, self.profile = retrieval or RetrievalConfig(), profile or ProfileConfig()
        self.limit, self.input_share = llm.layout.max_input_tokens, retrieval.input_share
        self.retriever: Retriever | None = None
        if kinds:
            budget = retrieval.budget_tokens or self.limit
            self.retriever = Retriever(retrieval, kinds, entry, self.words, budget, threads)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        names = {method.name for method in self.methods}
        for bucket in batch["bucket"].to_pylist():
            asked = self.owed.read(bucket)
            requests, answered = asked.requests, asked.answered
            keys = pc.unique(requests["user_key"]).to_pylist()  # all that is read is theirs, but for other-user
            users = None
            if (self.maker or self.retriever) and self.histories is not None and requests.num_rows:
                sources = (self.histories, self.embeddings, self.personas)
                others = any(method.plug == "other-user" for method in self.methods)
                with_fields = self.retriever is not None
                users = Users(*sources, bucket, requests, keys, self.cap, others=others, with_fields=with_fields)
            index = None
            if self.adapters is not None:
                owners = zip(requests["user_id"].to_pylist(), requests["owner_id"].to_pylist(), strict=True)
                others = any(method.adapter == "other-user" for method in self.methods)
                index = AdapterIndex(self.adapters, bucket, dict(owners), None if others else keys)
            profiles: dict[str, tuple[str, LastItem]] = {}
            if self.profiles is not None:
                found = self.profiles.read(["user_id", "text", *LAST_ITEM], buckets=[bucket], user_keys=keys)
                profiles = {row["user_id"]: (row["text"], last_item(row)) for row in found.to_pylist()}
            for start in range(0, requests.num_rows, self.block_rows):
                if self.maker is not None and start % (AHEAD * self.block_rows) == 0:
                    coming = requests.slice(start, AHEAD * self.block_rows)
                    coming = coming.select(["user_id", "request_id", "input"]).to_pylist()
                    owed = [row for row in coming if names - answered.get(request_key(row), set())]
                    self.maker.read_ahead([query(row["input"], self.entry) for row in owed])
                rows = requests.slice(start, self.block_rows).to_pylist()
                for method in self.methods:
                    open_rows = [row for row in rows if method.name not in answered.get(request_key(row), ())]
                    if open_rows:
                        yield self._block(bucket, open_rows, method, users, index, profiles)

    def _block(
        self,
        bucket: int,
        requests: list[dict[str, Any]],
        method: Method,
        users: "Users | None",
        index: AdapterIndex | None,
        profiles: Mapping[str, tuple[str, LastItem]],
    ) -> pa.Table:
        errors: list[str | None] = [None] * len(requests)
        notes: list[list[str]] = [[] for _ in requests]
        inputs = []
        for i, request in enumerate(requests):
            words = self.oracle.get(request["user_id"], "") if method.oracle else ""
            if method.oracle and not words:
                errors[i] = "no stated preference for this user in the oracle file"
            inputs.append(words + request["input"])
        leads: list[str] = [""] * len(requests)
        if method.profile:
            for i, request in enumerate(requests):
                text, made_from = profiles.get(request["user_id"], (None, None))
                if made_from is not None and not made_from.is_visible_to(request):
                    text = None
                    notes[i].append("profile_not_used")
                leads[i] = self._profile(text, inputs[i])
        if method.retrieval is not None:
            assert self.retriever is not None and users is not None, "retrieval needs histories"
            reserved = [self._reserved(text) for text in leads]
            texts, problems = self.retriever.prompts(method.retrieval, requests, inputs, users, reserved)
            errors = [error or problem for error, problem in zip(errors, problems, strict=True)]
            leads = [first + text.prefix for first, text in zip(leads, texts, strict=True)]
            inputs = [text.suffix for text in texts]
        if method.plug is None:  # no rows stand between the two parts
            inputs = [first + rest for first, rest in zip(leads, inputs, strict=True)]
            leads = [""] * len(requests)
        prompts = self.prompt_builder.prompts(inputs, leads)
        empty = np.zeros(0, np.float32)
        rows: list[np.ndarray] = [empty] * len(requests)
        kinds = ["none"] * len(requests)
        if method.plug is not None:
            assert self.maker is not None and users is not None, "a method with a plug needs a plug and histories"
            rows, kinds = self.maker.rows(requests, method.plug, users, self.entry)
            if method.plug not in ("no-history", "soft-prompt", "other-user"):
                for i, request in enumerate(requests):
                    notes[i] += users.notes(request, stored=kinds[i] == "mean")
        adapters: list[AdapterName | None] = [None] * len(requests)
        if method.adapter is not None:
            assert index is not None, "a method with an adapter needs the table of adapters"
            choose = index.own if method.adapter == "own" else index.other
            adapters = [choose(request) for request in requests]
            for i, request in enumerate(requests):
                if adapters[i] is None and method.adapter == "own" and index.knows_too_much(request):
                    notes[i].append("adapter_not_used")
        n = len(requests)
        with_plug = method.plug is not None
        columns = {
            "bucket": [bucket] * n,
            "user_key": [request["user_key"] for request in requests],
            "request_id": [request["request_id"] for request in requests],
            "method": [method.name] * n,
            "user_id": [request["user_id"] for request in requests],
            "before": [prompt.before for prompt in prompts],
            "after": [prompt.after for prompt in prompts],
            "rows": ragged_f32(rows),
            "persona": kinds,
            "plug_id": [self.plug_id if with_plug else None] * n,
            "encoder_id": [self._encoder_id(method)] * n,
            "adapter_id": [name and name.adapter_id for name in adapters],
            "adapter_key": [name and name.user_key for name in adapters],
            "error": errors,
            "notes": notes,
        }
        return pa.table(columns, schema=PROMPTS)

    def _profile(self, text: str | None, input: str) -> str:
        if text is None:
            return ""
        return prefix(text, input, self.profile, self.words, self.limit, self.input_share)

    def _reserved(self, text: str) -> int:
        """What a text before retrieval's takes of retrieval's own budget, which may be below the prompt's."""
        assert self.retriever is not None, "asked for retrieval only"
        taken = count_tokens(text, self.words) if text else 0
        return max(0, taken - (self.limit - self.retriever.budget_tokens))

    def _encoder_id(self, method: Method) -> str | None:
        """Encoder of the vectors that the method reads: those of the table it was given."""
        if method.retrieval == "dense" and self.embeddings is not None:
            return self.embeddings.metadata.get("encoder_id")
        if method.plug is not None and self.maker is not None:
            return self.maker.plug.config.encoder_id
        return None
