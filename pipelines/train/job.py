"""Job `train`: histories, embeddings, requests with targets -> a plug.

What it does and its keys stand in `config.py`.
"""

import json
import math
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray.train
import torch
from ray.train.torch import get_device
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from infra import lease, session
from infra.errors import InputError
from infra.progress import Progress
from infra.report import new_run_id
from infra.shards import keys_by_bucket
from infra.storage import Storage
from infra.trainer import run_training
from pipelines import begun, tables
from pipelines.histories import width_of
from pipelines.run import CpuShare, begin
from pipelines.tables import read_users
from pipelines.train.config import Config
from pipelines.train.samples import PrepareSamples, Shard, load_samples
from pipelines.waves import each_bucket
from pplug.encoder import encoder_id, pooling_of
from pplug.fit import Fitter, Samples, held_out, run_epochs
from pplug.folder import check_replaceable, whole_folder
from pplug.identity import model_folder, short_id
from pplug.llm import FrozenLLM, llm_id
from pplug.plain_text import TextTokenizer
from pplug.plug import PLUG_FILES, PersonaPlug, PlugConfig, plug_id


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    run_id = config.run_id or new_run_id("train")
    with lease.reading(config.tables, run_id):
        return _run(config, run_id)


def _run(config: Config, run_id: str) -> int:
    report = begin("train", config, run_id=run_id)
    run_dir = report.run_dir
    histories = tables.snapshot(config.tables, "histories", config.as_of_version)
    task = tables.task_entry(config.task, histories)
    if task.metric == "rubric":
        raise InputError(
            f"task {task.name}: its targets are rubrics for a judge, and no answers to learn; train on another task"
        )
    rule = task.item_template(config.encoder.with_label)
    try:
        encoder, llm = encoder_id(config.encoder, rule), llm_id(config.llm)
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"encoder or llm: {error}") from error
    blind = config.shape.without_history
    identities = {"encoder_id": None if blind else encoder, "llm_id": llm}
    embeddings_name = "" if blind else tables.embeddings_name(encoder)
    target = _target(config, run_dir)
    try:
        check_replaceable(target, PLUG_FILES)
    except ValueError as error:
        raise InputError(f"plug: {error}") from error
    settings = decisive(config, identities)
    versions: dict[Any, int] = {**config.as_of_version}
    known = begun.read(run_dir, "train", run_id, settings)
    versions |= {name.partition("-")[0]: version for name, version in known.items()}
    snapshots = {}
    for name in filter(None, ("histories", embeddings_name, "requests")):
        snapshots[name] = tables.snapshot(config.tables, name, versions)
        report.table_read(name, snapshots[name].version)
    begun.write(run_dir, "train", run_id, settings, snapshots)
    histories, requests, embeddings = snapshots["histories"], snapshots["requests"], snapshots.get(embeddings_name)
    width = None
    if config.encoder.own is not None:  # of a soft prompt, too
        own = embeddings or tables.snapshot(config.tables, tables.embeddings_name(encoder), {})
        width = width_of(own)

    session.start(need={"CPU": config.workers + 2.0, "GPU": config.workers * config.gpus_per_worker})
    session.check_shared(run_dir, "run_dir")
    samples = Storage(run_dir).join("samples", run_id).uri  # another run's samples may lie in the same run_dir
    with report.stage("prepare") as stage:
        counts, shards = _prepare(config, histories, embeddings, requests, task, samples)
        stage.rows = counts["samples"]
    report.planned = counts["samples"]
    report.extra["samples"] = counts
    if not counts["samples"]:
        raise InputError(
            f"{config.tables}: no request with a target whose user is there; ingest requests with targets, or use "
            "--derive-requests to make them from the histories"
        )
    if counts["without_vector"]:
        print(f"train: {counts['without_vector']} items have no vector yet; run `refresh` to use them", flush=True)
    with report.stage("fit") as stage:
        facts = _fit(config, run_id, run_dir, (samples, shards), identities, target, width)
        stage.rows = counts["samples"] * config.fit.epochs
    report.written = counts["samples"]
    report.extra |= facts
    code = report.finish()
    print(f"plug {facts['plug_id']} (validation loss {facts['best_val_loss']:.4f}): {facts['plug']}", flush=True)
    return code


# What may change from one start of a run to the next: it decides where and how fast, not what comes out.
_FREE = {"run_id", "run_dir", "plug", "workers", "gpus_per_worker", "threads", "checkpoint_steps", "max_failures",
         "max_reject_fraction"}  # fmt: skip


def decisive(config: Config, identities: dict[str, str | None]) -> dict[str, Any]:
    """All that decides what comes out of a run, beside the tables' versions."""
    settings = config.decisive(exclude=_FREE)
    del settings["fit"]["micro_tokens"], settings["encoder"]["batch_tokens"]  # by the names in the record
    if config.users is not None:  # the ids in the file count, not its name
        settings["users"] = short_id({"users": sorted(read_users(config.users) or ())})
    return settings | identities


