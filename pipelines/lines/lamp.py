"""Job `lamp`: one data set in LaMP's layout from its files to the report, by one command.

`config.py` says what it does, and holds its keys.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra.errors import InputError
from infra.job_log import LINE_LOG, JobLog
from infra.report import check_run_id
from pipelines.lines.config import BASE_LM, SOFT_PROMPT
from pipelines.lines.config import LampConfig as Config
from pipelines.lines.steps import local_root, run_steps
from pipelines.methods import NO_ADAPTER, Method, parse_all
from pplug.retrieval import ShownItems

TASK_BASE = "task-base"
"""Step that adapts the LLM to the task; the model lies in `base` of its run folder."""


def run(config: Config) -> int:
    """Runs the jobs; returns the exit code of the first that fails, else 0."""
    name = check_run_id(config.run_id or f"{Path(config.task).stem}-{config.use}")
    root = local_root(config.run_dir or f"runs/{name}")
    if JobLog.current is not None:
        JobLog.current.move_to(str(root), LINE_LOG)
    code = run_steps(steps(config, root, name), root)
    if code:
        return code
    print(f"\nlamp done; report: {root / 'evaluate' / 'report.html'}")
    return 0


def steps(config: Config, root: Path, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the job and its config by step, in order."""
    line = _Line(config, root, name)
    model, encoder = line.model, line.given["encoder"]
    llm = model["llm"]
    methods = parse_all(config.methods)
    adapters = [method.name for method in methods if method.part("adapter")]
    trained = any((part := method.part("adapter")) and part.name != NO_ADAPTER for method in methods)
    soft = [method.name for method in methods if (part := method.part("plug")) and part.name == SOFT_PROMPT]
    task_base = model["task_base"] if adapters else None
    if task_base:
        _refuse_plugs_of_another_llm(methods, config.use)
    line.ingest("train", 0)
    if llm["model"] == BASE_LM:
        llm["model"] = str(root / BASE_LM)
        # dev, which is evaluated, has tables of its own: all items of train may be learned
        line.add(BASE_LM, "base-lm", "train", lm=model["lm"], output=llm["model"], cut="none",
                 suffix=llm["layout"]["suffix"])  # fmt: skip
    line.add("refresh-train", "refresh", "train", encoder=encoder, **line.gpus)
    line.train("train")
    line.ingest("dev", 1)
    line.add("refresh-dev", "refresh", "dev", encoder=encoder, plug=str(root / "plug"), **line.gpus)
    if trained and not task_base:
        line.adapt(llm)
    apart = {*soft, *(adapters if task_base else [])}
    line.generate("generate", "plug", [method for method in config.methods if method not in apart], llm)
    if soft:
        line.train("train-soft", without_history=True)
        line.generate("generate-soft", "plug-soft", soft, llm)
    if task_base:
        adapted = llm | {"model": str(root / TASK_BASE / "base")}
        line.add(TASK_BASE, "adapt", "train", stage="base", cut="none", llm=llm, output=adapted["model"],
                 **task_base, **line.gpus)  # fmt: skip
        if trained:
            line.adapt(adapted)
        line.generate("generate-adapters", "plug", adapters, adapted)
    # the methods too: the runs may hold replies of methods that an earlier start asked for
    line.add("evaluate", "evaluate", "dev", run=[f"{name}-{step}" for step in line.runs], methods=list(config.methods),
             generate_reports=[str(root / step / "report.json") for step in line.runs],
             references_from=[str(root / "tables" / "train")])  # fmt: skip
    return line.found


def _refuse_plugs_of_another_llm(methods: Sequence[Method], use: str) -> None:
    """Refuses methods that add a plug to adapters whose LLM has learned the task: the plug is made for another LLM."""
    mixed = [method.name for method in methods if method.part("adapter") and method.part("plug")]
    if mixed:
        raise InputError(
            f"methods {mixed}: models.{use}.task_base makes another LLM for the adapters than the plug is trained for; "
            f"leave these methods out, or set models.{use}.task_base to null"
        )


class _Line:
    """The steps in the making: `found` by name, `runs` those of them that generate."""

    def __init__(self, config: Config, root: Path, name: str) -> None:
        self.config, self.root, self.name = config, root, name
        chosen = config.models[config.use]
        self.given, self.model = config.model_dump(mode="json"), chosen.model_dump(mode="json")
        if chosen.task_base is not None:  # what is not given stays so: a base has other targets by default
            self.model["task_base"]["lora"] = chosen.task_base.lora.model_dump(mode="json", exclude_unset=True)
        self.gpus = {"workers": config.workers, "gpus_per_worker": config.gpus_per_worker}
        self.found: dict[str, tuple[str, dict[str, Any]]] = {}
        self.runs: list[str] = []

    def add(self, step: str, job: str, part: str, **values: Any) -> None:
        run_dir, run_id = self.root / step, check_run_id(f"{self.name}-{step}")  # before hours of other steps
        own = {"tables": str(self.root / "tables" / part), "run_id": run_id, "run_dir": str(run_dir)}
        self.found[step] = (job, values | own)

    def ingest(self, part: str, number: int) -> None:
        config = self.config
        if config.source:
            values: dict[str, Any] = {"source": config.source, "split": part, "task": config.task}
        else:
            values = {"download": config.task, "split": f"{config.separation}/{part}"}
            values |= {"download_dir": config.download_dir} | ({"address": config.address} if config.address else {})
        if config.derive_requests:
            values |= {"questions": "skip", "derive_requests": config.derive_requests[number]}
        if config.limit and config.limit[number]:
            values |= {"limit": config.limit[number]}
        self.add(f"ingest-{part}", "ingest", part, **values)

    def train(self, step: str, **shape: Any) -> None:
        model, given = self.model, self.given
        found: dict[str, Any] = {}
        if given["retrieve"] != "none":
            shown = {name: given["retrieval"][name] for name in ShownItems.model_fields}
            found = {"retrieve": given["retrieve"], "retrieval": shown}
        self.add(step, "train", "train", llm=model["llm"], encoder=given["encoder"], fit=given["fit"],
                 shape=model["shape"] | shape, plug=str(self.root / step.replace("train", "plug")),
                 **found, **self.gpus)  # fmt: skip

    def adapt(self, llm: dict[str, Any]) -> None:
        items = {"max_history_items": self.model["max_adapter_items"]}
        self.add("adapt", "adapt", "dev", llm=llm, lora=self.model["lora"], **items, **self.gpus)

    def generate(self, step: str, plug: str, methods: list[str], llm: dict[str, Any]) -> None:
        model, given = self.model, self.given
        retrieval = given["retrieval"] | {"encoder": given["encoder"]}
        if methods:
            self.runs.append(step)
            self.add(step, "generate", "dev", llm=llm, engine=model["engine"], decoding=model["decoding"],
                     plug=str(self.root / plug), methods=methods, retrieval=retrieval, **self.gpus)  # fmt: skip
