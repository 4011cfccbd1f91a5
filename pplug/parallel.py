"""One frozen LLM over several workers: each holds a part of every layer's matrices.

Tensor parallelism: each worker computes with its part. The plan of a family (which matrix is cut along rows, which
along columns) and the loading of parts alone are transformers' own. Sharding (FSDP2): a layer is put together on each
worker while it is computed, and the workers take different samples. Token embeddings and head stay whole on each
worker: persona rows are put between embeddings outside the model, and logits are computed in pieces. Workers are a mesh
of dp x fsdp x tp: those of one tp group take the same samples, and the groups share a batch.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
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
        model = kind.from_config(config)
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
    with ExitStack() as meanwhile:
        for name, function in own.items():
            meanwhile.enter_context(patch.object(mixin, name, function))
        plan = {"tp_plan": whole or "auto"} if mesh.copies > 1 else {}
        yield {"distributed_config": DistributedConfig(tp_size=mesh.copies, fsdp_size=mesh.shards, **plan)}


def _shard_layers(model: Any, meshes: TransformersDeviceMesh) -> Any:
    """Shards the layers alone, each by itself; transformers would shard embeddings and head too."""
    for layer in layers_of(model):
        fully_shard(layer, mesh=meshes.get_mesh("fsdp"))
    return model


def is_sharded(model: Any) -> bool:
    """True if layers are put together while they are computed, which all workers have to do at the same time."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_spread(model: Any) -> bool:
    """True if a part of the model's weights lies on other workers."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
