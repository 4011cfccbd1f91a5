"""One user's adapter as data: its settings, its bytes, its PEFT folder, and what is refused. `lora` trains it.

Route: trained A, B -> to_bytes (safetensors, PEFT's names) -> table `adapters` -> from_bytes (all of it checked) ->
PEFT folder -> vLLM or peft.PeftModel. Nothing but safetensors is ever read: a pickle can run code.
Shapes: r rank, A (r, in), B (out, r); the base's weight gets alpha / r * B A added.

[1] "Democratizing Large Language Models via Personalized Parameter-Efficient Fine-tuning", arXiv:2402.04401 (OPPU).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from pplug.retrieval import InTraining, RetrievalConfig
from pplug.settings import Settings, renamed
from pplug.trainable import auto_class

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
IMPORTED = "imported"
"""Stands in the id of an adapter that was trained elsewhere, where others have the identity of their settings."""
_PREFIX = "base_model.model."
_HEADER_BYTES = 100_000_000  # safetensors' own bound


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Modules that the adapter of a base changes by default: in the paper, the projections of the attention."""


class AdapterShape(Settings):
    """Sets which modules an adapter changes, and how. The defaults are the paper's [1]."""

    targets: tuple[str, ...] = Field(("q_proj", "v_proj"), min_length=1)
    """Last names of the linear modules that get an adapter, such as `q_proj`."""
    rank: int = Field(8, gt=0)
    """Rank of an adapter's matrices."""
    alpha: float = Field(8.0, gt=0)
    """Scale of the adapter: its product is multiplied by alpha / rank."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def peft_config(self, base: str) -> dict[str, Any]:
        """adapter_config.json of this shape on the base model in this folder."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": list(self.targets),
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


class LoraConfig(Settings):
    """Sets how an adapter is trained; every value decides the adapter's weights. The defaults are the paper's [1]."""

    shape: AdapterShape = AdapterShape()
    """Modules and rank of an adapter."""
    dropout: float = Field(0.05, ge=0, lt=1)
    """Fraction of the adapter's inputs that are set to zero in training."""
    batch_size: int = Field(16, gt=0)
    """Number of a user's examples per step."""
    epochs: int = Field(2, gt=0)
    """Number of passes over a user's examples."""
    learning_rate: float = Field(1e-4, gt=0)
    """Highest learning rate, reached at the end of the warm-up."""
    weight_decay: float = Field(1e-2, ge=0)
    """Weight decay of AdamW."""
    warmup_fraction: float = renamed("warmup", 0.1, ge=0, lt=1)
    """Fraction of a user's steps over which the learning rate rises; then it falls linearly to zero."""
    max_grad_norm: float = renamed("clip", 0.3, gt=0)
    """Norm of the gradient over all of a user's parameters above which it is scaled down."""
    max_tokens_per_microbatch: int = renamed("micro_tokens", 16_384, gt=0)
    """A step with more tokens than this is computed in parts. Stage base takes parts of 1,024 tokens at most on a CPU,
    where longer ones are slower."""
    storage_dtype: Literal["bfloat16", "float32"] = renamed("stored", "bfloat16")
    """Number format of the weights in the table; they are trained in float32."""
    seed: int = Field(0, ge=0, lt=2**64)
    """Seed of the first weights, the order of the examples and the dropout."""


class ExampleRule(Settings):
    """Sets how an item becomes an example."""

    max_target_tokens: int = Field(128, gt=1)
    """Number of tokens that an answer may have, EOS included; a longer one is cut."""
    retrieve: InTraining = "none"
    """Retrieval that puts earlier items before an item's input. Ask `generate` for adapter+bm25 or adapter+recency
    then."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Number of retrieved items and the room for them, as in `generate`."""


class StackConfig(Settings):
    """Sets how many users share a pass. It decides speed and memory only; no value of an adapter depends on it."""

    tokens: int = Field(16_384, gt=0)
    """Number of tokens in one pass. More bring nothing once the processor is full."""
    memory_gib: float | None = Field(None, gt=0)
    """Memory for what a pass keeps until its backward, and for the adapters with their optimiser states. Default: 8 on
    a CPU, and most of what is free on a GPU."""
    checkpointing: Literal["auto", "on", "off"] = "auto"
    """Choice of computing the inner values of a layer again in the backward pass instead of keeping them. It takes a
    third more time and a fraction of the memory. auto does so on a GPU. Stage base uses it too."""


def target_modules(model: "nn.Module", targets: Sequence[str]) -> "dict[str, nn.Linear]":
    """The linear modules of a base that an adapter changes, by full name, in the model's order: those that texts pass,
    in the decoder and the output head. A base that reads pictures too has others of the same names.

    Raises:
        ValueError: the base has no module of that name, or one that is not linear.
    """
    from torch import nn

    base: Any = model
    names = {module: name for name, module in model.named_modules()}
    body, embeddings = base.get_decoder(), base.get_input_embeddings()
    if all(module is not embeddings for module in body.modules()):
        body = base  # `decoder` is the name of the output layer (ModernBERT)
    decoder, head = names.get(body, ""), names.get(base.get_output_embeddings())
    begin = f"{decoder}." if decoder else ""
    modules = {n: m for n, m in model.named_modules() if n.startswith(begin) or n == head}
    found: dict[str, nn.Linear] = {}
    for target in targets:
        named = {name: module for name, module in modules.items() if name.rpartition(".")[2] == target}
        other = [name for name, module in named.items() if not isinstance(module, nn.Linear)]
        if not named or other:
            linear = {n.rpartition(".")[2] for n, m in modules.items() if isinstance(m, nn.Linear)}
            raise ValueError(
                f"target {target!r}: the base has {'no module of this name' if not named else 'one that is not linear'}"
                f"; its linear modules are {', '.join(sorted(linear)) or 'none'}"
            )
        found |= named
    return {name: found[name] for name in modules if name in found}


