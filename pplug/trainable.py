"""LLMs that nothing can be learned through, refused by their config before a training starts anything.

A plug and adapters learn from the gradient that goes back through the frozen LLM. Some quantised layers let none pass,
and transformers computes with them without a word: a plug would stay as it was drawn.
Measured with tiny random models on a CPU (transformers 5.19, compressed_tensors 0.17, bitsandbytes 0.50): the gradient
of a persona row is exactly 0 through W8A8 and FP8-dynamic, and of the usual size through weights in 4 or 8 bits alone,
fp8 in blocks and mxfp4. That of an adapter is 0 through bitsandbytes' 4 bits too, after passes without a gradient.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pplug.identity import read_config

DEQUANTISED = ("fp8", "mxfp4")
"""Quantisations that are taken back as the weights are loaded: transformers does so where the device has no kernel for
them, and those kernels have no backward pass."""


def auto_class(config: Any) -> Any:
    """The Auto class of transformers that loads an LLM of this config.

    Raises:
        ValueError: transformers has no LLM of this type that reads token embeddings and writes text alone.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    if type(config) not in kind._model_mapping:  # its own words are a list of all types
        name = "encoder-decoder" if config.is_encoder_decoder else "causal model"
        raise ValueError(
            f"transformers has no {name} of type {config.model_type}, which a plug and adapters need; methods without "
            "a plug or an adapter work with it"
        )
    return kind


def refuse_untrainable(folder: Path, to_merge: bool = False) -> None:
    """Refuses an LLM through which a plug or adapters would learn nothing.

    Args:
        to_merge: an adapter is to be added to its weights.

    Raises:
        ValueError: it is quantised in a way that no gradient passes, or whose weights cannot be added to; transformers
            has no class for it; its config is no JSON.
    """
    from transformers import AutoConfig

    said = read_config(folder).get("quantization_config")
    auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    if not said:
        return
    method = said.get("quant_method") or "bitsandbytes"  # whose early files do not say it
    why = "" if method in DEQUANTISED else _keeps_gradients_back(method, said)
    if to_merge and method != "mxfp4":  # of which the experts alone are quantised, and no adapter changes those
        why = why or "what is learned cannot be added to its rounded weights"
    if why:
        raise ValueError(
            f"{folder} is quantised ({method}), and {why}; train on the original, and have this copy serve what was "
            "trained there (llm.serves)"
        )


def _keeps_gradients_back(method: str, said: Mapping[str, Any]) -> str:
    """Says why no gradient passes through a quantised LLM; empty where one does."""
    if method != "compressed-tensors":
        return "trainings do not know whether a gradient passes through it"
    groups = (said.get("config_groups") or {}).values()
    inputs = ("input_activations", "output_activations")
    if any(not isinstance(group, Mapping) or any(map(group.get, inputs)) for group in groups):
        return "no gradient passes through its rounded activations"
    return "no gradient passes through its rounded keys and values" if said.get("kv_cache_scheme") else ""
