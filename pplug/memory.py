"""Memory of a training: layers that are computed twice instead of kept, and passes that fit what is free.

Gradient checkpointing keeps a layer's input alone and computes the rest again in the backward pass: 8,192 bytes per
token and layer instead of 147,752, for a layer of Qwen3-8B's width in bfloat16. A pass that does not fit nevertheless
is taken again in halves. Neither changes a result beyond rounding.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator of a CPU
    "CUBLAS_STATUS_ALLOC_FAILED",  # a handle that is made at the first product of a thread
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
)
FREE_SHARE = 0.8
"""Fraction of the free memory that a pass may take: the rest is for what the count does not see."""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The model's layers, in order: those that transformers can compute again in the backward pass."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)}
    inner = {name for name in found for other in found if name.startswith(f"{other}.")}
    return [module for name, module in found.items() if name not in inner]


def checkpoint_layers(model: nn.Module, again: Callable[[], tuple[Any, Any]] | None = None) -> int:
    """Makes a model keep the input of each of its layers alone for the backward pass; it stays in eval mode.

    transformers' own switch works in training mode only, which would turn on the model's dropout.

    Args:
        again: gives two context managers when a layer is computed: that of the first and that of the second time.

    Returns:
        How many layers were changed; 0 where the model has none of transformers' kind.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, again or _nothing)
    return len(layers)


def is_checkpointed(model: nn.Module) -> bool:
    """True after `checkpoint_layers`."""
    return any(map(_is_computed_twice, layers_of(model)))


def keep_all(model: nn.Module) -> None:
    """Takes back `checkpoint_layers`."""
    for layer in filter(_is_computed_twice, layers_of(model)):
        layer.forward = layer.forward.args[0]


def _is_computed_twice(layer: nn.Module) -> bool:
    return isinstance(layer.forward, partial) and layer.forward.func is _checkpointed


def _nothing() -> tuple[Any, Any]:
    return nullcontext(), nullcontext()


def _checkpointed(forward: Callable[..., Any], again: Callable[[], tuple[Any, Any]], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=again, **kwargs)


def wanted(choice: str, device: Any) -> bool:
    """True if layers are to be computed again: auto does so on a GPU, whose memory is what is short."""
    return choice == "on" or (choice == "auto" and torch.device(device).type == "cuda")


def kept_bytes(run: Callable[[], Any], but: Sequence[Tensor] = ()) -> int:
    """Bytes that a forward pass keeps for its backward.

    Args:
        run: computes a loss, whose graph is dropped afterwards.
        but: tensors that are not counted, such as the weights.
    """
    own, kept = {_storage(tensor).data_ptr() for tensor in but}, dict[int, Any]()

    def keep(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        at = storage.data_ptr()
        if at not in own and not (at in kept and kept[at].nbytes()):  # an emptied one's address is another's now
            kept[at] = storage  # alive, so that no other one gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = run()
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: Tensor) -> Any:
    """A tensor's storage; of one that is spread over workers that of the part which is here."""
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()


def free_bytes(device: Any, sharers: int = 1) -> int:
    """Memory that a pass on this device may take: of a GPU what is free there, of a CPU what the machine or its
    container has left, divided among `sharers` workers."""
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    free = _number(Path("/proc/meminfo"), "MemAvailable:")
    free = 2**63 if free is None else 1024 * free
    limit, used = (_number(Path("/sys/fs/cgroup", name)) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        # what is kept of files counts as used, and the kernel gives it back where the limit is reached
        of_files = _number(Path("/sys/fs/cgroup/memory.stat"), "inactive_file") or 0
        free = min(free, max(0, limit - used + of_files))
    return free // sharers


def _number(path: Path, after: str = "") -> int | None:
    """The number in a file of the kernel's, or the one behind a word; None where there is none."""
    try:
        words = path.read_text().split()
        return int(words[words.index(after) + 1 if after else 0])
    except (OSError, ValueError, IndexError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """True if an allocation has failed. Those beside torch's allocator of a GPU have no class of their own for it."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


def set_free() -> None:
    """Gives what a failed pass has left back to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
