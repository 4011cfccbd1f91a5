"""Job `lamp`: one task of the LaMP benchmark from download to report, by one command, with the paper's settings.

Fetches train and dev of one separation, then runs the jobs as a user would (each command is printed, its config is
left below the run folder): ingest, refresh and train on train; ingest, refresh, generate and evaluate on dev. A rerun
goes on where it broke off. pipelines/configs/lamp_*.yaml hold the settings of each task.
Unit of work: a job.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.stages.reply import Decoding, EngineConfig
from pplug.encoder import EncoderConfig
from pplug.fit import FitConfig
from pplug.llm import LLMConfig
from pplug.retrieval import RetrievalConfig


class Model(BaseModel):
    """An LLM, how it replies, and the plug's shape for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    llm: LLMConfig
    engine: EngineConfig = EngineConfig()
    decoding: Decoding = Decoding()
    shape: dict[str, Any] = {}
    """Of the plug, as `train` takes it."""


class Config(BaseModel):
    """Which task, models and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: str
    """A LaMP task, such as LaMP_2."""
    models: dict[str, Model]
    """By a name of one's own."""
    use: str
    """Which of the models."""
    encoder: EncoderConfig = EncoderConfig()
    fit: FitConfig = FitConfig()
    methods: tuple[str, ...] = ("none", "bm25", "plug", "plug:no-history", "plug:other-user")
    """As in generate."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Its encoder is the one above."""
    separation: Literal["time", "user"] = "time"
    """How the benchmark splits: the paper's figures are of the time separation."""
    address: str | None = None
    """Of the benchmark's site, where it has moved."""
    download_dir: str = "data/LaMP"
    """Folder that downloads are kept in."""
    workers: int = Field(1, gt=0)
    """GPUs."""
    gpus_per_worker: float = Field(1.0, ge=0)
    """0 on a CPU."""
    run_id: str | None = None
    """Name of the run; default: the task's name and the model's."""
    run_dir: str | None = None
    """Tables, plug and reports lie below; default: runs/<run_id>."""

    @model_validator(mode="after")
    def _the_model_is_there(self) -> Self:
        if self.use not in self.models:
            raise ValueError(f"use={self.use} is none of the models {', '.join(self.models)}")
        return self


def run(config: Config) -> int:
    """Runs the jobs; returns the exit code of the first that fails, else 0."""
    from infra.report import check_run_id
    from pipelines.__main__ import main

    name = check_run_id(config.run_id or f"{config.task}-{config.use}")
    root = Path(config.run_dir or f"runs/{name}")
    (root / "configs").mkdir(parents=True, exist_ok=True)
    for step, (job, values) in steps(config, root, name).items():
        path = root / "configs" / f"{step}.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        print(f"\n$ python -m pipelines {job} --config {path}", flush=True)
        code = main([job, "--config", str(path)])
        if code:
            return code
    print(f"\nlamp done; report: {root / 'evaluate' / 'report.html'}")
    return 0


def steps(config: Config, root: Path, name: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """By step, in order: the job and its config."""
    model = config.models[config.use].model_dump(mode="json")
    given = config.model_dump(mode="json")
    encoder, plug = given["encoder"], str(root / "plug")
    gpus = {"workers": config.workers, "gpus_per_worker": config.gpus_per_worker}
    found: dict[str, tuple[str, dict[str, Any]]] = {}

    def add(step: str, job: str, part: str, **values: Any) -> None:
        own = {"tables": str(root / "tables" / part), "run_id": f"{name}-{step}", "run_dir": str(root / step)}
        found[step] = (job, values | own)

    def ingest(part: str) -> None:
        moved = {"address": config.address} if config.address else {}
        split = f"{config.separation}/{part}"
        add(f"ingest-{part}", "ingest", part, download=config.task, split=split,
            download_dir=config.download_dir, **moved)  # fmt: skip

    ingest("train")
    add("refresh-train", "refresh", "train", encoder=encoder, **gpus)
    add("train", "train", "train", llm=model["llm"], encoder=encoder, fit=given["fit"], shape=model["shape"],
        plug=plug, **gpus)  # fmt: skip
    ingest("dev")
    add("refresh-dev", "refresh", "dev", encoder=encoder, plug=plug, **gpus)
    add("generate", "generate", "dev", llm=model["llm"], engine=model["engine"], decoding=model["decoding"], plug=plug,
        methods=list(config.methods), retrieval=given["retrieval"] | {"encoder": encoder}, **gpus)  # fmt: skip
    add("evaluate", "evaluate", "dev", run=[f"{name}-generate"],
        generate_reports=[str(root / "generate" / "report.json")])  # fmt: skip
    return found
