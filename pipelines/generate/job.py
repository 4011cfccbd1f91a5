"""Job `generate`: requests + personas or embeddings -> generations, for one or several methods, by one engine.

What it does and its keys stand in `config.py`.
"""

import dataclasses
import json
import os
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport, new_run_id
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.generate.checks import KEPT, check_base, refuse_a_leak, refuse_another_run, settings_id
from pipelines.generate.config import Config
from pipelines.generate.drop_errors import drop_errors
from pipelines.generate.pending import Owed
from pipelines.generate.prompts import NOTES, BuildPrompts
from pipelines.generate.replies import Reply
from pipelines.generate.sources import (
    adapters_of,
    is_encoder_decoder,
    plug_sources,
    profiles_made_as,
    profiles_of,
    read_oracle,
    ready_for,
    retrieval_sources,
)
from pipelines.generate.write_profiles import AskForProfiles, WriteProfiles
from pipelines.methods import Method, parse_all
from pipelines.pending_users import OwedUsers
from pipelines.waves import Committer, WriteFiles, bucket_rows, commit_stream, plan
from pplug.llm import llm_id
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
    encoder_decoder = is_encoder_decoder(config)
    requests_table = tables.open_table(config.tables, "requests")
    requests = tables.snapshot(config.tables, "requests", config.as_of_version)
    histories = tables.snapshot(config.tables, "histories", config.as_of_version)
    entry = tables.task_entry(config.task, histories)
    report.table_read("requests", requests.version)
    report.table_read("histories", histories.version)
    need = {"CPU": config.workers + config.prompt_workers + 1.0, "GPU": config.workers * config.gpus_per_worker}
    if config.write_profiles:
        made_as = profiles_made_as(config, entry, llm)
        session.start(need=need)
        with lease.writing(config.tables, run_id):
            _write_profiles(config, report, requests, histories, entry, llm, made_as, encoder_decoder)
        return report.finish()
    sources = plug_sources(config, methods, llm, report)
    stored = adapters_of(config, methods, llm, report)
    retrieval_sources(config, methods, entry, sources, report)
    sources["profiles"] = profiles_of(config, methods, llm, report)

    session.start(need=need)
    generations = tables.open_or_create(config.tables, "generations", requests_table.buckets)
    sources["adapters"] = ready_for(stored, requests_table.buckets, llm)
    with lease.writing(config.tables, run_id):
        _generate(config, report, methods, requests, generations, histories, sources, entry, llm, encoder_decoder)
    return report.finish()


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
        "settings_id": settings_id(config, entry),
    }
    refuse_another_run(generations.metadata_of_run(report.run_id), identities, report.run_id)
    found = plan(requests.filled(users), owed.count, report)
    counts = {bucket: row["owed"] for bucket, row in found.items()}
    refuse_a_leak(config, methods, {name: sum(row[f"{name}_leaks"] for row in found.values()) for name in KEPT})
    check_base(config, requests, found, report)
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
                read_oracle(config, methods),
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
