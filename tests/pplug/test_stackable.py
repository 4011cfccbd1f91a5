"""Which bases are trained in a stack: those with plain attention, whatever the family, and no others."""

import numpy as np
import pytest
import torch

from pplug.adapter import AdapterShape, LoraConfig
from pplug.lora import Pass, StackedTrainer, UserExamples
from pplug.lora_user import ALIGN
from pplug.norms import use_fast_rmsnorm
from tests.pplug.families import MIXING, PLAIN, make, targets
from tests.pplug.test_lora import one_by_one, people, stacked


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
        ("Gemma2", {}, "caps its scores"),
        ("StableLm", {}, "needs a base that hands its keyword arguments on"),
    ],
)
def test_attention_that_is_more_than_plain_is_refused(family, more, message):
    with pytest.raises(ValueError, match=message):
        trainer(make(family, **more))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("Mistral", {}),
        ("Gemma3", {}),
        ("Phimoe", {"num_local_experts": 4}),
        ("Qwen2Moe", {"use_sliding_window": True, "num_experts": 4, "num_experts_per_tok": 2,
                      "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}),
    ],
)  # fmt: skip
@torch.no_grad()
def test_texts_longer_than_the_window_of_a_base_are_read_as_the_base_reads_them(family, more):
    """Mistral's window is its config's, Gemma 3's each layer's own; PhiMoE has it in its mask alone,
    and Qwen2-MoE that of some layers. It is wider than the texts by which a stack tries
    whether a shortcut computes the same."""
    window, words = ALIGN + 4, np.random.default_rng(0).integers(3, 60, (3, 50))
    own, without = (make(family, **more, sliding_window=size) for size in (window, 64))
    want, wide = (model(input_ids=torch.from_numpy(words)).logits.log_softmax(-1) for model in (own, without))
    stack = trainer(own)
    users = [stack.enter(UserExamples(f"{i}", [(row[:30], row[30:])])) for i, row in enumerate(words.tolist())]
    labels = torch.from_numpy(words)[:, 30:, None]
    losses = [-logits[:, 29:-1].gather(-1, labels).sum((1, 2)) for logits in (want, wide)]
    torch.testing.assert_close(torch.stack(stack.losses(Pass(users, stack.device))), losses[0], rtol=1e-4, atol=0)
    assert ((losses[1] - losses[0]).abs() > 1e-3 * losses[0]).all()


def test_a_base_that_would_train_as_another_model_is_refused_without_being_told(monkeypatch):
    """The comparison alone finds the sinks, even where the attention takes them for nothing to do."""
    nothing = {"dropout", "position_ids", "use_cache", "output_router_logits", "s_aux"}
    monkeypatch.setattr("pplug.lora_pass._NOTHING_TO_DO", nothing)
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


def test_targets_inside_latent_attention_are_trained_as_peft_does():
    """Their inputs have an axis of heads, of length one, before that of the tokens."""
    sizes = {
        "kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "n_shared_experts": 1, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    shape = AdapterShape(targets=("kv_a_proj_with_mqa", "kv_b_proj"))
    config = LoraConfig(shape=shape, dropout=0.0, learning_rate=1e-3, epochs=1)
    (user,) = people((5,))
    found = stacked(make("DeepseekV2", **sizes), config, [user])["user-0"]
    want = one_by_one(make("DeepseekV2", **sizes), config, user)
    for name, pair in want.items():
        for ours, theirs in zip(found.weights[name], pair, strict=True):
            assert (ours - theirs).norm() / theirs.norm() < 1e-3, name
