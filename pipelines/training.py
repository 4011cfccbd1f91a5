"""The part of both trainings that runs in a Ray Train worker: steps, checkpoints, resumption and the curve of the loss.

A checkpoint is a folder: what is trained (its own files), state.pt (optimiser and schedule), history.json (metrics of
each checkpoint) and losses.csv (of each step). A run goes on from the newest whole one.
"""

import csv
import io
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import ray.train
import torch
from ray.train.torch import get_device
from tensorboardX import SummaryWriter

from infra import device
from infra.errors import InputError
from infra.progress import Progress
from infra.storage import Storage
from infra.trainer import Asked
from pipelines.tracking import Tracked
from pplug.llm import ParallelConfig
from pplug.loop import Loop, Order, run_epochs

LOSSES, CURVE, EVENTS = "losses.csv", "loss.svg", "tensorboard"


def refuse_workers(workers: int, parallel: ParallelConfig, gpus_per_worker: float = 0.0, name: str = "workers") -> None:
    """Refuses a number of workers that cannot hold LLMs in groups, or would train on one GPU together.

    Args:
        name: the config's key with the number.

    Raises:
        InputError: the number is no multiple of a group, or several workers have a part of a GPU each.
    """
    group = parallel.tensor * parallel.shard
    if workers % group:
        raise InputError(
            f"{name}={workers}: llm.parallel.tensor={parallel.tensor} and llm.parallel.shard={parallel.shard} have "
            f"{group} workers hold one LLM together; give a multiple of {group}"
        )
    if workers > 1 and 0 < gpus_per_worker < 1:
        raise InputError(
            f"gpus_per_worker={gpus_per_worker:g}: {workers} workers of a training cannot share a GPU, as each takes "
            "the memory that it finds free; give 1, or workers=1"
        )


def worker_device() -> torch.device:
    """The device of this Ray Train worker. Ray's own answer to a worker without a GPU is the machine's first one.

    Raises:
        InputError: Ray has assigned a GPU that torch cannot use.
    """
    own = device.assigned()
    return get_device() if own.type == "cuda" else own


def left_without_record(storage: Storage, run_id: str) -> list[str]:
    """Checkpoint folders, newest first, of a run whose record of them a kill has cut or prevented; a cut record goes.

    Ray Train writes its record in place, so that a kill in that instant leaves an empty one, and refuses it ever after.
    """
    name = f"{run_id}/checkpoint_manager_snapshot.json"
    if storage.is_s3:  # it shows an object when it is whole
        return []
    if storage.exists(name):
        try:
            json.loads(storage.read_bytes(name))
            return []
        except ValueError:
            storage.delete(name)
    return sorted(map(str, Path(storage.path, run_id).glob("checkpoint_*")), reverse=True)


def steps_before(storage: Storage, run_id: str) -> int:
    """Steps that earlier starts of a run have saved, as its newest whole checkpoint tells them; 0 where there is none.

    Asked before the training starts: workers that Ray restarts meanwhile go on within the same start.
    """
    for name in sorted((name for name in storage.list(run_id) if name.endswith("/history.json")), reverse=True):
        try:
            return int(json.loads(storage.read_bytes(name))[-1]["step"])
        except (OSError, ValueError, LookupError):  # not written to its end
            continue
    return 0


