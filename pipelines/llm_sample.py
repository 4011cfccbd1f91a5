"""The sample of an LLM (`pplug/stand_in.py`) that stands beside adapters: the stored one, or one taken by a worker.

A driver often runs on the head of a cluster, which may be too small for the LLM's weights.
"""

from pathlib import Path

import ray

from infra.snapshot import Snapshot
from pplug.llm import LLMConfig
from pplug.stand_in import SAMPLE, llm_sample


def stored(adapters: Snapshot, llm_id: str) -> str | None:
    """Returns the sample beside these adapters; None if there is none, or if they stand on another LLM."""
    return adapters.metadata.get(SAMPLE) if adapters.metadata.get("llm_id") == llm_id else None


def is_here(llm: LLMConfig) -> bool:
    """Says whether the weights lie on this machine already: nothing is fetched to read a few rows of them."""
    return llm.model.startswith("package:") or Path(llm.model).expanduser().is_dir()


def take(llm: LLMConfig, gpus: float) -> str:
    """Takes the sample: here if the weights lie on this machine, otherwise in a Ray task, to whose node they come.

    Args:
        gpus: GPUs that the task asks for, as a worker that loads the LLM does; it then runs where such a worker may.
    """
    if is_here(llm):
        return llm_sample(llm)
    sample: str = ray.get(ray.remote(_take).options(num_gpus=gpus).remote(llm))
    return sample


def _take(llm: LLMConfig) -> str:
    """Runs in a worker: as a function of this package, so that the worker knows how to fetch an address."""
    return llm_sample(llm)
