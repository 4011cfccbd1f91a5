"""Stages of generate --write-profiles: users of a bucket become prompts, the replies become their profiles.

Route: bucket -> users who are owed a profile, each with the newest items that count -> token ids -> Reply -> rows of
`profiles`, and rejects. A bucket's other profiles travel beside them, since a bucket is replaced as a whole.
A profile is made from items that all of the user's requests may see (`pending_users`).
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.generate.personas import ragged_f32
from pipelines.generate.prompts import PROMPTS
from pipelines.generate.replies import Reply
from pipelines.histories import Histories, decode_fields
from pipelines.pending_users import OwedUsers, with_nulls
from pipelines.waves import DETAIL, REASON
from pplug.identity import model_folder
from pplug.llm import LLMConfig, load_tokenizer
from pplug.profile import ProfileConfig, question
from pplug.schemas import PROFILES
from pplug.splice import PromptBuilder
from pplug.tasks import TaskEntry

ROWS = pa.schema([*PROFILES, pa.field(REASON, pa.string()), pa.field(DETAIL, pa.string())])
_TOKENS = pa.list_(pa.int32())
ASKED = pa.schema([*ROWS, pa.field("before", _TOKENS), pa.field("after", _TOKENS)])
"""A user to ask about (before, after), a profile that stays as it is (text), or a reject."""


class AskForProfiles:
    """Stage: a bucket's users as prompts. in: bucket int. out: ASKED, in blocks of users."""

    def __init__(
        self, owed: OwedUsers, entry: TaskEntry, llm: LLMConfig, config: ProfileConfig, encoder_decoder: bool
    ) -> None:
        self.owed, self.entry, self.config = owed, entry, config
        tokenizer = load_tokenizer(model_folder(llm.model, llm.revision))
        self.budget = config.prompt_tokens or llm.layout.max_input_tokens
        layout = llm.layout.model_copy(update={"max_input_tokens": self.budget})
        self.prompt_builder = PromptBuilder(tokenizer, layout, encoder_decoder)

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield from self.owed.blocks(bucket, ASKED, self._prompt)

    def _prompt(self, own: Histories, user: int, items: range) -> dict[str, Any]:
        assert own.fields is not None, "read with fields"
        if not items:
            return {REASON: "no_usable_item", DETAIL: "no item before the user's first request"}
        newest_first = [decode_fields(own.fields[i].as_py()) for i in reversed(items)]
        try:
            text = question(newest_first, self.config, self.entry, self.prompt_builder.words, self.budget)
        except ValueError as problem:  # names the missing field, never a text
            return {REASON: "missing_field", DETAIL: str(problem)}
        if not text:
            return {REASON: "no_room", DETAIL: f"not one item fits into a prompt of {self.budget} tokens"}
        (prompt,) = self.prompt_builder.prompts([text])
        made = {"profile_id": self.owed.made_as, "n_items": len(items)}
        return made | {"before": prompt.before, "after": prompt.after}


class WriteProfiles:
    """Stage: one profile a user asked about, by the engine of `Reply`.

    in:  ASKED
    out: ROWS: profiles, those that stay as they are, and rejects; a user whose prompt got no reply is one
    """

    def __init__(self, *how: Any) -> None:
        """`how`: as of `Reply`."""
        self.reply = Reply(*how)

    def __call__(self, batch: pa.Table) -> pa.Table:
        ask = pc.is_valid(batch["before"])
        out = [batch.filter(pc.invert(ask)).select(ROWS.names).cast(ROWS)]
        asked = batch.filter(ask)
        if asked.num_rows:
            replies = self.reply(_prompts(asked)).select(["text", "error", "llm_id", "decoding_id"]).to_pylist()
            rows = asked.select(ROWS.names).to_pylist()
            made = [row | _profile(**reply) for row, reply in zip(rows, replies, strict=True)]
            out.append(pa.Table.from_pylist(made, schema=ROWS))
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
