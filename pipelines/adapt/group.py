"""Adapters on a base that several processes hold together (`llm.parallel.tensor`).

One of them is the stage's own process, which Ray has given all their GPUs; the others are its children, which take the
same users through the same steps. A child ends with the process that it belongs to.
"""

import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra import device
from pplug.adapter import LoraConfig, StackConfig
from pplug.llm import FrozenLLM, LLMConfig
from pplug.lora import StackedTrainer, UserExamples
from pplug.lora_user import Fitted
from pplug.parallel import Mesh

TIMEOUT = timedelta(hours=2)
"""Time that a process waits for the others: while rows are written, nobody takes the next adapter."""


class TrainerGroup:
    """A `StackedTrainer` over several processes."""

    def __init__(self, llm: LLMConfig, lora: LoraConfig, stack: StackConfig, threads: int) -> None:
        """Raises ValueError: as `StackedTrainer`, or transformers has no plan that spreads the base."""
        kind = device.assigned().type
        self._folder = tempfile.TemporaryDirectory()
        how = (str(Path(self._folder.name, "meet")), kind, llm, lora, stack, threads)
        spawn = multiprocessing.get_context("spawn")
        self._pipes = []
        for rank in range(1, llm.parallel.tensor):
            here, there = spawn.Pipe()
            spawn.Process(target=_peer, args=(there, rank, *how), daemon=True).start()
            there.close()
            self._pipes.append(here)
        self.trainer = _trainer(0, *how)

    def fit(self, users: Iterable[UserExamples]) -> Iterator[Fitted]:
        """As `StackedTrainer.fit`."""
        users = list(users)
        for pipe in self._pipes:
            pipe.send(users)
        yield from self.trainer.fit(users)


def _peer(pipe: Any, rank: int, *how: Any) -> None:
    try:
        trainer = _trainer(rank, *how)
    except ValueError:  # the first process says it
        return
    with suppress(EOFError):
        while True:
            for _ in trainer.fit(pipe.recv()):
                pass


def _trainer(
    rank: int, meet: str, kind: str, llm: LLMConfig, lora: LoraConfig, stack: StackConfig, threads: int
) -> StackedTrainer:
    """This process's part of the base, with a trainer on it."""
    torch.set_num_threads(threads)
    if kind == "cuda":
        torch.cuda.set_device(rank)
    backend, workers = "nccl" if kind == "cuda" else "gloo", llm.parallel.tensor
    dist.init_process_group(backend, init_method=f"file://{meet}", rank=rank, world_size=workers, timeout=TIMEOUT)
    mesh = Mesh.of(rank, workers, workers, kind)
    own = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    return StackedTrainer(FrozenLLM.load(llm, mesh, own).model, lora, stack)