def _target(config: Config, run_dir: str) -> Path:
    """Folder the plug is written to."""
    return Path(config.plug or os.path.join(tempfile.mkdtemp() if Storage(run_dir).is_s3 else run_dir, "plug"))


def _prepare(
    config: Config, histories: Any, embeddings: Any, requests: Any, task: Any, folder: str
) -> tuple[dict[str, int], "list[Shard]"]:
    """Counts over all buckets, and the files that hold samples."""
    asked = tables.read_users(config.users, requests)
    users = keys_by_bucket(asked, tables.open_table(config.tables, "requests").buckets)
    stage = PrepareSamples(histories, embeddings, requests, task, config.max_history_items, folder, users)
    counts = {"samples": 0, "without_history": 0, "without_vector": 0}
    shards = []
    for row in each_bucket(requests.filled(users), stage):
        for name in counts:
            counts[name] += row[name]
        if row["samples"]:
            shards.append(Shard(row["bucket"], row["samples"], row["vectors"]))
    return counts, sorted(shards)


def _fit(
    config: Config,
    run_id: str,
    run_dir: str,
    samples: "tuple[str, list[Shard]]",
    identities: dict[str, str | None],
    target: Path,
    width: int | None,
) -> dict[str, Any]:
    """Runs Ray Train and copies the best plug to its folder."""
    storage = Storage(run_dir).join("train")
    given = {
        "config": config.model_dump(),
        "samples": samples,
        "identities": identities,
        "width": width,
        "cpu": CpuShare(config.workers, config.threads),
        "left": _left_without_record(storage, run_id),
    }
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
        with whole_folder(target, PLUG_FILES) as draft:
            shutil.copytree(Path(folder) / "best", draft, dirs_exist_ok=True)
        history = json.loads((Path(folder) / "history.json").read_text())
    best = min((entry for entry in history if "val_loss" in entry), key=lambda entry: entry["val_loss"])
    return {
        "plug": str(target),
        "plug_id": plug_id(target),
        "best_val_loss": best["val_loss"],
        "best_step": best["step"],
        "history": history,
        **identities,
    }


def _left_without_record(storage: "Storage", run_id: str) -> list[str]:
    """Checkpoint folders, newest first, of a run whose record of them a kill has cut; the cut record goes.

    Ray Train writes its record in place, so that a kill in that instant leaves an empty one, and refuses it ever after.
    """
    name = f"{run_id}/checkpoint_manager_snapshot.json"
    if storage.is_s3 or not storage.exists(name):  # S3 shows an object when it is whole
        return []
    try:
        json.loads(storage.read_bytes(name))
        return []
    except ValueError:
        storage.delete(name)
    return sorted(map(str, Path(storage.path, run_id).glob("checkpoint_*")), reverse=True)


# --- what runs in a train worker ---------------------------------------------------------------------------------


def fit_worker(given: dict[str, Any]) -> None:
    """One Ray Train worker: loads, resumes, trains, reports."""
    session.go_back_to(given["started_in"])
    config = Config.model_validate(given["config"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(given["cpu"].torch_threads())
    torch.manual_seed(config.fit.seed)
    plug, llm, query_tokenizer = make_models(config, given["identities"], given["width"])
    plug.to(get_device())
    with tempfile.TemporaryDirectory() as local:
        train, validation = make_samples(config, given["samples"], local, plug, llm, query_tokenizer)
        pad_id = query_tokenizer.pad_token_id or 0 if query_tokenizer is not None else 0
        fitter = Fitter(plug, llm, config.fit, train, validation, rank=rank, world=world, pad_id=pad_id)
        resumed = _Resume(local)
        resumed.load(fitter, given["left"])
        steps = math.ceil(len(train) / config.fit.batch_size) * config.fit.epochs

        def on_step(step: int, total: int, loss: float) -> None:
            if bar is not None:
                bar.update(note=f"loss {loss:.4f}")

        def on_checkpoint(step: int, metrics: dict[str, float], is_best: bool) -> None:
            if rank == 0:
                shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k in ("val_loss", "val_exact"))
                print(f"train: step {step} of {steps}, saved{': ' + shown if shown else ''}", flush=True)
                resumed.save(fitter, query_tokenizer, metrics, is_best)
                ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(resumed.folder))
            else:
                ray.train.report(metrics)

        with Progress(steps, "steps", "train, optimizer", begun=resumed.step) if rank == 0 else nullcontext() as bar:
            run_epochs(fitter, resumed.step, resumed.best, on_step, on_checkpoint, config.checkpoint_steps)
        if resumed.step >= steps:  # the run had ended before; report again, so that the driver finds its checkpoint
            checkpoint = ray.train.Checkpoint.from_directory(resumed.folder) if rank == 0 else None
            ray.train.report({"step": steps, "best_val_loss": resumed.best}, checkpoint=checkpoint)


