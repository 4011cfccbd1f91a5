"""Tiny random causal models of many families, float32: what stacked training takes and what it must not."""

from typing import Any

import torch
import transformers

VOCAB = 64
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
PLAIN: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Qwen3Moe": _EXPERTS,
    "Mistral": {"sliding_window": 32},
    "Gemma": {},
    "Gemma3": {},
    "Phi": {},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
    "Granite": {},
    "Cohere": {},
    "Cohere2": {},
    "SmolLM3": {},
    "Mixtral": {"num_local_experts": 4},
    "OPT": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "Starcoder2": {},
}
"""Attention alone keeps a text's tokens together."""
MIXING: dict[str, dict[str, Any]] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "FalconH1": {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "Bamba": {"attn_layer_indices": [1]} | _MAMBA,
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
                         "shared_intermediate_size": 32} | _MAMBA,
    "Qwen3Next": {"layer_types": ["linear_attention", "full_attention"], "shared_expert_intermediate_size": 16,
                  "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
                  "linear_value_head_dim": 16} | _EXPERTS,
    "Mamba2": {"num_heads": 4, "state_size": 8, "n_groups": 1},
}  # fmt: skip
"""Convolutions or state-space layers run along the row of tokens."""


def make(name: str, **more: Any) -> Any:
    """A model of the family whose every weight is perturbed, so that no layer passes its input through."""
    text = "Text" if hasattr(transformers, f"{name}TextConfig") else ""
    kind = getattr(transformers, f"{name}{text}Config")
    sizes = _SIZES | (PLAIN | MIXING).get(name, {}) | more
    torch.manual_seed(0)
    causal = getattr(transformers, f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    model = causal(kind(**sizes))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_((0.2 if weight.ndim > 1 else 0.1) * torch.randn_like(weight))
    return model.eval()


def targets(model: torch.nn.Module) -> tuple[str, ...]:
    """Names of linear modules that an adapter could change."""
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    wanted = ("q_proj", "v_proj"), ("query_key_value",), ("qkv_proj",), ("in_proj",)
    return next(names for names in wanted if linear.issuperset(names))
