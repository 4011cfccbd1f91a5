"""Curves for MLflow and Weights & Biases: refused by name where the library is missing, written where it is there."""

import importlib.util

import pytest

from infra.errors import InputError
from pipelines.adapt import job as adapt
from pipelines.tracking import PROJECT, Tracked
from pipelines.train import job as train


@pytest.mark.parametrize("track", ["mlflow", "wandb"])
@pytest.mark.parametrize("job", [train, adapt], ids=["train", "adapt"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(job, track, tmp_path):
    if importlib.util.find_spec(track) is not None:
        pytest.skip(f"{track} is installed")
    config = {"tables": str(tmp_path), "llm": {"model": "any"}, "run_dir": str(tmp_path / "run")}
    with pytest.raises(InputError, match=f"track={track}: the library {track} is not installed"):
        job.run(job.Config(**config, track=track))


def test_mlflow_gets_each_loss_and_goes_on_with_the_same_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    for first in (1, 3):
        tracked = Tracked("mlflow", "my-run", {"workers": 1})
        tracked.log(first, train=1.0 / first)
        tracked.log(first + 1, train=0.5 / first)
        tracked.log(first + 1, validation=0.25)
        tracked.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name(PROJECT).experiment_id])
    assert run.info.run_name == "my-run"
    steps = [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "loss/train")]
    assert sorted(steps) == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, pytest.approx(1 / 6))]


def test_wandb_writes_a_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    tracked = Tracked("wandb", "my-run", {"workers": 1})
    tracked.log(1, train=1.0)
    tracked.log(1, validation=0.5)
    tracked.close()
    assert list((tmp_path / "wandb").glob("offline-run-*my-run/*.wandb"))
