"""LLMs that nothing can be learned through are refused; quantised ones that let a gradient pass are not."""

import json

import pytest
import torch
from transformers.utils import logging

from pplug.adapter import LoraConfig, base_shapes
from pplug.fit import make_room
from pplug.llm import FrozenLLM, LLMConfig, embedding_rows
from pplug.lora import StackedTrainer
from pplug.trainable import refuse_untrainable
from tests.pplug.models import tiny_llama
from tests.pplug.quantised import compressed, fp8, groups, said

CONFIGS = {
    "compressed-tensors": {"config_groups": groups(activations=True)},
    "gptq": {"bits": 4},
    "awq": {"bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    "modelopt": {"quant_algo": "FP8"},
}


@pytest.mark.parametrize("method", CONFIGS)
def test_an_llm_whose_quantisation_keeps_gradients_back_is_refused_by_its_config(tmp_path, method):
    folder = said(tiny_llama(tmp_path), {"quant_method": method} | CONFIGS[method])
    with pytest.raises(ValueError, match=rf"is quantised \({method}\), and .*; train on the original, .*llm.serves"):
        refuse_untrainable(folder)


def test_a_config_that_is_no_json_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type"')
    with pytest.raises(ValueError, match=f"^{tmp_path}/config.json: not JSON "):
        refuse_untrainable(tmp_path)


@pytest.mark.parametrize(
    ("quantization", "merges"),
    [
        ({"quant_method": "mxfp4"}, True),
        ({"quant_method": "fp8"}, False),
        ({"quant_method": "compressed-tensors", "config_groups": groups(activations=False)}, False),
    ],
)
def test_one_that_lets_a_gradient_pass_is_not_refused_unless_its_rounded_weights_are_added_to(
    tmp_path, quantization, merges
):
    folder = said(tiny_llama(tmp_path), quantization)
    refuse_untrainable(folder)
    if merges:
        refuse_untrainable(folder, to_merge=True)
    else:
        with pytest.raises(ValueError, match="cannot be added to its rounded weights; train on the original"):
            refuse_untrainable(folder, to_merge=True)


def test_a_training_whose_persona_rows_get_no_gradient_is_refused_before_its_first_step(tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(compressed(tmp_path, activations=True))))
    with pytest.raises(FloatingPointError, match="no gradient passes through LlamaForCausalLM to a persona row"):
        make_room(llm, "off")
    with pytest.raises(ValueError, match="no gradient passes through LlamaForCausalLM to an adapter"):
        StackedTrainer(llm.model, LoraConfig())


def test_weights_that_alone_are_rounded_let_the_gradient_pass(tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(compressed(tmp_path, activations=False))))
    assert make_room(llm, "off") > 0
    StackedTrainer(llm.model, LoraConfig())


def test_fp8_is_taken_back_on_every_device_and_not_only_where_transformers_has_no_kernel(tmp_path, monkeypatch):
    heard: list[str] = []
    logger = logging.get_logger("transformers.quantizers.quantizer_finegrained_fp8")
    monkeypatch.setattr(logger, "warning_once", heard.append)
    llm = FrozenLLM.load(LLMConfig(model=str(fp8(tmp_path / "fp8"))))
    assert not heard  # of a fallback for want of a GPU
    make_room(llm, "off")
    plain = FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path / "plain"))))
    for name in ("mlp.up_proj", "self_attn.q_proj"):
        got, want = (one.model.model.layers[1].get_submodule(name).weight for one in (llm, plain))
        assert 0 < (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("kind", ["mistral3", "qwen2_5_vl"])
def test_a_model_that_transformers_has_no_causal_class_for_is_refused_in_one_sentence(tmp_path, kind):
    folder = tiny_llama(tmp_path)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    said = f"no causal model of type {kind}, .*; methods without a plug or an adapter work with it"
    for refused in (
        lambda: refuse_untrainable(folder),
        lambda: base_shapes(folder, ("q_proj",)),
        lambda: FrozenLLM.load(LLMConfig(model=str(folder))),
        lambda: embedding_rows(folder, [0]),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            refused()
        assert len(str(caught.value)) < 200


def test_the_gradient_that_is_looked_at_leaves_none_in_the_model(tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path))))
    own = next(llm.model.parameters()).requires_grad_(True)
    state = torch.get_rng_state()
    make_room(llm, "off")
    assert own.grad is None and torch.equal(torch.get_rng_state(), state)
