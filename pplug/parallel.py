"""One frozen LLM over several workers: each holds a part of every layer's matrices (tensor parallelism).

The plan of a family (which matrix is cut along rows, which along columns) and the loading of parts alone are
transformers' own. Token embeddings and head stay whole on each worker: persona rows are put between embeddings outside
the model, and logits are computed in pieces. Workers are a mesh of dp x tp: those of one tp group take the same
samples, and the groups share a batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig
from transformers.distributed import mixin
from transformers.distributed.utils import TransformersDeviceMesh

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
    parts: Any = None
    """Mesh of the workers that hold one LLM together; None where each holds a whole one."""

    @classmethod
    def of(cls, rank: int, world: int, tensor: int, device: str) -> "Mesh":
        """The mesh of `world` workers, `tensor` of which hold one LLM together.

        Raises:
            ValueError: the number of workers is no multiple of it.
        """
        if world % tensor:
            raise ValueError(f"{world} workers cannot hold LLMs in groups of {tensor}; choose a multiple of {tensor}")
        if tensor == 1:
            return cls(rank, world)
        mesh = init_device_mesh(device, (world // tensor, 1, 1, tensor), mesh_dim_names=("dp", "pp", "fsdp", "tp"))
        return cls(rank // tensor, world // tensor, tensor, mesh["pp", "fsdp", "tp"])


@contextmanager
def spread(mesh: Mesh, kind: Any, config: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `from_pretrained` by which this worker loads its part of a model.

    transformers makes a mesh of all processes by itself, and knows no groups of them with a model each: it is given
    ours meanwhile.

    Args:
        kind: the Auto class that loads the model; `config`: the model's.

    Raises:
        ValueError: transformers has no plan for this family.
    """
    if mesh.parts is None:
        yield {}
        return
    with torch.device("meta"):
        model = kind.from_config(config)
    if not model.tp_plan:
        raise ValueError(
            f"{type(model).__name__}: transformers has no plan that spreads this model; leave llm.parallel out"
        )
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    names = {name for name, module in model.named_modules() if module in ends}
    whole = {name: _WHOLE for name in names if name in model.tp_plan}
    device = mesh.parts.device_type
    own = mixin.initialize_distributed_mesh
    place = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    mixin.initialize_distributed_mesh = lambda wanted: (place, TransformersDeviceMesh(mesh.parts, mesh.parts))
    try:
        yield {"distributed_config": DistributedConfig(tp_size=mesh.parts["tp"].size(), tp_plan=whole or "auto")}
    finally:
        mixin.initialize_distributed_mesh = own


def is_spread(model: Any) -> bool:
    """True if a part of the model's weights lies on other workers."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
