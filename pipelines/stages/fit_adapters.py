"""Stages of adapt: users of a bucket become examples, examples become adapters, many users at once.

Route: bucket -> users who are owed an adapter, each with the items that count -> token ids -> stacked training -> rows
of `adapters`. A bucket's other adapters travel beside them, since a bucket is replaced as a whole.

An item becomes an example by the task's own input and target; where retrieval is on, with what it finds among the items
before it, as the request would have been answered then. Where the table of requests is given, a user's items are
cut at the earliest of the user's requests: what one of them may not see is trained on by none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import bucket_of, user_key
from infra.snapshot import Snapshot
from pipelines.stages.bucket import Histories, decode_fields, read_bucket, to_us
from pipelines.stages.write import DETAIL, REASON
from pplug import history, retrieval
from pplug.adapter import ExampleRule, LoraConfig, StackConfig, to_bytes
from pplug.identity import model_folder, short_id
from pplug.llm import FrozenLLM, LLMConfig, load_tokenizer
from pplug.lora import StackedTrainer, UserExamples
from pplug.schemas import ADAPTERS
from pplug.splice import Splicer
from pplug.tasks import TaskEntry, fill, query

ROWS = pa.schema([*ADAPTERS, pa.field(REASON, pa.string()), pa.field(DETAIL, pa.string())])
_TOKENS = pa.list_(pa.list_(pa.int32()))
EXAMPLES = pa.schema([*ROWS, pa.field("prompts", _TOKENS), pa.field("answers", _TOKENS)])
"""A user to train (prompts, answers), an adapter that stays as it is (weights), or a reject."""
BLOCK_USERS = 64


RETRIEVAL_ITEMS = 512
"""Newest items before an item among which retrieval looks, as in generate."""


def fit_id(lora: LoraConfig, llm_id: str, entry: TaskEntry, rule: ExampleRule, cap: int) -> str:
    """Identity of all that decides an adapter beside the user's own items."""
    form = entry.model_dump(mode="json", include={"input", "target", "marker", "query_end", "retrieval"})
    rules = {"task": form, "rule": rule.model_dump(mode="json"), "cap": cap}
    return short_id({"lora": lora.model_dump(mode="json"), "llm_id": llm_id} | rules)


@dataclass(frozen=True)
class Owing:
    """What a bucket owes."""

    own: Histories
    users: dict[int, tuple[range, str]]
    """Users owed an adapter: rows of the items that count, and their hash."""
    missing: list[str]
    """Users asked for who have no item at all."""
    there: int
    """Users whose adapter is there."""
    stays: list[str]
    """user_key of the bucket's adapters that are not made anew."""

    @property
    def owed(self) -> int:
        return len(self.users) + len(self.missing)


