"""The guard of every actor of a stage: a refusal is told at once, and deaths that are its own fault are limited.

Ray Data starts an actor again as often as it dies, and replaces one whose constructor fails a few times
(`infra.session.INIT_DEATHS`): that is right for a node that went away or memory that is not free yet, and wrong for a
row that kills the engine, or a config that the constructor refuses. Both are told here, since `map_batches` takes no
number of restarts any more (Ray 2.64 drops it).
"""

import uuid
from functools import cache
from typing import Any

import ray

from infra import nodes
from infra.errors import InputError

_ASK_TIMEOUT_S = 60.0


class Deaths:
    """Actor of the driver: counts for each actor of a pool how often it has died on a node that lives on."""

    def __init__(self) -> None:
        self._starts: dict[str, list[str]] = {}

    def started(self, actor: str, node: str) -> int:
        """Notes a start of an actor on a node; returns how often it has died before, lost nodes not counted."""
        before = self._starts.setdefault(actor, [])
        alive = {one["NodeID"] for one in ray.nodes() if one["Alive"]}
        died = sum(one in alive for one in before)
        before.append(node)
        return died


def counter() -> str:
    """Name of the counter of this driver's session, which starts with the first stage that has actors.

    It stands beside the driver, so that it outlives whatever other nodes are lost.
    """
    context = ray.get_runtime_context()
    name, _ = _counter(context.get_job_id(), context.get_node_id())
    return name


@cache  # keeps the handle, without which Ray would end it
def _counter(job: str, node: str) -> tuple[str, Any]:
    name = f"deaths-{uuid.uuid4().hex}"
    return name, ray.remote(Deaths).options(name=name, max_restarts=-1, **nodes.beside_driver()).remote()


def guarded(stage: type, restarts: int, deaths: str) -> type:
    """Returns the stage with a constructor that may refuse and that counts its starts.

    Args:
        restarts: number of deaths after which an actor's next start fails, which ends the job.
        deaths: name of the counter.
    """

    class Guarded(stage):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any) -> None:
            self.refusal: InputError | None = None
            died = deaths_so_far(deaths)
            if died > restarts:
                raise RuntimeError(
                    f"{stage.__name__} died {died} times on nodes that are alive, and may start again {restarts} times "
                    "(an engine: max_engine_restarts): a row kills it, or memory runs out; see the worker's log"
                )
            try:
                super().__init__(*args)
            except InputError as error:  # Ray would start another actor, which would refuse just the same
                self.refusal = error

        def __call__(self, batch: Any) -> Any:
            if self.refusal is not None:
                raise self.refusal
            return super().__call__(batch)

    Guarded.__name__ = Guarded.__qualname__ = stage.__name__
    return Guarded


def deaths_so_far(deaths: str) -> int:
    """Returns how often this actor has died before, lost nodes not counted."""
    context = ray.get_runtime_context()
    actor, node = context.get_actor_id(), context.get_node_id()
    if actor is None:
        return 0
    died: int = ray.get(ray.get_actor(deaths).started.remote(actor, node), timeout=_ASK_TIMEOUT_S)
    return died
