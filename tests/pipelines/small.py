"""A small world with tiny real models, for tests that run whole jobs: made once, ingested, told to jobs by configs."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import BaseModel

from infra.errors import InputError
from pipelines import tables
from pipelines.__main__ import JOBS
from pipelines.ingest import job as ingest
from pplug import world
from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from pplug.plug import PersonaPlug, PlugConfig
from pplug.tasks import load
from tests.pplug.models import tiny_bert, tiny_llama

LOG = "_delta_log"


@dataclass(frozen=True)
class Small:
    """A folder with the world's files, an encoder and an LLM; `tables` holds what has been ingested."""

    root: Path
    files: dict[str, Path]
    encoder: EncoderConfig
    llm: LLMConfig

    @property
    def tables(self) -> str:
        return str(self.root / "tables")

    @property
    def common(self) -> dict[str, Any]:
        """What refresh and train share."""
        return {"tables": self.tables, "encoder": self.encoder}

    def config(self, job: ModuleType, run_id: str, **values: Any) -> BaseModel:
        return job.Config(run_id=run_id, run_dir=str(self.root / "runs" / run_id), **values)

    def run(self, job: ModuleType, run_id: str, **values: Any) -> int:
        """Runs a job here, in the tests' own Ray."""
        return job.run(self.config(job, run_id, **values))

    def words(self, job: ModuleType, run_id: str, **values: Any) -> list[str]:
        """The command line of the same run, its config in a file."""
        path = self.root / f"{run_id}.yaml"
        path.write_text(yaml.safe_dump(self.config(job, run_id, **values).model_dump(mode="json")))
        (name,) = [name for name, known in JOBS.items() if known.module == job.__name__]
        return ["-m", "pipelines", name, "--config", str(path)]

    def report(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.root / "runs" / run_id / "report.json").read_text())

    def ingest(self, split: str, run_id: str = "ingest", **values: Any) -> None:
        source = {"source": str(self.files[f"{split}/histories"])}
        source["requests_source"] = str(self.files[f"{split}/requests"])
        assert self.run(ingest, run_id, tables=self.tables, task=str(self.files["task"]), **source | values) == 0

    def untrained_plug(self) -> str:
        """A plug for this encoder and LLM as it is before training, where what it says does not matter; its folder."""
        import torch

        llm, folder = FrozenLLM.load(self.llm), self.root / "plug"
        torch.manual_seed(0)
        made_for = {
            "encoder_id": encoder_id(self.encoder, load(str(self.files["task"])).item),
            "llm_id": llm_id(self.llm),
        }
        scales = dict.fromkeys(("persona_scale", "instruction_scale"), llm.embedding_norm)
        PersonaPlug(
            PlugConfig(encoder_dim=16, llm_dim=llm.dim, aggregation="mean", **scales, **made_for)
        ).save_pretrained(folder)
        return str(folder)


def make(root: Path, *, width: int = 64, **sizes: Any) -> Small:
    """A world of these sizes (see world.WorldConfig), written below `root` with its models."""
    config = world.WorldConfig(**{"corpus_users": 0, "items": (3, 9)} | sizes)
    encoder = EncoderConfig(model=str(tiny_bert(root / "encoder", dim=16)), dtype="float32", max_tokens=64)
    llm = LLMConfig(model=str(tiny_llama(root / "llm", width=width)))
    return Small(root, world.write(config, root / "world"), encoder, llm)


def rows(place: str, name: str) -> list[dict[str, Any]]:
    """All rows of the newest complete version."""
    return tables.open_table(place, name).snapshot(complete=True).read().to_pylist()


def names(place: str, start: str) -> str:
    """The one table whose name starts so: embeddings carry their encoder's id."""
    (found,) = [path.name for path in Path(place).iterdir() if path.name.startswith(start)]
    return found


def commits(place: str, start: str) -> int:
    """Commits after the creation of the first table whose name starts so, by its log alone: quick enough to poll."""
    for folder in Path(place).glob(f"{start}*"):
        return max(0, len(list((folder / LOG).glob("*.json"))) - 1)
    return 0


def is_complete(place: str, name: str) -> bool:
    """Whether a run has ended on this table."""
    try:
        return bool(tables.open_table(place, name).snapshot(complete=True))
    except InputError:
        return False
