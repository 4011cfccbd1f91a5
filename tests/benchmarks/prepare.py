"""What the benchmarks run on: real histories where they are at hand, else the embedded world; models of random weights.

Made once below the benchmarks' folder and found again. Values of weights and vectors decide no speed; lengths do, and
these are real: texts, tokenizers trained on them, MiniLM's own vectors.
"""

import gzip
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import LLMConfig, llm_id
from pplug.splice import PromptLayout
from pplug.tasks import TaskSpec
from tests.benchmarks.measure import Given

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "uboot_subsystem_LaMP_2"
LABELS = ("arch/arm, board, include, configs, common, tools, drivers/net, top level, lib, doc, cmd, drivers/mtd, "
          "arch/x86, drivers/usb, drivers/mmc")  # fmt: skip
TASK = {
    "name": "subsystem",
    "marker": "article: ",
    "item": "{category}: {title}. {text}",
    "item_without_label": "{title}. {text}",
    "input": "Which directory does this change belong to? article: {title} {text}",
    "target": "category",
    "metric": "classification",
    "labels": LABELS.split(", "),
    "retrieval": {"pattern": 'the directory for the change: "{title} {text}" is "{category}" '},
    "max_output_tokens": 8,
}


REQUESTS = 15
"""Each one's newest items that are asked for."""


def people(given: Given) -> int:
    """So many that a run of `generate` takes a minute on two cores."""
    from pplug.bert import bf16_is_quicker

    return given.size(96 if bf16_is_quicker() else 32, 4)


@dataclass(frozen=True)
class Population:
    """Tables of one population."""

    tables: str
    entry: TaskSpec
    data: str
    """Which, in words."""

    @property
    def encoder_id(self) -> str:
        return encoder_id(EncoderConfig(), self.entry.item)

    def snapshot(self, name: str) -> Any:
        from pipelines import tables

        return tables.open_table(self.tables, name).snapshot(complete=True)

    def texts(self) -> list[str]:
        """Every item's history text, in the table's order."""
        from pplug.history import item_text

        cells = self.snapshot("histories").read(["fields"])["fields"].to_pylist()
        return [item_text(dict(cell), self.entry, True) for cell in cells]


def ingested(folder: Path, users: int, requests: int = REQUESTS) -> Population:
    """Histories of the first users, and so many of their newest items as requests with a known answer."""
    from pipelines.ingest import job as ingest

    root = folder / (f"population-{users}" if requests == REQUESTS else f"population-{users}x{requests}")
    real = REAL.is_dir()
    entry = TaskSpec.model_validate(TASK) if real else _world_entry(root, users)
    data = f"u-boot commit messages of {users} people" if real else f"the embedded world's {users} people"
    found = Population(str(root / "tables"), entry, data)
    if (root / "ready").exists():
        return found
    shutil.rmtree(root / "tables", ignore_errors=True)
    root.mkdir(parents=True, exist_ok=True)
    task = root / "task.yaml"
    task.write_text(yaml.safe_dump(json.loads(entry.model_dump_json())))
    source: dict[str, Any] = {"source": str(root / "world" / "test" / "histories.jsonl")}
    if real:
        (root / "lamp").mkdir(exist_ok=True)
        asked = _read("dev_questions")[:users]
        (root / "lamp" / "dev_questions.json").write_text(json.dumps(asked))
        golds = _read("dev_outputs")
        wanted = {question["id"] for question in asked}
        golds["golds"] = [gold for gold in golds["golds"] if gold["id"] in wanted]
        (root / "lamp" / "dev_outputs.json").write_text(json.dumps(golds))
        source = {"source": str(root / "lamp"), "split": "dev", "questions": "skip"}
    config = ingest.Config(tables=found.tables, task=str(task), derive_requests=requests, buckets=8,
                           run_dir=str(root / "ingest"), **source)  # fmt: skip
    assert ingest.run(config) == 0
    (root / "ready").touch()
    return found


def refreshed(folder: Path, users: int) -> Population:
    """The same with MiniLM's vectors."""
    from pipelines.refresh import job as refresh

    found = ingested(folder, users)
    ready = Path(found.tables).parent / "vectors-ready"
    if not ready.exists():
        run_dir = str(ready.with_name("refresh"))
        assert refresh.run(refresh.Config(tables=found.tables, run_dir=run_dir)) == 0
        ready.touch()
    return found


def _read(name: str) -> Any:
    return json.loads(gzip.open(REAL / f"{name}.json.gz").read())


def _world_entry(root: Path, users: int) -> TaskSpec:
    from pplug import world

    files = world.write(world.WorldConfig(train_users=0, test_users=users, corpus_users=0), root / "world")
    return TaskSpec.model_validate(yaml.safe_load(files["task"].read_text()))


# --- models -----------------------------------------------------------------------------------------------------------

LARGE = {"vocab_size": 32_000, "width": 512, "layers": 6, "heads": 8, "ffn_width": 1408}
"""35.7M parameters, 16.4M of them token embeddings."""
DEMO: dict[str, int] = {}
"""The demo's own: pplug.tiny_lm's defaults, 0.9M parameters."""


def language_model(folder: Path, name: str, sizes: dict[str, int], population: Population, inputs: int) -> LLMConfig:
    """A Llama with random weights and a tokenizer trained on the texts; it never ends a reply by itself.

    Args:
        inputs: llm.layout.max_input_tokens.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from pplug.tiny_lm import TinyLMConfig, train_tokenizer

    config = TinyLMConfig(**{"max_model_len": 1024} | sizes)
    place = folder / f"lm-{name}"
    if not (place / "ready").exists():
        tokenizer = train_tokenizer(((text, "") for text in _corpus(population)), config)
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.width, intermediate_size=config.ffn_width,
            num_hidden_layers=config.layers, num_attention_heads=config.heads, num_key_value_heads=config.heads,
            max_position_embeddings=config.max_model_len, tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        ))  # fmt: skip
        with torch.no_grad():  # a logit of 0 is never the highest: every reply is as long as it may be
            model.model.embed_tokens.weight[tokenizer.eos_token_id] = 0
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        (place / "ready").touch()
    return LLMConfig(model=str(place), layout=PromptLayout(max_input_tokens=inputs))


def _corpus(population: Population) -> list[str]:
    """All texts there are, so that a large vocabulary finds words to merge."""
    if not REAL.is_dir():
        return population.texts()
    asked = [question for split in ("train", "dev") for question in _read(f"{split}_questions")]
    return [f"{item['title']} {item['text']}" for question in asked for item in question["profile"]]


def new_plug(folder: Path, population: Population, llm: LLMConfig, persona_tokens: int = 1) -> str:
    """An untrained plug with MiniLM as its query encoder, in a folder."""
    from pipelines.train import job as train
    from pipelines.train.config import PlugShape

    place = folder / f"plug-{Path(llm.model).name}-{persona_tokens}-{llm.layout.max_input_tokens}"
    if not (place / "config.json").exists():
        config = train.Config(tables=population.tables, llm=llm,
                              shape=PlugShape(persona_tokens=persona_tokens))  # fmt: skip
        identities = {"encoder_id": population.encoder_id, "llm_id": llm_id(llm)}
        plug, _, tokenizer = train.make_models(config, identities)
        plug.save_pretrained(place, tokenizer)
    return str(place)
