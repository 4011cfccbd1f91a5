"""Job `adapt`: histories (and requests) -> one adapter per user, many trained together; or the base they stand on.

What it does and its keys stand in `config.py`.
"""

import math
import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from infra.table import Table
from infra.trainer import run_training
from pipelines import begun, failures, llm_sample, made_from, tables, training, waves
from pipelines.adapt.base import BaseExamples, BaseShard, fit_base, merge
from pipelines.adapt.config import Config
from pipelines.adapt.mixed import OtherSettings
from pipelines.adapt.unchanged import TakeUnchanged
from pipelines.adapt.users import RETRIEVAL_ITEMS, FitAdapters, ReadExamples, fit_id
from pipelines.asked import Chosen
from pipelines.made_from import users_id
from pipelines.model_folders import below, check_output
from pipelines.owners import NOBODY, Owners, Persons
from pipelines.pending_users import PendingUsers
from pipelines.run import CpuShare, begin
from pipelines.tracking import refuse_missing
from pipelines.training import keep_curve, left_without_record, refuse_workers
from pplug.adapter import base_shapes
from pplug.folder import MODEL_FILES
from pplug.identity import model_folder
from pplug.llm import llm_id
from pplug.stand_in import SAMPLE
from pplug.tasks import TaskSpec
from pplug.trainable import refuse_untrainable


@failures.plain_refusals
def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    _refuse_a_spread(config)
    refuse_missing(config.track)
    report = begin("adapt", config)
    run_id, run_dir = report.run_id, report.run_dir
    table = tables.open_table(config.tables, "histories")
    began = begun.versions(run_dir, run_id) if config.stage == "base" else {}
    histories = table.snapshot(began.get("histories"), complete=not began)
    report.table_read("histories", histories.version)
    task = tables.task_entry(config.task, histories)
    if task.target is None and (config.stage == "users" or config.examples == "items"):
        raise InputError(f"task {task.name} names no target: its items have no answer that an adapter could learn")
    if config.rule.retrieve != "none" and (config.stage == "base" or task.retrieval is None):
        why = "stage base has no history of its own" if config.stage == "base" else f"task {task.name} has no such form"
        raise InputError(
            f"rule.retrieve={config.rule.retrieve}: {why}; leave it out or give the task entry `retrieval`"
        )
    if config.rule.retrieve != "none":
        try:
            config.rule.retrieval.room(config.llm.layout.max_input_tokens)
        except ValueError as error:
            raise InputError(f"rule.retrieval.{error}") from error
    try:
        base = llm_id(config.llm)
        folder = model_folder(config.llm.model, config.llm.revision, weights=False)
        refuse_untrainable(folder, to_merge=config.stage == "base")
        base_shapes(folder, config.trained.shape.targets, to_merge=config.stage == "base")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    users = tables.read_users(config.users, histories, persons=_persons(config))
    workers = config.workers if config.stage == "base" else config.least("workers")
    session.start(
        need={"CPU": workers + 2.0, "GPU": workers * config.gpus_per_worker},
        writes={"tables": config.tables} | ({"run_dir": run_dir} if config.stage == "base" else {}),
        reads={"llm.model": config.llm.model},
    )
    if config.stage == "base":
        with lease.reading(config.tables, run_id):
            return _base(config, run_id, run_dir, report, task, base)
    with lease.writing(config.tables, run_id):
        tables.refuse_rebucketed(config.tables, "histories", table.buckets)
        _adapters(config, report, histories, task, users, base)
    return report.finish()


def _persons(config: Config) -> Persons:
    """People with a history under another id, whom a file of a base's target users may name."""
    asks = config.stage == "base" and config.users is not None
    requests = tables.snapshot_if_any(config.tables, "requests", {}) if asks else None
    return NOBODY if requests is None else Owners(requests).of_several()


def _refuse_a_spread(config: Config) -> None:
    """Refuses a base spread over workers in a way that the stage does not have, or over a number that does not fit."""
    parallel = config.llm.parallel
    if config.stage == "users" and parallel.shard > 1:
        raise InputError(
            "llm.parallel.shard: the users of a stack differ from worker to worker; give llm.parallel.tensor"
        )
    if config.stage == "base" and parallel.tensor > 1:
        raise InputError("llm.parallel.tensor: stage base spreads the layers' weights alone; give llm.parallel.shard")
    for name in ("workers", "min_workers"):
        refuse_workers(getattr(config, name) or config.workers, parallel, config.gpus_per_worker, name)
    if config.stage == "users" and parallel.tensor > 1 and config.gpus_per_worker not in (0, 1):
        raise InputError(
            f"gpus_per_worker={config.gpus_per_worker:g}: with llm.parallel.tensor={parallel.tensor} each worker has a "
            "GPU of its own; give 1"
        )


