"""refresh, train and generate as an operator submits them: `ray job submit --working-dir .` against a running head.

What is wrong comes back with its message too: tests/test_ray_head.py.
"""

import pytest

from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from pipelines.ingest import job as ingest
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pplug.fit import FitConfig
from tests.pipelines import small

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]


@pytest.fixture(scope="module")
def population(tmp_path_factory):
    return small.make(tmp_path_factory.mktemp("submit"), train_users=12, test_users=2, train_requests=2)


@pytest.fixture(scope="module")
def submit(population, ray_head):
    def submit(job, run_id, **values):
        done = ray_head.submit("python", *population.words(job, run_id, **values))
        assert done.returncode == 0, done.stdout[-4000:]
        report = population.report(run_id)
        assert report["exit_code"] == 0 and f"{run_id} done:" in done.stdout, done.stdout[-4000:]
        assert report["planned"] == report["written"] > 0
        return report

    return submit


@pytest.fixture(scope="module")
def refreshed(population, submit):
    """What the submitted ingest and refresh report."""
    source = {name: str(population.files[f"train/{kind}"]) for name, kind in
              (("source", "histories"), ("requests_source", "requests"))}  # fmt: skip
    submit(ingest, "ingest", tables=population.tables, task=str(population.files["task"]), buckets=2, **source)
    return submit(refresh, "refresh", **population.common)


def test_ingest_and_refresh_run_as_submitted_jobs(population, refreshed):
    embeddings = small.names(population.tables, "embeddings")
    assert refreshed["tables_written"] == {embeddings: 1, "personas": 1}
    items = {(row["user_key"], row["text_hash"]) for row in small.rows(population.tables, "histories")}
    assert len(small.rows(population.tables, embeddings)) == len(items) == refreshed["written"]
    assert len(small.rows(population.tables, "personas")) == 12


def test_train_and_generate_run_as_submitted_jobs(population, refreshed, submit):
    fit = FitConfig(epochs=1, batch_size=16, precision="float32", val_fraction=0.3)
    plug = str(population.root / "plug")
    llm = {"tables": population.tables, "llm": population.llm}
    report = submit(train, "train", **llm, encoder=population.encoder, plug=plug, fit=fit)
    assert report["planned"] == 12 * 2 and (population.root / "plug" / "model.safetensors").exists()

    engine = EngineConfig(kind="transformers", batch_rows=16)
    methods = ("none", "plug")
    submit(generate, "generate", **llm, plug=plug, methods=methods, engine=engine, decoding=Decoding(max_tokens=4))
    replies = small.rows(population.tables, "generations")
    assert len({(row["request_id"], row["method"]) for row in replies}) == len(replies) == 12 * 2 * 2
    assert all(row["error"] is None for row in replies)
