"""Part `profile`: the text about the user that `generate --write-profiles` made, first in the prompt."""

from typing import Self

from infra.errors import InputError
from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.generate.parts.base import BucketView, Drafts, GenerateRun, Part, Worker
from pipelines.learned import LastItem, last_item
from pipelines.methods import PartInfo
from pplug.llm import tokenizer_of
from pplug.plain_text import TextTokenizer
from pplug.profile import ProfileConfig, prefix
from pplug.schemas import LAST_ITEM


class Profile(Part):
    group = "profile"
    remedy = "run `generate --write-profiles` again, which cuts them at the requests that there are now"

    def __init__(self, profiles: Snapshot, config: ProfileConfig, input_share: float) -> None:
        """`input_share`: fraction of the prompt's tokens that the request may keep when a profile is added."""
        self.profiles, self.config, self.input_share = profiles, config, input_share
        self._texts: dict[str, tuple[str, LastItem]] = {}

    @classmethod
    def open(cls, run: GenerateRun) -> Self:
        config, methods = run.config, run.methods_with("profile")
        profiles = tables.snapshot(config.tables, "profiles", config.as_of_version)
        if not profiles.files:
            raise InputError(
                f"methods {methods}: the table profiles in {config.tables} is empty; run `generate --write-profiles`"
            )
        made_by, wanted = profiles.metadata.get("llm_id"), config.profile.llm_id
        written = f"the profiles in {config.tables} were written by"
        if wanted is None:
            remedy = f"run `generate --write-profiles` with this one, or give --profile.llm-id {made_by} to use these"
            run.accept(written, made_by, None, remedy)
        elif made_by != wanted:
            raise InputError(f"{written} LLM {made_by}, but profile.llm_id={wanted} asks for those of another")
        limit = config.llm.layout.max_input_tokens
        tokenizer = TextTokenizer(tokenizer_of(config.llm))
        if not prefix("profile", "", config.profile, tokenizer, limit, config.retrieval.input_share):
            raise InputError(
                f"profile.max_tokens={config.profile.max_tokens} and llm.layout.max_input_tokens={limit} leave a "
                "profile no room beside the words of profile.text; raise them or shorten it"
            )
        run.report.table_read("profiles", profiles.version)
        return cls(profiles, config.profile, config.retrieval.input_share)

    def made_from_items(self) -> Snapshot:
        return self.profiles

    def identities(self) -> dict[str, str]:
        return {"profile_id": self.profiles.metadata.get("profile_id", "")}

    def load(self, worker: Worker) -> None:
        self.tokenizer, self.limit = worker.prompt_builder.words, worker.llm.layout.max_input_tokens

    def look(self, view: BucketView) -> None:
        columns, made_as = ["user_id", "text", "profile_id", *LAST_ITEM], self.identities()["profile_id"]
        rows = self.profiles.read(columns, buckets=[view.bucket], user_keys=view.user_keys).to_pylist()
        self._texts = {row["user_id"]: (row["text"], last_item(row)) for row in rows
                       if made_as in ("", row["profile_id"])}  # fmt: skip
        self._others = {row["user_id"] for row in rows} - self._texts.keys()

    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        for i, request in enumerate(drafts.requests):
            text, made_from = self._texts.get(request["user_id"], (None, None))
            if made_from is not None and not made_from.is_visible_to(request):
                drafts.notes[i].append("profile_not_used")
            elif request["user_id"] in self._others:
                drafts.notes[i].append("profile_of_other_settings")
            elif text is not None:
                drafts.prefixes[i] = prefix(
                    text, drafts.inputs[i], self.config, self.tokenizer, self.limit, self.input_share
                )
