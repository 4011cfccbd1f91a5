"""Stages of generate --write-profiles: users of a bucket become prompts, the replies become their profiles.

Route: bucket -> users whose profile is pending, each with the newest items that count -> token ids -> Reply -> rows of
`profiles`, and rejects. A bucket's other profiles travel beside them, since a bucket is replaced as a whole.
A profile is made from items that all of the user's chosen requests may see (`pending_users`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import InputError
from infra.table import Table
from pipelines import tables
from pipelines.generate.config import Config
from pipelines.generate.personas import ragged_f32
from pipelines.generate.prompts import PROMPTS
from pipelines.generate.replies import Reply
from pipelines.histories import Histories, decode_fields
from pipelines.pending_users import PendingUsers, with_nulls
from pipelines.waves import DETAIL, REASON
from pplug.llm import LLMConfig, tokenizer_of
from pplug.profile import ProfileConfig, profile_id, question
from pplug.schemas import PROFILES
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec

PROFILE_ROWS = pa.schema([*PROFILES, pa.field(REASON, pa.string()), pa.field(DETAIL, pa.string())])
_TOKENS = pa.list_(pa.int32())
ASKED = pa.schema([*PROFILE_ROWS, pa.field("before", _TOKENS), pa.field("after", _TOKENS)])
"""A user to ask about (before, after), a profile that stays as it is (text), or a reject."""


def profiles_made_as(config: Config, task: TaskSpec, llm: str, decoding_id: str) -> str:
    """Identity of the profiles to write; refuses a task without a form for items, and two kinds in one table."""
    if task.retrieval is None:
        raise InputError(
            f"write_profiles: task {task.name} does not say how items stand in a prompt; give a task entry with "
            "`retrieval` (--task FILE)"
        )
    made_as = profile_id(config.profile, llm, decoding_id, task)
    place = tables.location(config.tables, "profiles")
    others = set[str]()
    some = config.users is not None or config.requests != "all" or config.since is not None
    if some and Table.exists(place):
        others = tables.metadata_values(tables.open_table(config.tables, "profiles"), "profile_id") - {made_as}
    if others:
        raise InputError(
            f"users={config.users}, requests={config.requests}, since={config.since}: the profiles in {config.tables} "
            f"are of settings {', '.join(sorted(others))}, these would be of settings {made_as} (LLM, decoding, "
            "prompt, task); give the same settings, or leave users out and ask for all requests to write everybody's "
            "anew"
        )
    return made_as


class AskForProfiles:
    """Stage: a bucket's users as prompts. in: bucket int. out: ASKED, in blocks of users."""

    def __init__(
        self, pending: PendingUsers, task: TaskSpec, llm: LLMConfig, config: ProfileConfig, encoder_decoder: bool
    ) -> None:
        self.pending, self.task, self.config = pending, task, config
        self.budget = config.prompt_tokens or llm.layout.max_input_tokens
        layout = llm.layout.model_copy(update={"max_input_tokens": self.budget})
        self.prompt_builder = PromptBuilder(tokenizer_of(llm), layout, encoder_decoder)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield from self.pending.blocks(bucket, ASKED, self._prompt)

    def _prompt(self, own: Histories, user: int, items: range) -> dict[str, Any]:
        assert own.fields is not None, "read with fields"
        if not items:
            return {REASON: "no_usable_item", DETAIL: "no item before the user's first request"}
        newest_first = [decode_fields(own.fields[i].as_py()) for i in reversed(items)]
        try:
            text = question(newest_first, self.config, self.task, self.prompt_builder.words, self.budget)
        except ValueError as problem:  # names the missing field, never a text
            return {REASON: "missing_field", DETAIL: str(problem)}
        if not text:
            return {REASON: "no_room", DETAIL: f"not one item fits into a prompt of {self.budget} tokens"}
        (prompt,) = self.prompt_builder.prompts([text])
        made = {"profile_id": self.pending.made_as, "n_items": len(items)}
        return made | {"before": prompt.before, "after": prompt.after}


class WriteProfiles:
    """Stage: one profile per user asked about, by the engine of `Reply`.

    in:  ASKED
    out: PROFILE_ROWS: profiles, those that stay as they are, and rejects; a user whose prompt got no reply is one
    """

    def __init__(self, *how: Any) -> None:
        """`how`: the arguments of `Reply`."""
        self.reply = Reply(*how)

    def __call__(self, batch: pa.Table) -> pa.Table:
        ask = pc.is_valid(batch["before"])
        out = [batch.filter(pc.invert(ask)).select(PROFILE_ROWS.names).cast(PROFILE_ROWS)]
        asked = batch.filter(ask)
        if asked.num_rows:
            replies = self.reply(_prompts(asked)).select(["text", "error", "llm_id", "decoding_id"]).to_pylist()
            rows = asked.select(PROFILE_ROWS.names).to_pylist()
            made = [row | _profile(**reply) for row, reply in zip(rows, replies, strict=True)]
            out.append(pa.Table.from_pylist(made, schema=PROFILE_ROWS))
        return pa.concat_tables(out)


def _profile(text: str, error: str | None, **made_by: str) -> dict[str, str]:
    if error is not None:
        return {REASON: "no_reply", DETAIL: error}
    if not text.strip():
        return {REASON: "empty_profile", DETAIL: "the reply has no text"}
    return {"text": text.strip()} | made_by


def _prompts(asked: pa.Table) -> pa.Table:
    """ASKED -> PROMPTS. A user's key stands for the request: by it a sampled reply draws."""
    columns = {
        "request_id": asked["user_key"],
        "method": pa.repeat("profile", len(asked)),
        "rows": ragged_f32([np.zeros(0, np.float32)] * len(asked)),
        "persona": pa.repeat("none", len(asked)),
    }
    plain = with_nulls(asked, PROMPTS)
    return pa.table({name: columns.get(name, plain[name]) for name in PROMPTS.names}, schema=PROMPTS)
