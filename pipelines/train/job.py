"""Job `train`: histories, embeddings, requests with targets -> a plug.

What it does and its keys stand in `config.py`.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
from safetensors.torch import load_file

from infra import lease, session, temporary
from infra.errors import InputError
from infra.report import new_run_id
from infra.storage import Storage
from infra.trainer import run_training
from pipelines import begun, failures, tables, training
from pipelines.histories import width_of
from pipelines.model_folders import below, check_output, loading, whole_output
from pipelines.run import CpuShare, begin
from pipelines.tables import read_users
from pipelines.tracking import refuse_missing, tracker
from pipelines.train.answers import known_answers
from pipelines.train.config import Config
from pipelines.train.examples import examples
from pipelines.train.prepare import check, prepare
from pipelines.train.samples import Shard, load_samples, vectors_by_user
from pipelines.training import Checkpoints, Orders, keep_curve, left_without_record, refuse_workers, worker_device
from pplug.encoder import best_dtype, encoder_id, query_limit, read_folder, refuse_another_encoder
from pplug.encoder_head import query_encoder
from pplug.fit import Fitter, Samples, drawn, encode_queries
from pplug.fit_config import held_out
from pplug.history import NO_TIME
from pplug.identity import model_folder, short_id
from pplug.items import AnswerTokens, LabelSet
from pplug.llm import FrozenLLM, llm_id, refuse_another
from pplug.parallel import Mesh
from pplug.plain_text import TextTokenizer
from pplug.plug import PLUG_FILES, PersonaPlug, PlugConfig, plug_id
from pplug.plug_parts import label_tokens, label_vectors, token_vectors
from pplug.stand_in import SAMPLE_FILE, llm_sample
from pplug.start import Start
from pplug.tasks import TaskSpec
from pplug.trainable import refuse_untrainable


@failures.plain_refusals
def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    refuse_workers(config.workers, config.llm.parallel, config.gpus_per_worker)
    refuse_missing(config.track)
    run_id = config.run_id or new_run_id("train")
    with lease.reading(config.tables, run_id):
        return _run(config, run_id)


def _run(config: Config, run_id: str) -> int:
    report = begin("train", config, run_id=run_id)
    run_dir = report.run_dir
    # of a run that began before: the task that `ingest` stores may have got another label since
    began = {name.partition("-")[0]: version for name, version in begun.versions(run_dir, run_id).items()}
    versions: dict[Any, int] = {**config.as_of_version, **began}
    histories = tables.snapshot(config.tables, "histories", versions)
    task = _task(config, histories)
    shown = examples(config, task)
    encoder, llm = _models(config, task)
    answers = known_answers(config, task)
    blind = config.shape.without_history
    identities = {"encoder_id": None if blind else encoder, "llm_id": llm}
    embeddings_name = "" if blind else tables.embeddings_name(encoder)
    target = config.plug or below(run_dir, "plug")
    check_output("plug", target, PLUG_FILES, run_dir)
    settings = decisive(config, identities) | {begun.TASK: task.model_dump(mode="json")}
    if blind and config.shape.request_value:
        settings[begun.QUERY_ENCODER] = encoder
    begun.read(run_dir, "train", run_id, settings)
    snapshots = {}
    for name in filter(None, ("histories", embeddings_name, "requests")):
        snapshots[name] = tables.snapshot(config.tables, name, versions)
        report.table_read(name, snapshots[name].version)
    begun.write(run_dir, "train", run_id, settings, snapshots)
    histories, requests, embeddings = snapshots["histories"], snapshots["requests"], snapshots.get(embeddings_name)
    width = None
    if config.encoder.own is not None:  # of a soft prompt, too
        width = width_of(embeddings or tables.snapshot(config.tables, tables.embeddings_name(encoder), {}))

    session.start(
        need={"CPU": config.workers + 2.0, "GPU": config.workers * config.gpus_per_worker},
        writes={"tables": config.tables, "run_dir": run_dir},
        reads={"encoder.model": config.encoder.model, "llm.model": config.llm.model},
    )
    samples = Storage(run_dir).join("samples", run_id).uri  # another run's samples may lie in the same run_dir
    with report.stage("prepare") as stage:
        counts, shards, tokens = prepare(config, histories, embeddings, requests, task, samples, answers, shown)
        stage.rows = counts["samples"]
    report.planned = counts["samples"]
    report.extra["samples"] = counts
    check(config, counts, answers, tokens)
    with report.stage("fit") as stage:
        made_for = (task.item_template(config.encoder.with_label), encoder)
        facts = _fit(config, run_id, run_dir, (samples, shards), identities, made_for, target, width, (answers, tokens))
        per_epoch = min(counts["samples"], config.fit.max_samples or counts["samples"])
        stage.rows = round(per_epoch * facts.pop("epochs"))
    report.written = counts["samples"]
    report.extra |= facts
    code = report.finish()
    print(f"plug {facts['plug_id']} (validation loss {facts['best_val_loss']:.4f}): {facts['plug']}", flush=True)
    return code


def _task(config: Config, histories: Any) -> TaskSpec:
    """The task that is learned. Raises InputError: its targets are no answers."""
    task = tables.task_entry(config.task, histories)
    if task.metric == "rubric":
        raise InputError(
            f"task {task.name}: its targets are rubrics for a judge, and no answers to learn; train on another task"
        )
    return task


def _models(config: Config, task: TaskSpec) -> tuple[str, str]:
    """Identities of encoder and LLM, whose folders are looked at before anything starts."""
    try:
        if config.encoder.own is None:
            query_limit(read_folder(config.encoder), config.encoder, config.shape.query_max_tokens)
        refuse_untrainable(model_folder(config.llm.model, config.llm.revision, weights=False))
        return encoder_id(config.encoder, task.item_template(config.encoder.with_label)), llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"encoder or llm: {error}") from error


# What may change from one start of a run to the next: it decides where and how fast, not what comes out.
_FREE = {"run_id", "run_dir", "plug", "workers", "gpus_per_worker", "threads", "checkpoint_steps", "checkpoint_minutes",
         "max_failures", "max_reject_fraction", "track"}  # fmt: skip


def decisive(config: Config, identities: dict[str, str | None]) -> dict[str, Any]:
    """All that decides what comes out of a run, beside the tables' versions and the task's entry."""
    settings = config.decisive(exclude=_FREE)
    settings["fit"] = config.fit.decisive()
    if config.retrieve == "none":
        del settings["retrieval"]
    del settings["encoder"]["batch_tokens"], settings["llm"]["parallel"]
    if config.users is not None:  # the ids in the file count, not its name
        settings["users"] = short_id({"users": sorted(read_users(config.users) or ())})
    return settings | identities


def _fit(
    config: Config,
    run_id: str,
    run_dir: str,
    samples: "tuple[str, list[Shard]]",
    identities: dict[str, str | None],
    made_for: tuple[str, str],
    target: str,
    width: int | None,
    answers: tuple[LabelSet | AnswerTokens | None, list[int]],
) -> dict[str, Any]:
    """Runs Ray Train and copies the best plug to its folder."""
    storage = Storage(run_dir).join("train")
    given = {
        "config": config.model_dump(),
        "samples": samples,
        "identities": identities,
        "made_for": made_for,
        "width": width,
        "answers": answers,
        "cpu": CpuShare(config.workers, config.threads),
        "left": left_without_record(storage, run_id),
        "run_dir": run_dir,
        "run_id": run_id,
    }
    before = training.steps_before(storage, run_id)
    result = run_training(
        fit_worker,
        given,
        run_id=run_id,
        run_dir=run_dir,
        workers=config.workers,
        gpus_per_worker=config.gpus_per_worker,
        max_failures=config.max_failures,
        checkpoints_kept=2,  # each holds the best plug so far beside the newest
    )
    assert result.checkpoint is not None, "the last step always reports a checkpoint"
    with result.checkpoint.as_directory() as folder:
        with whole_output(target, PLUG_FILES) as draft:
            shutil.copytree(Path(folder) / "best", draft, dirs_exist_ok=True)
            identity = plug_id(draft)
        history = json.loads((Path(folder) / "history.json").read_text())
        keep_curve(folder, run_dir)
    epochs = training.epochs_taken(history, before)
    best = min((entry for entry in history if "val_loss" in entry), key=lambda entry: entry["val_loss"])
    return {
        "plug": target,
        "plug_id": identity,
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        # before the first validation there is no best loss, and JSON has no word for infinity
        "history": [{name: n for name, n in entry.items() if math.isfinite(n)} for entry in history],
        "epochs": epochs,
        **identities,
    }


# --- what runs in a train worker ---------------------------------------------------------------------------------


def fit_worker(given: dict[str, Any]) -> None:
    """One Ray Train worker: loads, resumes, trains, reports."""
    session.go_back_to(given["started_in"])
    config = Config.model_validate(given["config"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    torch.set_num_threads(given["cpu"].torch_threads())
    device = worker_device()
    parallel = config.llm.parallel
    mesh = Mesh.of(rank, context.get_world_size(), parallel.tensor, device.type, parallel.shard)
    torch.manual_seed(config.fit.seed)
    answers, tokens = given["answers"]
    plug, llm, query_tokenizer = make_models(config, given["identities"], given["width"], answers, tokens, mesh, device)
    with loading("llm"):
        refuse_another(config.llm, given["identities"]["llm_id"])
    with loading("encoder"):
        refuse_another_encoder(config.encoder, *given["made_for"])
    plug.to(device)
    with temporary.folder("train") as local:
        train, validation = make_samples(config, given["samples"], local, plug, llm, query_tokenizer)
        if plug.center is not None:
            plug.center.learn(vectors_by_user(train))
        pad_id = query_tokenizer.pad_token_id or 0 if query_tokenizer is not None else 0
        if config.fit.start_epochs and ray.train.get_checkpoint() is None:
            train, validation = start(config, plug, llm, train, validation, pad_id, rank)
        train, validation = read_by_llm(config, train, validation)
        if rank == 0:
            say_cuts(config, train, validation)
        fitter = Fitter(plug, llm, config.fit, train, validation, mesh=mesh, pad_id=pad_id)

        def read(folder: str) -> Callable[[], None]:
            if os.path.exists(f"{folder}/best"):
                load_file(f"{folder}/best/model.safetensors")
            state = load_file(f"{folder}/plug/model.safetensors")
            return lambda: plug.load_state_dict(state)

        # taken here, as the driver's machine may be too small for the LLM's weights
        sample = llm_sample(config.llm) if rank == 0 else ""

        def write(folder: str, is_best: bool) -> None:
            plug.save_pretrained(f"{folder}/plug", query_tokenizer)
            if is_best:
                shutil.copytree(f"{folder}/plug", f"{folder}/best", dirs_exist_ok=True)
            write_sample(folder, sample)

        checkpoints = Checkpoints("train", local, fitter, read, write)
        checkpoints.load(given["left"])
        fitter.encode_queries()  # by the encoder that the start has trained, which a checkpoint brings with it
        training.train(
            checkpoints,
            rank=rank,
            orders=Orders(given["ending"], config.checkpoint_minutes),
            checkpoint_steps=config.checkpoint_steps,
            patience=config.fit.patience,
            run_dir=given["run_dir"],
            tracked=tracker(config.track, given["run_id"], given["config"]),
        )


def say_cuts(config: Config, *parts: "Samples") -> None:
    """Prints how many inputs were cut and how many answers may have been, where there are any."""
    inputs = sum(prompt.cut for part in parts for prompt in part.prompts)
    limit = config.fit.max_target_tokens
    answers = sum(len(target) >= limit for part in parts for target in part.targets)
    if inputs or answers:
        print(
            f"train: of {sum(map(len, parts)):,} samples {inputs:,} inputs were cut at their end (llm.layout."
            f"max_input_tokens={config.llm.layout.max_input_tokens}, or beside items retrieval.input_share), and "
            f"{answers:,} answers reach fit.max_target_tokens={limit}, where a longer one is cut",
            flush=True,
        )


def write_sample(folder: str, sample: str) -> None:
    """Puts the LLM's sample beside the plugs of a checkpoint; the best may be from a release that did not."""
    for name in ("plug", "best"):
        if os.path.isdir(f"{folder}/{name}"):
            Path(folder, name, SAMPLE_FILE).write_text(sample, encoding="utf-8")


