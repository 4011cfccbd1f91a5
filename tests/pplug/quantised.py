"""Tiny Llamas as compressed-tensors and transformers' fp8 store them, made in place."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.pplug.models import tiny_llama

_ROUNDED = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_PER_TOKEN = _ROUNDED | {"strategy": "token", "dynamic": True}


def groups(activations: bool) -> dict[str, Any]:
    """config_groups of compressed-tensors: weights in 8 bits, and activations if asked."""
    inputs = _PER_TOKEN if activations else None
    return {"group_0": {"targets": ["Linear"], "weights": _ROUNDED, "input_activations": inputs}}


def said(folder: Path, quantization: dict[str, Any]) -> Path:
    """Puts a quantization_config into a folder's config."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return folder


def compressed(folder: Path, activations: bool) -> Path:
    """Weights in FP8, with a scale per row; FP8-dynamic where activations are rounded too."""
    tiny_llama(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            scale = weight.abs().amax(1, keepdim=True) / 448  # the largest value of the format
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head"]}
    return said(folder, {"quant_method": "compressed-tensors", "config_groups": groups(activations)} | how)


def fp8(folder: Path) -> Path:
    """Weights in FP8, with a scale per block of 64 x 64."""
    tiny_llama(folder)
    tensors = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if "_proj" in name:
            blocks = weight.view(weight.shape[0] // 64, 64, weight.shape[1] // 64, 64)
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).view_as(weight).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    how = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [64, 64]}
    return said(folder, {"quant_method": "fp8"} | how)
