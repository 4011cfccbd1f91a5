"""Stage: requests of a bucket, each with its user's history, become prompts with persona rows.

Route: bucket -> requests x methods still owed -> visible items -> plug -> rows (1+P, H) beside token ids; or -> the
user's profile, the items that retrieval finds -> the prompt's text.
The vectors stay here; only persona rows and token ids travel on.
Shapes: T items of a block's requests (ragged), D encoder width, P persona tokens, H LLM width.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from pipelines.engines.adapters import AdapterIndex, AdapterName
from pipelines.generate.retrieve import Found, Retriever
from pipelines.histories import Histories, matrix, read_bucket, to_us
from pipelines.learned import LastItem, last_item, last_items
from pipelines.methods import Method
from pplug import history
from pplug.identity import model_folder
from pplug.llm import LLMConfig, load_tokenizer
from pplug.plain_text import TextTokenizer
from pplug.profile import ProfileConfig, lead
from pplug.retrieval import RetrievalConfig, count_tokens
from pplug.schemas import LAST_ITEM
from pplug.splice import Splicer
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


@dataclass(frozen=True)
class Owed:
    """Which requests and methods a run still has to answer: one answer for plan and work."""

    requests: Snapshot
    done: Snapshot | None
    """Generations before this run's work began."""
    run_id: str
    methods: tuple[str, ...]
    only: str
    """all, open (without a target) or labelled."""
    users: Mapping[int, list[str]] | None
    """Keys by bucket (`shards.keys_by_bucket`): only their requests."""
    profiles: Snapshot | None = None
    """Where given, requests of users without one are counted, and those that the user's profile knows too much for."""
    adapters: Snapshot | None = None
    """Where given, requests that the user's adapter knows too much for are counted."""

    def read(self, bucket: int) -> "Asked":
        """Requests of a bucket, and what the run has already answered of them."""
        keys = of_bucket(self.users, bucket)
        requests = self.requests.read(buckets=[bucket], user_keys=keys)
        if self.only != "all":
            has = pc.is_valid(requests["target"])
            requests = requests.filter(has if self.only == "labelled" else pc.invert(has))
        answered: dict[tuple[str, str], set[str]] = {}
        failed = 0
        if self.done is not None:
            columns = ["user_id", "request_id", "method", "error"]
            mine = pc.field("run_id") == self.run_id
            for row in self.done.read(columns, buckets=[bucket], filter=mine, user_keys=keys).to_pylist():
                if row["error"] is None:
                    answered.setdefault(request_key(row), set()).add(row["method"])
                else:
                    failed += 1
        requests = requests.sort_by([("user_key", "ascending"), ("request_id", "ascending")])
        return Asked(requests, answered, failed)

    def count(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Stage of the plan. in: bucket. out: one row per bucket.

        owed, there: pairs of a request and a method. failed: replies of this run that are errors. with_target, dated:
        requests with a known answer, and those of them that may not see all items. without_adapter, without_profile:
        requests whose user has none. adapter_leaks, profile_leaks: requests with a known answer whose user's adapter or
        profile was made from items that they may not see.
        """
        for bucket in batch["bucket"].to_pylist():
            asked, wanted = self.read(bucket), set(self.methods)
            rows = asked.requests.select(["user_id", "request_id", "as_of", "as_of_position", "target"]).to_pylist()
            keys = pc.unique(asked.requests["user_key"]).to_pylist()
            there = sum(len(asked.answered.get(request_key(row), set()) & wanted) for row in rows)
            counts = {"owed": len(rows) * len(self.methods) - there, "there": there, "failed": asked.failed}
            labelled = [row for row in rows if row["target"] is not None]
            counts["with_target"] = len(labelled)
            counts["dated"] = sum(row["as_of"] is not None or row["as_of_position"] is not None for row in labelled)
            for name, table in (("adapter", self.adapters), ("profile", self.profiles)):
                made_from = {} if table is None else last_items(table, bucket, keys)
                counts[f"{name}_leaks"] = sum(
                    row["user_id"] in made_from and not made_from[row["user_id"]].is_visible_to(row) for row in labelled
                )
                counts[f"without_{name}"] = sum(row["user_id"] not in made_from for row in rows)
            yield pa.table({"bucket": [bucket]} | {name: [n] for name, n in counts.items()})


@dataclass(frozen=True)
class Asked:
    """What a run is asked in one bucket."""

    requests: pa.Table
    """Sorted by user_key and request_id."""
    answered: dict[tuple[str, str], set[str]]
    """By `request_key`: the methods with a reply. A reply with an error is none: it is asked for again."""
    failed: int
    """Replies of this run that are errors."""


def request_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """What a request is known by: two users may have requests of one request_id."""
    return row["user_id"], row["request_id"]


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
        self.splicer = Splicer(load_tokenizer(model_folder(llm.model, llm.revision)), llm.layout, encoder_decoder)
        self.words = self.splicer.words
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
            leads = [first + text.lead for first, text in zip(leads, texts, strict=True)]
            inputs = [text.rest for text in texts]
        if method.plug is None:  # no rows stand between the two parts
            inputs = [first + rest for first, rest in zip(leads, inputs, strict=True)]
            leads = [""] * len(requests)
        prompts = self.splicer.prompts(inputs, leads)
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
        return lead(text, input, self.profile, self.words, self.limit, self.input_share)

    def _reserved(self, text: str) -> int:
        """What a text before retrieval's takes of retrieval's own budget, which may be below the prompt's."""
        assert self.retriever is not None, "asked for retrieval only"
        taken = count_tokens(text, self.words) if text else 0
        return max(0, taken - (self.limit - self.retriever.budget_tokens))

    def _encoder_id(self, method: Method) -> str | None:
        """Of the vectors that the method reads: those of the table it was given."""
        if method.retrieval == "dense" and self.embeddings is not None:
            return self.embeddings.metadata.get("encoder_id")
        if method.plug is not None and self.maker is not None:
            return self.maker.plug.config.encoder_id
        return None


class Users:
    """What a bucket's requests need of their users: visible items, another user's items, stored personas."""

    def __init__(
        self,
        histories: Snapshot,
        embeddings: Snapshot | None,
        personas: Snapshot | None,
        bucket: int,
        requests: pa.Table,
        keys: Sequence[str],
        cap: int,
        *,
        others: bool,
        with_fields: bool,
    ) -> None:
        """`keys`: of the requests' users; `others`: another user's items will be asked for, so that all are read."""
        theirs = None if others else keys
        self.own = read_bucket(histories, embeddings, bucket, with_fields=with_fields, user_keys=theirs)
        self.cap = cap
        self.found = Found()
        self._source, self._bucket = (histories, embeddings), bucket
        self._others: Histories | None = None
        self._owner = dict(zip(requests["user_id"].to_pylist(), requests["owner_id"].to_pylist(), strict=True))
        self._stored: dict[str, np.ndarray] = {}
        self._made_from: dict[str, str] = {}
        if personas is not None:
            made = pc.field("persona").is_valid()
            columns = ["user_id", "persona", "history_hash"]
            found = personas.read(columns, buckets=[bucket], filter=made, user_keys=keys)
            ids = found["user_id"].to_pylist()
            self._stored = dict(zip(ids, matrix(found["persona"]), strict=True))
            self._made_from = dict(zip(ids, found["history_hash"].to_pylist(), strict=True))
        self._current: dict[str, bool] = {}

    def stored(self, request: Mapping[str, Any]) -> np.ndarray | None:
        """The persona that refresh stored, (P*H,), where it was made from just the items that this request may see."""
        if not self._undated(request):
            return None
        user_id = request["user_id"]
        if user_id in self._stored and user_id not in self._current:
            rows = self.rows(request)
            digest = history.history_hash(self.own.text_hash.take(pa.array(rows)).to_pylist())
            self._current[user_id] = digest == self._made_from[user_id]
        return self._stored[user_id] if self._current.get(user_id) else None

    def notes(self, request: Mapping[str, Any], stored: bool) -> list[str]:
        """What the report has to count about a persona (NOTES). `stored`: one that `refresh` stored would have done."""
        ready = self.stored(request) if stored else None
        if ready is not None:
            return []
        rows = self.rows(request)
        found = ["items_without_vector"] if len(self.own.with_vector(rows)) < len(rows) else []
        if stored and self._current.get(request["user_id"]) is False and self._undated(request):
            found.append("persona_made_anew")
        return found

    def _undated(self, request: Mapping[str, Any]) -> bool:
        return request["as_of"] is None and request["as_of_position"] is None

    def rows(self, request: Mapping[str, Any]) -> np.ndarray:
        """Rows of `own` of the items the request may see, oldest first."""
        user = self.own.user(request["user_id"])
        if user is None:
            return np.zeros(0, np.int64)
        return self.own.visible(user, to_us(request["as_of"]), request["as_of_position"], self.cap)

    def items(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of the items the request may see."""
        return self.own.vectors[self.own.with_vector(self.rows(request))]

    def others_items(self, request: Mapping[str, Any]) -> np.ndarray:
        """(n, D) vectors of another person's items: drawn by the user's hash, so that every run draws alike."""
        owner = request["owner_id"]
        pool = self.own
        choice = self._strangers(pool, request["user_id"], owner)
        if not choice:  # alone in the bucket: the next bucket that has anybody
            pool = self._next_bucket()
            choice = self._strangers(pool, request["user_id"], owner)
        if not choice:
            return pool.vectors[:0]
        digest = hashlib.blake2b(f"other:{owner}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
        user = choice[int.from_bytes(digest, "big") % len(choice)]
        return pool.vectors[pool.with_vector(pool.visible(user, None, None, self.cap))]

    def _strangers(self, pool: Histories, user_id: str, owner: str) -> list[int]:
        return [
            row
            for row, user in enumerate(pool.user_ids)
            if user != user_id and self._owner.get(user, user) != owner and pool.starts[row + 1] > pool.starts[row]
        ]

    def _next_bucket(self) -> Histories:
        if self._others is None:
            histories, embeddings = self._source
            filled = sorted(histories.by_bucket())
            later = [bucket for bucket in filled if bucket > self._bucket] + filled
            self._others = read_bucket(histories, embeddings, later[0])
        return self._others


class PersonaMaker:
    """The plug at work: query vectors, weights, persona rows, for a block of requests at a time."""

    def __init__(self, folder: str, threads: int, queries: bool) -> None:
        """`queries`: whether any persona is weighed by its request; without, no query encoder is loaded."""
        import torch

        from pplug.bert import forward_of
        from pplug.encoder import best_dtype
        from pplug.plug import PersonaPlug

        torch.set_num_threads(threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.plug = PersonaPlug.from_pretrained(folder, queries=queries).to(self.device)
        self.dtype = best_dtype()
        self.ahead: dict[str, Any] = {}
        self.tokenizer = None
        if self.plug.emb_model is not None:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(f"{folder}/query_encoder")
            self.words = TextTokenizer(self.tokenizer)
            self.forward = forward_of(self.plug.emb_model, self.dtype)
        with torch.inference_mode():
            self.instruction = self.plug.instruction().float().cpu().numpy()

    def rows(
        self, requests: list[dict[str, Any]], kind: str, users: Users, entry: TaskEntry
    ) -> tuple[list[np.ndarray], list[str]]:
        """Flat rows (R*H,) of each request, and how its persona was weighed (attention, mean, none)."""
        config = self.plug.config
        aggregation = {"trained": config.aggregation, "other-user": config.aggregation}.get(kind, kind)
        stored = [
            users.stored(request) if aggregation == "mean" and kind != "other-user" else None for request in requests
        ]
        items = []
        for request, ready in zip(requests, stored, strict=True):
            if kind in ("no-history", "soft-prompt") or ready is not None:
                items.append(np.zeros((0, config.encoder_dim), np.float32))
            else:
                items.append(users.others_items(request) if kind == "other-user" else users.items(request))
        personas = self._personas(requests, items, aggregation, entry)
        out, kinds = [], []
        for vectors, ready, persona in zip(items, stored, personas, strict=True):
            if ready is not None and ready.any():  # all zeros: a stored user without an item
                out.append(np.concatenate([self.instruction.ravel(), ready]))
                kinds.append("mean")
            elif len(vectors):
                out.append(np.concatenate([self.instruction.ravel(), persona]))
                kinds.append(aggregation)
            else:
                out.append(self.instruction.ravel())
                kinds.append("none")
        return out, kinds

    def _personas(
        self, requests: list[dict[str, Any]], items: list[np.ndarray], aggregation: str, entry: TaskEntry
    ) -> np.ndarray:
        import torch

        config = self.plug.config
        flat = np.concatenate([vectors.reshape(-1, config.encoder_dim) for vectors in items])
        if not len(flat):
            return np.zeros((len(requests), config.persona_tokens * config.llm_dim), np.float32)
        owner = np.repeat(np.arange(len(items)), [len(vectors) for vectors in items])
        x = None
        if aggregation == "attention" and self.tokenizer is not None:
            x = self._queries([query(request["input"], entry) for request in requests])
        with torch.inference_mode():
            built = self.plug.personas(
                torch.from_numpy(flat).to(self.device), torch.from_numpy(owner).to(self.device), len(requests), x
            )
        return built.flatten(1).float().cpu().numpy()

    def read_ahead(self, texts: list[str]) -> None:
        """Encodes the queries of requests to come, instead of those it was given before."""
        if self.tokenizer is not None and texts:
            self.ahead = dict(zip(texts, self._encoded(texts), strict=True))

    def _queries(self, texts: list[str]) -> Any:
        """Vectors (B, D) of the requests."""
        import torch

        if all(text in self.ahead for text in texts):
            return torch.stack([self.ahead[text] for text in texts])
        return self._encoded(texts)

    def _encoded(self, queries: list[str]) -> Any:
        """Vectors (B, D), in batches of like length."""
        import torch

        from pplug.encoder import default_batch_tokens, each_batch, pad, pool

        config, tokenizer = self.plug.config, self.tokenizer
        assert tokenizer is not None, "a plug that weighs by requests comes with its tokenizer"
        texts = [config.query_prefix + text for text in queries]
        ids = self.words.framed(texts, config.query_max_tokens)
        out = torch.empty(len(ids), config.encoder_dim, device=self.device)

        def work(rows: np.ndarray) -> None:
            with torch.inference_mode():
                tokens, mask = pad([ids[row] for row in rows], tokenizer.pad_token_id or 0)
                tokens, mask = tokens.to(self.device), mask.to(self.device)
                out[rows] = pool(self.forward(tokens, mask), mask, config.query_pooling)

        budget = default_batch_tokens(self.device, self.dtype, config.query_max_tokens)
        each_batch([len(row) for row in ids], budget, self.device, work)
        return out


def ragged_f32(rows: Sequence[np.ndarray]) -> pa.Array:
    """Flat float arrays of different lengths -> list<float32>."""
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int32)
    values = np.concatenate([*rows, np.zeros(0, np.float32)]).astype(np.float32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
