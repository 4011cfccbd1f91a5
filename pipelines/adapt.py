"""Job `adapt`: histories (and requests) -> one adapter a user, many trained together; or the base they stand on.

stage users: Ray Data spreads users over workers, each of which trains many adapters in one stack. Buckets are committed
wave by wave as their users are finished; a rerun trains only who is missing or whose items have changed. Where there
are requests, a user's items are cut at the earliest of them: an adapter never knows what a request may not see.
Unit of work: a user.
stage base: one adapter on the examples of people who are not target users, on Ray Train, merged into a new base model
folder; give that folder as llm.model to stage users and to generate. Unit of work: an example.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from infra.errors import InputError
from infra.report import RunReport, new_run_id
from pipelines.options import ResumableConfig
from pplug.adapter import ExampleRule, LoraConfig, StackConfig
from pplug.llm import LLMConfig

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from pplug.tasks import TaskEntry


class Config(ResumableConfig):
    """What to train on, and how."""

    stage: Literal["users", "base"] = "users"
    """users: an adapter for each user; base: a base model adapted to the task on other people's examples."""
    llm: LLMConfig
    users: str | None = None
    """File with a target user's id a line. Stage users makes adapters for them (default: all); base leaves them out."""
    lora: LoraConfig = LoraConfig()
    epochs: int | None = Field(None, gt=0)
    """Default: lora.epochs for users; 3 for the base, as in the paper."""
    stack: StackConfig = StackConfig()
    rule: ExampleRule = ExampleRule()
    """How an item becomes an example."""
    history_cap: int = Field(10_000, gt=0)
    """Newest items of a user to train on."""
    cut: Literal["requests", "none"] = "requests"
    """requests: items that one of the user's requests may not see are left out, as an evaluation needs; none: all
    count, as for requests that are yet to come."""
    changed_only: bool = False
    """Go on from the adapters there, for new and changed users; refused where base or settings have changed."""
    examples: Literal["requests", "items"] = "items"
    """Stage base: what people's examples are; requests: those with a target."""
    output: str | None = None
    """Stage base: folder of the merged model; default: <run_dir>/base."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    workers: int = Field(1, gt=0)
    """Training actors: one a GPU, or one a core of a CPU node."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """1 on a GPU cluster."""
    threads: int | None = Field(None, gt=0)
    """Torch threads of one worker on a CPU; default: the machine's cores shared among the workers."""
    batch_users: int = Field(64, gt=0)
    """Users handed to a worker at a time; their adapters are in memory together."""
    wave_users: int = Field(2_000, gt=0)
    """Users in one commit."""
    max_failures: int = Field(2, ge=0)
    """Stage base: times a lost worker group is started again within one run."""

    @property
    def trained(self) -> LoraConfig:
        """The settings in force."""
        epochs = self.epochs or (self.lora.epochs if self.stage == "users" else 3)
        return self.lora.model_copy(update={"epochs": epochs})


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    from infra import lease, session
    from pipelines import tables
    from pplug.adapter import base_shapes
    from pplug.identity import model_folder
    from pplug.llm import llm_id

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
    users = tables.read_users(config.users)
    session.start(need={"CPU": config.workers + 2.0, "GPU": config.workers * config.gpus_per_worker})
    if config.stage == "base":
        with lease.reading(config.tables, run_id):
            return _base(config, report, histories, entry, users or frozenset(), run_dir)
    with lease.writing(config.tables, run_id):
        _adapters(config, report, histories, entry, users, base)
    return report.finish()


def _threads(config: Config) -> int:
    return config.threads or max(1, (os.cpu_count() or 1) // (1 if config.gpus_per_worker else config.workers))


def _requests(config: Config, report: RunReport) -> "Snapshot | None":
    from infra.table import Table
    from pipelines import tables

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
    import ray.data

    from infra.shards import keys_by_bucket
    from pipelines import tables
    from pipelines.stages.fit_adapters import FitAdapters, ReadExamples, fit_id
    from pipelines.stages.owed import OwedUsers
    from pipelines.stages.write import Committer, WriteFiles, bucket_rows, commit_stream, plan

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
    requests = _requests(config, report) if config.cut == "requests" else None
    # of some users only, the others' adapters stay as they were trained
    mixed = users is not None and "none" in tables.said(adapters, "cut")
    cut = "none" if requests is None or mixed else "requests"
    owed = OwedUsers(histories, requests, before if before.files else None, fit, config.history_cap, users, buckets)
    asked = keys_by_bucket(users, buckets)
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


def _base(
    config: Config,
    report: RunReport,
    histories: "Snapshot",
    entry: "TaskEntry",
    left_out: frozenset[str],
    run_dir: str,
) -> int:
    """Prepares examples, runs Ray Train, merges what it learned into the base."""
    from infra.storage import Storage
    from pipelines.stages.adapt_base import BaseExamples, merge
    from pipelines.stages.write import bucket_rows
    from pplug.llm import llm_id

    source = histories if config.examples == "items" else _requests(config, report)
    if source is None:
        raise InputError(f"{config.tables} has no requests; ingest them, or use --examples items")
    folder = Storage(run_dir).join("examples").uri
    # a killed run leaves checkpoints and no report: an erase has to know whom they learned from
    begun = {"job": "adapt", "run_id": report.run_id, "config": config.model_dump(mode="json")}
    Storage(run_dir).write_bytes(f"{report.run_id}.begun.json", json.dumps(begun, indent=2).encode())
    prepare = BaseExamples(source, entry, left_out, config.llm, config.rule.max_target_tokens, folder)
    with report.stage("prepare") as stage:
        rows = bucket_rows(list(source.by_bucket())).map_batches(prepare.__call__, batch_size=1, batch_format="pyarrow")
        for row in rows.iter_rows():
            stage.rows += row["examples"]
            report.planned += row["examples"] + row["rejected"]
            report.reject("no_answer", row["rejected"])
    if not stage.rows:
        raise InputError(f"{config.tables}: no example with an answer is left to adapt the base to the task")
    output = config.output or os.path.join(run_dir, "base")
    with report.stage("fit") as fit:
        fit.rows = stage.rows * config.trained.epochs
        result = _train(config, report.run_id, run_dir, folder)
        with result.checkpoint.as_directory() as checkpoint:
            merge(config.llm, str(Path(checkpoint) / "adapter"), output)
    report.written = stage.rows
    merged = llm_id(config.llm.model_copy(update={"model": output, "revision": None}))
    report.extra |= {"base": output, "llm_id": merged, "loss": result.metrics.get("loss")}
    code = report.finish()
    print(f"base {merged}: {output}", flush=True)
    return code


def _train(config: Config, run_id: str, run_dir: str, examples: str) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from infra.storage import Storage
    from pipelines.stages.adapt_base import fit_base

    storage = Storage(run_dir).join("train")
    resources = {"CPU": 1.0} | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})
    trainer = TorchTrainer(
        fit_base,
        train_loop_config={
            "llm": config.llm.model_dump(),
            "lora": config.trained.model_dump(),
            "examples": examples,
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
