"""Job `lamp`: one data set in LaMP's layout from its files to the report, by one command.

Fetches train and dev of one separation of the benchmark (or reads a folder of one's own), then runs the jobs as a user
would (each command is printed, its config is left below the run folder): ingest, refresh and train on train; ingest,
refresh, generate and evaluate on dev; `base-lm` and `adapt` where they are asked for. A rerun goes on where it broke
off. pipelines/configs/lamp_*.yaml hold the paper's settings of each task, tiny_*.yaml those for a machine of two cores
without a model hub.
Unit of work: a job.

[1] "LLMs + Persona-Plug = Personalized LLMs", arXiv:2409.11901.
"""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipelines.methods import parse_all
from pipelines.stages.reply import Decoding, EngineConfig
from pplug.adapter import LoraConfig
from pplug.encoder import EncoderConfig
from pplug.fit import FitConfig
from pplug.llm import LLMConfig
from pplug.retrieval import RetrievalConfig
from pplug.tiny_lm import TinyLMConfig

SOFT_PROMPT = "plug:soft-prompt"
BASE_LM = "base-lm"
"""Given as llm.model: the tiny LM that is trained first."""


class Model(BaseModel):
    """An LLM, how it replies, and the plug's shape for it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    llm: LLMConfig
    """Its model may be `base-lm`: a tiny one that is trained first, on the train users' items."""
    lm: TinyLMConfig = TinyLMConfig()
    """How that one is trained."""
    engine: EngineConfig = EngineConfig()
    decoding: Decoding = Decoding()
    shape: dict[str, Any] = {}
    """Of the plug, as `train` takes it."""
    lora: LoraConfig = LoraConfig()
    """Of the dev users' adapters, trained where a method has them."""


class Config(BaseModel):
    """Which task, models and settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: str
    """A LaMP task, such as LaMP_2, or the YAML file of one's own."""
    models: dict[str, Model]
    """By a name of one's own."""
    use: str
    """Which of the models."""
    encoder: EncoderConfig = EncoderConfig()
    fit: FitConfig = FitConfig()
    methods: tuple[str, ...] = ("none", "bm25", "plug", "plug:no-history", "plug:other-user")
    """As in generate. plug:soft-prompt trains a second plug, without histories."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Its encoder is the one above."""
    source: str | None = None
    """Folder in LaMP's layout with the splits train and dev; default: the benchmark's files are downloaded."""
    derive_requests: tuple[int, int] | None = None
    """Newest items of each train and each dev user that become requests; default: the published questions are used."""
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

    name = check_run_id(config.run_id or f"{Path(config.task).stem}-{config.use}")
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
    if any(method.adapter for method in methods):
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
