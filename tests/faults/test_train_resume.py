"""A training that is killed between two checkpoints goes on from the last one, to the same plug."""

import json
import re

import pytest
from safetensors.torch import load_file

from pipelines import refresh, train
from pplug.fit import FitConfig
from tests.faults.jobs import Job
from tests.pipelines import small

FIT = FitConfig(epochs=2, batch_size=8, precision="float32", learning_rate=1e-3, held_out=0.2)
EVERY = 2


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    made = small.make(tmp_path_factory.mktemp("train"), train_users=25, test_users=2, train_requests=4, test_requests=1)
    made.ingest("train", buckets=2)
    assert made.run(refresh, "refresh", **made.common) == 0
    return made


def checkpoints(population, run_id):
    """Those that Ray Train would go on from, by its own record."""
    record = population.root / "runs" / run_id / "train" / run_id / "checkpoint_manager_snapshot.json"
    return len(json.loads(record.read_text())["checkpoint_results"]) if record.exists() else 0


def weights(population, run_id):
    return load_file(population.root / "runs" / run_id / "plug" / "model.safetensors")


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_plug(population, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")  # else every checkpoint waits for two seconds
    values = population.common | {"llm": population.llm, "fit": FIT, "checkpoint_steps": EVERY, "threads": 1}
    assert population.run(train, "undisturbed", **values) == 0
    want = population.report("undisturbed")
    steps = want["history"][-1]["step"]
    words = population.words(train, "killed", **values)

    with Job(words, tmp_path / "log-1") as job:
        job.wait_until(lambda: checkpoints(population, "killed") >= 3, "three checkpoints")
        job.kill_group()
    assert not (population.root / "runs" / "killed" / "report.json").exists()
    saved = checkpoints(population, "killed")
    assert 3 <= saved < len(want["history"])

    with Job(words, tmp_path / "log-2") as job:
        assert job.wait() == 0, job.output[-4000:]
        went_on = re.search(r"goes on at step (\d+)", job.output)
    assert went_on is not None, job.output
    assert int(went_on[1]) in [entry["step"] for entry in want["history"][1:]] and int(went_on[1]) < steps

    got = population.report("killed")
    assert [entry["step"] for entry in got["history"]] == [entry["step"] for entry in want["history"]]
    assert got["best_step"] == want["best_step"]
    assert got["best_val_loss"] == pytest.approx(want["best_val_loss"], abs=1e-6)
    one, two = weights(population, "undisturbed"), weights(population, "killed")
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6, name