@dataclass(frozen=True)
class OwedAdapters:
    """Which users are still owed an adapter: one answer for plan and work."""

    histories: Snapshot
    requests: Snapshot | None
    """Where given, items are cut at each user's earliest request."""
    before: Snapshot | None
    """Adapters before this run's work began."""
    fit_id: str
    cap: int
    """Newest items that count."""
    users: frozenset[str] | None
    """Only these, where given."""
    buckets: int
    """Of the tables."""

    def read(self, bucket: int) -> Owing:
        own = read_bucket(self.histories, None, bucket, with_fields=True)
        cuts = self._cuts(own, bucket)
        names = ["user_id", "user_key", "adapter_id", "history_hash"]
        held = [] if self.before is None else self.before.read(names, buckets=[bucket]).to_pylist()
        stays = {row["user_id"]: row for row in held}
        owed, there = {}, 0
        for user, name in enumerate(own.user_ids):
            if self.users is not None and name not in self.users:
                continue
            start = int(own.starts[user])
            count = cuts.get(user, int(own.starts[user + 1]) - start)
            kept = history.newest(count, self.cap)
            rows = range(start + kept.start, start + kept.stop)
            digest = history.history_hash(own.text_hash[rows.start : rows.stop].to_pylist())
            old = stays.get(name)
            if old and old["adapter_id"].startswith(f"{self.fit_id}-") and old["history_hash"] == digest:
                there += 1
                continue
            owed[user] = (rows, digest)
            stays.pop(name, None)
        strangers = (self.users or frozenset()) - set(own.user_ids)
        missing = sorted(name for name in strangers if bucket_of(name, self.buckets) == bucket)
        return Owing(own, owed, missing, there, sorted(row["user_key"] for row in stays.values()))

    def held(self, bucket: int, keys: list[str]) -> Iterator[pa.Table]:
        """The adapters of these users, some at a time: a bucket's weights together may be many gigabytes."""
        for start in range(0, len(keys), BLOCK_USERS):
            some = keys[start : start + BLOCK_USERS]
            place = pc.field("user_key")
            near = (place >= some[0]) & (place <= some[-1])  # by which row groups are skipped
            assert self.before is not None, "what stays was read from there"
            yield self.before.read(buckets=[bucket], filter=near & place.isin(some))

    def _cuts(self, own: Histories, bucket: int) -> dict[int, int]:
        """How many of a user's oldest items come before the earliest of the user's requests."""
        cuts: dict[int, int] = {}
        if self.requests is None:
            return cuts
        asked = self.requests.read(["user_id", "as_of", "as_of_position"], buckets=[bucket])
        for request in asked.to_pylist():
            user = own.user(request["user_id"])
            if user is not None:
                start, end = own.starts[user], own.starts[user + 1]
                count = history.visible_count(
                    own.occurred_at[user], own.position[start:end], to_us(request["as_of"]), request["as_of_position"]
                )
                cuts[user] = min(count, cuts.get(user, count))
        return cuts

    def count(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Stage of the plan. in: bucket. out: bucket, owed, there, stays (adapters that travel with the owed)."""
        for bucket in batch["bucket"].to_pylist():
            owing = self.read(bucket)
            counts = {"owed": owing.owed, "there": owing.there, "stays": len(owing.stays)}
            yield pa.table({"bucket": [bucket]} | {name: [n] for name, n in counts.items()})


class ReadExamples:
    """Stage: a bucket's users as token ids. in: bucket int. out: EXAMPLES, in blocks of users."""

    def __init__(self, owed: OwedAdapters, entry: TaskEntry, llm: LLMConfig, rule: ExampleRule) -> None:
        self.owed, self.entry, self.rule = owed, entry, rule
        self.tokenizer = load_tokenizer(model_folder(llm.model, llm.revision))
        self.splicer = Splicer(self.tokenizer, llm.layout, False)
        self.budget = rule.retrieval.budget_tokens or llm.layout.max_input_tokens

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            owing = self.owed.read(bucket)
            own = owing.own
            for held in self.owed.held(bucket, owing.stays):
                yield _with_nulls(held, EXAMPLES)
            nothing = {"bucket": bucket, REASON: "no_history", DETAIL: "asked for, but no item in histories"}
            rows: list[dict[str, Any]] = [{"user_key": user_key(name)} | nothing for name in owing.missing]
            for user, (items, digest) in owing.users.items():
                names = {"bucket": bucket, "user_key": own.user_keys[user], "user_id": own.user_ids[user]}
                rows.append(names | {"history_hash": digest} | self._examples(own, int(own.starts[user]), items))
                if len(rows) == BLOCK_USERS:
                    yield pa.Table.from_pylist(rows, schema=EXAMPLES)
                    rows = []
            if rows:
                yield pa.Table.from_pylist(rows, schema=EXAMPLES)

    def _examples(self, own: Histories, first: int, items: range) -> dict[str, Any]:
        """Of the items in `items`; the user's oldest is at `first`."""
        assert own.fields is not None, "read with fields"
        start = max(first, items.start - RETRIEVAL_ITEMS)
        known = {i: decode_fields(own.fields[i].as_py()) for i in range(start, items.stop)}
        pairs = [item_example(known[i], self.entry) for i in items]
        found = [(i, pair) for i, pair in zip(items, pairs, strict=True) if pair is not None]
        if not found:
            detail = f"{len(items)} items before the user's first request, none with {self.entry.target}"
            return {REASON: "no_usable_item", DETAIL: detail}
        texts = []
        for i, (words, answer) in found:
            before = [known[j] for j in range(max(start, i - RETRIEVAL_ITEMS), i)]
            texts.append((words if words is None else self._with_items(words, before), answer))
        prompts, answers = tokenised(self.splicer, texts, self.rule.max_target_tokens)
        return {"prompts": prompts, "answers": answers}

    def _with_items(self, words: str, before: Sequence[Mapping[str, str]]) -> str:
        """The input with what retrieval finds among the items before it, oldest first."""
        if self.rule.retrieve == "none" or not before:
            return words
        if self.rule.retrieve == "bm25":
            index = retrieval.WordIndex([retrieval.words(fields, self.entry) for fields in before])
            best = index.rank(query(words, self.entry))
        else:
            best = retrieval.recency(len(before))
        chosen = [before[i] for i in best[: self.rule.retrieval.k]]
        share = self.rule.retrieval.input_share
        composed = retrieval.compose(chosen, words, self.entry, self.tokenizer, self.budget, share)
        return composed.lead + composed.rest


def item_example(fields: Any, entry: TaskEntry) -> tuple[str | None, str] | None:
    """(input, answer) that an item teaches; input None: the text alone. None when the item lacks what it takes."""
    answer = fields.get(entry.target, "").strip()
    if not answer:
        return None
    if entry.input is None:
        return None, answer
    try:
        return fill(entry.input, fields, entry.name), answer
    except ValueError:
        return None


def tokenised(
    splicer: Splicer, pairs: list[tuple[str | None, str]], max_target_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and answers; a text without an input stands where a user's words begin."""
    prompts = []
    for (words, _), prompt in zip(pairs, splicer.prompts([words or "" for words, _ in pairs]), strict=True):
        prompts.append(prompt.before + (prompt.after if words is not None else []))
    return prompts, splicer.targets([answer for _, answer in pairs], max_target_tokens)


class FitAdapters:
    """Stage: one adapter a user, trained together.

    in:  EXAMPLES
    out: ROWS: adapters, those that stay as they are, and rejects
    """

    def __init__(
        self, llm: LLMConfig, lora: LoraConfig, stack: StackConfig, llm_id: str, fit_id: str, threads: int
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        self.lora, self.llm_id, self.fit_id = lora, llm_id, fit_id
        self.trainer = StackedTrainer(FrozenLLM.load(llm).model, lora, stack)
        self.dtype = getattr(torch, lora.stored)

    def __call__(self, batch: pa.Table) -> pa.Table:
        import torch

        train = pc.is_valid(batch["prompts"])
        out = [batch.filter(pc.invert(train)).select(ROWS.names).cast(ROWS)]
        rows = {row["user_id"]: row for row in batch.filter(train).to_pylist()}
        users = (
            UserExamples(name, list(zip(row.pop("prompts"), row.pop("answers"), strict=True)))
            for name, row in rows.items()
        )
        for fitted in self.trainer.fit(users):
            row = rows[fitted.user_id]
            if not all(bool(torch.isfinite(part).all()) for pair in fitted.weights.values() for part in pair):
                row |= {
                    REASON: "not_finite",
                    DETAIL: f"training diverged; lower learning_rate {self.lora.learning_rate}",
                }
                continue
            data = to_bytes({name: (a.to(self.dtype), b.to(self.dtype)) for name, (a, b) in fitted.weights.items()},
                            self.llm_id)  # fmt: skip
            row |= {
                "adapter_id": f"{self.fit_id}-{content_id(data)}",
                "llm_id": self.llm_id,
                "rank": self.lora.shape.rank,
                "alpha": self.lora.shape.alpha,
                "targets": list(self.lora.shape.targets),
                "n_examples": fitted.n_examples,
                "loss": fitted.loss,
                "weights": data,
            }
        out.append(pa.Table.from_pylist(list(rows.values()), schema=ROWS))
        return pa.concat_tables(out)


def content_id(data: bytes) -> str:
    """16 hex characters of an adapter's bytes."""
    import hashlib

    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _with_nulls(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the schema's other columns null."""
    columns = [rows[f.name] if f.name in rows.column_names else pa.nulls(len(rows), f.type) for f in schema]
    return pa.table(columns, schema=schema)
