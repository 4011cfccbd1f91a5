"""A training that is killed between two checkpoints goes on from the last one, to the same plug."""

import json
import re
import shutil
import time

import pytest
from safetensors.torch import load_file

from infra.errors import InputError
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pplug.fit import FitConfig
from tests.faults.jobs import Job
from tests.pipelines import small

FIT = FitConfig(epochs=4, batch_size=8, precision="float32", learning_rate=1e-3, val_fraction=0.2)
EVERY = 2
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def population(tmp_path_factory, ray_session):
    made = small.make(tmp_path_factory.mktemp("train"), train_users=25, test_users=2, train_requests=4, test_requests=1)
    made.ingest("train", buckets=2)
    assert made.run(refresh, "refresh", **made.common) == 0
    return made


RECORD = "checkpoint_manager_snapshot.json"


def saved_step(population, run_id):
    """Step of the newest checkpoint that Ray Train would go on from, by its own record."""
    try:
        record = json.loads((population.root / "runs" / run_id / "train" / run_id / RECORD).read_text())
    except (OSError, ValueError):  # not there yet, or being written: Ray does so in place
        return 0
    return record["latest_checkpoint_result"]["metrics"]["step"] if record["latest_checkpoint_result"] else 0


def weights(population, run_id):
    return load_file(population.root / "runs" / run_id / "plug" / "model.safetensors")


@pytest.fixture(scope="module")
def killed(population, tmp_path_factory):
    """Config of a run that was killed, with its whole process group, between two checkpoints."""
    values = population.common | {"llm": population.llm, "fit": FIT, "checkpoint_steps": EVERY, "threads": 1}
    assert population.run(train, "undisturbed", **values) == 0
    with Job(population.words(train, "killed", **values), tmp_path_factory.mktemp("log") / "log") as job:
        job.wait_until(lambda: saved_step(population, "killed") >= 3 * EVERY, "three checkpoints")
        job.kill_group()
    assert not (population.root / "runs" / "killed" / "report.json").exists()
    runs = population.root / "runs"
    shutil.copytree(runs / "killed", runs / "cut")
    (runs / "cut" / "train" / "killed").rename(runs / "cut" / "train" / "cut")
    (runs / "cut" / "killed.begun.json").rename(runs / "cut" / "cut.begun.json")
    return values


def assert_equal(population, undisturbed, run_id):
    want, got = population.report(undisturbed), population.report(run_id)
    assert [entry["step"] for entry in got["history"]] == [entry["step"] for entry in want["history"]]
    assert got["best_step"] == want["best_step"]
    assert got["best_val_loss"] == pytest.approx(want["best_val_loss"], abs=1e-6)
    one, two = weights(population, undisturbed), weights(population, run_id)
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6, name


def test_a_killed_run_goes_on_from_its_last_checkpoint_to_the_same_plug(population, killed, tmp_path):
    last = saved_step(population, "killed")
    assert 3 * EVERY <= last < population.report("undisturbed")["history"][-1]["step"]
    population.ingest("test", "later")  # what has come since is not mixed into a training that has begun
    with Job(population.words(train, "killed", **killed), tmp_path / "log") as job:
        assert job.wait() == 0, job.output[-4000:]
    assert f"goes on at step {last}" in job.output
    assert population.report("killed")["tables_read"] == population.report("undisturbed")["tables_read"]
    assert_equal(population, "undisturbed", "killed")


def test_a_killed_run_whose_queries_learned_in_the_start_goes_on_with_their_vectors(population, killed, tmp_path):
    """The query encoder learns in the start alone, and queries are encoded once: by what it has become."""
    own = {"start_epochs": 3, "start_query_learning_rate": 1e-2, "query_learning_rate": 0.0}
    versions = {name.partition("-")[0]: read for name, read in population.report("undisturbed")["tables_read"].items()}
    values = killed | {"fit": FIT.model_copy(update=own), "as_of_version": versions}
    assert population.run(train, "started", **values) == 0
    with Job(population.words(train, "started-killed", **values), tmp_path / "log-1") as job:
        job.wait_until(lambda: saved_step(population, "started-killed") >= 3 * EVERY, "three checkpoints")
        job.kill_group()
    with Job(population.words(train, "started-killed", **values), tmp_path / "log-2") as job:
        assert job.wait() == 0, job.output[-4000:]
    assert "goes on at step" in job.output
    assert_equal(population, "started", "started-killed")


def test_a_run_does_not_go_on_with_another_config(population, killed):
    other = killed | {"fit": FIT.model_copy(update={"learning_rate": 2e-3})}
    with pytest.raises(
        InputError, match=r"run killed in .* began with another fit: .*0\.001.*, now .*0\.002.*--run-id"
    ):
        population.run(train, "killed", **other)


def test_a_kill_while_checkpoint_and_record_are_written_costs_that_checkpoint_only(population, killed):
    """The newest checkpoint is cut, and Ray's record of them is empty: by itself Ray would refuse the run for ever."""
    folder = population.root / "runs" / "cut" / "train" / "cut"
    assert (folder / RECORD).exists()
    (folder / RECORD).write_bytes(b"")
    newest = max(folder.glob("checkpoint_2*/state.pt")).parent  # the kill may have cut one already
    later = shutil.copytree(newest, folder / "checkpoint_2999-01-01_00-00-00.000000")
    (later / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:100])
    assert population.run(train, "cut", **killed) == 0
    assert_equal(population, "undisturbed", "cut")


def test_a_run_that_is_told_to_end_saves_first_and_a_rerun_goes_on_to_the_same_plug(population, killed, tmp_path):
    """Both of its workers end after the same step, which no plan has named."""
    values = killed | {"workers": 2, "fit": FIT.model_copy(update={"epochs": 8}), "checkpoint_steps": 7}
    with Job(population.words(train, "told", **values), tmp_path / "log-1") as job:
        job.wait_until(lambda: saved_step(population, "told") >= 7, "a checkpoint")
        began = time.monotonic()
        job.terminate()
        assert job.wait(30) == 143, job.output[-4000:]
        assert time.monotonic() - began < 30 and job.survivors() == []
    (step,) = re.findall(r"asked to end, ends at step (\d+) of \d+; the checkpoint is saved", job.output)
    assert "train: ended by SIGTERM; run_id=told goes on where this run stopped" in job.output
    assert saved_step(population, "told") == int(step) >= 7
    assert population.run(train, "told", **values) == 0
    assert population.run(train, "never-told", **values) == 0
    assert population.report("told")["best_step"] == population.report("never-told")["best_step"]
    one, two = weights(population, "never-told"), weights(population, "told")
    for name in one:
        assert (one[name] - two[name]).abs().max() <= 1e-6, name


def test_a_run_saves_between_two_checkpoints_when_some_time_has_passed(population, killed):
    undisturbed = population.report("undisturbed")
    # a test before this one has ingested more since
    versions = {name.partition("-")[0]: version for name, version in undisturbed["tables_read"].items()}
    values = killed | {"checkpoint_steps": 0, "checkpoint_minutes": 1e-6, "as_of_version": versions}
    assert population.run(train, "by-time", **values) == 0
    steps = [entry["step"] for entry in population.report("by-time")["history"]]
    assert steps == list(range(1, undisturbed["history"][-1]["step"] + 1))
    one, two = weights(population, "undisturbed"), weights(population, "by-time")
    assert all((one[name] - two[name]).abs().max() <= 1e-6 for name in one)
