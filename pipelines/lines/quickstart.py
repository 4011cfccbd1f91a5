"""Job `quickstart`: a file of one's own -> a report with a plug, by one command.

`config.py` says what it does, and holds its keys.
"""

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from infra import device
from infra.errors import InputError
from infra.job_log import LINE_LOG, JobLog
from infra.report import check_run_id
from pipelines.__main__ import main
from pipelines.engines.base import Decoding
from pipelines.lines import lamp
from pipelines.lines.config import BASE_LM, LampConfig, Model
from pipelines.lines.config import QuickstartConfig as Config
from pipelines.lines.steps import Steps, local_root, run_steps
from pplug import tasks, yaml_text
from pplug.encoder import EncoderConfig
from pplug.fit_config import FitConfig
from pplug.identity import short_id
from pplug.settings import as_words
from pplug.splice import PromptLayout

PARTS = {"train": 0.8, "dev": 0.2}
"""Shares of the users that the plug learns from, and that it is scored on."""
OWN = "own"
"""Name of the config and the task that the first step writes."""
_ASKED = ("columns", "task", "format", "explode", "query", "csv", "time")
"""Keys that the first step hands on."""
SHOWN = 3
"""Number of requests that are printed with their replies."""


def run(config: Config) -> int:
    """Runs the jobs; returns the exit code of the first that fails, else 0."""
    sources = [config.source] if isinstance(config.source, str) else list(config.source)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(sources[0].rstrip("/")).name.split(".")[0]).strip("-") or OWN
    name = check_run_id(config.run_id or f"quickstart-{stem[:40]}")
    root = local_root(config.run_dir or f"runs/{name}")
    root.mkdir(parents=True, exist_ok=True)
    if JobLog.current is not None:
        JobLog.current.move_to(str(root), LINE_LOG)
    own = root / f"{OWN}.yaml"
    there = set(root.iterdir())
    if own.exists():
        print(f"step 1: check\nthe mapping is that of {own}; remove it for another proposal", flush=True)
    elif code := _check(config, sources, own):
        return code
    values = _read(own, sources)
    _refuse_another_mapping(config, own, values)
    try:
        planned = steps(config, root, name, values)
    except InputError:
        # what this start proposed would be held against the next one, which is told to give other options
        for file in {own, root / f"{OWN}-task.yaml", _record(own)} - there:
            file.unlink(missing_ok=True)
        raise
    if forget_former(root, list(planned)):
        print(f"{own} or {OWN}-task.yaml has changed: what was made with them is removed and made anew", flush=True)
    if code := run_steps(planned, root, done=1):
        return code
    print(f"\nquickstart done; report: {root / 'evaluate' / 'report.html'}")
    print(f"mapping and task: {own}, {root / f'{OWN}-task.yaml'}; each job again: the commands above; look at rows:")
    print(f"$ python -m pipelines show replies --tables {shlex.quote(str(root / 'tables' / 'dev'))}", flush=True)
    return 0


def forget_former(root: Path, planned: Sequence[str]) -> bool:
    """Removes what the steps made from another mapping or task; returns whether there was such a thing."""
    files, mark = (root / f"{OWN}.yaml", root / f"{OWN}-task.yaml"), root / f"{OWN}.made-from"
    made_from = short_id({file.name: file.read_text(encoding="utf-8") for file in files if file.exists()})
    before = mark.read_text(encoding="utf-8") if mark.exists() else ""  # empty: a kill or a full disk cut it
    another = bool(before) and before != made_from
    for name in (*planned, "tables", "plug", "plug-soft") if another else ():
        shutil.rmtree(root / name, ignore_errors=True)
    if before != made_from:
        mark.write_text(made_from, encoding="utf-8")
    return another


def _refuse_another_mapping(config: Config, own: Path, known: Mapping[str, Any]) -> None:
    """Refuses a mapping or a task that the earlier start did not have: nothing would heed it. The file itself may have
    been mended since; where the record of that start is missing, columns and task are compared with the file."""
    record = _record(own)
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else dict(known)
    other: list[str] = []
    for key in _ASKED if record.exists() else ("columns", "task"):
        given, there = getattr(config, key), before.get(key) or {}
        if isinstance(given, dict):
            # the file leaves out columns that keep their names; the record has all that was given
            default = {name: name for name in given} if key == "columns" and not record.exists() else {}
            different = [name for name, value in given.items() if (default | there).get(name) != value]
            other += different if key == "columns" else [f"{key}.{name}" for name in different]
        elif given and given != there:
            other.append(key)
    if other:
        raise InputError(
            f"{', '.join(other)}: {own} is from an earlier start without it, and is what counts; change the file and "
            f"leave the option out, or remove it and {own.with_name(f'{OWN}-task.yaml')} for a new proposal, or give "
            "another --run-id"
        )


