"""The published loop that training is compared with does the same work: same loss, same gradients, with any change."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pplug import PersonaPlug, PlugConfig
from pplug.fit import FitConfig, Fitter, Samples
from pplug.llm import FrozenLLM
from pplug.splice import Prompt, PromptBuilder, PromptLayout
from tests.benchmarks.train import CHANGES, Loop, Setting
from tests.pplug.models import tiny_llama

DIM, COUNT = 12, 4


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("llm"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llm = FrozenLLM(model, tokenizer, PromptBuilder(tokenizer, PromptLayout(), False), False)
    rng = np.random.default_rng(0)
    items = rng.standard_normal((30, DIM)).astype(np.float32)
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    samples = Samples(
        prompts=[Prompt([1], rng.integers(4, 20, n).tolist()) for n in (5, 9, 3, 14)],
        targets=[rng.integers(4, 20, n).tolist() + [2] for n in (2, 1, 4, 3)],
        queries=[[]] * COUNT,
        owners=["a"] * COUNT,
        spans=np.array([[0, 0, 7], [0, 7, 8], [0, 8, 20], [0, 20, 30]]),
        shards=[items],
    )
    torch.manual_seed(0)
    plug = PersonaPlug(PlugConfig(encoder_dim=DIM, llm_dim=llm.dim, persona_scale=2.0)).eval()
    fitter = Fitter(plug, llm, FitConfig(precision="float32"), samples, samples)
    queries = torch.nn.functional.normalize(torch.from_numpy(rng.standard_normal((COUNT, DIM)).astype(np.float32)))
    fitter.query_vectors = lambda samples, indices: queries[torch.from_numpy(indices)]
    return Setting(fitter, samples, [np.arange(COUNT)], np.arange(COUNT))


def gradients(fitter, loss):
    fitter.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return [parameter.grad.clone() for parameter in fitter.parameters]


@pytest.mark.parametrize("loop", [Loop(), *CHANGES.values(), Loop(*[True] * len(dataclasses.fields(Loop)))], ids=str)
def test_the_published_loop_gives_our_loss_and_our_gradients(setting, loop):
    fitter = setting.fitter
    ours, _ = fitter.loss(setting.samples, setting.few, 0)
    theirs = loop.loss(setting, setting.few, *loop.rows(setting, setting.few))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    for got, want in zip(gradients(fitter, theirs), gradients(fitter, ours), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