class Checkpoints:
    """The checkpoint folder of a training, and how far the training has come."""

    def __init__(
        self, job: str, local: str, loop: Loop, read: Callable[[str], Callable[[], None]], write: Callable[..., None]
    ) -> None:
        """
        Args:
            local: a folder of this machine.
            read: reads what is trained from a folder, whole, and gives the function that puts it in place.
            write: called with (folder, whether this is the best so far), writes what is trained.
        """
        self.job, self.loop, self.read, self.write = job, loop, read, write
        self.folder = os.path.join(local, "checkpoint")
        self.step, self.best, self.worse = 0, math.inf, 0
        self.history: list[dict[str, float]] = []
        self.losses: list[tuple[int, float]] = []
        os.makedirs(self.folder)

    def load(self, left: list[str]) -> None:
        """Resumes from Ray's newest checkpoint; if Ray's record was lost, from the newest complete folder in `left`."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._take(folder)
            return
        for folder in left:
            try:
                self._take(folder)
                return
            except Exception as error:  # of whichever part was not written to its end, each has kinds of its own
                name = type(error).__name__
                print(f"{self.job}: {folder} was not saved to its end ({name}), looks before it", flush=True)

    def _take(self, folder: str) -> None:
        history = json.loads(Path(folder, "history.json").read_text())
        put = self.read(folder)
        # each state goes to its parameter's device; that of the worker that saved it may not be here
        state = torch.load(f"{folder}/state.pt", map_location="cpu", weights_only=True)
        losses = Path(folder, LOSSES)  # an earlier release wrote none
        rows = list(csv.reader(losses.open()))[1:] if losses.exists() else []
        # everything has been read: only now is anything changed
        shutil.copytree(folder, self.folder, dirs_exist_ok=True)
        self.history, self.step, self.best = history, int(history[-1]["step"]), history[-1]["best_val_loss"]
        self.losses = [(int(step), float(loss)) for step, loss in rows]
        validated = [entry["val_loss"] for entry in history if "val_loss" in entry]
        self.worse = len(validated) - 1 - validated.index(min(validated)) if validated else 0
        put()
        self.loop.load_state(state)
        print(f"{self.job}: goes on at step {self.step}", flush=True)

    def epoch_loss(self, epoch: int) -> float:
        """Mean loss of the steps of an epoch so far, with those that an earlier start of the run has taken."""
        first = epoch * self.loop.per_epoch
        return fmean(loss for step, loss in self.losses if step > first)

    def save(self, metrics: dict[str, float], is_best: bool) -> None:
        """Writes the folder anew."""
        self.write(self.folder, is_best)
        torch.save(self.loop.state(), f"{self.folder}/state.pt")
        self.history.append(metrics)
        Path(self.folder, "history.json").write_text(json.dumps(self.history))
        with Path(self.folder, LOSSES).open("w", newline="") as file:
            csv.writer(file).writerows([("step", "loss"), *self.losses])


class Curves:
    """Loss curves of a training, for TensorBoard where the run's folder is on a disk, and for a tracker."""

    def __init__(self, run_dir: str, begun: int, tracked: Callable[[], Tracked] | None) -> None:
        """`begun`: steps taken before; what an earlier start has written after them is left out."""
        self._events = None
        if run_dir and not Storage(run_dir).is_s3:
            folder = os.path.join(Storage(run_dir).path, EVENTS)
            self._events = SummaryWriter(folder, purge_step=begun + 1, flush_secs=10)
        self._tracked = None if tracked is None else tracked()

    def add(self, step: int, name: str, loss: float) -> None:
        """Adds a loss at a step."""
        if self._events is not None:
            self._events.add_scalar(f"loss/{name}", loss, step)
        if self._tracked is not None:
            self._tracked.log(step, **{name: loss})

    def close(self) -> None:
        """Writes what has not been written yet."""
        for one in (self._events, self._tracked):
            if one is not None:
                one.close()


class Orders:
    """Says after each step whether a checkpoint is due beside those of the plan, and whether the training is to end."""

    def __init__(self, ending: Any, minutes: float) -> None:
        """
        Args:
            ending: for `Asked`; when it is said, the training saves after the step that it is at, and ends.
            minutes: age of the newest checkpoint at which another is due; 0: none ever is for that.
        """
        self._asked, self._seconds, self._saved_at = Asked(ending), minutes * 60, time.monotonic()

    def saved(self) -> None:
        """Notes that a checkpoint is made now."""
        self._saved_at = time.monotonic()

    def __call__(self) -> Order:
        if self._asked():
            return Order.END
        return Order.SAVE if 0 < self._seconds < time.monotonic() - self._saved_at else Order.GO_ON


