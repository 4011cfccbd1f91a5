"""A driver often runs on the head of a cluster, which has no room for an LLM's weights: it never fetches them."""

import json

import pytest

from infra import artifacts
from pipelines import llm_sample, tables
from pipelines.adapt import job as adapt
from pipelines.generate.judge import AskJudge
from pplug import identity, stand_in
from pplug.adapter import LoraConfig
from pplug.llm import LLMConfig
from tests.pipelines.population import NOTES
from tests.pipelines.test_import_adapter import take
from tests.pplug.models import tiny_llama
from tests.pplug.test_peft_folder import saved

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def folder(tmp_path):
    return tiny_llama(tmp_path / "llm")


@pytest.fixture
def llm(folder):
    """At an address, so that this process fetches its files by the function that `fetched` records."""
    return LLMConfig(model=f"file://{folder}")


@pytest.fixture
def fetched(monkeypatch):
    """Says of each fetch of this process whether it was one with weights; workers fetch on their own."""
    found = []

    def fetch(address, weights):
        found.append(weights)
        return artifacts.fetch(address, weights)

    monkeypatch.setattr(identity, "fetch_address", fetch)
    return found


def fill(population, people):
    rows = [
        {"user_id": name, "item_id": f"{i}", "fields": {"mood": "good", "text": f"mat {i}"}}
        for name in people for i in range(2)
    ]  # fmt: skip
    path = population.folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(path), task=population.task(NOTES), buckets=1) == 0


def metadata(population):
    return tables.open_table(population.tables, "adapters").snapshot(complete=True).metadata


def not_taken(*given):
    raise AssertionError("a sample is stored")


def test_import_adapter_reads_the_config_alone_and_a_stored_sample(
    population, folder, llm, fetched, tmp_path, monkeypatch
):
    fill(population, ("ann", "bob"))
    saved(folder, tmp_path / "lora")
    assert take(population, llm.model, tmp_path / "lora", "ann", "one")[0] == 0
    assert fetched and not any(fetched)
    sample = stand_in.llm_sample(LLMConfig(model=str(folder)))
    assert metadata(population)["llm_sample"] == sample != ""
    monkeypatch.setattr(llm_sample, "take", not_taken)
    assert take(population, llm.model, tmp_path / "lora", "bob", "two")[0] == 0
    assert metadata(population)["llm_sample"] == sample and not any(fetched)


def test_adapt_has_a_worker_take_the_sample_and_keeps_a_stored_one(
    population, folder, llm, fetched, tmp_path, monkeypatch
):
    def run(name):
        config = adapt.Config(
            tables=population.tables, llm=llm, run_id=name, run_dir=str(tmp_path / name), threads=1,
            lora=LoraConfig(epochs=1, storage_dtype="float32"),
        )  # fmt: skip
        assert adapt.run(config) == 0
        return json.loads((tmp_path / name / "report.json").read_text())["written"]

    fill(population, ("ann",))
    assert run("first") == 1
    assert fetched and not any(fetched)
    sample = stand_in.llm_sample(LLMConfig(model=str(folder)))
    assert metadata(population)["llm_sample"] == sample != ""
    monkeypatch.setattr(llm_sample, "take", not_taken)
    assert run("second") == 0
    fill(population, ("ann", "bob"))
    assert run("third") == 1
    assert metadata(population)["llm_sample"] == sample and not any(fetched)


def test_adapters_on_another_llm_lend_it_no_sample(population):
    table = tables.open_or_create(population.tables, "adapters", 1)
    made = {"llm_id": "one", "llm_sample": "of one"}
    table.commit([], run_id="r", group=0, mode="append", planned_on=0, metadata=made, complete=True)
    found = [llm_sample.stored(table.snapshot(), llm) for llm in ("one", "two")]
    assert found == ["of one", None]


def test_the_judge_reads_the_tokenizer_alone(llm, folder, fetched):
    words = ["the film was good", "the cat sat on one big tree"]
    found = AskJudge(None, llm, False).prompt_builder.prompts(words)
    assert fetched and not any(fetched)
    assert found == AskJudge(None, LLMConfig(model=str(folder)), False).prompt_builder.prompts(words)
