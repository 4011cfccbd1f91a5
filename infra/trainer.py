"""Ray Train as both trainings start it: workers, storage, restarts, SIGTERM, and the error that ended it."""

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from infra import nodes, stopping
from infra.errors import InputError
from infra.storage import Storage


class Ending:
    """Actor of the driver: holds the word that a training is to end, and why it cannot go on."""

    def __init__(self) -> None:
        self._said = asyncio.Event()
        self._why: str | None = None

    async def say(self) -> None:
        self._said.set()

    async def said(self) -> None:
        """Returns as soon as the training has been told to end."""
        await self._said.wait()

    async def give_up(self, why: str) -> None:
        """A worker says why another try would end alike."""
        self._why = why

    async def given_up(self) -> str | None:
        """The reason of a worker that has given up; None where none has."""
        return self._why


class Asked:
    """Tells a worker between two steps whether its training is to end."""

    def __init__(self, ending: Any) -> None:
        self._said: Any = ending.said.remote()

    def __call__(self) -> bool:
        if self._said is None or not ray.wait([self._said], timeout=0)[0]:
            return False
        try:
            ray.get(self._said)
        except ray.exceptions.RayActorError:  # its process was killed: nobody can say it any more
            self._said = None
        return self._said is not None


def _giving_up(loop: Callable[[dict[str, Any]], None], given: dict[str, Any]) -> None:
    """Runs a worker's loop. One that diverges, or has no gradient, ends the training, and Ray does not try again: all
    workers come to this together, since they hold the same weights and sum their losses. An InputError may be met by
    one worker while the others wait for it, so Ray ends them all; a next try returns at once."""
    ending = given["ending"]
    if ray.get(ending.given_up.remote()) is not None:
        return
    try:
        loop(given)
    except FloatingPointError as error:
        ray.get(ending.give_up.remote(str(error)))
    except InputError as error:
        ray.get(ending.give_up.remote(str(error)))
        raise


def _refuse_given_up(ending: Any, run_id: str) -> None:
    why = ray.get(ending.given_up.remote())
    if why is not None:
        raise InputError(f"run_id={run_id}: {why}")


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
        loop: what each worker runs, on `given` and the keys `started_in`, the driver's folder, and `ending`, for
            `Asked`. A FloatingPointError says that the training has diverged, or has no gradient.
        run_dir: holds the checkpoints, in `train/<run_id>`.
        max_failures: number of times that a training whose worker has died goes on from its newest checkpoint.
        checkpoints_kept: number of newest checkpoints that stay.

    Raises:
        InputError: the training has diverged, or has no gradient, or a worker has raised it.
        Exception: the error that ended the training.
        Terminated: SIGTERM ended it; the workers have been asked to save a checkpoint.
    """
    ending = ray.remote(Ending).options(**nodes.beside_driver()).remote()
    storage = Storage(run_dir).join("train")
    resources = {"CPU": 1.0} | ({"GPU": gpus_per_worker} if gpus_per_worker else {})
    trainer = TorchTrainer(
        partial(_giving_up, loop),
        train_loop_config=given | {"started_in": os.getcwd(), "ending": ending},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpus_per_worker > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=run_id,
            storage_path=storage.path if storage.is_s3 else os.path.abspath(storage.path),
            storage_filesystem=storage.filesystem if storage.is_s3 else None,
            failure_config=FailureConfig(max_failures=max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=checkpoints_kept),
        ),
    )
    with stopping.asking(ending.say.remote):
        try:
            result = trainer.fit()
        except TrainingFailedError:
            _refuse_given_up(ending, run_id)
            raise
    if result.error is not None:
        raise result.error
    _refuse_given_up(ending, run_id)
    return result