def start(
    config: Config, plug: Any, llm: Any, train: Samples, validation: Samples, pad_id: int, rank: int
) -> tuple[Samples, Samples]:
    """Has the plug learn to name the answers, before the LLM reads any sample.

    Returns:
        The samples, with the vectors of their queries where no part of the training changes these.
    """
    dtype = best_dtype(config.fit.precision, next(plug.parameters()).device)
    held = encode_queries(plug, validation, pad_id, dtype)
    beginning = Start(plug, llm, config.fit, pad_id)
    before = beginning.named(held)
    trains_queries = config.fit.start_query_learning_rate > 0
    own = train if trains_queries else encode_queries(plug, train, pad_id, dtype)
    beginning.learn(own)
    if trains_queries:
        held = encode_queries(plug, validation, pad_id, dtype)
    after = beginning.named(held)  # by all workers: those that hold one LLM together look up embeddings together
    if rank == 0:
        print(
            f"train: start: without the LLM, the plug names {after:.4f} of the held-out answers, {before:.4f} before",
            flush=True,
        )
    still = not trains_queries and config.fit.query_learning_rate == 0
    return (own, held) if still else (train, validation)


def read_by_llm(config: Config, train: Samples, validation: Samples) -> tuple[Samples, Samples]:
    """The samples that the LLM reads: all, or as many as `fit.max_samples` says."""
    most, seed = config.fit.max_samples, config.fit.seed
    share = 1.0 if most is None else most / (len(train) + len(validation))
    if share >= 1:
        return train, validation
    return train.take(drawn(len(train), share, seed)), validation.take(drawn(len(validation), share, seed))