class _Resume:
    """The checkpoint folder: plug/ (as it is), best/ (the plug that validates best), state.pt, history.json."""

    def __init__(self, local: str) -> None:
        self.folder = os.path.join(local, "checkpoint")
        self.step, self.best = 0, math.inf
        self._history: list[dict[str, float]] = []
        os.makedirs(self.folder)

    def load(self, fitter: Any, left: list[str]) -> None:
        """Resumes from Ray's newest checkpoint; if Ray's record was lost, from the newest complete folder in `left`."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._take(folder, fitter)
            return
        for folder in left:
            try:
                self._take(folder, fitter)
                return
            except Exception as error:  # of whichever part was not written to its end, each has kinds of its own
                print(f"train: {folder} was not saved to its end ({type(error).__name__}), looks before it", flush=True)

    def _take(self, folder: str, fitter: Any) -> None:
        history = json.loads(Path(folder, "history.json").read_text())
        if any("val_loss" in entry for entry in history):
            load_file(f"{folder}/best/model.safetensors")
        plug, state = load_file(f"{folder}/plug/model.safetensors"), torch.load(f"{folder}/state.pt", weights_only=True)
        # everything has been read: only now is anything changed
        shutil.copytree(folder, self.folder, dirs_exist_ok=True)
        self._history, self.step, self.best = history, int(history[-1]["step"]), history[-1]["best_val_loss"]
        fitter.plug.load_state_dict(plug)
        fitter.load_state(state)
        print(f"train: goes on at step {self.step}", flush=True)

    def save(self, fitter: Any, tokenizer: Any, metrics: dict[str, float], is_best: bool) -> None:
        fitter.plug.save_pretrained(f"{self.folder}/plug", tokenizer)
        if is_best:
            shutil.copytree(f"{self.folder}/plug", f"{self.folder}/best", dirs_exist_ok=True)
        torch.save(fitter.state(), f"{self.folder}/state.pt")
        self._history.append(metrics)
        Path(self.folder, "history.json").write_text(json.dumps(self._history))


def make_models(config: Config, identities: dict[str, Any], width: int | None = None) -> tuple[Any, Any, Any]:
    """A new plug (with its query encoder), the frozen LLM, and the tokenizer of queries.

    Args:
        width: D of vectors that have no encoder; the plug then has no query encoder, and there is no tokenizer.
    """
    llm = FrozenLLM.load(config.llm)
    shape, encoder, tokenizer, query_pooling = config.shape, None, None, "cls"
    if width is None:
        folder = model_folder(config.encoder.model, config.encoder.revision)
        # On a CPU the fused attention's backward in bfloat16 is several times slower than plain products for short
        # texts.
        kind = "sdpa" if torch.cuda.is_available() else "eager"
        encoder = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)
        width, query_pooling = encoder.config.hidden_size, pooling_of(folder, config.encoder.pooling)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    attention = shape.aggregation == "attention" and not shape.without_history
    plug = PersonaPlug(
        PlugConfig(
            encoder_dim=width,
            llm_dim=llm.dim,
            persona_tokens=shape.persona_tokens,
            aggregation=shape.aggregation,
            temperature=shape.temperature,
            persona_scale=shape.persona_scale or llm.embedding_norm,
            instruction_scale=shape.instruction_scale or llm.embedding_norm,
            query_pooling=query_pooling,
            query_prefix=shape.query_prefix,
            query_max_tokens=shape.query_max_tokens or config.encoder.max_tokens,
            trained_without_history=shape.without_history,
            **identities,
        ),
        query_encoder=encoder if attention else None,
    )
    # eval: the encoder's own dropout would make a step depend on how a batch is split over workers
    return plug.eval(), llm, tokenizer


def make_samples(
    config: Config, samples: "tuple[str, list[Shard]]", local: str, plug: Any, llm: Any, tokenizer: Any
) -> tuple["Samples", "Samples"]:
    """Train and validation samples, tokenised; validation users never train.

    Args:
        samples: the folder that PrepareSamples wrote to, and the files it wrote.
    """
    words = TextTokenizer(tokenizer) if tokenizer is not None else None
    folder, files = samples
    table, shards = load_samples(folder, files, local)
    fit = config.fit
    out = np.array([held_out(owner, fit.val_fraction, fit.seed) for owner in table["owner_id"].to_pylist()])
    if out.all() or not out.any():
        raise ValueError(
            f"{len(set(table['owner_id'].to_pylist()))} people with targets: {fit.val_fraction:.0%} held out leaves "
            f"{'nobody to train on' if out.all() else 'nobody to choose the checkpoint by'}; give more users or change "
            "fit.val_fraction"
        )

    def tokenised(rows: "pa.Table") -> "Samples":
        queries = [plug.config.query_prefix + text for text in rows["query"].to_pylist()]
        return Samples(
            prompts=llm.prompt_builder.prompts(rows["input"].to_pylist()),
            targets=llm.prompt_builder.targets(rows["target"].to_pylist(), fit.max_target_tokens),
            queries=words.framed(queries, plug.config.query_max_tokens) if words else [[] for _ in queries],
            owners=rows["owner_id"].to_pylist(),
            spans=np.stack([rows[name].to_numpy() for name in ("shard", "start", "stop")], axis=1),
            shards=shards,
        )

    return tokenised(table.filter(pa.array(~out))), tokenised(table.filter(pa.array(out)))
