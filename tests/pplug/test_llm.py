"""Reading of an LLM's folder: embeddings, norms, tokenizer, by whatever names the files have."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Gemma2ForCausalLM,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5GemmaConfig,
)

from pplug.identity import weight_digests
from pplug.llm import FrozenLLM, LLMConfig, caps_scores, embedding_rows, llm_id, load_tokenizer, misleads
from pplug.plain_text import control_tokens
from tests.pplug.families import make
from tests.pplug.models import tiny_bart, tiny_llama, word_tokenizer
from tests.pplug.token_kinds import byte_bpe

TEXTS = ["the cat on the mat", "", "  two  spaces\n", "naïve <s> text </s> 123"]


@pytest.mark.parametrize("named", ["TokenizersBackend", "PreTrainedTokenizerFast", None])
def test_a_tokenizer_is_the_one_that_transformers_chooses(tmp_path, named):
    folder = Path(shutil.copytree(tiny_llama(tmp_path / "made"), tmp_path / "llm"))
    said = json.loads((folder / "tokenizer_config.json").read_text())
    assert said.pop("tokenizer_class") == "TokenizersBackend"
    (folder / "tokenizer_config.json").write_text(json.dumps(said | ({"tokenizer_class": named} if named else {})))
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))


@pytest.mark.parametrize("named", ["LlamaTokenizerFast", "LlamaTokenizer"])
def test_a_byte_level_tokenizer_under_the_name_of_llamas_keeps_its_spaces(tmp_path, named):
    """As in DeepSeek-R1-Distill-Llama, which transformers knows by its address alone and not by a folder."""
    want = byte_bpe(tmp_path)
    folder = Path(shutil.copytree(tiny_llama(tmp_path / "made"), tmp_path / "llm"))
    want.save_pretrained(folder)
    renamed(folder, named)
    text = "the cat  sat on\nthe mat"
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] != want(text)["input_ids"], (
        "it chooses right by now"
    )
    found = load_tokenizer(folder)
    assert found(text)["input_ids"] == want(text)["input_ids"] and found.decode(found(text)["input_ids"]) == text
    assert found.chat_template == want.chat_template
    assert misleads(folder) and not misleads(Path(tiny_llama(tmp_path / "plain")))


def test_of_a_mistral_with_the_publishers_own_file_the_tokenizer_is_still_that_of_transformers(tmp_path):
    """As in Mistral-Nemo, where AutoTokenizer takes the backend of mistral_common, if that is installed."""
    pytest.importorskip("mistral_common")
    folder = Path(shutil.copytree(tiny_llama(tmp_path / "made"), tmp_path / "llm"))
    want = load_tokenizer(folder)
    renamed(folder, "PreTrainedTokenizerFast")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mistral"}))
    (folder / "tekken.json").write_text("{}")
    found = load_tokenizer(folder)
    assert found(TEXTS)["input_ids"] == want(TEXTS)["input_ids"]
    assert control_tokens(found) == control_tokens(want)  # by its added tokens, which the other backend has not


def renamed(folder, kind):
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": kind}))


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = tiny_llama(tmp_path)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    del said["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(folder)


@torch.no_grad()
def test_a_broken_file_of_a_tokenizer_is_no_code_of_its_own(tmp_path):
    folder = tiny_llama(tmp_path)
    said = folder / "tokenizer_config.json"
    config = json.loads(said.read_text()) | {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    said.write_text(json.dumps(config))
    load_tokenizer(folder)  # transformers has the class that the config names
    (folder / "tokenizer.json").write_text('{"version"')
    with pytest.raises(ValueError, match=f"^{folder}: no tokenizer that can be loaded"):
        load_tokenizer(folder)
    said.write_text('{"tokenizer_class"')
    with pytest.raises(ValueError, match=f"^{folder}: no tokenizer that can be loaded"):
        load_tokenizer(folder)
    with pytest.raises(ValueError, match=f"^{said}: not JSON "):
        llm_id(LLMConfig(model=str(folder)))


def test_a_base_that_caps_its_scores_is_loaded_with_an_attention_that_does(tmp_path):
    """vLLM caps them. transformers' default attention does not: its logits are those of a model without the cap."""
    make("Gemma2", attn_logit_softcapping=0.3, query_pre_attn_scalar=1).save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    ids = torch.arange(3, 20)[None]
    capped = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    config = capped.config.to_dict() | {"attn_logit_softcapping": None}
    plain = Gemma2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, config=type(capped.config)(**config))
    want, other = (model.eval()(input_ids=ids).logits for model in (capped, plain))
    got = FrozenLLM.load(LLMConfig(model=str(tmp_path))).model(input_ids=ids).logits
    assert (want - other).abs().max() > 0.01 * want.std()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_a_cap_is_found_in_a_part_of_a_config_too():
    nested = T5GemmaConfig().to_dict()
    assert "attn_logit_softcapping" not in nested and caps_scores(nested)
    assert not caps_scores(make("Gemma3").config.to_dict())


