"""Which bases are trained in a stack: those with plain attention, whatever the family, and no others."""

import pytest
import torch

from pplug.adapter import AdapterShape, LoraConfig
from pplug.lora import StackedTrainer, UserExamples
from pplug.norms import use_fast_rmsnorm
from tests.pplug.families import MIXING, PLAIN, make, targets


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer(model):
    return StackedTrainer(model, LoraConfig(shape=AdapterShape(targets=targets(model)), dropout=0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", PLAIN)
def test_a_family_with_plain_attention_is_trained(family, dtype):
    (fitted,) = trainer(make(family).to(dtype)).fit([UserExamples("a", [([5, 6], [7, 2])])])
    assert all(bool(b.any()) for _, b in fitted.weights.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MIXING)
def test_a_family_whose_layers_run_along_the_row_is_refused(family, dtype):
    with pytest.raises(
        ValueError, match=f"{family}ForCausalLM mixes users in a stack: .* choose a base with attention"
    ):
        trainer(make(family).to(dtype))


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "this base asks for s_aux too"),
        ("Gemma2", {}, "caps its scores or has a window"),
        ("StableLm", {}, "needs a base that hands its keyword arguments on"),
    ],
)
def test_attention_that_is_more_than_plain_is_refused(family, more, message):
    with pytest.raises(ValueError, match=message):
        trainer(make(family, **more))


def test_a_base_that_would_train_as_another_model_is_refused_without_being_told(monkeypatch):
    """The comparison alone finds the sinks, even where the attention takes them for nothing to do."""
    monkeypatch.setattr("pplug.lora._NOTHING_TO_DO", {"dropout", "position_ids", "use_cache", "output_router_logits",
                                                      "s_aux"})  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = make("GptOss", num_local_experts=4, num_experts_per_tok=2).to(dtype)
        with pytest.raises(ValueError, match="GptOssForCausalLM would be trained as another model"):
            trainer(model)


@pytest.mark.parametrize("family", MIXING)
@torch.no_grad()
def test_norms_that_take_a_gate_stay_as_they_are(family):
    ids, model = torch.arange(3, 20)[None], make(family)
    want = model(input_ids=ids, use_cache=False).logits
    use_fast_rmsnorm(model)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want, rtol=1e-4, atol=1e-4)
