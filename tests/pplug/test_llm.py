"""What is read of an LLM's folder."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pplug.llm import load_tokenizer
from tests.pplug.models import tiny_llama

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