@pytest.mark.parametrize("family", ["Gemma", "Gemma2", "Gemma3", "MiniCPM3", "Granite", "Llama"])
@torch.no_grad()
def test_rows_and_norm_are_those_of_the_embedding_layer(family, tmp_path):
    """Gemma and MiniCPM3 multiply in that layer: persona rows stand behind it."""
    more = {"scale_emb": 12.0} if family == "MiniCPM3" else {}
    make(family, **more).save_pretrained(tmp_path)
    word_tokenizer(tmp_path)
    llm = FrozenLLM.load(LLMConfig(model=str(tmp_path)))
    given = llm.embedding(torch.arange(llm.embedding.weight.shape[0]))
    assert llm.embedding_norm == pytest.approx(float(given.norm(dim=1).mean()), rel=1e-5)
    assert (given.norm() > 3 * llm.embedding.weight.norm()) == (family not in ("Granite", "Llama"))
    torch.testing.assert_close(embedding_rows(tmp_path, [5, 0, 9]), given[[5, 0, 9]], rtol=1e-5, atol=0)


@torch.no_grad()
def test_barts_rows_are_scaled_where_its_config_says_so(tmp_path):
    folder = tiny_bart(tmp_path, scale_embedding=True)
    llm = FrozenLLM.load(LLMConfig(model=str(folder)))
    given = llm.embedding(torch.arange(9))
    assert given.norm() > 3 * llm.embedding.weight[:9].norm()
    torch.testing.assert_close(embedding_rows(folder, list(range(9))), given, rtol=1e-5, atol=0)


def rename(folder, names):
    """Writes the weights anew under names as they are on the hub."""
    path = folder / "model.safetensors"
    save_file({names(name): tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("GPT2", lambda name: name.removeprefix("transformer.")),
        ("Llama", lambda name: name if name.startswith("lm_head") else f"language_model.{name}"),
    ],
)
def test_embeddings_are_found_under_the_names_of_published_files(family, names, tmp_path):
    more = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64} if family == "GPT2" else {}
    model = make(family, **more)
    model.save_pretrained(tmp_path)
    rename(tmp_path, names)
    assert torch.equal(embedding_rows(tmp_path, [3, 60]), model.get_input_embeddings().weight[[3, 60]])


def test_embeddings_are_read_from_pickles_where_there_is_nothing_else(tmp_path):
    model = make("Llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert torch.equal(embedding_rows(tmp_path, [3, 60]), model.get_input_embeddings().weight[[3, 60]])


def test_pickles_of_old_and_what_a_training_leaves_beside_them_are_told_apart(tmp_path):
    model = make("Llama")
    model.config.save_pretrained(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=False)
    before = weight_digests(tmp_path, str(tmp_path))
    assert before == [hashlib.sha256(file.read_bytes()).hexdigest()]
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin"):
        torch.save({"args": Path("no tensor")}, tmp_path / name)
    assert weight_digests(tmp_path, str(tmp_path)) == before
    assert torch.equal(embedding_rows(tmp_path, [3, 60]), model.get_input_embeddings().weight[[3, 60]])


def test_embeddings_that_cannot_be_told_apart_are_refused(tmp_path):
    model = make("Llama")
    model.save_pretrained(tmp_path)
    rename(tmp_path, lambda name: f"other.{name}" if "embed" in name else name)
    weights = load_file(tmp_path / "model.safetensors")
    weights["vision.embed_tokens.weight"] = weights["other.model.embed_tokens.weight"] + 1
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no tensor model.embed_tokens.weight in its weights"):
        embedding_rows(tmp_path, [3])


def test_an_llm_that_lacks_weights_is_refused_and_one_whose_head_is_tied_is_not(tmp_path):
    folder = tiny_llama(tmp_path)
    weights = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in weights and FrozenLLM.load(LLMConfig(model=str(folder)))
    lacking = ("model.layers.1.mlp.up_proj.weight", "model.norm.weight")
    save_file({name: w for name, w in weights.items() if name not in lacking}, folder / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    with pytest.raises(ValueError, match=f"2 of the weights that transformers' LlamaForCausalLM .* {lacking[0]}: "):
        FrozenLLM.load(LLMConfig(model=str(folder)))


def test_tables_of_positions_that_a_class_computes_may_be_missing(tmp_path):
    """As in the files of Pegasus and FSMT."""
    sizes = {"d_model": 32, "max_position_embeddings": 16, "vocab_size": len(word_tokenizer(tmp_path, eos=True))}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 2, f"{part}_ffn_dim": 48}
    model = PegasusForConditionalGeneration(PegasusConfig(**sizes))
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    own = {name: tensor for name, tensor in weights.items() if "embed_positions" not in name}
    save_file(own, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = FrozenLLM.load(LLMConfig(model=str(tmp_path))).model
    table = torch.tensor([[math.sin(place / 10000 ** (k / 16)) for k in range(16)] for place in range(16)])
    torch.testing.assert_close(loaded.get_encoder().embed_positions.weight[:, :16].cpu(), table)