def _record(own: Path) -> Path:
    """The file with what the start that made the mapping was given."""
    return own.with_name(f"{OWN}.asked.json")


def _check(config: Config, sources: list[str], own: Path) -> int:
    words = ["ingest", *(word for source in sources for word in ("--check", source)), "--write-config", str(own)]
    words += ["--set", f"parts={json.dumps(PARTS)}", "--part", "train"]  # a part without a user is refused here
    for key in _ASKED:
        if value := getattr(config, key):
            words += as_words(key, value)
    print(f"step 1: check\n$ python -m pipelines {shlex.join(words)}", flush=True)
    code = main(words)
    if not code:
        values = yaml_text.load(own.read_text(encoding="utf-8"))
        kept = {key: value for key, value in values.items() if key not in ("parts", "part")}  # each step gives its own
        text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
        own.write_text(text, encoding="utf-8")
        _record(own).write_text(config.model_dump_json(include=set(_ASKED)), encoding="utf-8")
    return code


def _read(own: Path, sources: list[str]) -> dict[str, Any]:
    """The config that the first step wrote, which the user may have mended.

    Raises:
        InputError: it cannot be read, or it is of other sources.
    """
    try:
        values: dict[str, Any] = dict(yaml_text.load(own.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(
            f"{own}: not a mapping in YAML ({error}): mend it, or remove it for another proposal"
        ) from error
    given = values.get("source")
    if ([given] if isinstance(given, str) else list(given or ())) != sources:
        raise InputError(f"{own} is of {given}, not of {', '.join(sources)}: give another --run-id, or remove {own}")
    return values


def steps(config: Config, root: Path, name: str, own: dict[str, Any]) -> Steps:
    """Returns the job and its config by step, in order, after the first.

    Args:
        own: config of `ingest` with the mapping and the task.
    """
    try:
        task = tasks.find(str(own["task"]))
    except (KeyError, ValueError) as error:
        raise InputError(f"{root / f'{OWN}.yaml'}: task: {error}") from error
    if task.input is None or task.target is None:
        raise InputError(
            f"task {task.name} has no answer to ask for, so that nothing can be scored: name the column with the "
            "answers, as in --columns target=COLUMN, or give a task by --task"
        )
    tiny = config.llm.model == BASE_LM
    llm = config.llm
    if tiny and llm.layout == PromptLayout():
        llm = llm.model_copy(update={"layout": PromptLayout(max_input_tokens=120)})
    model = Model(
        llm=llm,
        lm=config.lm,
        engine=config.engine,
        decoding=Decoding(max_tokens=task.max_output_tokens),
        shape={"persona_tokens": 4, "temperature": 0.2} if tiny else {},
    )
    line = LampConfig(
        task=str(own["task"]),
        models={"own": model},
        use="own",
        # small settings for a small model; the defaults are the paper's
        encoder=EncoderConfig(max_tokens=64) if tiny else EncoderConfig(),
        fit=FitConfig(epochs=3, learning_rate=3e-3, query_learning_rate=0, item_dropout=0.3) if tiny else FitConfig(),
        methods=config.methods,
        source="-",
        gpus_per_worker=_gpus(config),
    )
    planned = dict(lamp.steps(line, root, name))
    limit = {} if config.limit is None else {"limit": config.limit}
    for part, share in PARTS.items():
        job, values = planned[f"ingest-{part}"]
        kept = {key: values[key] for key in ("tables", "run_id", "run_dir")}
        few = {key: max(1, round(number * share)) for key, number in limit.items()}
        planned[f"ingest-{part}"] = job, own | kept | few | {"parts": PARTS, "part": part}
    if "generate" in planned:
        planned["generate"][1]["show"] = SHOWN
    return planned


def _gpus(config: Config) -> float:
    """GPUs of each job's worker."""
    if config.gpus_per_worker != "auto":
        return config.gpus_per_worker
    return 1.0 if device.assigned().type == "cuda" else 0.0
