"""Job `base-lm`: a histories table -> a tiny decoder-only language model with its tokenizer.

It is there so that the line can be tried where no model can be downloaded, and that is all it is for: a model of some
million parameters that has read nothing but these items knows its one task and nothing else.
Each item becomes a prompt (the task's input template) and a target; nothing says whose item it is. A rerun that would
train the same model on the same texts finds it there and leaves it.
Unit of work: a history item.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from infra.errors import InputError
from infra.report import RunReport, new_run_id, progress
from pipelines.options import JobConfig
from pplug.tiny_lm import TinyLMConfig

if TYPE_CHECKING:
    from infra.snapshot import Snapshot
    from pplug.tasks import TaskEntry
    from pplug.tiny_lm import Progress


class Config(JobConfig):
    """Which items, and how large a model."""

    output: str
    """Folder the model is written to."""
    prompt: str | None = None
    """Template of the prompt; default: the task's own `input`. May name fields that only these items have."""
    suffix: str = "\n"
    """Between prompt and target; give the same as llm.layout.suffix."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    max_items: int = Field(200_000, gt=0)
    """Items to train on, at most. Those of the first buckets are taken, whole users by chance; the rest is not read."""
    lm: TinyLMConfig = TinyLMConfig()
    threads: int | None = Field(None, gt=0)
    """Torch threads; default: all cores."""
    max_reject_fraction: float = Field(0.1, ge=0, le=1)
    """More rejects than this share of the items end the run with exit code 3."""


def run(config: Config) -> int:
    """Trains and saves; returns the exit code."""
    from infra import lease

    run_id = config.run_id or new_run_id("base-lm")
    with lease.reading(config.tables, run_id):
        return _run(config, run_id)


def _run(config: Config, run_id: str) -> int:
    import os

    import torch

    from pipelines import tables
    from pplug.tiny_lm import RECORD_FILE, train_lm

    report = RunReport(
        "base-lm", run_id, config.model_dump(), config.run_dir or f"runs/{run_id}", config.max_reject_fraction
    )
    histories = tables.open_table(config.tables, "histories").snapshot(complete=True)
    report.table_read("histories", histories.version)
    entry = tables.task_entry(config.task, histories)
    with report.stage("read") as stage:
        texts = _texts(config, histories, entry, report)
        stage.rows = len(texts)
    made_from = _made_from(config, texts)
    record = Path(config.output) / RECORD_FILE
    if record.exists() and json.loads(record.read_text()).get("made_from") == made_from:
        report.already_there = len(texts)
        code = report.finish()
        print(f"model: {config.output}, already there")
        return code
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    with report.stage("train") as stage, progress(config.lm.steps, "base-lm steps") as bar:

        def show(now: "Progress") -> None:
            bar.update()
            if now.step % 100 == 0:
                print(f"base-lm: step {now.step}, loss {now.loss:.3f}, on targets {now.target_loss:.3f}", flush=True)

        trained = train_lm(texts, config.lm, show, config.suffix)
        stage.rows = int(trained.facts["steps"])
    trained.facts["made_from"] = made_from
    trained.save(config.output)
    report.written = len(texts)
    report.extra["lm"] = trained.facts
    print(f"base-lm: {trained.facts['parameters']:,} parameters, held-out loss {trained.facts.get('heldout_loss')}")
    code = report.finish()
    print(f"model: {config.output}")
    return code


def _made_from(config: Config, texts: list[tuple[str, str]]) -> str:
    """Identity of all that decides the model: the texts in their order, and how it is trained on them."""
    from pplug.identity import short_id

    digest = hashlib.blake2b()
    for pair in texts:
        digest.update(json.dumps(pair).encode())
    settings = {"lm": config.lm.model_dump(mode="json"), "suffix": config.suffix}
    return short_id({"texts": digest.hexdigest(), **settings})


def _texts(config: Config, histories: "Snapshot", entry: "TaskEntry", report: RunReport) -> list[tuple[str, str]]:
    """(prompt, target) of each item; items that lack a field of the template are counted and left out."""
    from pplug.tasks import fill

    template = config.prompt or entry.input
    if template is None or entry.target is None:
        raise InputError(f"task {entry.name} does not say how an item becomes a prompt with a target; give --prompt")
    texts: list[tuple[str, str]] = []
    for bucket in sorted(histories.by_bucket()):
        cells = histories.read(["fields"], buckets=[bucket])["fields"].slice(0, config.max_items - report.planned)
        report.planned += len(cells)
        for cell in cells.to_pylist():
            fields = dict(cell or [])
            try:
                texts.append((fill(template, fields, entry.name), fill(f"{{{entry.target}}}", fields, entry.name)))
            except ValueError:
                report.reject("missing_field")
        if report.planned >= config.max_items:
            break
    report.extra["items"] = {"in_table": histories.rows, "used": len(texts)}
    if not texts:
        raise InputError(f"{config.tables}: no item has the fields of the prompt {template!r} and of {entry.target!r}")
    return texts
