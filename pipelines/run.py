"""The begin of every job: its report, and how much of a node's processor an actor takes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infra.cores import cores
from infra.report import RunReport, new_run_id
from pipelines.job_config import JobConfig


def begin(
    job: str, config: JobConfig, *, run_id: str | None = None, shown: Mapping[str, Any] | None = None
) -> RunReport:
    """Makes the report of a run: under the run id given or that the config names, or a new one.

    Args:
        shown: what the report says of the config, where that is not all of it.
    """
    run_id = run_id or config.run_id or new_run_id(job)
    allowed = getattr(config, "max_reject_fraction", 1.0)
    return RunReport(
        job, run_id, config.model_dump() if shown is None else shown, config.run_dir or f"runs/{run_id}", allowed
    )


@dataclass(frozen=True)
class CpuShare:
    """The share of a node's cores that one of several actors takes; counted on the node where the actor runs."""

    actors: int = 1
    """Number of actors that share the cores of a node."""
    threads: int | None = None
    """Number of threads, where the user has given it."""

    @classmethod
    def of(cls, workers: int, gpus_per_worker: float, threads: int | None = None) -> "CpuShare":
        """The share of each of some workers: with GPUs the cores wait for the GPU, so that each may take them all."""
        return cls(1 if gpus_per_worker else workers, threads)

    def torch_threads(self) -> int:
        return self.threads or max(1, cores() // self.actors)