def train(
    checkpoints: Checkpoints,
    *,
    rank: int,
    orders: Orders,
    checkpoint_steps: int = 0,
    patience: int | None = None,
    more: Callable[[dict[str, float]], dict[str, Any]] = dict,
    run_dir: str = "",
    tracked: Callable[[], Tracked] | None = None,
) -> None:
    """Trains from where `checkpoints` stand to the end, on this worker.

    Args:
        rank: of this worker among all; the first one saves and speaks.
        orders, checkpoint_steps, patience: as in `run_epochs`, which asks for orders after each step.
        more: metrics -> metrics that are reported, with further ones.
        run_dir: folder in which TensorBoard finds the curves, where it is on a disk.
        tracked: opens the run of a tracker that is shown the curves too.
    """
    loop, job, first, begun = checkpoints.loop, checkpoints.job, rank == 0, checkpoints.step
    curves = Curves(run_dir, begun, tracked) if first else None

    def on_step(step: int, total: int, loss: float) -> None:
        checkpoints.losses.append((step, loss))
        if bar is not None:
            bar.update(note=f"loss {loss:.4f}")
        if curves is not None:
            curves.add(step, "train", loss)

    def on_checkpoint(step: int, metrics: dict[str, float], is_best: bool) -> None:
        metrics = more(metrics | {"train_loss": checkpoints.epoch_loss(int(metrics["epoch"]))})
        orders.saved()
        if not first:
            ray.train.report(metrics)
            return
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k in ("loss", "val_loss", "val_exact"))
        print(f"{job}: step {step} of {loop.steps}, saved{': ' + shown if shown else ''}", flush=True)
        if curves is not None and "val_loss" in metrics:
            curves.add(step, "validation", metrics["val_loss"])
        checkpoints.save(metrics, is_best)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(checkpoints.folder))

    with Progress(loop.steps, "steps", f"{job}, optimizer", begun=begun) if first else nullcontext() as bar:
        whole = run_epochs(
            loop, begun, checkpoints.best, on_step, on_checkpoint, checkpoint_steps,
            patience=patience, worse=checkpoints.worse, ask=orders,
        )  # fmt: skip
    if curves is not None:
        curves.close()
    taken = loop.schedule.last_epoch
    if taken == begun:  # the run had ended before; report again, so that the driver finds its checkpoint
        checkpoint = ray.train.Checkpoint.from_directory(checkpoints.folder) if first else None
        ray.train.report(more(checkpoints.history[-1]), checkpoint=checkpoint)
    elif first and not whole:
        print(f"{job}: asked to end, ends at step {taken} of {loop.steps}; the checkpoint is saved", flush=True)
    elif first and taken < loop.steps:
        better = f"no lower validation loss in {patience} epochs"
        why = better if math.isfinite(checkpoints.losses[-1][1]) else "the loss is no number any more"
        print(f"{job}: ends at step {taken}: {why}", flush=True)


def epochs_taken(history: Sequence[Mapping[str, float]], begun: float = 0) -> float:
    """Counts the epochs up to the last checkpoint; they are fewer than planned where a training ended early.

    Args:
        history: metrics of each checkpoint; at an epoch's end they have a val_loss.
        begun: steps that do not count, those of earlier starts.
    """
    whole = next(entry for entry in history if "val_loss" in entry)
    return (history[-1]["step"] - begun) / whole["step"] * (whole["epoch"] + 1)


def keep_curve(checkpoint: str, run_dir: str) -> None:
    """Writes the loss of each step and a chart of it beside the report: losses.csv and loss.svg."""
    path = Path(checkpoint, LOSSES)
    if not path.exists():
        return
    history = json.loads(Path(checkpoint, "history.json").read_text())
    losses = [(int(step), float(loss)) for step, loss in list(csv.reader(path.open()))[1:]]
    validated = [(entry["step"], entry["val_loss"]) for entry in history if "val_loss" in entry]
    storage = Storage(run_dir)
    storage.write_bytes(LOSSES, path.read_bytes())
    storage.write_bytes(CURVE, _chart(losses, validated))


def _chart(losses: list[tuple[int, float]], validated: list[tuple[int, float]]) -> bytes:
    import matplotlib  # workers, which draw nothing, import this module too
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*losses, strict=True), linewidth=0.8, label="training, each step")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss per target token")
    axes.legend()
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "loss"}):  # the same bytes for the same losses
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
