"""A generate run through real vLLM whose driver, and then whose engine, is killed: every reply is there once."""

from collections import Counter

import pytest

from pipelines import tables
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from pipelines.refresh import job as refresh
from tests.faults.jobs import Job
from tests.pipelines import small

METHODS = ("none", "plug:mean")


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    """Histories with vectors, requests, and a plug as it is before training."""
    made = small.make(tmp_path_factory.mktemp("generate"), train_users=2, test_users=40, test_requests=5)
    made.ingest("test", buckets=16)
    assert made.run(refresh, "refresh", **made.common) == 0
    made.untrained_plug()
    return made


def values(population, **more):
    return {
        "tables": population.tables,
        "llm": population.llm,
        "plug": str(population.root / "plug"),
        "methods": METHODS,
        "decoding": Decoding(max_tokens=64),
        "engine": EngineConfig(batch_rows=4, in_flight=2, max_num_seqs=4),
        "wave_rows": 4,
    } | more


def engine_cores(job):
    return job.named("EngineCore")


def replies(population, complete):
    """How often each (request, method) stands in the table."""
    found = tables.open_table(population.tables, "generations").snapshot(complete=complete).read()
    return Counter(zip(found["request_id"].to_pylist(), found["method"].to_pylist(), strict=True)), found


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_engine_cost_no_reply_and_double_none(population, tmp_path):
    wanted = {(row["request_id"], method) for row in small.rows(population.tables, "requests") for method in METHODS}
    words = population.words(generate, "night", **values(population))

    with Job(words, tmp_path / "log-1") as job:
        job.wait_until(lambda: small.commits(population.tables, "generations") >= 2, "two groups committed")
        assert len(engine_cores(job)) == 1
        job.kill_driver()
        # what is left of the engine would hold the memory that the next one needs
        assert [name for name in job.survivors(15) if "EngineCore" in name or "Reply" in name] == []
    half, _ = replies(population, complete=False)
    assert 0 < len(half) < len(wanted) and set(half.values()) == {1}

    with Job(words, tmp_path / "log-2") as job:
        stood = small.commits(population.tables, "generations")
        job.wait_until(lambda: small.commits(population.tables, "generations") > stood, "one more group committed")
        (first,) = engine_cores(job)
        first.kill()
        job.wait_until(lambda: any(core.pid != first.pid for core in engine_cores(job)), "another engine")
        assert job.wait() == 0, job.output[-4000:]
        assert "the engine died; this actor ends" in job.output
        assert [name for name in job.survivors(15) if "EngineCore" in name] == []

    found, table = replies(population, complete=True)
    assert set(found) == wanted and set(found.values()) == {1}
    assert table["error"].null_count == len(table) and set(table["run_id"].to_pylist()) == {"night"}
    report = population.report("night")
    assert report["already_there"] == len(half) and report["planned"] == len(wanted) == report["written"] + len(half)
    assert report["failed"] == 0
