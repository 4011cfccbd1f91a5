"""Tiny random models of the families in the table, wide enough for vLLM's attention on a CPU (heads of 32)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.pplug.models import word_tokenizer

ABSENT = "absent"
"""A size that a family's config does not take."""
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MLA = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "head_dim": 64, "first_k_dense_replace": 2}  # fmt: skip
_MAMBA = {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1,
          "shared_intermediate_size": 32, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16,
          "mamba_n_groups": 1}  # fmt: skip
_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": ABSENT}
_T5 = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0,
       "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
_BART = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 128,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2,
         "forced_eos_token_id": None}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A family of the table: its class in transformers, its sizes, and the modules that adapters change."""

    name: str
    classes: str
    sizes: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    seq2seq: bool = False
    embeddings: float = 1.0
    """Factor of the token embeddings; small ones leave a reply to more than the last token."""

    def save(self, folder: Path) -> Path:
        """Writes a model whose every weight is perturbed, so that no layer passes its input through."""
        torch.manual_seed(0)
        vocabulary = len(word_tokenizer(folder, bos=not self.seq2seq or self.classes == "Bart", eos=self.seq2seq))
        text = "Text" if hasattr(transformers, f"{self.classes}TextConfig") else ""
        sizes = ({} if self.seq2seq else _SIZES) | {"vocab_size": vocabulary} | self.sizes
        given = {name: value for name, value in sizes.items() if value != ABSENT}
        config = getattr(transformers, f"{self.classes}{text}Config")(**given)
        causal = "LMHeadModel" if self.classes == "GPT2" else "ForCausalLM"
        head = "ForConditionalGeneration" if self.seq2seq else causal
        model = getattr(transformers, f"{self.classes}{head}")(config)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_((0.2 if weight.ndim > 1 else 0.1) * torch.randn_like(weight))
            model.get_input_embeddings().weight.mul_(self.embeddings)
        model.save_pretrained(folder)
        return folder


FAMILIES = (
    Family("Llama", "Llama"),
    Family("Qwen2", "Qwen2"),
    Family("Qwen3", "Qwen3"),
    Family("Qwen3-MoE", "Qwen3Moe", _EXPERTS),
    Family("Mistral", "Mistral"),
    Family("Mixtral", "Mixtral", _LOCAL_EXPERTS),
    Family("Gemma", "Gemma", _TIED),
    Family("Gemma 2", "Gemma2", {"query_pre_attn_scalar": 32} | _TIED, embeddings=0.25),
    Family("Gemma 3", "Gemma3", {"query_pre_attn_scalar": 32} | _TIED, embeddings=0.25),
    Family("Phi-3", "Phi3", targets=("qkv_proj",)),
    Family("OLMo 2", "Olmo2"),
    Family("GPT-2", "GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}, ("c_attn",)),
    Family("GPT-NeoX", "GPTNeoX", targets=("query_key_value",)),
    Family("Granite", "Granite"),
    Family("Cohere", "Cohere", _TIED),
    Family("Cohere 2", "Cohere2", _TIED),
    Family("Falcon", "Falcon", _FALCON, ("query_key_value",)),
    Family("StableLM", "StableLm"),
    Family("SmolLM3", "SmolLM3"),
    Family("gpt-oss", "GptOss", _LOCAL_EXPERTS),
    Family("DeepSeek V2 (latent attention)", "DeepseekV2", _MLA, ("q_proj",)),
    Family("Granite 4 hybrid (state space)", "GraniteMoeHybrid", _MAMBA),
    Family("T5", "T5", _T5, ("q", "v"), seq2seq=True),
    Family("FLAN-T5", "T5", _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}, ("q", "v"),
           seq2seq=True),
    Family("BART", "Bart", _BART, seq2seq=True),
)  # fmt: skip
