"""Job `generate`: requests + personas or embeddings -> generations, for one or several methods, by one engine.

What it does and its keys stand in `config.py`.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from infra import lease, session
from infra.errors import InputError
from infra.lines import lines
from infra.report import RunReport, new_run_id
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import made_from, tables
from pipelines.engines.adapters import Adapters, facts
from pipelines.generate.config import Config
from pipelines.generate.drop_errors import drop_errors
from pipelines.generate.pending import Owed
from pipelines.generate.prompts import NOTES, BuildPrompts
from pipelines.generate.replies import Reply
from pipelines.generate.write_profiles import AskForProfiles, WriteProfiles
from pipelines.methods import Method, parse_all
from pipelines.pending_users import OwedUsers
from pipelines.waves import Committer, WriteFiles, bucket_rows, commit_stream, plan
from pplug.encoder import encoder_id
from pplug.identity import model_folder, short_id
from pplug.llm import llm_id, load_tokenizer
from pplug.plain_text import TextTokenizer
from pplug.plug import PersonaPlug, plug_id
from pplug.profile import lead, profile_id
from pplug.tasks import TaskEntry

NOTE = "note"


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    run_id = config.run_id or new_run_id("generate")
    report = RunReport(
        "generate", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}", config.max_reject_fraction
    )
    methods = parse_all(config.methods)
    try:
        llm = llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    encoder_decoder = _encoder_decoder(config)
    requests_table = tables.open_table(config.tables, "requests")
    requests = tables.snapshot(config.tables, "requests", config.as_of_version)
    histories = tables.snapshot(config.tables, "histories", config.as_of_version)
    entry = tables.task_entry(config.task, histories)
    report.table_read("requests", requests.version)
    report.table_read("histories", histories.version)
    need = {"CPU": config.workers + config.prompt_workers + 1.0, "GPU": config.workers * config.gpus_per_worker}
    if config.write_profiles:
        made_as = _profile_id(config, entry, llm)
        session.start(need=need)
        with lease.writing(config.tables, run_id):
            _write_profiles(config, report, requests, histories, entry, llm, made_as, encoder_decoder)
        return report.finish()
    sources = _plug_sources(config, methods, llm, report)
    stored = _adapters(config, methods, llm, report)
    _retrieval_sources(config, methods, entry, sources, report)
    sources["profiles"] = _profiles(config, methods, llm, report)

    session.start(need=need)
    generations = tables.open_or_create(config.tables, "generations", requests_table.buckets)
    sources["adapters"] = _ready_for(stored, requests_table.buckets, llm)
    with lease.writing(config.tables, run_id):
        _generate(config, report, methods, requests, generations, histories, sources, entry, llm, encoder_decoder)
    return report.finish()


def _encoder_decoder(config: Config) -> bool:
    """Whether the LLM is one; refused before anything starts where the engine has no such models."""
    folder = model_folder(config.llm.model, config.llm.revision)
    found = json.loads((folder / "config.json").read_text()).get("is_encoder_decoder", False)
    if found and config.engine.kind == "vllm":
        raise InputError(
            f"llm {config.llm.model} is an encoder-decoder, which vLLM does not have; set engine.kind=transformers"
        )
    return bool(found)


def _plug_sources(config: Config, methods: list[Method], llm: str, report: RunReport) -> dict[str, Any]:
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


def _adapters(config: Config, methods: list[Method], llm: str, report: RunReport) -> "Snapshot | None":
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


def _ready_for(stored: "Snapshot | None", buckets: int, llm: str) -> Any:
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


def _retrieval_sources(
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


def _profiles(config: Config, methods: list[Method], llm: str, report: RunReport) -> "Snapshot | None":
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


def _profile_id(config: Config, entry: "TaskEntry", llm: str) -> str:
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
        there = tables.said(tables.open_table(config.tables, "profiles"), "profile_id") - {made_as}
    if there:
        raise InputError(
            f"users={config.users}: the profiles in {config.tables} are of settings {', '.join(sorted(there))}, these "
            f"would be of settings {made_as} (LLM, decoding, prompt, task); give the same settings, or leave users out "
            "to write everybody's anew"
        )
    return made_as


def _write_profiles(
    config: Config,
    report: RunReport,
    requests: "Snapshot",
    histories: "Snapshot",
    entry: "TaskEntry",
    llm: str,
    made_as: str,
    encoder_decoder: bool,
) -> None:
    """Plans what each bucket owes, asks for it in one stream, commits wave by wave."""
    users, buckets = tables.read_users(config.users, requests), tables.open_table(config.tables, "requests").buckets
    profiles = tables.open_or_create(config.tables, "profiles", buckets)
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    before = profiles.snapshot()
    owed = OwedUsers(
        histories,
        requests,
        before if before.files else None,
        made_as,
        config.profile.items,
        users,
        buckets,
        id_column="profile_id",
        only_asking=True,
    )
    counts = plan(requests.filled(keys_by_bucket(users, buckets)), owed.count, report)
    todo = sorted(bucket for bucket, row in counts.items() if row["owed"])
    identity = {"llm_id": llm, "profile_id": made_as, "decoding_id": config.decoding.decoding_id}
    report.extra |= identity
    complete = before.metadata.get("complete") == "true"
    committer = Committer(
        table=profiles,
        rejects=rejects,
        report=report,
        owed={bucket: counts[bucket]["owed"] + counts[bucket]["stays"] for bucket in todo},
        group_rows=config.wave_rows,
        metadata=identity | {"histories_version": str(histories.version), "requests_version": str(requests.version)},
        planned_on=before.version,
        replace=True,
        complete=complete,
    )
    if not todo:
        if not complete:
            committer.finish()
        return
    with report.stage("generate") as stage:
        stage.rows = sum(counts[bucket]["owed"] for bucket in todo)
        asked = bucket_rows(todo).map_batches(
            AskForProfiles,
            fn_constructor_args=(owed, entry, config.llm, config.profile, encoder_decoder),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.prompt_workers),
        )
        written = asked.map_batches(
            WriteProfiles,
            fn_constructor_args=(config.llm, config.engine, config.decoding, llm, report.run_id, _threads(config)),
            **_on_engines(config),
        )
        known = rejects.snapshot()  # a user without an item is one every night, and stands there once
        files = written.map_batches(
            WriteFiles(profiles, rejects, "generate", report.run_id, key="user_key", rejected=known).__call__,
            batch_size=config.wave_rows,
            batch_format="pyarrow",
        )
        commit_stream(files, committer, "users")
    report.written -= sum(counts[bucket]["stays"] for bucket in todo)  # they were there, and are again


def _threads(config: Config) -> int:
    return max(1, (os.cpu_count() or 1) // (1 if config.gpus_per_worker else config.workers))


def _on_engines(config: Config) -> dict[str, Any]:
    """How Ray Data runs a stage with an engine."""
    return {
        "batch_size": config.engine.batch_rows,
        "batch_format": "pyarrow",
        "num_gpus": config.gpus_per_worker or None,
        "compute": ray.data.ActorPoolStrategy(
            size=config.workers,
            max_tasks_in_flight_per_actor=2 * config.engine.in_flight,
            max_concurrent_calls_per_actor=config.engine.in_flight,
            enable_true_multi_threading=True,
        ),
        # a batch that kills the engine again and again must end the job, not loop
        "max_restarts": config.max_engine_restarts,
        "max_task_retries": config.max_engine_restarts,
    }


def _generate(
    config: Config,
    report: RunReport,
    methods: list[Method],
    requests: "Snapshot",
    generations: Any,
    histories: "Snapshot",
    sources: dict[str, Any],
    entry: Any,
    llm: str,
    encoder_decoder: bool,
) -> None:
    """Plans what each bucket owes, answers it in one stream, commits wave by wave."""
    before, profiles = generations.snapshot(), sources["profiles"]
    users = keys_by_bucket(tables.read_users(config.users, requests), generations.buckets)
    stored = sources["adapters"].snapshot if sources["adapters"] else None
    owed = Owed(
        requests,
        before if before.files else None,
        report.run_id,
        config.methods,
        config.requests,
        users,
        profiles,
        stored if any(method.adapter == "own" for method in methods) else None,
    )
    identities = {
        "llm_id": llm,
        "plug_id": sources["plug_id"] or "",
        "profile_id": profiles.metadata.get("profile_id", "") if profiles is not None else "",
        "decoding_id": config.decoding.decoding_id,
        "settings_id": _settings_id(config, entry),
    }
    _refuse_another_run(generations.said_by(report.run_id), identities, report.run_id)
    found = plan(requests.filled(users), owed.count, report)
    counts = {bucket: row["owed"] for bucket, row in found.items()}
    _refuse_a_leak(config, methods, {name: sum(row[f"{name}_leaks"] for row in found.values()) for name in KEPT})
    _check_base(config, requests, found, report)
    failed = [bucket for bucket, row in found.items() if row["failed"]]
    if failed:
        report.extra["errors_tried_again"] = sum(found[bucket]["failed"] for bucket in failed)
        before = drop_errors(generations, before, failed, report, identities)
        owed = dataclasses.replace(owed, done=before)
    if profiles is not None:
        report.extra["requests_without_profile"] = sum(row["without_profile"] for row in found.values())
    todo = sorted(bucket for bucket, n in counts.items() if n)
    committer = Committer(
        table=generations,
        rejects=None,
        report=report,
        owed={bucket: counts[bucket] for bucket in todo},
        group_rows=config.wave_rows,
        metadata=identities,
        planned_on=before.version,
        strict=False,  # replies are keyed by run: another run's are none of this one's
    )
    if not todo:
        if before.metadata.get("complete") != "true":
            committer.finish()
        return
    threads = _threads(config)
    with report.stage("generate") as stage:
        stage.rows = sum(counts.values())
        prompts = bucket_rows(todo).map_batches(
            BuildPrompts,
            fn_constructor_args=(
                owed,
                methods,
                histories,
                sources["embeddings"],
                sources["personas"],
                config.plug if sources["plug_id"] else None,
                sources["plug_id"],
                config.llm,
                encoder_decoder,
                entry,
                _oracle(config, methods),
                config.history_cap,
                config.engine.batch_rows,
                threads,
                stored,
                config.retrieval,
                profiles,
                config.profile,
            ),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=config.prompt_workers),
        )
        replies = prompts.map_batches(
            Reply,
            fn_constructor_args=(
                config.llm,
                config.engine,
                config.decoding,
                llm,
                report.run_id,
                threads,
                sources["adapters"],
            ),
            **_on_engines(config),
        )
        files = replies.map_batches(
            CountAndWrite(WriteFiles(generations, None, "generate", report.run_id)).__call__,
            batch_size=config.wave_rows,
            batch_format="pyarrow",
        )
        tokens = {"prompt_tokens": 0, "output_tokens": 0}

        def seen(batch: "pa.Table") -> None:
            for reason, n in _merged(batch["reasons"].to_pylist()).items():
                kind, _, name = reason.rpartition(" ")
                if reason in tokens:
                    tokens[reason] += n
                elif kind == NOTE and name in NOTES:
                    report.extra.setdefault("notes", dict.fromkeys(NOTES, 0))[name] += n
                else:
                    report.failed += n
                    report.extra.setdefault("errors", {}).setdefault(reason, 0)
                    report.extra["errors"][reason] += n

        commit_stream(files, committer, "replies", seen)
        report.extra |= tokens


KEPT = {
    "adapter": "run `adapt` again with cut=requests (the default), which cuts them at the requests that there are now",
    "profile": "run `generate --write-profiles` again, which cuts them at the requests that there are now",
}
"""What is kept per user and made from the user's items, and what to do where it knows too much."""


