"""A job that is asked to end does so within 30 seconds, half commits nothing, and a rerun goes on."""

import shutil
import time

import numpy as np
import pytest

from pipelines import tables
from pipelines.refresh import job as refresh
from tests.faults.jobs import Job
from tests.pipelines import small


@pytest.mark.slow
def test_sigterm_in_the_middle_of_a_wave_ends_a_refresh_and_a_rerun_completes_it(tmp_path, ray_session):
    made = small.make(tmp_path, train_users=2, test_users=40, test_requests=1)
    made.ingest("test", buckets=8)
    place = str(tmp_path / "again")
    shutil.copytree(made.tables, place)
    assert made.run(refresh, "undisturbed", **made.common) == 0
    name = small.names(made.tables, "embeddings")

    def vectors(place):
        rows = tables.open_table(place, name).snapshot().read(["text_hash", "vector"]).to_pylist()
        found = {row["text_hash"]: row["vector"] for row in rows}
        assert len(found) == len(rows)
        return found

    wanted = vectors(made.tables)
    words = made.words(refresh, "night", **(made.common | {"tables": place, "wave_texts": 1}))
    with Job(words, tmp_path / "log-1") as job:
        job.wait_until(lambda: small.commits(place, "embeddings") >= 2, "two waves committed")
        began = time.monotonic()
        job.terminate()
        assert job.wait(30) == 143, job.output[-4000:]
        assert time.monotonic() - began < 30
        assert job.survivors() == []
        assert "refresh: ended by SIGTERM; run_id=night goes on where this run stopped" in job.output
    half = vectors(place)
    assert 0 < len(half) < len(wanted) and half.keys() < wanted.keys()
    assert made.report("night")["exit_code"] == 143
    assert not list((tmp_path / "again" / "_leases").glob("*")), "the leases were put down"
    assert made.run(refresh, "night", **(made.common | {"tables": place})) == 0
    whole = vectors(place)
    assert whole.keys() == wanted.keys() and made.report("night")["already_there"] == len(half)
    for text_hash, vector in wanted.items():  # in batches of other texts, products may differ in the last of 16 bits
        np.testing.assert_allclose(whole[text_hash], vector, atol=1e-3)
