"""Stage: the requests of a bucket, each with its user's history, become prompts with persona rows.

Route: bucket -> requests x methods not answered yet -> each part of the method adds its share (`parts/`) -> token ids
around persona rows (1+P, H).
The vectors stay here; only persona rows and token ids travel on.
Shapes: P persona tokens, H LLM width.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra import device
from infra.snapshot import Snapshot
from pipelines.asked import request_hash
from pipelines.generate.parts import Part
from pipelines.generate.parts.base import BucketView, Drafts, Worker
from pipelines.generate.pending import BucketRequests, PendingReplies
from pipelines.generate.personas import ragged_f32
from pipelines.generate.visible import VisibleItems
from pipelines.methods import Method
from pipelines.owners import Owners
from pipelines.run import CpuShare
from pplug.llm import LLMConfig, tokenizer_of
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec

PROMPTS = pa.schema(
    {
        "bucket": pa.int32(),
        "user_key": pa.string(),
        "request_id": pa.string(),
        "method": pa.string(),
        "user_id": pa.string(),
        "input_hash": pa.string(),
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
        "samples": pa.list_(pa.int32()),  # replies that are wanted, by number; null: the only one
    }
)
NOTES = {
    "adapter_not_used": "the user's adapter was made from items that the request may not see",
    "profile_not_used": "the user's profile was made from items that the request may not see",
    "profile_of_other_settings": "the user's profile was made with other settings: run generate --write-profiles",
    "persona_made_anew": "the stored persona was made from another history, or from another number of newest items",
    "items_without_time": "the plug weighs items by their age, and the user's have no times: their order alone counted",
    "items_without_vector": "items that the request may see have no vector yet: `refresh` has not read them",
    "history_without_time": "the request has a time and the user's items have none: it may see none of them",
    "input_cut": "the end of the prompt's text was cut off at llm.layout.max_input_tokens, or the end of the request "
    "at retrieval.input_share, since items stand beside it",
    "thinking_cut": "the model thought aloud; its thoughts were cut from the reply",
    "thinking_unfinished": "the model thought until decoding.max_tokens, so the reply is empty",
}

AHEAD = 8
"""Blocks whose queries are encoded together: the more there are, the more alike are those of a batch."""


class BuildPrompts:
    """Stage: prompts of whole buckets, in blocks of `block_rows`.

    in:  bucket int
    out: PROMPTS, one row per request and method
    """

    def __init__(
        self,
        pending: PendingReplies,
        methods: Sequence[Method],
        parts: Sequence[Part],
        histories: Snapshot | None,
        embeddings: Snapshot | None,
        llm: LLMConfig,
        encoder_decoder: bool,
        task: TaskSpec,
        max_items: int,
        block_rows: int,
        cpu: CpuShare,
    ) -> None:
        device.assigned()  # without a GPU of its own, it must not find one that an engine was given
        self.pending, self.methods, self.parts = pending, methods, parts
        self.histories, self.embeddings = histories, embeddings
        self.max_items, self.block_rows = max_items, block_rows
        self.prompt_builder = PromptBuilder(tokenizer_of(llm), llm.layout, encoder_decoder)
        for part in parts:
            part.load(Worker(llm, task, self.prompt_builder, cpu))

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        names = {method.name for method in self.methods}
        for bucket in batch["bucket"].to_pylist():
            asked = self.pending.read(bucket)
            view = self._view(bucket, asked.requests)
            for part in self.parts:
                part.look(view)
            for start in range(0, asked.requests.num_rows, self.block_rows):
                if start % (AHEAD * self.block_rows) == 0:
                    coming = asked.requests.slice(start, AHEAD * self.block_rows)
                    coming = coming.select(["user_id", "request_id", "input"]).to_pylist()
                    for part in self.parts:
                        part.look_ahead(asked.unanswered(coming, names))
                rows = asked.requests.slice(start, self.block_rows).to_pylist()
                yield from self._blocks(bucket, asked, rows, view.items)

    def _view(self, bucket: int, requests: pa.Table) -> BucketView:
        """Reads of the bucket's histories what the parts need; of these users alone, but for a control of another."""
        keys = pc.unique(requests["user_key"]).to_pylist()
        needs = [part.needs() for part in self.parts]
        items, owners = None, Owners(self.pending.requests)
        if self.histories is not None and any(one.items for one in needs) and requests.num_rows:
            items = VisibleItems(
                self.histories,
                self.embeddings,
                bucket,
                owners,
                keys,
                self.max_items,
                others=any(one.others for one in needs),
                with_fields=any(one.fields for one in needs),
                labels=next((one.labels for one in needs if one.labels is not None), None),
            )
        encoder_id = None if self.embeddings is None else self.embeddings.metadata.get("encoder_id")
        return BucketView(bucket, requests, keys, items, encoder_id, owners)

    def _blocks(
        self, bucket: int, asked: BucketRequests, rows: Sequence[dict[str, Any]], items: VisibleItems | None
    ) -> Iterator[pa.Table]:
        """Prompts of these requests, one block per method."""
        for method in self.methods:
            requests = [
                dict(row, samples=asked.missing(row, method.name) if asked.samples > 1 else None)
                for row in asked.unanswered(rows, {method.name})
            ]
            if requests:
                drafts = Drafts(method, requests, [request["input"] for request in requests])
                for part in self.parts:
                    info = method.part(part.group)
                    if info is not None:
                        part.contribute(info, drafts)
                for request, notes in zip(requests, drafts.notes, strict=True):
                    if items is not None and method.part("none") is None and items.hides_all(request):
                        notes.append("history_without_time")
                yield self._table(bucket, drafts)

    def _table(self, bucket: int, drafts: Drafts) -> pa.Table:
        """Drafts -> PROMPTS."""
        prefixes, inputs, n = drafts.prefixes, drafts.inputs, len(drafts.requests)
        if drafts.method.part("plug") is None:  # no rows stand between the two texts
            inputs = [prefix + text for prefix, text in zip(prefixes, inputs, strict=True)]
            prefixes = [""] * n
        prompts = self.prompt_builder.prompts(inputs, prefixes)
        for prompt, notes in zip(prompts, drafts.notes, strict=True):
            notes += ["input_cut"] * (prompt.cut and "input_cut" not in notes)
        columns = {
            "bucket": [bucket] * n,
            "user_key": [request["user_key"] for request in drafts.requests],
            "request_id": [request["request_id"] for request in drafts.requests],
            "method": [drafts.method.name] * n,
            "user_id": [request["user_id"] for request in drafts.requests],
            "input_hash": [request_hash(request) for request in drafts.requests],
            "before": [prompt.before for prompt in prompts],
            "after": [prompt.after for prompt in prompts],
            "rows": ragged_f32(drafts.soft_prompts),
            "persona": drafts.personas,
            "plug_id": [drafts.plug_id] * n,
            "encoder_id": [drafts.encoder_id] * n,
            "adapter_id": [name and name.adapter_id for name in drafts.adapters],
            "adapter_key": [name and name.user_key for name in drafts.adapters],
            "error": drafts.errors,
            "notes": drafts.notes,
            "samples": [request["samples"] for request in drafts.requests],
        }
        return pa.table(columns, schema=PROMPTS)
