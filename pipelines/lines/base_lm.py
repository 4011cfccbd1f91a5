"""Job `base-lm`: a histories table -> a tiny decoder-only language model with its tokenizer.

`config.py` says what it does, and holds its keys.
"""

import hashlib
import json
import shutil

import pyarrow as pa
import torch

from infra import artifacts, lease
from infra.cores import cores
from infra.errors import InputError
from infra.progress import Progress
from infra.report import RunReport, new_run_id
from infra.snapshot import Snapshot
from infra.storage import Storage
from infra.table import Table
from pipelines import made_from as origin
from pipelines import tables
from pipelines.cut import ITEM_COLUMNS, REQUEST_COLUMNS, visible_to_all
from pipelines.lines.config import BaseLMConfig as Config
from pipelines.model_folders import check_output
from pipelines.owners import Owners, Persons
from pipelines.run import begin
from pplug.folder import MODEL_FILES
from pplug.identity import short_id
from pplug.tasks import TaskSpec, fill
from pplug.tiny_lm import RECORD_FILE, train_lm
from pplug.tiny_lm import Progress as TrainingProgress


def run(config: Config) -> int:
    """Trains and saves; returns the exit code."""
    run_id = config.run_id or new_run_id("base-lm")
    with lease.reading(config.tables, run_id):
        return _run(config, run_id)


def _run(config: Config, run_id: str) -> int:
    report = begin("base-lm", config, run_id=run_id)
    histories = tables.open_table(config.tables, "histories").snapshot(complete=True)
    report.table_read("histories", histories.version)
    task = tables.task_entry(config.task, histories)
    check_output("output", config.output, MODEL_FILES)
    requests = None
    if config.cut == "requests" and Table.exists(tables.location(config.tables, "requests")):
        requests = tables.snapshot(config.tables, "requests", {})
        report.table_read("requests", requests.version)
    with report.stage("read") as stage:
        texts = _texts(config, histories, requests, task, report)
        stage.rows = len(texts)
    made_from = _made_from(config, texts)
    versions = {"histories": histories.version} | ({"requests": requests.version} if requests else {})
    record = origin.MadeFrom(
        job="base-lm",
        run_id=run_id,
        tables=Storage(config.tables).uri,
        versions=versions,
        examples="items",
        cut="requests" if requests else "none",
        items_cut_off=report.extra["items_cut_off"],
    )
    if _made_as(config.output) == made_from:
        _renew_record(config.output, record)
        report.already_there = len(texts)
        code = report.finish()
        print(f"model: {config.output}, already there")
        return code
    torch.set_num_threads(config.threads or cores())
    with report.stage("train") as stage, Progress(config.lm.steps, "steps") as bar:

        def show(now: TrainingProgress) -> None:
            bar.update(note=f"loss {now.loss:.3f}, on targets {now.target_loss:.3f}")

        trained = train_lm(texts, config.lm, show, config.suffix)
        stage.rows = int(trained.facts["steps"])
    trained.facts["made_from"] = made_from
    records = {origin.FILE: origin.text(record)}
    if artifacts.is_address(config.output):
        with artifacts.published(config.output) as folder:
            trained.save(folder, records)
    else:
        trained.save(config.output, records)
    report.written = len(texts)
    report.extra["lm"] = trained.facts
    loss = trained.facts.get("heldout_loss")
    told = "no item was held out" if loss is None else f"loss on items held out {loss:.3f}"
    print(f"base-lm: {trained.facts['parameters']:,} parameters, {told}")
    code = report.finish()
    print(f"model: {config.output}")
    return code


def _made_as(output: str) -> str | None:
    """Identity of what the model that is there was made from; None where there is none."""
    if artifacts.is_address(output) and not artifacts.exists(output):
        return None
    facts = artifacts.fetch(output, weights=False) / RECORD_FILE
    made_from: str | None = json.loads(facts.read_text()).get("made_from") if facts.exists() else None
    return made_from


def _renew_record(output: str, record: origin.MadeFrom) -> None:
    """Writes into a model that is there what it has been compared with now: by older versions `generate` would warn."""
    was = [
        one.model_copy(update={"run_id": record.run_id}) for one in origin.read(artifacts.fetch(output, weights=False))
    ]
    if was == [record]:
        return
    if artifacts.is_address(output):
        with artifacts.published(output) as folder:
            shutil.copytree(artifacts.fetch(output), folder, dirs_exist_ok=True)
            (folder / origin.FILE).write_text(origin.text(record), encoding="utf-8")
    else:
        (artifacts.fetch(output) / origin.FILE).write_text(origin.text(record), encoding="utf-8")


def _made_from(config: Config, texts: list[tuple[str, str]]) -> str:
    """Identity of all that decides the model: the texts in their order, and how it is trained on them."""
    digest = hashlib.blake2b()
    for pair in texts:
        digest.update(json.dumps(pair).encode())
    settings = {"lm": config.lm.decisive(), "suffix": config.suffix}
    return short_id({"texts": digest.hexdigest(), **settings})


def _texts(
    config: Config, histories: "Snapshot", requests: "Snapshot | None", task: "TaskSpec", report: RunReport
) -> list[tuple[str, str]]:
    """Returns (prompt, target) of each item; items that lack a field of the template are counted and left out.

    Args:
        requests: where given, items that one of them may not see are left out too.
    """
    template = config.prompt or task.input
    if template is None or task.target is None:
        raise InputError(f"task {task.name} does not say how an item becomes a prompt with a target; give --prompt")
    texts: list[tuple[str, str]] = []
    cut_off = open_items = 0
    of_several = Persons() if requests is None else Owners(requests).of_several()
    for bucket in sorted(histories.by_bucket()):
        items = histories.read(["fields", *ITEM_COLUMNS], buckets=[bucket])
        if requests is not None:
            visible = visible_to_all(items, requests.read(REQUEST_COLUMNS, buckets=[bucket]), of_several)
            cut_off += int((~visible).sum())
            items = items.filter(pa.array(visible))
        cells = items["fields"].slice(0, config.max_items - report.planned - open_items)
        report.planned += len(cells)
        for cell in cells.to_pylist():
            fields = dict(cell or [])
            try:
                pair = fill(template, fields, task.name), fill(f"{{{task.target}}}", fields, task.name)
            except ValueError:
                report.reject("missing_field")
                continue
            if pair[1].strip():
                texts.append(pair)
            else:  # an open item is no fault of the table, and teaches nothing
                open_items += 1
                report.planned -= 1
        if report.planned + open_items >= config.max_items:
            break
    report.extra["items"] = {"in_table": histories.rows, "used": len(texts)}
    report.extra["items_cut_off"] = cut_off
    if open_items:
        report.extra["items"]["without_answer"] = open_items
    if cut_off:
        print(f"base-lm: {cut_off} items left out, which a request of their user may not see", flush=True)
    if not texts:
        raise InputError(
            f"{config.tables}: no item has the fields of the prompt {template!r} and of {task.target!r} ({cut_off} "
            "items are cut off by requests; cut=none takes them)"
        )
    return texts
