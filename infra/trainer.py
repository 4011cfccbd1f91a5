"""Ray Train as both trainings start it: workers, storage, restarts, and the error that ended it."""

import os
from collections.abc import Callable
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from infra.storage import Storage


def run_training(
    loop: Callable[[dict[str, Any]], None],
    given: dict[str, Any],
    *,
    run_id: str,
    run_dir: str,
    workers: int,
    gpus_per_worker: float,
    max_failures: int,
    checkpoints_kept: int,
) -> Result:
    """Runs a training to its end, on from its newest checkpoint where the run has begun before.

    Args:
        loop: what each worker runs, on `given` and the key `started_in`, the driver's folder.
        run_dir: holds the checkpoints, in `train/<run_id>`.
        max_failures: number of times that a training whose worker has died goes on from its newest checkpoint.
        checkpoints_kept: number of newest checkpoints that stay.

    Raises:
        Exception: the error that ended the training.
    """
    storage = Storage(run_dir).join("train")
    resources = {"CPU": 1.0} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    trainer = TorchTrainer(
        loop,
        train_loop_config=given | {"started_in": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=run_id,
            storage_path=storage.path if storage.is_s3 else os.path.abspath(storage.path),
            storage_filesystem=storage.filesystem if storage.is_s3 else None,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints_kept),
        ),
    )
    result = trainer.fit()
    if result.error is not None:
        raise result.error
    return result
