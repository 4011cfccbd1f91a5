"""Job `adapt`: histories (and requests) -> one adapter a user, many trained together; or the base they stand on.

What it does and its keys stand in `config.py`.
"""

import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import ray.data
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from infra import lease, session
from infra.errors import InputError
from infra.report import RunReport, new_run_id
from infra.shards import keys_by_bucket
from infra.snapshot import Snapshot
from infra.storage import Storage
from infra.table import Table
from pipelines import begun, made_from, tables
from pipelines.adapt.base import BaseExamples, BaseShard, fit_base, merge
from pipelines.adapt.config import Config
from pipelines.adapt.mixed import OtherSettings
from pipelines.adapt.users import FitAdapters, ReadExamples, fit_id
from pipelines.made_from import users_id
from pipelines.pending_users import OwedUsers
from pipelines.waves import Committer, WriteFiles, bucket_rows, commit_stream, plan
from pplug.adapter import base_shapes
from pplug.folder import MODEL_FILES, check_replaceable
from pplug.identity import model_folder
from pplug.llm import llm_id
from pplug.tasks import TaskEntry


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    run_id = config.run_id or new_run_id("adapt")
    run_dir = config.run_dir or f"runs/{run_id}"
    report = RunReport("adapt", run_id, config.model_dump(), run_dir, config.max_reject_fraction)
    histories = tables.open_table(config.tables, "histories").snapshot(complete=True)
    report.table_read("histories", histories.version)
    entry = tables.task_entry(config.task, histories)
    if entry.target is None and (config.stage == "users" or config.examples == "items"):
        raise InputError(f"task {entry.name} names no target: its items have no answer that an adapter could learn")
    if config.rule.retrieve != "none" and (config.stage == "base" or entry.retrieval is None):
        why = (
            "stage base has no history of its own" if config.stage == "base" else f"task {entry.name} has no such form"
        )
        raise InputError(
            f"rule.retrieve={config.rule.retrieve}: {why}; leave it out or give the task entry `retrieval`"
        )
    try:
        base = llm_id(config.llm)
        base_shapes(model_folder(config.llm.model, config.llm.revision), config.lora.shape.targets)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"llm: {error}") from error
    users = tables.read_users(config.users, histories)
    session.start(need={"CPU": config.workers + 2.0, "GPU": config.workers * config.gpus_per_worker})
    if config.stage == "base":
        with lease.reading(config.tables, run_id):
            return _base(config, run_id, run_dir, report, entry, base)
    with lease.writing(config.tables, run_id):
        _adapters(config, report, histories, entry, users, base)
    return report.finish()


