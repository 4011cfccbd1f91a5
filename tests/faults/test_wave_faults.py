"""A run of generate whose requests lie in one bucket, killed twice: what its waves have committed is not made again."""

from collections import Counter

import pytest

from pipelines import tables
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate import job as generate
from tests.faults.jobs import Job
from tests.pipelines import small

WAVE = 8


@pytest.mark.slow
def test_a_killed_run_keeps_the_waves_of_a_bucket_that_is_not_complete(tmp_path, ray_session):
    made = small.make(tmp_path, train_users=2, test_users=40, test_requests=5)
    made.ingest("test", buckets=1)
    wanted = {row["request_id"] for row in small.rows(made.tables, "requests")}
    engine = EngineConfig(kind="transformers", dtype="float32", batch_rows=4, in_flight=1)
    values = {"tables": made.tables, "llm": made.llm, "methods": ("none",), "engine": engine, "wave_rows": WAVE}
    words = made.words(generate, "night", decoding=Decoding(max_tokens=96, min_tokens=96, constrain="none"), **values)
    there: list[int] = []
    for kill in range(2):
        stood = small.commits(made.tables, "generations")
        with Job(words, tmp_path / f"log-{kill}") as job:
            job.wait_until(lambda at=stood + 2: small.commits(made.tables, "generations") >= at, "two waves")
            job.kill_driver()
            job.survivors(15)
        half = Counter(replies(made.tables, complete=False))
        there.append(len(half))
        assert set(half.values()) == {1} and len(half) < len(wanted)
        assert there[-1] >= 2 * WAVE * (kill + 1)
    with Job(words, tmp_path / "log-last") as job:
        assert job.wait() == 0, job.output[-4000:]
    assert Counter(replies(made.tables, complete=True)) == dict.fromkeys(wanted, 1)
    report = made.report("night")
    assert (report["already_there"], report["written"]) == (there[-1], len(wanted) - there[-1])


def replies(place: str, complete: bool) -> list[str]:
    return tables.open_table(place, "generations").snapshot(complete=complete).read()["request_id"].to_pylist()