def _requests(config: Config, report: RunReport) -> "Snapshot | None":
    named = config.requests != "all" or config.since is not None
    if config.cut == "none" or not (named or Table.exists(tables.location(config.tables, "requests"))):
        return None
    requests = tables.open_table(config.tables, "requests").snapshot(complete=True)
    report.table_read("requests", requests.version)
    return requests


def _adapters(
    config: Config, report: RunReport, histories: Snapshot, task: TaskSpec, users: frozenset[str] | None, base: str
) -> None:  # fmt: skip
    """Plans whose adapter is pending, trains them in one stream, commits wave by wave."""
    fit = fit_id(config.trained, base, task, config.rule, config.max_history_items)
    buckets = tables.open_table(config.tables, "histories").buckets
    adapters, rejects = (tables.open_or_create(config.tables, *one) for one in (("adapters", buckets), ("rejects", 1)))
    before = adapters.snapshot()
    asked = keys_by_bucket(users, buckets)
    chosen = Chosen.of(config.tables, config.requests, config.since, "adapter")
    _refuse_other_settings(config, adapters, before, base, fit)
    _refuse_a_mixture(config, report, before, asked, (base, fit))
    requests = _requests(config, report)
    # when only some users are trained, the others keep their old adapters, which may be uncut
    mixed = (users is not None or chosen.is_some) and "none" in tables.metadata_values(adapters, "cut")
    cut = "none" if requests is None or mixed else "requests"
    pending = PendingUsers(
        histories, requests, before if before.files else None, fit, config.max_history_items, users, buckets,
        only_asking=chosen.is_some, chosen=chosen, rejects_strangers=not chosen.is_some,
        items_before=0 if config.rule.retrieve == "none" else RETRIEVAL_ITEMS, without=frozenset({"weights"}),
        newest=tables.snapshot(config.tables, "histories", {}),
    )  # fmt: skip
    every = sorted({*histories.by_bucket(), *before.by_bucket()})  # a bucket may have lost all its items
    plan = waves.plan(every if asked is None else list(asked), pending.count, report)
    identities = {"llm_id": base, "fit_id": fit, "cut": cut}
    report.extra |= identities
    if gone := sum(row["gone"] for row in plan.values()):
        report.extra["adapters_gone"] = gone
        print(f"adapt: {gone} adapters go, because their users have no item any more", flush=True)
    sample = llm_sample.stored(before, base)
    if sample is None and any(
        row["pending"] for row in plan.values()
    ):  # others were trained without one, or on another
        sample = llm_sample.take(config.llm, config.gpus_per_worker)
    sampled = {} if sample is None else {SAMPLE: sample}
    cpu, tensor = CpuShare.of(config.workers, config.gpus_per_worker, config.threads), config.llm.parallel.tensor
    waves.run(
        report,
        "fit",
        "users",
        into=adapters,
        before=before,
        pending={bucket: row["pending"] for bucket, row in plan.items()},
        unchanged={bucket: row["unchanged"] for bucket, row in plan.items()},
        gone={bucket: row["gone"] for bucket, row in plan.items()},
        steps=[
            waves.actors(ReadExamples, pending, task, config.llm, config.rule, size=1),
            waves.actors(
                FitAdapters, config.llm, config.trained, config.stack, base, fit, cpu,
                least=config.least("workers") // tensor, size=config.workers // tensor, rows=config.batch_users,
                gpus=config.gpus_per_worker * tensor,
            ),
            waves.tasks(TakeUnchanged(before), rows=None),
        ],
        metadata=identities | {"histories_version": str(histories.version)} | sampled,
        wave_rows=config.wave_users,
        rejects=rejects,  # a user without an example is one in every run, and stands there once
        key="user_key",
        complete=before.metadata.get("complete") == "true" and before.metadata.get("cut") == cut,
    )  # fmt: skip


def _refuse_other_settings(config: Config, table: Table, adapters: Snapshot, base: str, fit: str) -> None:
    """Refuses to train some users alone beside adapters that were made with other settings.

    A run that changes the settings and breaks off leaves adapters of both. One that trains all users ends it; one that
    trains those with a chosen request would end it with a mixture.
    """
    some = {"changed_only": config.changed_only, "requests": config.requests != "all", "since": config.since}
    given = [name for name, value in some.items() if value]
    chosen = given and given != ["changed_only"]
    there = tables.metadata_values(table, "fit_id") if chosen else {adapters.metadata.get("fit_id", fit)}
    if given and there - {fit}:
        raise InputError(
            f"{', '.join(given)}: the adapters there are of base {adapters.metadata.get('llm_id')} and settings "
            f"{' and '.join(sorted(there))}, this run would make those of base {base} and settings {fit}; give the "
            f"settings they were made with, or leave {' and '.join(given)} out to train everybody anew"
        )


