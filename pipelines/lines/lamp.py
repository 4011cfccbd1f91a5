"""Job `lamp`: one data set in LaMP's layout from its files to the report, by one command.

`config.py` says what it does, and holds its keys.
"""

from pathlib import Path
from typing import Any

from infra.job_log import LINE_LOG, JobLog
from infra.report import check_run_id
from pipelines.lines.config import BASE_LM, SOFT_PROMPT
from pipelines.lines.config import LampConfig as Config
from pipelines.lines.steps import run_steps
from pipelines.methods import parse_all


def run(config: Config) -> int:
    """Runs the jobs; returns the exit code of the first that fails, else 0."""
    name = check_run_id(config.run_id or f"{Path(config.task).stem}-{config.use}")
    root = Path(config.run_dir or f"runs/{name}")
    if JobLog.current is not None:
        JobLog.current.move_to(str(root), LINE_LOG)
    code = run_steps(steps(config, root, name), root)
    if code:
        return code
    print(f"\nlamp done; report: {root / 'evaluate' / 'report.html'}")
    return 0


def steps(config: Config, root: Path, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Returns the job and its config by step, in order."""
    model = config.models[config.use].model_dump(mode="json")
    given = config.model_dump(mode="json")
    encoder, methods = given["encoder"], parse_all(config.methods)
    gpus = {"workers": config.workers, "gpus_per_worker": config.gpus_per_worker}
    base_lm = model["llm"]["model"] == BASE_LM
    if base_lm:
        model["llm"]["model"] = str(root / BASE_LM)
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(step: str, job: str, part: str, **values: Any) -> None:
        own = {"tables": str(root / "tables" / part), "run_id": f"{name}-{step}", "run_dir": str(root / step)}
        found[step] = (job, values | own)

    def ingest(part: str, number: int) -> None:
        if config.source:
            values: dict[str, Any] = {"source": config.source, "split": part, "task": config.task}
        else:
            values = {"download": config.task, "split": f"{config.separation}/{part}"}
            values |= {"download_dir": config.download_dir} | ({"address": config.address} if config.address else {})
        if config.derive_requests:
            values |= {"questions": "skip", "derive_requests": config.derive_requests[number]}
        add(f"ingest-{part}", "ingest", part, **values)

    def train(step: str, **shape: Any) -> None:
        add(step, "train", "train", llm=model["llm"], encoder=encoder, fit=given["fit"], shape=model["shape"] | shape,
            plug=str(root / step.replace("train", "plug")), **gpus)  # fmt: skip

    def generate(step: str, plug: str, names: list[str]) -> None:
        add(step, "generate", "dev", llm=model["llm"], engine=model["engine"], decoding=model["decoding"],
            plug=str(root / plug), methods=names, retrieval=given["retrieval"] | {"encoder": encoder},
            **gpus)  # fmt: skip

    ingest("train", 0)
    if base_lm:
        # dev, which is evaluated, has tables of its own: all items of train may be learned
        add(BASE_LM, "base-lm", "train", lm=model["lm"], output=str(root / BASE_LM), cut="none")
    add("refresh-train", "refresh", "train", encoder=encoder, **gpus)
    train("train")
    ingest("dev", 1)
    add("refresh-dev", "refresh", "dev", encoder=encoder, plug=str(root / "plug"), **gpus)
    if any(method.part("adapter") for method in methods):
        add("adapt", "adapt", "dev", llm=model["llm"], lora=model["lora"], **gpus)
    generate("generate", "plug", [name for name in config.methods if name != SOFT_PROMPT])
    runs = ["generate"]
    if SOFT_PROMPT in config.methods:
        train("train-soft", without_history=True)
        generate("generate-soft", "plug-soft", [SOFT_PROMPT])
        runs.append("generate-soft")
    add("evaluate", "evaluate", "dev", run=[f"{name}-{step}" for step in runs],
        generate_reports=[str(root / step / "report.json") for step in runs],
        references_from=[str(root / "tables" / "train")])  # fmt: skip
    return found
