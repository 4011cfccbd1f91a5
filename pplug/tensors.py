"""Single tensors of a model folder, read from its files without the model: safetensors, else pickles."""

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pplug.identity import INDICES, weight_files

if TYPE_CHECKING:
    from torch import Tensor, nn


def tensor_files(folder: Path) -> dict[str, Path]:
    """File of each tensor, by the tensor's name."""
    index = next((folder / name for name in INDICES if (folder / name).is_file()), None)
    if index is not None:
        named: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in named.items() if (folder / file).is_file()}
    return {name: path for path in weight_files(folder) for name in _names(path)}


def _names(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    return list(_pickled(path))


def _pickled(path: Path) -> "dict[str, Tensor]":
    """Tensors of a pickle, mapped and not read, unless it has torch's form of before 1.6; code in it is refused."""
    import torch

    mapped = zipfile.is_zipfile(path)
    found: dict[str, Tensor] = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    return found


def shapes(path: Path) -> "dict[str, Tensor]":
    """Tensors of a safetensors file without their values, on PyTorch's meta device, in float32."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as tensors:
        return {name: torch.empty(tensors.get_slice(name).get_shape(), device="meta") for name in tensors.keys()}


def shape_of(path: Path, name: str) -> tuple[int, ...]:
    """Shape of a tensor in a file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())
    return tuple(_pickled(path)[name].shape)


def read_rows(path: Path, name: str, rows: Sequence[int]) -> "Tensor":
    """Some rows of a matrix in a file, float32.

    Raises:
        IndexError: it has fewer rows.
    """
    import torch

    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as tensors:
            matrix = tensors.get_slice(name)
            if max(rows, default=0) >= matrix.get_shape()[0]:
                raise IndexError(f"{name} of {path.name} has {matrix.get_shape()[0]} rows, none of number {max(rows)}")
            return torch.cat([matrix[row : row + 1] for row in rows]).float()
    return _pickled(path)[name][list(rows)].float()


def refuse_missing(folder: Path, model: "nn.Module", missing: Iterable[str]) -> None:
    """Refuses a model whose files lack some of its weights, which transformers then draws at random.

    Args:
        missing: names that transformers did not find, without those of weights that are tied to another. A pooler's
            do not count, since nothing here is computed with it, nor do tables that the class computes (Pegasus).

    Raises:
        ValueError: a parameter is missing; the message names one.
    """
    computed = [f"{name}." for name, part in model.named_modules() if "Sinusoidal" in type(part).__name__]
    own = {name for name, _ in model.named_parameters() if "pooler" not in name.split(".")}
    own = {name for name in own if not name.startswith(tuple(computed))}
    lacking = sorted(own.intersection(missing))
    if lacking:
        raise ValueError(
            f"{folder}: {len(lacking)} of the weights that transformers' {type(model).__name__} computes with are not "
            f"in its files, such as {lacking[0]}: these are of another model, maybe one whose code is its own, which "
            "is not run; take a model that transformers has"
        )
