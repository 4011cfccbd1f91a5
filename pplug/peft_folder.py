"""A LoRA that was trained elsewhere: a PEFT folder, checked part by part, as an adapter of ours.

What changes more than the product of two matrices is refused by its name: it would be served as something else.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pplug.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterShape, base_shapes

if TYPE_CHECKING:
    from torch import Tensor

_PREFIX = "base_model.model."
_UNKNOWN = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that were trained whole",
    "lora_bias": "a bias of its own",
    "fan_in_fan_out": "transposed weights",
    "rank_pattern": "a rank of its own in some modules",
    "alpha_pattern": "a scale of its own in some modules",
    "layer_replication": "repeated layers",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "trained parameters beside modules",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "routing among adapters (Arrow)",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
"""Settings of PEFT whose adapters are more than alpha / r * B A on linear modules, or on a changed base."""
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read_lora(folder: Path, base: Path) -> "tuple[AdapterShape, dict[str, tuple[Tensor, Tensor]]]":
    """The LoRA in a PEFT folder, plain or rsLoRA.

    Modules of a target that the adapter leaves alone get zeros, so that it changes what it changed and no more. Those
    beside the decoder that it has and leaves alone, as PEFT makes them of what reads pictures, are left out.

    Args:
        base: folder of the model that it is to stand on.

    Returns:
        Its shape (of rsLoRA with the alpha that gives the same scale) and, by full module name, A (r, in), B (out, r).

    Raises:
        ValueError: no PEFT folder, another kind of adapter, one that does not fit the base or changes nothing of it.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: no {name}; expected a folder as PEFT saves an adapter, with safetensors")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    _refuse_other_kinds(folder, config)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder}: {WEIGHTS_FILE} is not a whole safetensors file ({error})") from error
    pairs = _pairs(folder, tensors)
    targets, shapes = _targets(pairs, base)
    pairs = {name: pair for name, pair in pairs.items() if name in shapes or bool(pair[1].any())}
    unmatched = sorted(pairs.keys() - shapes.keys())
    if unmatched:
        raise ValueError(
            f"{folder}: {len(unmatched)} of {len(pairs)} modules are not in the base {base}, such as {unmatched[0]}; "
            f"the adapter was made for {config.get('base_model_name_or_path')}"
        )
    rank = int(config["r"])
    for name, (a, b) in pairs.items():
        wanted = (rank, shapes[name][0]), (shapes[name][1], rank)
        if (tuple(a.shape), tuple(b.shape)) != wanted:
            raise ValueError(
                f"{folder}: module {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, expected {wanted}"
            )
        if not bool(torch.isfinite(a).all()) or not bool(torch.isfinite(b).all()):
            raise ValueError(f"{folder}: module {name} holds values that are not finite")
    if not any(bool(a.any()) and bool(b.any()) for a, b in pairs.values()):
        raise ValueError(f"{folder}: the adapter changes nothing: A or B is zero in each of its modules")
    kind = next(iter(pairs.values()))[0].dtype
    for name, (width_in, width_out) in shapes.items():
        if name not in pairs:
            pairs[name] = torch.zeros(rank, width_in, dtype=kind), torch.zeros(width_out, rank, dtype=kind)
    alpha = float(config["lora_alpha"]) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
    return AdapterShape(targets=targets, rank=rank, alpha=alpha), {name: pairs[name] for name in shapes}


def _targets(
    pairs: "Mapping[str, tuple[Tensor, Tensor]]", base: Path
) -> tuple[tuple[str, ...], dict[str, tuple[int, int]]]:
    """Last names of an adapter's modules, and the shapes of the base's modules of these names."""
    targets = tuple(sorted({name.rpartition(".")[2] for name in pairs}))
    try:
        return targets, base_shapes(base, targets)
    except ValueError:  # a name may be one of what reads pictures alone, which the adapter leaves alone
        targets = tuple(sorted({name.rpartition(".")[2] for name, (_, b) in pairs.items() if bool(b.any())}))
        if not targets:
            raise
        return targets, base_shapes(base, targets)


def _refuse_other_kinds(folder: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder}: peft_type is {config.get('peft_type')}; only LORA is taken")
    more = [f"{what} ({key})" for key, what in _UNKNOWN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        more.append(f"trained biases (bias={config['bias']})")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        more.append(f"a base that it has changed (init_lora_weights={config['init_lora_weights']})")
    if more:
        raise ValueError(f"{folder}: the adapter has {', '.join(more)}; only plain LoRA and rsLoRA are taken")


def _pairs(folder: Path, tensors: "Mapping[str, Tensor]") -> "dict[str, tuple[Tensor, Tensor]]":
    """A and B by module; PEFT writes nothing else of a plain LoRA."""
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix(_PREFIX).partition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise ValueError(f"{folder}: tensor {name} is no part of a plain LoRA")
        parts.setdefault(module, {})[rest[0]] = tensor
    if not parts:
        raise ValueError(f"{folder}: the adapter changes nothing: it has no module")
    whole = {name: (pair.get("A"), pair.get("B")) for name, pair in parts.items()}
    for name, (a, b) in whole.items():
        if a is None or b is None:
            raise ValueError(f"{folder}: module {name} has only one of A and B")
    return whole  # type: ignore[return-value]
