"""A LoRA added to the weights of its base, tensor by tensor: neither the base nor one of its files is in memory as a
whole."""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from pplug.adapter import CONFIG_FILE, WEIGHTS_FILE
from pplug.identity import weight_files

_PREFIX = "base_model.model."
_COPIED = ("config.json", "generation_config.json", "model.safetensors.index.json")
_PROCESSORS = "*processor_config.json"


def can_merge(base: Path, adapter: Path) -> bool:
    """True if the base's files have the adapter's modules under the names that the loaded model has."""
    known = {name for file in _weights(base) for name in _names(file)}
    return all(f"{module}.weight" in known for module in _modules(adapter))


def merge_files(base: Path, adapter: Path, output: Path) -> None:
    """Writes the base's weight files with alpha / r * B A added, and its configs, into a folder that is there.

    Values are those of PEFT's `merge_and_unload`, in the types that the base's files have.

    Args:
        adapter: folder as PEFT saves it, of a plain LoRA.

    Raises:
        FloatingPointError: as `refuse_not_finite`.
    """
    config = json.loads((adapter / CONFIG_FILE).read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(adapter / WEIGHTS_FILE)
    for file in _weights(base):
        shutil.copyfile(file, output / file.name)
        begins = _begins(file)
        with safe_open(file, "pt") as source, (output / file.name).open("r+b") as merged:
            for name in begins:  # one that the adapter changes has the same type and shape as before, and so its place
                module = name.removesuffix(".weight")
                b = tensors.get(f"{_PREFIX}{module}.lora_B.weight")
                if b is not None:
                    delta = b.float() @ tensors[f"{_PREFIX}{module}.lora_A.weight"].float() * scale
                    merged.seek(begins[name])
                    merged.write(_added(module, source.get_tensor(name), delta))
    for name in _COPIED:
        if (base / name).exists():
            shutil.copy(base / name, output / name)


def _begins(file: Path) -> dict[str, int]:
    """Byte of a safetensors file at which each tensor begins: behind a header of JSON, whose length comes first."""
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        header = json.loads(source.read(length))
    return {name: 8 + length + facts["data_offsets"][0] for name, facts in header.items() if name != "__metadata__"}


def _added(module: str, weight: torch.Tensor, delta: torch.Tensor) -> memoryview:
    """Bytes of the sum, in the weight's own type."""
    merged = (weight + delta).to(weight.dtype).contiguous()
    refuse_not_finite(module, merged)
    return memoryview(merged.view(torch.uint8).numpy())


def refuse_not_finite(module: str, weight: torch.Tensor) -> None:
    """Refuses a merged weight that no model could compute with: a step's loss is taken before the step, so that no loss
    tells what the last one made.

    Raises:
        FloatingPointError: the weight holds a value that is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise FloatingPointError(f"with the adapter added, the weight of {module} holds values that are not finite")


def copy_processors(base: Path, output: Path) -> None:
    """Copies what a model that also reads pictures needs, without which vLLM does not start it for texts either."""
    for path in base.glob(_PROCESSORS):
        shutil.copy(path, output / path.name)


def _weights(base: Path) -> list[Path]:
    """The files that transformers reads the weights from: a folder may also hold them in the publisher's own form
    (`consolidated*.safetensors`), which vLLM would prefer."""
    return [file for file in weight_files(base) if file.suffix == ".safetensors"]


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as source:
        return list(source.keys())


def _modules(adapter: Path) -> set[str]:
    names = _names(adapter / WEIGHTS_FILE)
    return {name.removeprefix(_PREFIX).partition(".lora_")[0] for name in names}