def make_models(
    config: Config,
    identities: dict[str, Any],
    width: int | None = None,
    known: LabelSet | AnswerTokens | None = None,
    tokens: Sequence[int] = (),
    mesh: Mesh | None = None,
    device: torch.device | None = None,
) -> tuple[Any, Any, Any]:
    """A new plug (with its query encoder), the frozen LLM, and the tokenizer of queries.

    Args:
        width: D of vectors that have no encoder; the plug then has no query encoder, and there is no tokenizer.
        known: how the plug reads the items' answers; None for one that reads none.
        tokens: ids of those that answers are spelt with, ascending.
        mesh: this worker's place among those of the training.
        device: of the LLM, and later of the plug.

    Raises:
        InputError: LLM or encoder cannot be loaded (`loading`).
    """
    with loading("llm"):
        llm = FrozenLLM.load(config.llm, mesh, device)
    shape = config.shape
    encoder, tokenizer, queries = _queries(config, width, device)
    attention = shape.aggregation == "attention" and not shape.without_history
    limit = config.llm.layout.max_input_tokens
    beyond: dict[str, Any] = {}  # a soft prompt has no items, so that no part for them could learn
    if not shape.without_history:
        beyond = {"recency": shape.recency, "center": shape.center, "token_attention": shape.token_attention}
        beyond["max_history_items"] = config.max_history_items
    if isinstance(known, LabelSet):
        beyond |= {"labels": known.labels, "label_field": known.field, "label_guess": shape.label_guess}
    elif known is not None:
        beyond |= {"answer_field": known.field, "answer_vocabulary": len(tokens)}
    plug = PersonaPlug(
        PlugConfig(
            llm_dim=llm.dim,
            persona_tokens=shape.persona_tokens,
            aggregation=shape.aggregation,
            temperature=shape.temperature,
            persona_scale=shape.persona_scale or llm.embedding_norm,
            instruction_scale=shape.instruction_scale or llm.embedding_norm,
            **queries,
            trained_without_history=shape.without_history,
            retrieve=None if config.retrieve == "none" else config.retrieval.named(config.retrieve, limit),
            request_value=shape.request_value,
            hidden=shape.hidden,
            **beyond,
            **identities,
        ),
        query_encoder=encoder if attention or shape.request_value else None,
    )
    if isinstance(known, LabelSet):
        spelt = label_tokens(llm, known.labels, shape.persona_tokens)
        plug.set_label_vectors(label_vectors(llm, known.labels).cpu(), spelt)
    elif known is not None:
        plug.set_answers(known.words, tokens, token_vectors(llm, tokens))
    # eval: the encoder's own dropout would make a step depend on how a batch is split over workers
    return plug.eval(), llm, tokenizer


