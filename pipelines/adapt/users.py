"""Stages of adapt: users of a bucket become examples, examples become adapters, many users at once.

Route: bucket -> users whose adapter is pending, each with the items that count -> token ids -> stacked training -> rows
of `adapters`. A bucket is replaced as a whole: its other adapters travel beside them as names, and get their weights
where the rows are written.

An item becomes an example by the task's own input and target; where retrieval is on, with what it finds among the items
before it, as the request would have been answered then. Which items count is said in `pending_users`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from infra import device
from infra.errors import InputError
from pipelines.adapt.group import TrainerGroup
from pipelines.adapt.unchanged import ADAPTER_ROWS
from pipelines.histories import Histories, decode_fields
from pipelines.pending_users import PendingUsers
from pipelines.run import CpuShare
from pipelines.waves import DETAIL, REASON
from pplug import retrieval
from pplug.adapter import ExampleRule, LoraConfig, StackConfig, content_id, to_bytes
from pplug.identity import short_id
from pplug.llm import FrozenLLM, LLMConfig, refuse_another, tokenizer_of
from pplug.lora import StackedTrainer, UserExamples
from pplug.lora_user import Fitted
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec, fill

_TOKENS = pa.list_(pa.list_(pa.int32()))
EXAMPLES = pa.schema([*ADAPTER_ROWS, pa.field("prompts", _TOKENS), pa.field("answers", _TOKENS)])
"""A user to train (prompts, answers), an adapter that stays as it is (adapter_id, without weights), or a reject."""
BLOCK_BYTES = 256 * 2**20
"""Weights of one block of rows: beyond 2 GiB Arrow would need other offsets, and a block is in memory several times."""
RETRIEVAL_ITEMS = 512
"""Newest items before an item among which retrieval looks, as in generate."""


def fit_id(lora: LoraConfig, llm_id: str, task: TaskSpec, rule: ExampleRule, cap: int) -> str:
    """Identity of all that decides an adapter beside the user's own items."""
    fields = {"input", "target", "marker", "query_end", "retrieval"}
    if rule.retrieve != "none":  # it says what is searched, and what of an item is cut
        fields.add("item_without_label")
    form = task.model_dump(mode="json", include=fields)
    rules = {"task": form, "rule": rule.decisive(), "cap": cap}
    # how a step is cut to fit the memory decides which values dropout draws, as a seed does, and no more; it stands
    # there as it did when it was part of the identity
    decisive = lora.decisive() | {"micro_tokens": 16_384}
    return short_id({"lora": decisive, "llm_id": llm_id} | rules)


class ReadExamples:
    """Stage: a bucket's users as token ids. in: bucket int. out: EXAMPLES, in blocks of users."""

    def __init__(self, pending: PendingUsers, task: TaskSpec, llm: LLMConfig, rule: ExampleRule) -> None:
        self.pending, self.task, self.rule = pending, task, rule
        self.prompt_builder = PromptBuilder(tokenizer_of(llm), llm.layout, False)
        self.limit = llm.layout.max_input_tokens

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield from self.pending.blocks(bucket, EXAMPLES, self._examples)

    def _examples(self, own: Histories, user: int, items: range) -> dict[str, Any]:
        """Examples of the items in `items`; retrieval looks among those before them too."""
        assert own.fields is not None, "read with fields"
        start = max(int(own.starts[user]), items.start - RETRIEVAL_ITEMS)
        known = {i: decode_fields(own.fields[i].as_py()) for i in range(start, items.stop)}
        pairs = [item_example(known[i], self.task) for i in items]
        found = [(i, pair) for i, pair in zip(items, pairs, strict=True) if pair is not None]
        if not found:
            detail = f"{len(items)} items before the user's first request, none with {self.task.target}"
            return {REASON: "no_usable_item", DETAIL: detail}
        texts = []
        for i, (words, answer) in found:
            before = [known[j] for j in range(max(start, i - RETRIEVAL_ITEMS), i)]
            try:
                texts.append((words if words is None else self._with_items(words, before), answer))
            except ValueError as problem:  # names the field that retrieval words an item by, never a text
                return {REASON: "missing_field", DETAIL: str(problem)}
        prompts, answers = tokenised(self.prompt_builder, texts, self.rule.max_target_tokens)
        return {"prompts": prompts, "answers": answers}

    def _with_items(self, words: str, before: Sequence[Mapping[str, str]]) -> str:
        """The input with what retrieval finds among the items before it, oldest first."""
        rule, tokenizer = self.rule, self.prompt_builder.words
        found = retrieval.before(rule.retrieve, before, words, self.task, tokenizer, self.limit, rule.retrieval)
        return found.prefix + found.suffix


