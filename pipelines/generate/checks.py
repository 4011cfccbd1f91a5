"""Refusals of `generate`: a model that its engine does not have, known answers, requests that have gone, another
way of answering under one run_id."""

from collections.abc import Mapping, Sequence
from typing import Any

from infra import device, log
from infra.errors import ConcurrentRunError, InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from pipelines import made_from, tables
from pipelines.engines.base import CAN, ResolvedDecoding
from pipelines.engines.constrain import resolve
from pipelines.generate.config import Config
from pipelines.generate.judge_config import JudgeConfig
from pipelines.generate.parts import Part
from pipelines.methods import Method
from pplug.identity import model_folder, short_id
from pplug.llm import is_encoder_decoder as is_encoder_decoder_folder
from pplug.llm import tokenizer_of
from pplug.plain_text import TextTokenizer
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec

Plan = Mapping[int, Mapping[str, Any]]
"""Counts per bucket, as `PendingReplies.count` gives them."""


def is_encoder_decoder(config: Config | JudgeConfig) -> bool:
    """Returns whether the LLM is an encoder-decoder.

    Raises:
        InputError: the engine has no such models, or no beams where they are asked for.
    """
    can = CAN[config.engine.kind]
    if config.decoding.num_beams > 1 and not can.beams:
        raise InputError(
            f"decoding.num_beams={config.decoding.num_beams} needs engine.kind=transformers; {config.engine.kind} "
            "samples or is greedy"
        )
    found = is_encoder_decoder_folder(model_folder(config.llm.model, config.llm.revision, weights=False))
    if found and not can.encoder_decoder:
        raise InputError(
            f"llm {config.llm.model} is an encoder-decoder, which {config.engine.kind} does not have; set "
            "engine.kind=transformers"
        )
    return found


def resolved(config: Config, task: TaskSpec, encoder_decoder: bool, report: RunReport) -> ResolvedDecoding:
    """The decoding of this run: whether replies are limited to the task's labels. A profile never is.

    Raises:
        InputError: as `constrain.resolve`.
    """
    decoding = config.decoding
    if config.write_profiles:
        if decoding.constrain == "labels":
            raise InputError("decoding.constrain=labels: a profile is no label; leave it out with --write-profiles")
        if decoding.n > 1:
            raise InputError(f"decoding.n={decoding.n}: a user has one profile; leave it out with --write-profiles")
        decoding = decoding.model_copy(update={"constrain": "none"})

    def words() -> TextTokenizer:
        return PromptBuilder(tokenizer_of(config.llm), config.llm.layout, encoder_decoder).words

    out, warning = resolve(decoding, config.engine, task, words)
    if warning is not None:
        report.warn(warning)
    report.extra["constrain"] = "labels" if out.labels else "none"
    return out


def gpus_of(config: Config | JudgeConfig) -> float:
    """GPUs of one engine; `auto` is decided by the running cluster.

    Raises:
        InputError: the engine is to be split over another number of GPUs than it is given.
    """
    gpus, devices = device.gpus_per_worker(config.gpus_per_worker, config.engine.devices), config.engine.devices
    if gpus >= 1 and devices > 1 and gpus != devices:
        raise InputError(
            f"gpus_per_worker={gpus:g}: engine.tensor_parallel_size and engine.pipeline_parallel_size make {devices} "
            "devices of one engine; give as many GPUs, or gpus_per_worker=auto"
        )
    return gpus


def refuse_a_leak(config: Config, methods: Sequence[Method], parts: Sequence[Part], plan: Plan) -> None:
    """Refuses to answer a request whose answer is known by an adapter or a profile that may have learned it."""
    for part in parts:
        leaks = sum(row.get(f"{part.group}_leaks", 0) for row in plan.values())
        if leaks:
            using = [m.name for m in methods if (own := m.part(part.group)) and not own.instead]
            raise InputError(
                f"methods {using}: the {part.group}s in {config.tables} were made from items that {leaks} of the "
                f"requests with a known answer may not see, perhaps from the answers themselves; {part.remedy}, or ask "
                "for --requests open"
            )


def note_undated(config: Config, report: RunReport, plan: Plan) -> None:
    """Counts the requests that `since` leaves out because they have no time.

    Raises:
        InputError: no request has one, so that `since` can choose none on any night.
    """
    undated = sum(row["undated"] for row in plan.values())
    if not undated:
        return
    if not any(row["timed"] for row in plan.values()):
        instead = "" if config.requests == "new" else ", or ask for --requests new, which goes by the replies"
        raise InputError(
            f"since={config.since}: none of the {undated} requests asked for in {config.tables} has a time (as_of); "
            f"ingest them with a time{instead}"
        )
    report.extra["requests_without_time"] = undated
    print(f"generate: {undated} requests have no time (as_of), and since={config.since} leaves them out", flush=True)


def settings_id(config: Config, task: TaskSpec) -> str:
    """Identity of what decides a prompt beside the models, the decoding and the tables."""
    return short_id(
        {
            "retrieval": config.retrieval.decisive(),
            "profile": config.profile.decisive(),
            "history_cap": config.max_history_items,
            "task": task.model_dump(mode="json"),
        }
        | ({"as_of_version": dict(config.as_of_version)} if config.as_of_version else {})
    )


def refuse_dropped(config: Config, requests: Snapshot) -> None:
    """Refuses to answer requests of which a job has taken some out since they were opened.

    It is asked once the version of `generations` to plan on is known: a job that takes them out later commits there.

    Raises:
        ConcurrentRunError: `drop-requests`, `erase` or `restore` has taken some out; a rerun answers what is left.
    """
    if "requests" in config.as_of_version:
        return
    table = tables.open_table(config.tables, "requests")
    for info in log.back_from(table.storage, table.version):
        version = info["version"]
        if version <= requests.version:
            return
        if log.is_rewritten(info) and "other" in log.kinds(table.storage, version - 1, version):
            raise ConcurrentRunError(
                f"{table.uri}: while this job started, run {log.writer(info)} has taken requests out; start it again"
            )


def refuse_another_run(metadata: Mapping[str, str], identities: Mapping[str, str], run_id: str) -> None:
    """Refuses to go on with a run whose replies were made otherwise: one run_id stands for one way of answering."""
    differ = [
        f"{name} {metadata[name]}, now {value}"
        for name, value in identities.items()
        if value and metadata.get(name, value) not in ("", value)
    ]
    if differ:
        raise InputError(
            f"run_id={run_id}: this run has replies of other models or settings ({'; '.join(differ)}); give those "
            "again, or another run_id"
        )


def check_base(config: Config, requests: Snapshot, plan: Plan, report: RunReport) -> None:
    """Refuses an LLM that has learned the answers of the requests; warns where that cannot be told."""
    counts = (sum(row[name] for row in plan.values()) for name in ("dated", "with_target"))
    base = model_folder(config.llm.model, config.llm.revision, weights=False)
    users = tables.read_users(config.users)
    for warning in made_from.check(base, config.tables, requests, users, *counts):
        report.warn(warning)
