"""An adapt run whose worker, and then whose driver, is killed: the table ends as that of an undisturbed run."""

import shutil

import pytest

from pipelines import tables
from pipelines.adapt import job as adapt
from pplug.adapter import LoraConfig
from tests.faults.jobs import Job
from tests.pipelines import small

# many small steps: a run lasts long enough to be killed twice, and each user's bits come from hundreds of steps
LORA = LoraConfig(epochs=40, batch_size=2, learning_rate=1e-3)
BUCKETS = 16


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    made = small.make(tmp_path_factory.mktemp("adapt"), train_users=2, test_users=40, test_requests=1)
    made.ingest("test", buckets=BUCKETS)
    shutil.copytree(made.tables, made.root / "other")
    return made


def values(population, place):
    return {"tables": place, "llm": population.llm, "lora": LORA, "threads": 1, "batch_users": 2, "wave_users": 1}


def contents(place):
    return {row["user_id"]: row for row in small.rows(place, "adapters")}


def trainers(job):
    return job.named("FitAdapters")


@pytest.mark.slow
def test_a_killed_worker_and_a_killed_driver_leave_the_table_of_an_undisturbed_run(population, tmp_path):
    place, quiet = population.tables, str(population.root / "other")
    words = population.words(adapt, "night", **values(population, place))
    with Job(words, tmp_path / "log-1") as job:
        job.wait_until(lambda: small.commits(place, "adapters") >= 1, "a group committed")
        (first,) = trainers(job)
        first.kill()
        job.wait_until(lambda: any(other.pid != first.pid for other in trainers(job)), "another worker")
        stood = small.commits(place, "adapters")
        job.wait_until(lambda: small.commits(place, "adapters") > stood, "one more group committed")
        job.kill_driver()
    half = tables.open_table(place, "adapters").snapshot()
    assert 0 < half.rows < 40 and half.metadata["complete"] == "false"
    assert population.run(adapt, "night", **values(population, place)) == 0
    report = population.report("night")
    assert report["already_there"] == half.rows and report["written"] == 40 - half.rows

    assert population.run(adapt, "quiet", **values(population, quiet)) == 0
    want, got = contents(quiet), contents(place)
    assert len(got) == 40 == len(small.rows(place, "adapters"))
    assert got == want  # to the last bit: other companions, another order, another process