def item_example(fields: Any, task: TaskSpec) -> tuple[str | None, str] | None:
    """(input, answer) that an item teaches; input None: the text alone. None when the item lacks what it takes."""
    answer = fields.get(task.target, "").strip()
    if not answer:
        return None
    if task.input is None:
        return None, answer
    try:
        return fill(task.input, fields, task.name), answer
    except ValueError:
        return None


def tokenised(
    prompt_builder: PromptBuilder, pairs: list[tuple[str | None, str]], max_target_tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of prompts and answers; the answer of a pair without an input starts where the user's words would."""
    prompts = [prompt.before + prompt.after for prompt in prompt_builder.prompts([words or "" for words, _ in pairs])]
    if any(words is None for words, _ in pairs):
        opening = prompt_builder.opening()
        prompts = [opening if words is None else ids for (words, _), ids in zip(pairs, prompts, strict=True)]
    return prompts, prompt_builder.targets([answer for _, answer in pairs], max_target_tokens)


class FitAdapters:
    """Stage: one adapter per user, trained together.

    in:  EXAMPLES
    out: ADAPTER_ROWS in blocks of BLOCK_BYTES: adapters, those that stay (without weights), and rejects

    The first call raises InputError where the base cannot be trained in a stack.
    """

    def __init__(
        self, llm: LLMConfig, lora: LoraConfig, stack: StackConfig, llm_id: str, fit_id: str, cpu: CpuShare
    ) -> None:
        torch.set_num_threads(cpu.torch_threads())
        self.lora, self.llm_id, self.fit_id = lora, llm_id, fit_id
        self.trainer: StackedTrainer | TrainerGroup | None = None
        self.refused = ""
        try:
            if llm.parallel.tensor > 1:
                group = TrainerGroup(llm, lora, stack, cpu.torch_threads())
                refuse_another(llm, llm_id)
                self.trainer = group
            else:
                base = FrozenLLM.load(llm, device=device.assigned()).model
                refuse_another(llm, llm_id)
                self.trainer = StackedTrainer(base, lora, stack)
        except (ValueError, ImportError) as error:  # Ray would start the actor again, and keep the reason to itself
            self.refused = f"llm {llm.model}: {error}"
        self.dtype = getattr(torch, lora.storage_dtype)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        if self.trainer is None:
            raise InputError(self.refused)
        train = pc.is_valid(batch["prompts"])
        yield batch.filter(pc.invert(train)).select(ADAPTER_ROWS.names).cast(ADAPTER_ROWS)
        waiting = {row["user_id"]: row for row in batch.filter(train).to_pylist()}
        users = (
            UserExamples(name, list(zip(row.pop("prompts"), row.pop("answers"), strict=True)))
            for name, row in waiting.items()
        )
        done: list[dict[str, Any]] = []
        size = 0
        for fitted in self.trainer.fit(users):
            done.append(waiting[fitted.user_id] | self._fitted(fitted))
            size += len(done[-1].get("weights") or b"")
            if size >= BLOCK_BYTES:
                yield pa.Table.from_pylist(done, schema=ADAPTER_ROWS)
                done, size = [], 0
        yield pa.Table.from_pylist(done, schema=ADAPTER_ROWS)

    def _fitted(self, fitted: Fitted) -> dict[str, Any]:
        """Columns of a user's adapter, or of the reject that it is."""
        if not all(bool(torch.isfinite(part).all()) for pair in fitted.weights.values() for part in pair):
            detail = f"training diverged; lower learning_rate {self.lora.learning_rate}"
            return {REASON: "not_finite", DETAIL: detail}
        pairs = {name: (a.to(self.dtype), b.to(self.dtype)) for name, (a, b) in fitted.weights.items()}
        data = to_bytes(pairs, self.llm_id)
        return {
            "adapter_id": f"{self.fit_id}-{content_id(data)}",
            "llm_id": self.llm_id,
            "rank": self.lora.shape.rank,
            "alpha": self.lora.shape.alpha,
            "targets": list(self.lora.shape.targets),
            "n_examples": fitted.n_examples,
            "loss": fitted.loss,
            "weights": data,
        }
