"""What a run of `generate` reads: tables, plug, adapters and profiles, each checked against the LLM before anything
starts."""

import json
from functools import partial
from typing import Any

from infra.errors import InputError
from infra.lines import lines
from infra.report import RunReport
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import tables
from pipelines.engines.adapters import Adapters, facts
from pipelines.generate.config import Config
from pipelines.methods import Method
from pipelines.waves import bucket_rows
from pplug.encoder import encoder_id
from pplug.identity import model_folder
from pplug.llm import load_tokenizer
from pplug.plain_text import TextTokenizer
from pplug.plug import PersonaPlug, plug_id
from pplug.profile import lead, profile_id
from pplug.tasks import TaskEntry


def is_encoder_decoder(config: Config) -> bool:
    """Whether the LLM is one; refused before anything starts where the engine has no such models."""
    folder = model_folder(config.llm.model, config.llm.revision)
    found = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder", False)
    if found and config.engine.kind == "vllm":
        raise InputError(
            f"llm {config.llm.model} is an encoder-decoder, which vLLM does not have; set engine.kind=transformers"
        )
    return bool(found)


def plug_sources(config: Config, methods: list[Method], llm: str, report: RunReport) -> dict[str, Any]:
    """The plug's identity and the tables it reads, checked against the LLM; empty when no method needs a plug."""
    with_plug = [method.name for method in methods if method.plug]
    if not with_plug:
        return {"plug_id": None, "embeddings": None, "personas": None}
    if config.plug is None:
        raise InputError(f"methods {with_plug} need a plug; give its folder with --plug (`train` writes one)")
    try:
        made_for = PersonaPlug.from_pretrained(config.plug).config
    except (OSError, ValueError) as error:
        raise InputError(f"plug: {error}") from error
    if made_for.llm_id != llm:
        raise InputError(
            f"plug {config.plug} was trained for LLM {made_for.llm_id} (weights and prompt layout), but "
            f"{config.llm.model} with this layout is {llm}; give the LLM and llm.layout it was trained with, or train "
            "a new plug"
        )
    _refuse_a_mixture(config.plug, made_for.trained_without_history, methods)
    if made_for.trained_without_history:
        return {"plug_id": plug_id(config.plug), "embeddings": None, "personas": None}
    name = tables.embeddings_name(made_for.encoder_id or "")
    embeddings = tables.snapshot(config.tables, name, config.as_of_version)
    report.table_read(name, embeddings.version)
    identity, personas = plug_id(config.plug), None
    if any(method.plug == "mean" for method in methods) or made_for.aggregation == "mean":
        if Table.exists(tables.location(config.tables, "personas")):
            stored = tables.snapshot(config.tables, "personas", config.as_of_version)
            if stored.metadata.get("plug_id") == identity:  # another plug's personas are made anew from the vectors
                personas = stored
                report.table_read("personas", stored.version)
    return {"plug_id": identity, "embeddings": embeddings, "personas": personas}


def _refuse_a_mixture(plug: str, without_history: bool, methods: list[Method]) -> None:
    """A soft prompt has a row of its own in a report: it is never scored as a plug, nor a plug as it."""
    wrong = [method.name for method in methods if method.plug and (method.plug == "soft-prompt") != without_history]
    if wrong and without_history:
        raise InputError(
            f"plug {plug} was trained without any history, so methods {wrong} say nothing of it; ask for "
            "plug:soft-prompt, or give a plug that was trained with histories"
        )
    if wrong:
        raise InputError(
            f"methods {wrong} need a plug that was trained without any history, but {plug} was trained with histories; "
            "train one with --set shape.without_history=true, or ask for plug:no-history of this one"
        )


def adapters_of(config: Config, methods: list[Method], llm: str, report: RunReport) -> "Snapshot | None":
    """The table of adapters, checked against the LLM; None when no method needs it."""
    with_adapter = [method.name for method in methods if method.adapter]
    if not with_adapter:
        return None
    if config.engine.kind != "vllm":
        raise InputError(f"methods {with_adapter} need engine.kind=vllm, which serves many adapters in one batch")
    found = tables.snapshot(config.tables, "adapters", config.as_of_version)
    if not found.files:
        raise InputError(f"methods {with_adapter}: the table adapters in {config.tables} is empty; run `adapt`")
    if found.metadata.get("llm_id") != llm:
        raise InputError(
            f"the adapters in {config.tables} were trained on LLM {found.metadata.get('llm_id')} (weights and prompt "
            f"layout), but {config.llm.model} with this layout is {llm}; give the LLM and llm.layout they were trained "
            "with, or run `adapt` on this one"
        )
    report.table_read("adapters", found.version)
    return found


