"""Job `generate`: requests + personas or embeddings -> generations, for one or several methods, by one engine.

What it does and its keys stand in `config.py`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra import job_log, lease, session
from infra.errors import InputError
from infra.report import RunReport
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from infra.table import Table
from pipelines import failures, shown, tables, waves
from pipelines.asked import Chosen
from pipelines.engines.base import PromptSizes, ResolvedDecoding
from pipelines.generate.checks import (
    check_base,
    gpus_of,
    is_encoder_decoder,
    note_undated,
    refuse_a_leak,
    refuse_another_run,
    refuse_dropped,
    resolved,
    settings_id,
)
from pipelines.generate.config import Config
from pipelines.generate.judge_config import JudgeConfig
from pipelines.generate.parts import GenerateRun, Part, open_parts
from pipelines.generate.parts.adapter import Adapter
from pipelines.generate.pending import MadeAlike, PendingReplies
from pipelines.generate.prompts import NOTES, BuildPrompts
from pipelines.generate.remade import drop_remade
from pipelines.generate.replies import ENGINE, Reply
from pipelines.generate.write_profiles import AskForProfiles, WriteProfiles, profiles_made_as
from pipelines.methods import parse_all
from pipelines.pending_users import PendingUsers
from pipelines.run import CpuShare, begin
from pplug.llm import llm_id
from pplug.tasks import TaskSpec

NOTE = "note"
TOKENS = ("prompt_tokens", "output_tokens")


@dataclasses.dataclass(frozen=True)
class Opened:
    """The tables and the task of a run, opened and checked before anything starts."""

    requests: Snapshot
    histories: Snapshot
    buckets: int
    """Number of buckets of the requests, read before any snapshot."""
    task: TaskSpec
    llm_id: str
    encoder_decoder: bool
    decoding: ResolvedDecoding

    @classmethod
    def of(cls, config: Config, report: RunReport) -> "Opened":
        try:
            llm = llm_id(config.llm)
        except (FileNotFoundError, ValueError) as error:
            raise InputError(f"llm: {error}") from error
        encoder_decoder = is_encoder_decoder(config)
        buckets = tables.open_table(config.tables, "requests").buckets
        requests = tables.snapshot(config.tables, "requests", config.as_of_version)
        histories = tables.snapshot(config.tables, "histories", config.as_of_version)
        report.table_read("requests", requests.version)
        report.table_read("histories", histories.version)
        task = tables.task_entry(config.task, histories)
        decoding = resolved(config, task, encoder_decoder, report)
        return cls(requests, histories, buckets, task, llm, encoder_decoder, decoding)


@failures.plain_refusals
def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("generate", config)
    methods = parse_all(config.methods)
    opened = Opened.of(config, report)
    if config.write_profiles:
        made_as = profiles_made_as(config, opened.task, opened.llm_id, opened.decoding.decoding_id)
        _start(config)
        with lease.writing(config.tables, report.run_id):
            tables.refuse_rebucketed(config.tables, "requests", opened.buckets)
            _write_profiles(config, report, opened, made_as)
        return report.finish()
    using = GenerateRun(config, methods, opened.llm_id, opened.task, report, opened.buckets)
    parts = open_parts(using)
    _start(config)
    with lease.writing(config.tables, report.run_id):
        tables.refuse_rebucketed(config.tables, "requests", opened.buckets)
        generations = tables.open_or_create(config.tables, "generations", opened.buckets)
        for part in parts:
            part.start()
        _generate(using, opened, parts, generations)
    code = report.finish()
    if config.show:
        for text in shown.replies(generations.snapshot(), opened.requests, report.run_id, config.show):
            job_log.show(text)
    return code


def _start(config: Config) -> None:
    """Starts Ray, or joins the cluster, and refuses what it could never schedule."""
    reads = {
        "plug": config.plug,
        "llm.model": config.llm.model,
        "retrieval.encoder.model": config.retrieval.encoder.model,
    }
    engines, builders = config.least("workers"), config.least("prompt_workers")
    session.start(need={"CPU": engines + builders + 1.0}, writes={"tables": config.tables}, reads=reads)
    session.check({"GPU": engines * gpus_of(config) + builders * config.gpus_per_prompt_worker})


def _generate(using: GenerateRun, opened: Opened, parts: Sequence[Part], generations: Table) -> None:
    """Plans which replies are pending, makes them in one stream, commits wave by wave."""
    config, report, methods = using.config, using.report, using.methods
    before = generations.snapshot()
    refuse_dropped(config, opened.requests)
    pending, plan, metadata = _plan(using, opened, parts, generations, before)
    if any(row["again"] for row in plan.values()):
        pending, plan, before = _without_remade(pending, plan, generations, before, report, metadata)
    cpu = CpuShare.of(config.workers, gpus_of(config))
    adapters = next((part.for_engine for part in parts if isinstance(part, Adapter)), None)
    sizes = PromptSizes(max((part.rows for part in parts), default=0), config.llm.layout.max_input_tokens)
    counted = CountedReplies(report)
    waves.run(
        report,
        "generate",
        "replies",
        into=generations,
        before=before,
        pending={bucket: row["pending"] for bucket, row in plan.items()},
        steps=[
            waves.actors(
                BuildPrompts, pending, methods, parts, opened.histories, using.embeddings, config.llm,
                opened.encoder_decoder, opened.task, config.max_history_items, config.engine.batch_rows,
                CpuShare.of(config.prompt_workers, config.gpus_per_prompt_worker),
                **prompt_pool(config),
            ),
            engine_step(
                config, Reply, config.llm, config.engine, opened.decoding, opened.llm_id, report.run_id, cpu, adapters,
                sizes,
            ),
        ],
        metadata=metadata,
        wave_rows=config.wave_rows,
        block_rows=config.wave_rows,
        strict=False,  # replies are keyed by run: another run's are none of this one's
        count=count_replies,
        counted=counted,
    )  # fmt: skip
    counted.note_tokens()


def _without_remade(
    pending: PendingReplies,
    plan: dict[int, dict[str, Any]],
    generations: Table,
    before: Snapshot,
    report: RunReport,
    identities: Mapping[str, str],
) -> tuple[PendingReplies, dict[int, dict[str, Any]], Snapshot]:
    """Takes out the replies that are made anew; returns what is pending on the version without them, and that version.

    Where replies of other runs count, it counts anew: that version holds those that another run has made meanwhile.
    """
    again = {bucket: row for bucket, row in plan.items() if row["again"]}
    changed = sum(row["changed"] for row in again.values())
    errors = sum(row["again"] for row in again.values()) - changed
    counts = {"errors_tried_again": errors, "changed_requests": changed}
    report.extra |= {name: count for name, count in counts.items() if count}
    before = drop_remade(generations, before, pending, list(again), report, identities)
    pending = dataclasses.replace(pending, done=before)
    if pending.alike is not None:
        report.planned = report.already_there = 0
        plan = waves.plan(list(plan), pending.count, report)
    return pending, plan, before


def _plan(
    using: GenerateRun, opened: Opened, parts: Sequence[Part], generations: Table, before: Snapshot
) -> tuple[PendingReplies, dict[int, dict[str, Any]], dict[str, str]]:
    """Counts the pending replies per bucket, and refuses those that must not be made; the last value returned is what
    the commits say of the run."""
    config, report = using.config, using.report
    users = keys_by_bucket(tables.read_users(config.users, opened.requests), generations.buckets)
    identities = {"llm_id": opened.llm_id, "engine": config.engine.kind, "plug_id": "", "fit_id": ""}
    identities |= {"profile_id": "", "encoder_id": "", "decoding_id": opened.decoding.decoding_id}
    identities |= {"settings_id": settings_id(config, opened.task)}
    for part in parts:
        identities |= part.identities()
    alike = MadeAlike(opened.llm_id, opened.decoding.decoding_id, identities["plug_id"], identities["fit_id"])
    pending = PendingReplies(
        opened.requests,
        before if before.files else None,
        report.run_id,
        config.methods,
        config.requests,
        users,
        {part.group: table for part in parts if (table := part.made_from_items()) is not None},
        config.decoding.n,
        alike if config.requests == "new" else None,
        config.since,
    )
    before_now = generations.metadata_of_run(report.run_id)
    if tables.JUDGE_OF in before_now:
        raise InputError(f"run_id={report.run_id}: this run has judgements; give replies another run_id")
    refuse_another_run(before_now, identities, report.run_id)
    plan = waves.plan(opened.requests.filled(users), pending.count, report)
    note_undated(config, report, plan)
    refuse_a_leak(config, using.methods, parts, plan)
    check_base(config, opened.requests, plan, report)
    if "profile" in pending.made_from_items:
        report.extra["requests_without_profile"] = sum(row["without_profile"] for row in plan.values())
    return pending, plan, identities | histories_read(before_now, opened.histories.version)


def histories_read(before_now: Mapping[str, str], version: int) -> dict[str, str]:
    """Returns what a run's commits say of the histories that it has read: the oldest version of all its starts.

    They say nothing where an earlier release has begun the run, whose replies have read a version that nobody knows.

    Args:
        before_now: metadata of the run's commits until now.
        version: the version that this start reads.
    """
    if before_now and tables.HISTORIES_VERSION not in before_now:
        return {}
    return {tables.HISTORIES_VERSION: str(min(version, int(before_now.get(tables.HISTORIES_VERSION, version))))}


def prompt_pool(config: Config) -> dict[str, Any]:
    """The pool of actors that build prompts."""
    return {
        "least": config.least("prompt_workers"),
        "size": config.prompt_workers,
        "gpus": config.gpus_per_prompt_worker,
    }


def engine_step(config: Config | JudgeConfig, stage: type, *args: Any) -> waves.Step:
    """A stage with an engine, which answers several batches at once."""
    return waves.actors(
        stage,
        *args,
        least=config.least("workers"),
        size=config.workers,
        rows=config.engine.batch_rows,
        gpus=gpus_of(config),
        pool={
            "max_tasks_in_flight_per_actor": 2 * config.engine.in_flight,
            "max_concurrent_calls_per_actor": config.engine.in_flight,
            "enable_true_multi_threading": True,
        },
        restarts=config.max_engine_restarts,  # a batch that kills the engine again and again ends the job
    )


def count_replies(replies: pa.Table) -> dict[str, int]:
    """Counts the tokens, errors and notes of a block of replies."""
    counts: dict[str, int] = {name: pc.sum(replies[name]).as_py() or 0 for name in TOKENS}
    for error in replies["error"].drop_null().to_pylist():
        counts[error] = counts.get(error, 0) + 1
    for note in pc.list_flatten(replies["notes"]).to_pylist():
        counts[f"{NOTE} {note}"] = counts.get(f"{NOTE} {note}", 0) + 1
    for row in pc.value_counts(replies[ENGINE]).to_pylist():
        counts[f"{ENGINE}: {row['values']}"] = row["counts"]
    return counts


MOST_ERRORS, OTHER_ERRORS = 100, "others"
"""Number of different errors that a report tells apart, and the name of the rest: they may hold values of the row."""


class CountedReplies:
    """Adds what `count_replies` has counted to the report."""

    def __init__(self, report: RunReport) -> None:
        self.report, self.tokens = report, dict.fromkeys(TOKENS, 0)

    def __call__(self, counts: Mapping[str, int]) -> None:
        for reason, n in counts.items():
            kind, _, name = reason.rpartition(" ")
            if reason in self.tokens:
                self.tokens[reason] += n
            elif reason.startswith(f"{ENGINE}: "):
                self._engine(reason.removeprefix(f"{ENGINE}: "), n)
            elif kind == NOTE and name in NOTES:
                self.report.extra.setdefault("notes", dict.fromkeys(NOTES, 0))[name] += n
            else:
                self.report.failed += n
                errors = self.report.extra.setdefault("errors", {})
                known = reason if reason in errors or len(errors) < MOST_ERRORS else OTHER_ERRORS
                errors[known] = errors.get(known, 0) + n

    def _engine(self, about: str, n: int) -> None:
        """Counts the replies per number format: auto may take another one on another node."""
        engines = self.report.extra.setdefault("engines", {})
        engines[about] = engines.get(about, 0) + n
        if len(engines) == 2 and about in engines and engines[about] == n:
            self.report.warn(f"replies come from engines of several kinds ({', '.join(engines)}); give engine.dtype")

    def note_tokens(self) -> None:
        self.report.extra |= self.tokens


def _write_profiles(config: Config, report: RunReport, opened: Opened, made_as: str) -> None:
    """Plans whose profile is pending, has them written in one stream, commits wave by wave."""
    users = tables.read_users(config.users, opened.requests)
    profiles = tables.open_or_create(config.tables, "profiles", opened.buckets)
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    before = profiles.snapshot()
    pending = PendingUsers(
        opened.histories,
        opened.requests,
        before if before.files else None,
        made_as,
        config.profile.items,
        users,
        opened.buckets,
        id_column="profile_id",
        only_asking=True,
        chosen=Chosen.of(config.tables, config.requests, config.since, "profile"),
        newest=tables.snapshot(config.tables, "histories", {}),
    )
    plan = waves.plan(opened.requests.filled(keys_by_bucket(users, opened.buckets)), pending.count, report)
    identities = {"llm_id": opened.llm_id, "profile_id": made_as, "decoding_id": opened.decoding.decoding_id}
    versions = {
        "histories_version": str(opened.histories.version), "requests_version": str(opened.requests.version)
    }  # fmt: skip
    report.extra |= identities
    cpu = CpuShare.of(config.workers, gpus_of(config))
    sizes = PromptSizes(0, config.profile.prompt_tokens or config.llm.layout.max_input_tokens)
    waves.run(
        report,
        "generate",
        "users",
        into=profiles,
        before=before,
        pending={bucket: row["pending"] for bucket, row in plan.items()},
        unchanged={bucket: row["unchanged"] for bucket, row in plan.items()},
        steps=[
            waves.actors(
                AskForProfiles, pending, opened.task, config.llm, config.profile, opened.encoder_decoder,
                **prompt_pool(config),
            ),
            engine_step(
                config, WriteProfiles, config.llm, config.engine, opened.decoding, opened.llm_id, report.run_id, cpu,
                None, sizes,
            ),
        ],
        metadata=identities | versions,
        wave_rows=config.wave_rows,
        block_rows=config.wave_rows,
        rejects=rejects,  # a user without an item is one every night, and stands there once
        key="user_key",
    )  # fmt: skip