def _queries(config: Config, width: int | None, device: torch.device | None) -> tuple[Any, Any, dict[str, Any]]:
    """The plug's query encoder, its tokenizer, and the keys of the plug's config; no encoder beside a `width`."""
    shape = config.shape
    if width is None:
        with loading("encoder"):
            return query_encoder(config.encoder, shape.query_prefix, shape.query_max_tokens, device)
    limit = shape.query_max_tokens or config.encoder.max_tokens
    return None, None, {"encoder_dim": width, "query_prefix": shape.query_prefix or "", "query_max_tokens": limit}


def make_samples(
    config: Config, samples: "tuple[str, list[Shard]]", local: str, plug: Any, llm: Any, tokenizer: Any
) -> tuple["Samples", "Samples"]:
    """Train and validation samples, tokenised; validation users never train.

    Args:
        samples: the folder that PrepareSamples wrote to, and the files it wrote.
    """
    words = TextTokenizer(tokenizer) if tokenizer is not None else None
    folder, files = samples
    table, shards, facts = load_samples(folder, files, local)
    fit, by_request = config.fit, plug.config.aggregation == "attention"
    out = np.array([held_out(owner, fit.val_fraction, fit.seed) for owner in table["owner_id"].to_pylist()])

    def tokenised(rows: "pa.Table") -> "Samples":
        queries = [plug.config.query_prefix + text for text in rows["query"].to_pylist()]
        prompts = llm.prompt_builder.prompts(rows["input"].to_pylist(), rows["prefix"].to_pylist())
        cut = rows["cut"].to_pylist()  # beside items, before the prompt was made
        return Samples(
            prompts=[replace(one, cut=one.cut or was) for one, was in zip(prompts, cut, strict=True)],
            targets=llm.prompt_builder.targets(rows["target"].to_pylist(), fit.max_target_tokens),
            queries=words.framed(queries, plug.config.query_max_tokens) if words else [[] for _ in queries],
            owners=rows["owner_id"].to_pylist(),
            spans=np.stack([rows[name].to_numpy() for name in ("shard", "start", "stop")], axis=1),
            shards=shards,
            facts=facts,
            # a persona that depends on the user alone counts ages from the newest item, as `refresh` does
            as_of=rows["as_of"].to_numpy() if by_request else np.full(len(rows), NO_TIME),
        )

    return tokenised(table.filter(pa.array(~out))), tokenised(table.filter(pa.array(out)))
