"""Quick norms give what transformers' own norms give, forward and backward, and stand only where they do."""

import copy

import pytest
import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pplug.norms import QuickRMSNorm, use_fast_rmsnorm

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3], ids=str)
def test_values_and_gradients_are_those_of_the_formula_in_64_bits(scale):
    torch.manual_seed(0)
    own = LlamaRMSNorm(24, eps=1e-5).double()
    with torch.no_grad():
        own.weight.normal_()
    x, grad = scale * torch.randn(3, 5, 24, dtype=torch.double), torch.randn(3, 5, 24)
    want_x = x.clone().requires_grad_()
    normed = want_x * (want_x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    (own.weight * normed).backward(grad.double())
    quick = QuickRMSNorm(torch.nn.Parameter(own.weight.detach().float()), 1e-5)
    got_x = x.float().requires_grad_()
    got = quick(got_x)
    got.backward(grad)
    torch.testing.assert_close(got, (own.weight * normed).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got_x.grad, want_x.grad.float(), rtol=1e-4, atol=1e-5 * want_x.grad.abs().max().item())
    torch.testing.assert_close(quick.weight.grad, own.weight.grad.float(), rtol=1e-4, atol=1e-5)


def test_half_precision_in_gives_what_transformers_gives():
    own = LlamaRMSNorm(24)
    x = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    got = QuickRMSNorm(own.weight, own.variance_epsilon)(x)
    assert got.dtype == own(x).dtype == torch.float32
    torch.testing.assert_close(got, own(x), rtol=2**-8, atol=0)


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES))


def t5():
    sizes = {"vocab_size": 40, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))


@pytest.mark.parametrize(("make", "norms"), [(llama, 5), (qwen, 9), (t5, 7)])
def test_a_model_gives_the_same_logits_and_gradients(make, norms):
    torch.manual_seed(0)
    model = make()
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2)
    quick = copy.deepcopy(model)
    assert use_fast_rmsnorm(quick) == norms
    assert use_fast_rmsnorm(quick) == 0
    assert quick.state_dict().keys() == model.state_dict().keys()
    ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = [each(input_ids=ids, labels=ids).loss for each in (model, quick)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, got), want in zip(quick.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


def test_another_kind_of_norm_and_another_type_stay():
    torch.manual_seed(0)
    assert use_fast_rmsnorm(GemmaForCausalLM(GemmaConfig(**SIZES))) == 0
    assert use_fast_rmsnorm(llama().bfloat16()) == 0


def test_a_norm_that_says_otherwise_stays():
    class Shifted(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 1e-3

    model = torch.nn.Sequential(Shifted(8), LlamaRMSNorm(8))
    assert use_fast_rmsnorm(model) == 1
    assert isinstance(model[0], Shifted)