def _threads(config: Config) -> int:
    return config.threads or max(1, (os.cpu_count() or 1) // (1 if config.gpus_per_worker else config.workers))


def _requests(config: Config, report: RunReport) -> "Snapshot | None":
    if not Table.exists(tables.location(config.tables, "requests")):
        return None
    requests = tables.open_table(config.tables, "requests").snapshot(complete=True)
    report.table_read("requests", requests.version)
    return requests


def _adapters(
    config: Config,
    report: RunReport,
    histories: "Snapshot",
    entry: "TaskEntry",
    users: frozenset[str] | None,
    base: str,
) -> None:
    """Plans what each bucket owes, trains it in one stream, commits wave by wave."""
    fit = fit_id(config.trained, base, entry, config.rule, config.history_cap)
    buckets = tables.open_table(config.tables, "histories").buckets
    adapters = tables.open_or_create(config.tables, "adapters", buckets)
    rejects = tables.open_or_create(config.tables, "rejects", 1)
    before = adapters.snapshot()
    made = before.metadata
    if config.changed_only and (made.get("fit_id") or fit) != fit:
        raise InputError(
            f"changed_only: the adapters there are of base {made.get('llm_id')} and settings {made.get('fit_id')}, "
            f"this run would make those of base {base} and settings {fit}; give the settings they were made with, or "
            "leave changed_only out to train everybody anew"
        )
    asked = keys_by_bucket(users, buckets)
    _refuse_a_mixture(config, report, before, histories, asked, (base, fit))
    requests = _requests(config, report) if config.cut == "requests" else None
    # of some users only, the others' adapters stay as they were trained
    mixed = users is not None and "none" in tables.metadata_values(adapters, "cut")
    cut = "none" if requests is None or mixed else "requests"
    owed = OwedUsers(histories, requests, before if before.files else None, fit, config.history_cap, users, buckets)
    counts = plan(list(histories.by_bucket() if asked is None else asked), owed.count, report)
    todo = sorted(bucket for bucket, row in counts.items() if row["owed"])
    done = made.get("complete") == "true" and made.get("cut") == cut
    committer = Committer(
        table=adapters,
        rejects=rejects,
        report=report,
        owed={bucket: counts[bucket]["owed"] + counts[bucket]["stays"] for bucket in todo},
        group_rows=config.wave_users,
        metadata={"llm_id": base, "fit_id": fit, "cut": cut, "histories_version": str(histories.version)},
        planned_on=before.version,
        replace=True,
        complete=done,
    )
    report.extra |= {"llm_id": base, "fit_id": fit, "cut": cut}
    if not todo:
        if not done:
            committer.finish()
        return
    with report.stage("fit") as stage:
        stage.rows = sum(counts[bucket]["owed"] for bucket in todo)
        examples = bucket_rows(todo).map_batches(
            ReadExamples,
            fn_constructor_args=(owed, entry, config.llm, config.rule),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        fitted = examples.map_batches(
            FitAdapters,
            fn_constructor_args=(config.llm, config.trained, config.stack, base, fit, _threads(config)),
            batch_size=config.batch_users,
            batch_format="pyarrow",
            num_gpus=config.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=config.workers),
        )
        known = rejects.snapshot()  # a user without an example is one in every run, and stands there once
        files = fitted.map_batches(
            WriteFiles(adapters, rejects, "adapt", report.run_id, key="user_key", rejected=known).__call__,
            batch_size=None,
            batch_format="pyarrow",
        )
        commit_stream(files, committer, "users")
    report.written -= sum(counts[bucket]["stays"] for bucket in todo)  # they were there, and are again


def _refuse_a_mixture(
    config: Config,
    report: RunReport,
    adapters: "Snapshot",
    histories: "Snapshot",
    users: "Mapping[int, list[str]] | None",
    made_as: tuple[str, str],
) -> None:
    """Refuses to make adapters of one base or settings beside other users' adapters of another.

    Where all users are trained, adapters of users without items may still stay; they are counted.
    """
    stage = OtherSettings(adapters, histories, made_as[1], users)
    found: Counter[tuple[str, str]] = Counter()
    if adapters.files:
        rows = bucket_rows(adapters.filled()).map_batches(stage.__call__, batch_size=1, batch_format="pyarrow")
        for row in rows.iter_rows():
            found[row["llm_id"], row["fit_id"]] += row["rows"]
    if not found:
        return
    report.extra["adapters_of_other_settings"] = found.total()
    (base, settings), _ = found.most_common(1)[0]
    if users is None:
        print(f"adapt: {found.total()} adapters of users who have no item any more stay as they are, the most of base "
              f"{base} and settings {settings}", flush=True)  # fmt: skip
        return
    raise InputError(
        f"users={config.users}: {found.total()} adapters of other users would stay in {config.tables}, of base {base} "
        f"and settings {settings} (the most of them), beside new ones of base {made_as[0]} and settings {made_as[1]}: "
        "a table has adapters of one base and of one kind of settings. Give those that they were made with, "
        "name these users in the file too, or leave `users` out to train everybody anew"
    )


def _base(config: Config, run_id: str, run_dir: str, report: RunReport, entry: "TaskEntry", base: str) -> int:
    """Prepares examples, runs Ray Train, merges what it learned into the base."""
    output = Path(config.output or os.path.join(run_dir, "base"))
    folder = model_folder(config.llm.model, config.llm.revision)
    if output.exists() and output.samefile(folder):
        raise InputError(f"output={output}: is the folder of the base itself; give another folder")
    try:
        check_replaceable(output, MODEL_FILES)
    except ValueError as error:
        raise InputError(f"output: {error}") from error
    left_out = tables.read_users(config.users) or frozenset()
    decisive = _decisive(config, entry, left_out, base)
    known = begun.read(run_dir, "adapt", run_id, decisive)
    snapshots = _base_snapshots(config, report, known)
    begun.write(run_dir, "adapt", run_id, decisive, snapshots)
    session.check_shared(run_dir, "run_dir")
    examples = Storage(run_dir).join("examples", run_id).uri  # another run's examples may lie in the same run_dir
    shards, counts = _examples(config, report, snapshots, entry, left_out, examples)
    record = made_from.MadeFrom(
        job="adapt",
        run_id=run_id,
        tables=Storage(config.tables).uri,
        versions={name: snapshot.version for name, snapshot in snapshots.items()},
        examples=config.examples,
        cut=_cut(config, snapshots),
        left_out=made_from.users_id(left_out),
        **counts,
    )
    with report.stage("fit") as fit:
        fit.rows = sum(shard.examples for shard in shards) * config.trained.epochs
        result = _train(config, run_id, run_dir, examples, shards)
        with result.checkpoint.as_directory() as checkpoint:
            merge(config.llm, str(Path(checkpoint) / "adapter"), str(output), made_from.text(record, folder))
    report.written = sum(shard.examples for shard in shards)
    merged = llm_id(config.llm.model_copy(update={"model": str(output), "revision": None}))
    report.extra |= {"base": str(output), "llm_id": merged, "loss": result.metrics.get("loss")}
    report.extra["examples"] = result.metrics["examples"]
    report.extra["made_from"] = record.model_dump(mode="json")
    code = report.finish()
    print(f"base {merged}: {output}", flush=True)
    return code


# What may change from one start of a base's run to the next: it decides where and how fast, not what comes out.
_FREE = {"run_id", "run_dir", "output", "workers", "gpus_per_worker", "threads", "max_failures", "max_reject_fraction",
         "stack", "changed_only", "batch_users", "wave_users", "history_cap", "lora", "epochs"}  # fmt: skip


def _decisive(config: Config, entry: "TaskEntry", left_out: frozenset[str], base: str) -> dict[str, Any]:
    """All that decides what a base learns, beside the tables' versions."""
    decisive = config.model_dump(mode="json", exclude=_FREE) | {"task": entry.model_dump(mode="json"), "llm_id": base}
    decisive["lora"] = config.trained.model_dump(mode="json", exclude={"micro_tokens"})
    decisive["users"] = users_id(left_out)  # the ids in the file count, not its name
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
    entry: "TaskEntry",
    left_out: frozenset[str],
    folder: str,
) -> "tuple[list[BaseShard], dict[str, Any]]":
    """Writes the examples; returns their files, and what the base's record says of them."""
    histories, requests = snapshots["histories"], snapshots.get("requests")
    cut = _cut(config, snapshots) == "requests"
    prepare = BaseExamples(
        histories, requests, config.examples, cut, entry, left_out, config.llm, config.rule.max_target_tokens, folder
    )
    buckets = snapshots["histories" if config.examples == "items" else "requests"].filled()
    shards, counts, latest = [], {"items_cut_off": 0, "users_left_out": 0}, None
    with report.stage("prepare") as stage:
        rows = bucket_rows(buckets).map_batches(prepare.__call__, batch_size=1, batch_format="pyarrow")
        for row in rows.iter_rows():
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


def _train(config: Config, run_id: str, run_dir: str, examples: str, shards: "list[BaseShard]") -> Any:
    storage = Storage(run_dir).join("train")
    resources = {"CPU": 1.0} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    trainer = TorchTrainer(
        fit_base,
        train_loop_config={
            "llm": config.llm.model_dump(),
            "lora": config.trained.model_dump(),
            "examples": examples,
            "shards": shards,
            "threads": _threads(config),
            "started_in": os.getcwd(),
        },
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=config.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=run_id,
            storage_path=storage.path if storage.is_s3 else os.path.abspath(storage.path),
            storage_filesystem=storage.filesystem if storage.is_s3 else None,
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
        ),
    )
    result = trainer.fit()
    if result.error is not None:
        raise result.error
    return result
