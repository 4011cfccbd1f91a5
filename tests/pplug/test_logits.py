"""Losses over a large vocabulary in pieces: the same values, and no tensor of all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from pplug import logits, objective
from pplug.adapter import AdapterShape, LoraConfig
from pplug.llm import FrozenLLM, LLMConfig
from pplug.logits import BodyAndHead
from pplug.lora import StackedTrainer, UserExamples
from pplug.splice import Prompt
from tests.pplug.families import MIXING, PLAIN, make, targets
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5


@pytest.mark.parametrize("family", [*PLAIN, *MIXING, "Gemma2", "GPTBigCode"])
@torch.no_grad()
def test_a_family_taken_apart_makes_the_same_logits(family):
    """Scales, caps and biases of the logits are the family's own."""
    model = make(family)
    ids = torch.arange(5, 20)[None]
    parts = BodyAndHead(model)
    want = model(input_ids=ids, use_cache=False).logits[0]
    got = parts.logits(parts.hidden(input_ids=ids, use_cache=False)[0])
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    again = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(again, want)  # the model is as it was


def with_rows(llm):
    rows = torch.randn(4, 3, llm.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    prompts = [Prompt([1, 4], [5, 6, 7]), Prompt([1], [9]), Prompt([1, 8], []), Prompt([1, 4, 5], [6])]
    loss, exact = objective.target_loss(llm, prompts, rows, [3, 1, 3, 0], [[8, 2], [7, 9, 2], [2], [5, 6, 7, 8, 2]])
    loss.backward()
    return loss.detach(), exact, rows.grad


@pytest.mark.parametrize("make_model", [tiny_llama, tiny_t5, tiny_bart])
def test_a_loss_in_pieces_is_that_of_all_logits(make_model, tmp_path, monkeypatch):
    llm = FrozenLLM.load(LLMConfig(model=str(make_model(tmp_path))))
    loss, exact, gradient = with_rows(llm)
    monkeypatch.setattr(objective, "LOGITS", 3 * logits.vocabulary(llm.model))  # three positions at a time
    pieces = with_rows(llm)
    assert llm.parts is not None
    torch.testing.assert_close(pieces[0], loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pieces[2], gradient, rtol=1e-4, atol=1e-5)
    assert torch.equal(pieces[1], exact) and gradient.abs().sum() > 0


@pytest.mark.parametrize("family", ["Llama", "Cohere", "Granite"])
def test_a_stack_in_pieces_trains_the_same_adapters(family, monkeypatch):
    users = [
        UserExamples(name, [([5, 6, 7 + i], [8, 9, 10 + i, 2]) for i in range(n)]) for name, n in (("a", 9), ("b", 3))
    ]
    config = LoraConfig(shape=AdapterShape(targets=targets(make(family))), learning_rate=1e-3)
    found = []
    for rows in (None, 16):
        trainer = StackedTrainer(make(family), config)
        if rows is not None:
            monkeypatch.setattr(trainer, "_label_rows", rows)
        found.append({one.user_id: one for one in trainer.fit(users)})
    for user in ("a", "b"):
        for name, pair in found[0][user].weights.items():
            for want, got in zip(pair, found[1][user].weights[name], strict=True):
                assert (got - want).norm() <= 1e-4 * want.norm()


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


WORDS = 128_256
"""Tokens of Llama 3."""


def test_logits_of_a_vocabulary_of_128k_never_exist_whole(tmp_path):
    torch.manual_seed(0)
    folder = tiny_llama(tmp_path)
    config = LlamaConfig.from_pretrained(folder, vocab_size=WORDS, hidden_size=32, intermediate_size=32)
    llm = FrozenLLM.load(LLMConfig(model=str(folder)))
    llm.model = LlamaForCausalLM(config).eval().requires_grad_(False)
    samples, tokens = 4, 100
    rows = torch.randn(samples, 1, 32).requires_grad_()
    answers = torch.randint(4, WORDS, (samples, tokens)).tolist()
    with Largest() as counted:
        loss, _ = objective.target_loss(llm, [Prompt([1], [5])] * samples, rows, [1] * samples, answers)
        loss.backward()
    whole = samples * (tokens + 1) * WORDS
    assert counted.elements <= logits.LOGITS < whole
    assert bool(rows.grad.abs().sum() > 0)
