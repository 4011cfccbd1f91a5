"""One frozen LLM over several workers: each holds a part of every layer's matrices.

Tensor parallelism: each worker computes with its part. The plan of a family (which matrix is cut along rows, which
along columns) and the loading of parts alone are transformers' own. Sharding (FSDP2): a layer is put together on each
worker while it is computed, and the workers take different samples. Token embeddings and head stay whole on each
worker: persona rows are put between embeddings outside the model, and logits are computed in pieces. Workers are a mesh
of dp x fsdp x tp: those of one tp group take the same samples, and the groups share a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig
from transformers.distributed import mixin
from transformers.distributed.utils import TransformersDeviceMesh

from pplug.memory import layers_of

_WHOLE = "replicated_with_grad_allreduce"
"""transformers' word for a module that every worker holds whole."""


@dataclass(frozen=True)
class Mesh:
    """This worker's place among all."""

    rank: int
    """Place among those that share a batch: workers, or groups of workers that hold one LLM together."""
    world: int
    """Number of those that share a batch."""
    copies: int = 1
    """Number of workers that take the same samples."""
    shards: int = 1
    """Number of workers that put each layer together while it is computed, and so take as many passes as each other."""
    parts: Any = None
    """Mesh of the workers that hold one LLM together; None where each holds a whole one."""

    @classmethod
    def of(cls, rank: int, world: int, tensor: int, device: str, shard: int = 1) -> "Mesh":
        """The mesh of `world` workers, `tensor` times `shard` of which hold one LLM together.

        Raises:
            ValueError: the number of workers is no multiple of it.
        """
        group = tensor * shard
        if world % group:
            raise ValueError(f"{world} workers cannot hold LLMs in groups of {group}; choose a multiple of {group}")
        if group == 1:
            return cls(rank, world)
        mesh = init_device_mesh(device, (world // group, 1, shard, tensor), mesh_dim_names=("dp", "pp", "fsdp", "tp"))
        return cls(rank // tensor, world // tensor, tensor, shard, mesh["pp", "fsdp", "tp"])


@contextmanager
def spread(mesh: Mesh, kind: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` by which this worker loads its part of a model.

    transformers makes a mesh of all processes by itself, and knows no groups of them with a model each: it is given
    ours meanwhile.

    Args:
        kind: the Auto class that loads the model; `config`: the model's.

    Raises:
        ValueError: transformers has no plan for this family, or no layers of it.
    """
    if mesh.parts is None:
        yield {}
        return
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=False)
    if (mesh.copies > 1 and not model.tp_plan) or (mesh.shards > 1 and not layers_of(model)):
        raise ValueError(
            f"{type(model).__name__}: transformers has no plan that spreads this model; leave llm.parallel out"
        )
    # the ends stay whole, since they are used beside the model's own forward
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = {name for name, module in model.named_modules() if module in ends}
    whole = {name: _WHOLE for name in names if name in model.tp_plan}
    device = mesh.parts.device_type
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    own = {
        "initialize_distributed_mesh": lambda wanted: (place, TransformersDeviceMesh(mesh.parts, mesh.parts)),
        "apply_fully_sharded_data_parallelism": _shard_layers,
    }
    theirs = {name: getattr(mixin, name) for name in own}
    plan = {"tp_plan": whole or "auto"} if mesh.copies > 1 else {}
    try:
        for name, function in own.items():
            setattr(mixin, name, function)
        yield {"distributed_config": DistributedConfig(tp_size=mesh.copies, fsdp_size=mesh.shards, **plan)}
    finally:
        for name, function in theirs.items():
            setattr(mixin, name, function)


def _shard_layers(model: Any, meshes: TransformersDeviceMesh) -> Any:
    """Shards the layers alone, each by itself; transformers would shard embeddings and head too."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=meshes.get_mesh("fsdp"), reshard_after_forward=True)  # each is a root, which would not
    return model


def is_sharded(model: Any) -> bool:
    """True if layers are put together while they are computed, which all workers have to do at the same time."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_spread(model: Any) -> bool:
    """True if a part of the model's weights lies on other workers."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@dataclass(frozen=True)
class Cut:
    """The part of a linear module that is here, for adapters, which every worker holds whole.

    An adapter adds B A x. Where the module is cut along its output, B's rows of this part are used, and what goes back
    into A x is summed over the workers. Where it is cut along its input, x is a part: A's columns for it are used, and
    A x is summed. Each way one of the two matrices has its whole gradient on every worker, the other a part of it.
    """

    by_input: bool
    part: slice
    width: int
    """Values of the whole side that is cut."""
    workers: int
    group: Any

    @classmethod
    def of(cls, module: torch.nn.Linear) -> "Cut | None":
        """The cut of a module; None for one that every worker holds whole.

        Raises:
            ValueError: the workers hold parts of unlike sizes.
        """
        weight = module.weight
        if not isinstance(weight, DTensor) or weight.placements[0].is_replicate():
            return None
        side, mesh = weight.placements[0].dim, weight.device_mesh
        width, workers = weight.shape[side], mesh.size()
        if width % workers:
            raise ValueError(f"a module of width {width} cannot be cut into {workers} like parts for adapters")
        start = mesh.get_local_rank() * width // workers
        return cls(side == 1, slice(start, start + width // workers), width, workers, mesh.get_group())

    def inner(self, a: Tensor) -> Tensor:
        """The columns of A (r, in) that x has values for."""
        return a[:, self.part] if self.by_input else a

    def outer(self, b: Tensor) -> Tensor:
        """The rows of B (out, r) that the module has outputs for."""
        return b if self.by_input else b[self.part]

    def joined(self, low: Tensor) -> Tensor:
        """A x of all workers, from this one's."""
        return (_SumForward if self.by_input else _SumBackward).apply(low, self.group)

    @property
    def shares(self) -> tuple[float, float]:
        """Factors of the gradients of A and B before they are summed over the workers."""
        whole = 1 / self.workers
        return (1.0, whole) if self.by_input else (whole, 1.0)


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        value = value.clone()
        dist.all_reduce(value, group=group)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class _SumBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None
