"""What is read of an LLM's folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Gemma2ForCausalLM, T5GemmaConfig

from pplug.llm import FrozenLLM, LLMConfig, caps_scores, load_tokenizer
from tests.pplug.families import make
from tests.pplug.models import tiny_llama, word_tokenizer

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


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    folder = tiny_llama(tmp_path)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    del said["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        load_tokenizer(folder)


@torch.no_grad()
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
