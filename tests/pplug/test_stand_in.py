"""Plugs and adapters of another LLM are taken for its quantised copy or under its former identity, else refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pplug.llm import LLMConfig, embedding_rows, former_llm_id, llm_id, load_tokenizer
from pplug.splice import PromptLayout
from pplug.stand_in import llm_sample, stands_for
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("original"))))


def copy_of(config, folder, change=lambda tensor: tensor, **of_config):
    """A copy whose every weight has been changed, with another config."""
    shutil.copytree(config.model, folder)
    weights = load_file(Path(folder) / "model.safetensors")
    save_file({name: change(x) for name, x in weights.items()}, Path(folder) / "model.safetensors", {"format": "pt"})
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | of_config))
    return config.model_copy(update={"model": str(folder), "serves": llm_id(config)})


def rounded(bits):
    """Each row rounded to so many bits with a scale of its own."""
    top = 2 ** (bits - 1) - 1

    def round_(x):
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / top
        return (x / scale).round() * scale

    return round_


@pytest.mark.parametrize(
    ("change", "apart"), [(lambda x: x, 3e-4), (lambda x: x.bfloat16().float(), 2e-3), (rounded(8), 1e-2),
                          (rounded(4), 0.12)]
)  # fmt: skip
def test_a_copy_serves_for_the_original(original, tmp_path, change, apart):
    copy = copy_of(original, tmp_path / "copy", change, max_position_embeddings=4096)
    assert llm_id(copy) != llm_id(original)
    note = stands_for(copy, llm_id(copy), llm_id(original), llm_sample(original))
    measured = float(re.search(r"\d+ token embeddings differ by ([\d.]+) of their size", note)[1])
    assert apart / 3 <= measured <= apart and note.startswith(f"which {llm_id(copy)} serves for")


def test_a_sample_from_before_replies_had_a_head_does_not_serve_an_llm_that_has_one(tmp_path):
    original = LLMConfig(model=str(tiny_bart(tmp_path / "bart")))
    copy = copy_of(original, tmp_path / "copy", max_position_embeddings=4096)
    sample = json.loads(llm_sample(original))
    assert stands_for(copy, llm_id(copy), llm_id(original), json.dumps(sample)) is not None
    assert sample["frame"].pop("reply") == [1]
    with pytest.raises(ValueError, match="differ from that LLM's in their reply"):
        stands_for(copy, llm_id(copy), llm_id(original), json.dumps(sample))


def test_nothing_is_said_of_an_llm_that_is_the_one(original):
    assert stands_for(original, llm_id(original), llm_id(original), None) is None


def test_another_model_does_not_serve(original, tmp_path):
    other = LLMConfig(model=str(tiny_llama(tmp_path / "other", seed=4)), serves=llm_id(original))
    with pytest.raises(ValueError, match=r"differ by 1\.\d+ of their size .* it is another model"):
        stands_for(other, llm_id(other), llm_id(original), llm_sample(original))
    wide = LLMConfig(model=str(tiny_llama(tmp_path / "wide", width=32)), serves=llm_id(original))
    # a width of 32 is sampled whole, and compared all the same
    with pytest.raises(ValueError, match="it is another model"):
        stands_for(wide, llm_id(wide), llm_id(original), llm_sample(original))


def test_a_copy_with_other_prompts_does_not_serve(original, tmp_path):
    copy = copy_of(original, tmp_path / "copy", lambda x: x.bfloat16().float())
    for layout, what in (({"suffix": " :"}, "tail"), ({"chat": "never", "suffix": "."}, "tail")):
        config = copy.model_copy(update={"layout": PromptLayout(**layout)})
        with pytest.raises(ValueError, match=f"the prompts of .* differ from that LLM's in their {what}"):
            stands_for(config, llm_id(config), llm_id(original), llm_sample(original))
    last, sample = copy.model_copy(update={"layout": PromptLayout(rows="last")}), llm_sample(original)
    with pytest.raises(ValueError, match="llm.layout.rows=last, and it was trained with before"):
        stands_for(last, llm_id(last), llm_id(original), sample)
    of_before = json.dumps({name: value for name, value in json.loads(sample).items() if name != "place"})
    assert "its prompts are the same" in stands_for(last, llm_id(last), llm_id(original), of_before)


def test_a_copy_is_not_taken_without_a_word_or_without_a_sample(original, tmp_path):
    copy = copy_of(original, tmp_path / "copy", lambda x: x.bfloat16().float())
    with pytest.raises(ValueError, match="no sample of that LLM is stored there"):
        stands_for(copy, llm_id(copy), llm_id(original), None)
    with pytest.raises(ValueError, match=rf"this layout is {llm_id(copy)} \(llm.serves={llm_id(original)} names anoth"):
        stands_for(copy, llm_id(copy), "another", llm_sample(original))
    silent = copy.model_copy(update={"serves": None})
    with pytest.raises(ValueError, match=rf"this layout is {llm_id(copy)}$"):
        stands_for(silent, llm_id(silent), llm_id(original), llm_sample(original))


def test_an_llm_whose_replies_begin_otherwise_than_before_has_no_identity_of_before(tmp_path):
    assert former_llm_id(LLMConfig(model=str(tiny_bart(tmp_path / "bart")))) is None
    assert former_llm_id(LLMConfig(model=str(tiny_t5(tmp_path / "t5")))) is not None


def test_the_identity_of_before_is_taken_with_a_warning(original):
    former = former_llm_id(original)
    note = stands_for(original, llm_id(original), former, None)
    assert "the former identity of this one" in note and "one more release" in note
    pinned = original.model_copy(update={"layout": PromptLayout(date="2024-07-26")})
    assert former_llm_id(pinned) is None
    with pytest.raises(ValueError, match="this layout is"):
        stands_for(pinned, llm_id(pinned), former, None)


def test_a_tokenizer_may_know_more_tokens_than_there_are_embeddings(original, tmp_path):
    """As that of Gemma 3 1B, which names a token for pictures that the model has no row for."""
    shutil.copytree(original.model, tmp_path / "more")
    tokenizer = load_tokenizer(tmp_path / "more")
    rows = len(tokenizer)
    tokenizer.add_tokens(["<picture>"])
    tokenizer.save_pretrained(tmp_path / "more")
    longer = original.model_copy(update={"model": str(tmp_path / "more")})
    assert max(json.loads(llm_sample(longer))["ids"]) == rows - 1
    with pytest.raises(IndexError, match=f"has {rows} rows, none of number {rows}"):
        embedding_rows(tmp_path / "more", [rows])


def test_a_sample_is_small(original):
    assert len(llm_sample(original)) < 4000
    assert torch.tensor(json.loads(llm_sample(original))["ids"]).diff().gt(0).all()