def base_shapes(folder: Path, targets: Sequence[str], to_merge: bool = False) -> dict[str, tuple[int, int]]:
    """(in, out) of each module that an adapter of these targets changes, read from the base's config alone.

    Args:
        to_merge: the adapter is to be added to the base's weights.

    Raises:
        ValueError: the base lacks a target, or is no causal model. With `to_merge`: a target has the weight of the
            token embeddings, too.
    """
    import torch
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.is_encoder_decoder:
        raise ValueError(
            f"{folder} is an encoder-decoder ({config.model_type}), and adapters are trained on causal models alone; "
            "choose a causal model, or train a plug"
        )
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    modules = target_modules(model, targets)
    embeddings = model.get_input_embeddings().weight
    for name, module in modules.items():
        if to_merge and module.weight is embeddings:  # a LoRA changes the one and not the other
            raise ValueError(
                f"targets: {name} has the weight of the token embeddings ({folder} ties them), which an adapter of it "
                "would leave as they are; leave it out"
            )
    return {name: (module.in_features, module.out_features) for name, module in modules.items()}


def to_bytes(weights: "Mapping[str, tuple[Tensor, Tensor]]", llm_id: str) -> bytes:
    """Safetensors bytes of an adapter, under PEFT's names; the base's identity stands in the header.

    Args:
        weights: full module name -> A (r, in), B (out, r).
    """
    from safetensors.torch import save

    tensors = {}
    for name, (a, b) in weights.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = b.detach().cpu().contiguous()
    return save(tensors, metadata={"llm_id": llm_id})  # one entry: several come in any order, and bytes are identity


def from_bytes(
    data: bytes, shape: AdapterShape, shapes: Mapping[str, tuple[int, int]], llm_id: str
) -> "dict[str, tuple[Tensor, Tensor]]":
    """An adapter, every part of it checked.

    Args:
        shape: what it is said to be.
        shapes: the base's (in, out) of each module that `shape` names (see `base_shapes`).
        llm_id: the base it is to be used with.

    Returns:
        Full module name -> A (r, in), B (out, r), all finite.

    Raises:
        ValueError: not safetensors (a pickle is never opened), cut, made for another base, a tensor that is missing,
            unknown, of another shape or type, or not finite.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load

    # a header's length, too, may begin with a pickle's first byte; its JSON begins at the ninth
    if data[8:9] != b"{" and (data[:1] == b"\x80" or data[:2] == b"PK"):
        raise ValueError("adapter: these bytes are a pickle, which could run code; only safetensors are read")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"adapter: not a whole safetensors file ({error}); train or export it anew") from error
    made_for = _metadata(data).get("llm_id")
    if made_for != llm_id:
        raise ValueError(f"adapter: made for base {made_for}, but the base here is {llm_id}; train it on this base")
    weights = {}
    for name, (width_in, width_out) in shapes.items():
        pair = []
        for part, wanted in (("lora_A", (shape.rank, width_in)), ("lora_B", (width_out, shape.rank))):
            tensor = tensors.pop(f"{_PREFIX}{name}.{part}.weight", None)
            if tensor is None:
                raise ValueError(f"adapter: no tensor {part} for module {name}, which {shape.targets} names")
            if tuple(tensor.shape) != wanted:
                raise ValueError(
                    f"adapter: {part} of {name} has shape {tuple(tensor.shape)}, expected {wanted} (rank {shape.rank})"
                )
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(f"adapter: {part} of {name} is {tensor.dtype}, expected 16- or 32-bit floats")
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"adapter: {part} of {name} holds values that are not finite; train it anew")
            pair.append(tensor)
        weights[name] = (pair[0], pair[1])
    if not all(_adds_nothing(tensors, name) for name in tensors):
        raise ValueError(f"adapter: {len(tensors)} tensors that the base or {shape.targets} does not have")
    return weights


def _adds_nothing(tensors: "Mapping[str, Tensor]", name: str) -> bool:
    """True for a part of a module whose B is zero, as adapters of earlier releases hold for what reads pictures."""
    b = tensors.get(name.replace(".lora_A.", ".lora_B."))
    return b is not None and ".lora_B." in name.replace(".lora_A.", ".lora_B.") and not bool(b.any())


def _metadata(data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little")
    assert 0 < size < min(len(data), _HEADER_BYTES), "safetensors has read this header"
    return json.loads(data[8 : 8 + size]).get("__metadata__") or {}


def content_id(data: bytes) -> str:
    """16 hex characters of an adapter's bytes."""
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def write_folder(folder: Path, data: bytes, shape: AdapterShape, base: str) -> None:
    """A PEFT folder, as `peft.PeftModel.from_pretrained` and vLLM load it; `data` has been through `from_bytes`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(shape.peft_config(base), indent=2))
    (folder / WEIGHTS_FILE).write_bytes(data)
