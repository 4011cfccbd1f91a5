"""Model folders are data: code in weights or in a chat template does not run."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch

from pplug.llm import load_tokenizer
from pplug.splice import PromptBuilder, PromptLayout
from pplug.tensors import read_rows
from tests.pplug.models import tiny_llama


class Hostile:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path):
    mark, weights = tmp_path / "ran", tmp_path / "pytorch_model.bin"
    torch.save({"embed": Hostile(str(mark))}, weights)
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        read_rows(weights, "embed", [0])
    assert not mark.exists()
    torch.load(weights, weights_only=False)  # the same file, opened as we never do
    assert mark.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{% for m in messages %}{{ messages.append(m) }}{% endfor %}",
    ],
)
def test_a_chat_template_does_not_reach_python(tmp_path, template):
    folder, mark = tiny_llama(tmp_path / "llm"), tmp_path / "ran"
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(ValueError, match="the chat template fails"):
        PromptBuilder(tokenizer, PromptLayout(), encoder_decoder=False).prompts(["the cat"])
    assert not mark.exists()


def test_code_beside_a_model_does_not_run(tmp_path):
    folder, mark = tiny_llama(tmp_path / "llm"), tmp_path / "ran"
    (folder / "modeling_own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    config = (folder / "config.json").read_text()
    added = '{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Own"},'
    (folder / "config.json").write_text(config.replace("{", added, 1))
    code = f"from pplug.llm import FrozenLLM, LLMConfig; FrozenLLM.load(LLMConfig(model={str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["AutoTokenizer", "AutoConfig"])
def test_code_beside_a_model_does_not_run_when_someone_would_answer_yes(tmp_path, kind):
    """transformers asks on the terminal whether to run it, where its own classes do not know the folder."""
    folder, mark = tiny_llama(tmp_path / "llm"), tmp_path / "ran"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    file = folder / ("tokenizer_config.json" if kind == "AutoTokenizer" else "config.json")
    names = {"AutoTokenizer": ["own.Own", None]} if kind == "AutoTokenizer" else {kind: "own.Own"}
    named = {"tokenizer_class": "Own"} if kind == "AutoTokenizer" else {"model_type": "own"}
    file.write_text(json.dumps(json.loads(file.read_text()) | named | {"auto_map": names}))
    code = f"from pplug.llm import FrozenLLM, LLMConfig; FrozenLLM.load(LLMConfig(model={str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], input="y\n", capture_output=True, text=True, timeout=300)
    assert not mark.exists() and done.returncode == 1
    if kind == "AutoTokenizer":
        assert f"{folder}: its tokenizer ['own.Own', None] is code of its own, which is not run" in done.stderr
