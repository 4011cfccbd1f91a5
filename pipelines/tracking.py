"""Curves of a training for MLflow or Weights & Biases, where one of them is installed.

Both read where they write to from their own environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, WANDB_MODE).
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from infra.errors import InputError

Tracker = Literal["mlflow", "wandb"]
PROJECT = "pplug"


def refuse_missing(track: Tracker | None) -> None:
    """Refuses a tracker whose library is not installed.

    Raises:
        InputError: it is missing.
    """
    if track is not None and importlib.util.find_spec(track) is None:
        raise InputError(f"track={track}: the library {track} is not installed; `pip install {track}`, or leave it out")


class Tracked:
    """A run of the tracker under the run's own id; a training that goes on adds to it."""

    def __init__(self, track: Tracker, run_id: str, config: dict[str, Any]) -> None:
        """`config`: shown beside the curves."""
        self._log: Callable[[dict[str, float], int], Any]
        self.close: Callable[[], Any]
        if track == "mlflow":
            import mlflow

            mlflow.set_experiment(PROJECT)
            known = mlflow.search_runs(filter_string=f"attributes.run_name = '{run_id}'", output_format="list")
            mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=None if known else run_id)
            if not known:
                mlflow.log_dict(config, "config.json")
            self._log, self.close = (lambda values, step: mlflow.log_metrics(values, step=step)), mlflow.end_run
        else:
            import wandb

            run = wandb.init(project=PROJECT, id=run_id, name=run_id, resume="allow", config=config)
            self._log, self.close = (lambda values, step: run.log(values, step=step)), run.finish

    def log(self, step: int, **losses: float) -> None:
        """Writes losses of a step."""
        self._log({f"loss/{name}": value for name, value in losses.items()}, step)


def tracker(track: Tracker | None, run_id: str, config: dict[str, Any]) -> Callable[[], Tracked] | None:
    """A function that opens the tracker's run; None without one."""
    return None if track is None else partial(Tracked, track, run_id, config)