def _refuse_a_mixture(
    config: Config,
    report: RunReport,
    adapters: "Snapshot",
    users: "Mapping[int, list[str]] | None",
    made_as: tuple[str, str],
) -> None:
    """Refuses to make adapters of one base or settings beside other users' adapters of another.

    Where all users are trained none stay: those of users who have no item any more go.
    """
    if users is None:
        return
    stage = OtherSettings(adapters, made_as[1], users)
    found: Counter[tuple[str, str]] = Counter()
    if adapters.files:
        for row in waves.each_bucket(adapters.filled(), stage):
            found[row["llm_id"], row["fit_id"]] += row["rows"]
    if not found:
        return
    report.extra["adapters_of_other_settings"] = found.total()
    (base, settings), _ = found.most_common(1)[0]
    raise InputError(
        f"users={config.users}: {found.total()} adapters of other users would stay in {config.tables}, of base {base} "
        f"and settings {settings} (the most of them), beside new ones of base {made_as[0]} and settings {made_as[1]}: "
        "a table has adapters of one base and of one kind of settings. Give those that they were made with, "
        "name these users in the file too, or leave `users` out to train everybody anew"
    )


def _base(config: Config, run_id: str, run_dir: str, report: RunReport, task: "TaskSpec", base: str) -> int:
    """Prepares examples, runs Ray Train, merges what it learned into the base."""
    output = config.output or below(run_dir, "base")
    folder = model_folder(config.llm.model, config.llm.revision)
    _refuse_itself(output, folder, config.llm.model)
    check_output("output", output, MODEL_FILES, run_dir)
    left_out = tables.read_users(config.users) or frozenset()
    decisive = _decisive(config, task, left_out, base)
    snapshots = _base_snapshots(config, report, begun.read(run_dir, "adapt", run_id, decisive))
    begun.write(run_dir, "adapt", run_id, decisive, snapshots)
    examples = Storage(run_dir).join("examples", run_id).uri  # another run's examples may lie in the same run_dir
    shards, counts = _examples(config, report, snapshots, task, left_out, examples)
    record = made_from.MadeFrom(
        job="adapt",
        run_id=run_id,
        tables=Storage(config.tables).uri,
        versions={name: snapshot.version for name, snapshot in snapshots.items()},
        examples=config.examples,
        cut=_cut(config, snapshots),
        left_out=made_from.users_id(made_from.with_all_histories(left_out, snapshots.get("requests"))),
        **counts,
    )
    before = training.steps_before(checkpoints := Storage(run_dir).join("train"), run_id)
    with report.stage("fit") as fit:
        result = run_training(
            fit_base,
            {
                "llm": config.llm.model_dump(),
                "llm_id": base,
                "lora": config.trained.model_dump(),
                "checkpointing": config.stack.checkpointing,
                "examples": examples,
                "shards": shards,
                "cpu": CpuShare.of(config.workers, config.gpus_per_worker, config.threads),
                "left": left_without_record(checkpoints, run_id),
                "run_dir": run_dir,
                "checkpoint_minutes": config.checkpoint_minutes,
                "track": (config.track, run_id, config.model_dump(mode="json")),
            },
            run_id=run_id,
            run_dir=run_dir,
            workers=config.workers,
            gpus_per_worker=config.gpus_per_worker,
            max_failures=config.max_failures,
            checkpoints_kept=1,
        )
        fit.rows = _examples_of(shards, config, result.metrics["step"] - before)
        with result.checkpoint.as_directory() as checkpoint:
            keep_curve(checkpoint, run_dir)
            merge(config.llm, str(Path(checkpoint) / "adapter"), output, made_from.text(record, folder))
    for shard in shards:  # the words of users, as tokens: a rerun writes them anew
        Storage(examples).delete(shard.file)
    report.written = sum(shard.examples for shard in shards)
    merged = llm_id(config.llm.model_copy(update={"model": output, "revision": None}))
    report.extra |= {"base": output, "llm_id": merged, "made_from": record.model_dump(mode="json")}
    report.extra |= {"loss": result.metrics.get("loss"), "examples": result.metrics["examples"]}
    code = report.finish()
    print(f"base {merged}: {output}", flush=True)
    return code


def _refuse_itself(output: str, folder: Path, model: str) -> None:
    """Refuses to write a base over the model that it goes on from."""
    itself = os.path.exists(output) and os.path.samefile(output, folder)
    if itself or output.rstrip("/") == model.rstrip("/"):
        raise InputError(f"output={output}: is the folder of the base itself; give another folder")