def _refuse_a_leak(config: Config, methods: list[Method], leaks: Mapping[str, int]) -> None:
    """Refuses to answer a request whose answer is known by an adapter or a profile that may have learned it."""
    for kept, remedy in KEPT.items():
        if leaks[kept]:
            by_profile = kept == "profile"
            using = [m.name for m in methods if (m.profile if by_profile else m.adapter == "own")]
            raise InputError(
                f"methods {using}: the {kept}s in {config.tables} were made from items that {leaks[kept]} of the "
                f"requests with a known answer may not see, perhaps from the answers themselves; {remedy}, or ask for "
                "--requests open"
            )


def _settings_id(config: Config, entry: "TaskEntry") -> str:
    """Identity of what decides a prompt beside the models, the decoding and the tables."""
    return short_id(
        {
            "retrieval": config.retrieval.model_dump(mode="json"),
            "profile": config.profile.model_dump(mode="json"),
            "history_cap": config.history_cap,
            "task": entry.model_dump(mode="json"),
        }
    )


def _refuse_another_run(said: Mapping[str, str], identities: Mapping[str, str], run_id: str) -> None:
    """Refuses to go on with a run whose replies were made otherwise: one run_id stands for one way of answering."""
    differ = [
        f"{name} {said[name]}, now {value}"
        for name, value in identities.items()
        if value and said.get(name, value) not in ("", value)
    ]
    if differ:
        raise InputError(
            f"run_id={run_id}: this run has replies of other models or settings ({'; '.join(differ)}); give those "
            "again, or another run_id"
        )