def ready_for(stored: "Snapshot | None", buckets: int, llm: str) -> Any:
    """What an engine has to be made ready for, from the adapters themselves."""
    if stored is None:
        return None
    read = bucket_rows(list(stored.by_bucket())).map_batches(
        partial(facts, stored), batch_size=1, batch_format="pyarrow"
    )
    rank, targets = 0, set[str]()
    for row in read.iter_rows():
        rank, targets = max(rank, row["rank"]), targets | set(row["targets"])
    return Adapters(stored, buckets, llm, rank, tuple(sorted(targets)))


def retrieval_sources(
    config: Config, methods: list[Method], entry: "TaskEntry", sources: dict[str, Any], report: RunReport
) -> None:
    """Refuses what retrieval cannot do with this task, layout or encoder; adds the vectors that `dense` searches."""
    found = [method.name for method in methods if method.retrieval]
    if not found:
        return
    if entry.retrieval is None:
        raise InputError(
            f"methods {found}: task {entry.name} does not say how items stand in a prompt; give a task entry with "
            "`retrieval` (--task FILE)"
        )
    budget, limit = config.retrieval.budget_tokens, config.llm.layout.max_input_tokens
    if budget is not None and budget > limit:
        raise InputError(
            f"retrieval.budget_tokens={budget} is above llm.layout.max_input_tokens={limit}, where a prompt is cut: "
            "lower the one or raise the other"
        )
    if not any(method.retrieval == "dense" for method in methods):
        return
    try:
        rule = entry.item if config.retrieval.encoder.with_label else entry.item_without_label
        name = tables.embeddings_name(encoder_id(config.retrieval.encoder, rule))
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"retrieval.encoder: {error}") from error
    embeddings = tables.snapshot(config.tables, name, config.as_of_version)
    held = sources["embeddings"]
    if held is not None and held.table != embeddings.table:
        raise InputError(
            f"the plug was trained on the vectors of {held.table}, retrieval.encoder makes those of "
            f"{embeddings.table}; give the plug's encoder, or run the dense methods by themselves"
        )
    report.table_read(name, embeddings.version)
    sources["embeddings"] = embeddings


def profiles_of(config: Config, methods: list[Method], llm: str, report: RunReport) -> "Snapshot | None":
    """The table of profiles, checked against the LLM; None when no method needs it."""
    with_profile = [method.name for method in methods if method.profile]
    if not with_profile:
        return None
    found = tables.snapshot(config.tables, "profiles", config.as_of_version)
    if not found.files:
        raise InputError(
            f"methods {with_profile}: the table profiles in {config.tables} is empty; run `generate --write-profiles`"
        )
    made_by, wanted = found.metadata.get("llm_id"), config.profile.llm_id or llm
    if made_by != wanted:
        raise InputError(
            f"the profiles in {config.tables} were written by LLM {made_by} (weights and prompt layout), but expected "
            f"is {wanted}; run `generate --write-profiles` with that one, or give --profile.llm-id {made_by} to use "
            "these all the same"
        )
    limit = config.llm.layout.max_input_tokens
    tokenizer = TextTokenizer(load_tokenizer(model_folder(config.llm.model, config.llm.revision)))
    if not lead("profile", "", config.profile, tokenizer, limit, config.retrieval.input_share):
        raise InputError(
            f"profile.max_tokens={config.profile.max_tokens} and llm.layout.max_input_tokens={limit} leave a profile "
            "no room beside the words of profile.text; raise them or shorten it"
        )
    report.table_read("profiles", found.version)
    return found


def profiles_made_as(config: Config, entry: "TaskEntry", llm: str) -> str:
    """Identity of the profiles to write; refuses a task without a form for items, and two kinds in one table."""
    if entry.retrieval is None:
        raise InputError(
            f"write_profiles: task {entry.name} does not say how items stand in a prompt; give a task entry with "
            "`retrieval` (--task FILE)"
        )
    made_as = profile_id(config.profile, llm, config.decoding.decoding_id, entry)
    place = tables.location(config.tables, "profiles")
    there = set[str]()
    if config.users is not None and Table.exists(place):
        there = tables.metadata_values(tables.open_table(config.tables, "profiles"), "profile_id") - {made_as}
    if there:
        raise InputError(
            f"users={config.users}: the profiles in {config.tables} are of settings {', '.join(sorted(there))}, these "
            f"would be of settings {made_as} (LLM, decoding, prompt, task); give the same settings, or leave users out "
            "to write everybody's anew"
        )
    return made_as


def read_oracle(config: Config, methods: list[Method]) -> dict[str, str]:
    """What is known of users in words, for the method `oracle`."""
    if not any(method.oracle for method in methods):
        return {}
    if config.oracle is None:
        raise InputError("method oracle needs --oracle FILE: JSON lines of {user_id, text}")
    found = {}
    try:
        for line in lines(config.oracle):
            row = json.loads(line)
            found[row["user_id"]] = row["text"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"oracle={config.oracle}: expected JSON lines of {{user_id, text}} ({error!r})") from error
    return found