def _examples_of(shards: "list[BaseShard]", config: Config, steps: float) -> int:
    """Number of examples in so many steps."""
    examples = sum(shard.examples for shard in shards)
    return round(examples * steps / math.ceil(examples / config.trained.batch_size))


# What may change from one start of a base's run to the next: it decides where and how fast. What comes out depends on
# it as on a seed at most: dropout draws other values for another number of workers, or where a step is cut otherwise.
_FREE = {"run_id", "run_dir", "output", "workers", "min_workers", "gpus_per_worker", "threads", "max_failures",
         "max_reject_fraction", "checkpoint_minutes", "stack", "changed_only", "batch_users", "wave_users",
         "max_history_items", "lora", "epochs", "track"}  # fmt: skip
_FREE_KEYS: dict[str, Any] = dict.fromkeys(_FREE, True) | {"llm": {"parallel"}}


def _decisive(config: Config, task: "TaskSpec", left_out: frozenset[str], base: str) -> dict[str, Any]:
    """All that decides what a base learns, beside the tables' versions."""
    decisive = config.decisive(exclude=_FREE_KEYS) | {"task": task.model_dump(mode="json"), "llm_id": base}
    decisive["lora"] = config.trained.decisive(exclude={"max_tokens_per_microbatch"})
    decisive["users"] = users_id(left_out)  # the ids in the file count, not its name
    requests = tables.snapshot_if_any(config.tables, "requests", {})
    if made_from.with_all_histories(left_out, requests) != left_out:  # an earlier release left out those named alone
        decisive["left_out"] = "people"
    if config.max_history_items != Config.model_fields["max_history_items"].default:  # an earlier release took all
        decisive["max_history_items"] = config.max_history_items
    return decisive


def _cut(config: Config, snapshots: "Mapping[str, Snapshot]") -> Literal["requests", "none"]:
    """The cut in force: without requests there is none, and those that come later are not known."""
    return config.cut if config.examples == "items" and "requests" in snapshots else "none"


def _base_snapshots(config: Config, report: RunReport, known: dict[str, int]) -> "dict[str, Snapshot]":
    """The tables a base learns from: in the versions that the run began with, else the newest complete ones."""
    snapshots = {"histories": tables.snapshot(config.tables, "histories", known)}
    if "requests" in known or (not known and Table.exists(tables.location(config.tables, "requests"))):
        snapshots["requests"] = tables.snapshot(config.tables, "requests", known)
    for name, snapshot in snapshots.items():
        report.table_read(name, snapshot.version)
    if config.examples == "requests" and "requests" not in snapshots:
        raise InputError(f"{config.tables} has no requests; ingest them, or use --examples items")
    return snapshots


def _examples(
    config: Config,
    report: RunReport,
    snapshots: "Mapping[str, Snapshot]",
    task: "TaskSpec",
    left_out: frozenset[str],
    folder: str,
) -> "tuple[list[BaseShard], dict[str, Any]]":
    """Writes the examples; returns their files, and what the base's record says of them."""
    Storage(folder).sweep_drafts()
    histories, requests = snapshots["histories"], snapshots.get("requests")
    cut = _cut(config, snapshots) == "requests"
    prepare = BaseExamples(
        histories, requests, config.examples, cut, task, left_out, config.llm, config.rule.max_target_tokens, folder,
        config.max_history_items,
    )  # fmt: skip
    buckets = snapshots["histories" if config.examples == "items" else "requests"].filled()
    shards, counts, latest = [], {"items_cut_off": 0, "users_left_out": 0}, None
    with report.stage("prepare") as stage:
        for row in waves.each_bucket(buckets, prepare):
            stage.rows += row["examples"]
            report.planned += row["examples"] + row["rejected"]
            report.reject("no_answer", row["rejected"])
            for name in counts:
                counts[name] += row[name]
            if row["latest_us"] is not None:
                latest = max(row["latest_us"], row["latest_us"] if latest is None else latest)
            if row["examples"]:
                shards.append(BaseShard(row["bucket"], row["examples"]))
    if not shards:
        raise InputError(
            f"{config.tables}: no example with an answer is left to adapt the base to the task "
            f"({counts['items_cut_off']} items are cut off by requests, {counts['users_left_out']} users are left out)"
        )
    if counts["items_cut_off"]:
        print(f"adapt: {counts['items_cut_off']} items left out, which a request of their user may not see", flush=True)
    at = None if latest is None else (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=latest)).isoformat()
    return sorted(shards), counts | {"latest_item_at": at}