def _check_base(config: Config, requests: "Snapshot", found: dict[int, dict[str, Any]], report: RunReport) -> None:
    """Refuses an LLM that has learned the answers of the requests; warns where that cannot be told."""
    counts = (sum(row[name] for row in found.values()) for name in ("dated", "with_target"))
    base, users = model_folder(config.llm.model, config.llm.revision), tables.read_users(config.users)
    for warning in made_from.check(base, config.tables, requests, users, *counts):
        print(f"generate: {warning}", flush=True)
        report.extra.setdefault("warnings", []).append(warning)


def _merged(reasons: list[str]) -> dict[str, int]:
    total: dict[str, int] = {}
    for text in reasons:
        for reason, n in json.loads(text).items():
            total[reason] = total.get(reason, 0) + n
    return total


class CountAndWrite:
    """Writes replies and counts, into the files' metadata, their tokens and errors."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def __call__(self, batch: "pa.Table") -> "pa.Table":
        files = self.write(batch).to_pylist()
        counts: dict[str, int] = {name: pc.sum(batch[name]).as_py() or 0 for name in ("prompt_tokens", "output_tokens")}
        for error in batch["error"].drop_null().to_pylist():
            counts[error] = counts.get(error, 0) + 1
        for note in pc.list_flatten(batch["notes"]).to_pylist():
            counts[f"{NOTE} {note}"] = counts.get(f"{NOTE} {note}", 0) + 1
        if files:
            files[0]["reasons"] = json.dumps(counts)
        return pa.Table.from_pylist(files)


def _oracle(config: Config, methods: list[Method]) -> dict[str, str]:
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
