"""Memory of trainings: what layers keep at real width, what is the same with less of it, and passes that do not fit."""

import ctypes
import resource
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from pplug import PersonaPlug, PlugConfig, memory
from pplug.adapter import AdapterShape, LoraConfig, StackConfig
from pplug.fit import FitConfig, Fitter, Samples, make_room
from pplug.llm import FrozenLLM, LLMConfig
from pplug.lora import StackedTrainer, UserExamples
from pplug.lora_user import Part
from pplug.objective import target_loss
from pplug.splice import Prompt, PromptLayout
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5

WIDTH, TOKENS = 4096, 8


def qwen3_8b(layers: int) -> Qwen3ForCausalLM:
    """Layers of Qwen3-8B's shapes in bfloat16, whose weights are never written: shapes and types are what counts."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 12_288, "num_attention_heads": 32, "num_key_value_heads": 8}
    with torch.device("meta"):
        config = Qwen3Config(**sizes, head_dim=128, num_hidden_layers=layers, vocab_size=32)
        model = Qwen3ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    return model.to_empty(device="cpu")


def kept(model: Qwen3ForCausalLM) -> int:
    """Bytes that the layers keep of a pass with a gradient into its embeddings."""
    rows = torch.zeros(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    return memory.kept_bytes(lambda: model(inputs_embeds=rows, use_cache=False).logits, list(model.parameters()))


def test_a_layer_of_an_8b_model_keeps_its_input_alone():
    per_layer = {}
    for how in ("kept", "again"):
        counts = []
        for layers in (1, 2):  # the difference leaves out what no layer keeps
            model = qwen3_8b(layers)
            if how == "again":
                assert memory.checkpoint_layers(model) == layers
            counts.append(kept(model))
        per_layer[how] = (counts[1] - counts[0]) / TOKENS
    assert per_layer["again"] == 2 * WIDTH == 8_192  # bfloat16
    assert per_layer["kept"] == pytest.approx(147_752, rel=0.02)


def test_several_users_of_an_8b_model_fit_one_gpu_of_80_gb():
    """Users of 16 examples with 300 tokens, of which 30 are targets; 16.4 GB are the base itself."""
    users = {}
    for how in ("off", "on"):
        trainer = StackedTrainer.__new__(StackedTrainer)  # counted, not computed
        trainer.adapter_bytes = 36 * 20 * 8 * (4096 + 4096 + 4096 + 1024)  # q and v
        per_layer = 147_752 + 4 * 2 * 2 * WIDTH  # of each adapted module the input and the mask, float32
        trainer.token_bytes = 36 * 8_192 + per_layer if how == "on" else 36 * per_layer
        trainer.pair_bytes = 0.0
        trainer.label_bytes, trainer._label_rows, trainer._parts = 12 * 151_936, 2**25 // 151_936, object()
        part = trainer_part(16, 300, 30)
        room = memory.FREE_SHARE * (80e9 - 16.4e9)
        users[how] = 0
        while trainer.pass_bytes([part] * (users[how] + 1)) + (users[how] + 1) * trainer.adapter_bytes < room:
            users[how] += 1
    assert users["off"] <= 1 and users["on"] >= 8


def trainer_part(rows, tokens, labels):
    return Part([([0] * tokens, [0] * labels)] * rows, rows * labels, True)


@pytest.mark.parametrize("make", [tiny_llama, tiny_t5, tiny_bart])
def test_layers_that_are_computed_again_give_the_same_gradient(make, tmp_path):
    llm = FrozenLLM.load(LLMConfig(model=str(make(tmp_path))))
    found = []
    for how in ("off", "on"):
        make_room(llm, how)
        rows = torch.randn(2, 3, llm.dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
        prompts = [Prompt([1, 4], [5, 6, 7]), Prompt([1], [9])]
        loss, exact = target_loss(llm, prompts, rows, [3, 1], [[8, 2], [7, 9, 2]])
        loss.backward()
        found.append((loss, exact, rows.grad))
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    assert found[0][2].abs().sum() > 0


@pytest.mark.parametrize("rows", ["before", "after", "last"])
def test_a_token_takes_what_one_of_a_prompt_in_this_layout_keeps(llama, rows):
    llm = FrozenLLM.load(LLMConfig(model=str(llama), layout=PromptLayout(rows=rows)))
    [prompt] = llm.prompt_builder.prompts([" ".join(["cat", "ran"] * 25)])
    rows_RH = torch.zeros(1, 1, llm.dim, requires_grad=True)
    kept = memory.kept_bytes(lambda: target_loss(llm, [prompt], rows_RH, [1], [[5] * 8]), list(llm.model.parameters()))
    tokens = len(prompt.before) + len(prompt.after) + 1 + 8
    assert tokens > 50 and make_room(llm, "off") == pytest.approx(kept / tokens, rel=0.2)


def test_layers_that_are_computed_again_take_the_same_room_in_each_layout(llama):
    """Nothing is read ahead with them, whatever the layout."""
    layouts = [PromptLayout(rows=rows) for rows in ("before", "after", "last")]
    before, *others = (make_room(FrozenLLM.load(LLMConfig(model=str(llama), layout=own)), "on") for own in layouts)
    assert others == [before, before]


@pytest.mark.parametrize(
    "said, runs_out",
    [("CUDA error: out of memory", True), ("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
     ("DefaultCPUAllocator: can't allocate memory", True), ("CUDA error: device-side assert triggered", False)],
)  # fmt: skip
def test_an_allocation_that_fails_beside_torchs_own_is_known(said, runs_out):
    assert memory.is_out_of_memory(RuntimeError(said)) is runs_out


# --- what does not fit ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def large_blocks_go_back_to_the_system():
    """Else what earlier passes have freed would serve later ones beyond the limit."""
    m_mmap_threshold = -3
    ctypes.CDLL("libc.so.6").mallopt(m_mmap_threshold, 1 << 18)


@contextmanager
def limited(extra: int):
    """Lets this process take so many bytes more, and no further one."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"), width=128)


def long_samples(llm, n=256, tokens=100):
    rng = np.random.default_rng(0)
    return Samples(
        prompts=[Prompt([1], rng.integers(4, 26, tokens).tolist()) for _ in range(n)],
        targets=[[*rng.integers(4, 26, 8).tolist(), 2] for _ in range(n)],
        queries=[[]] * n,
        owners=[""] * n,
        spans=np.zeros((n, 3), np.int64),
        shards=[np.zeros((0, 12), np.float16)],
    )


def test_a_step_of_a_plug_that_does_not_fit_is_taken_in_smaller_passes(llama):
    llm = FrozenLLM.load(LLMConfig(model=str(llama)))
    samples, gradients = long_samples(llm), []
    for budget, room in ((40_000, 200 * 2**20), (2_000, None)):
        torch.manual_seed(0)
        plug = PersonaPlug(PlugConfig(encoder_dim=12, llm_dim=llm.dim, aggregation="mean")).eval()
        config = FitConfig(
            batch_size=256, max_tokens_per_microbatch=budget, precision="float32", max_grad_norm=1e9
        )  # gradients are left as they are: AdamW's first step would not show that all were too large
        fitter = Fitter(plug, llm, config, samples, samples)
        assert fitter.budget == budget
        if room is None:
            fitter.step(np.arange(256), 0)
        else:
            with limited(room):
                fitter.step(np.arange(256), 0)
            assert 1_000 < fitter.budget < 20_000
        gradients.append({name: one.grad for name, one in plug.named_parameters() if one.grad is not None})
    few, many = gradients
    assert few.keys() == many.keys() and any(grad.norm() > 0 for grad in many.values())
    for name, grad in many.items():
        torch.testing.assert_close(few[name], grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_a_stack_that_does_not_fit_is_taken_in_parts(llama):
    rng = np.random.default_rng(0)
    texts = [(rng.integers(4, 26, 100).tolist(), [*rng.integers(4, 26, 5).tolist(), 2]) for _ in range(120)]
    users = [UserExamples("one", texts[:40]), UserExamples("two", texts[40:])]
    config = LoraConfig(shape=AdapterShape(targets=("q_proj", "v_proj", "o_proj")), batch_size=80, epochs=1)
    found = []
    for scarce in (True, False):
        trainer = StackedTrainer(LlamaForCausalLM.from_pretrained(llama), config, StackConfig(tokens=20_000))
        before = trainer.memory_bytes
        with limited(80 * 2**20) if scarce else nullcontext():
            found.append({one.user_id: one for one in trainer.fit(users)})
        assert (trainer.memory_bytes < before) == scarce
    for user, whole in found[1].items():
        for name, pair in whole.weights.items():
            for want, got in zip(pair, found[0][user].weights[name], strict=True):
                assert (got - want).norm() <= 1e-4 * want.norm(), (user, name)


def test_an_error_that_is_not_of_memory_is_not_tried_again(llama):
    llm = FrozenLLM.load(LLMConfig(model=str(llama)))
    samples = long_samples(llm, 4)
    plug = PersonaPlug(PlugConfig(encoder_dim=12, llm_dim=llm.dim, aggregation="mean")).eval()
    fitter = Fitter(plug, llm, FitConfig(precision="float32"), samples, samples)
    fitter.train.targets[0][0] = 10**6  # no token
    with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
        fitter.step(np.arange(4), 0)
    assert fitter.budget == 16_384


def test_what_a_container_keeps_of_files_counts_as_free(monkeypatch):
    gib = 2**30
    told = {
        "MemAvailable:": 64 * gib // 1024,
        "memory.max": 16 * gib,
        "memory.current": 16 * gib,
        "inactive_file": 12 * gib,
    }
    monkeypatch.setattr(memory, "_number", lambda path, after="": told[after or path.name])
    assert memory.free_bytes("cpu") == 12 * gib
    assert memory.free_bytes("cpu", sharers=3) == 4 * gib


def test_a_word_of_the_kernels_is_found_by_its_name(tmp_path):
    (tmp_path / "memory.stat").write_text("anon 5\nfile 70\ninactive_file 12\nactive_file 58\n")
    assert memory._number(tmp_path / "memory.stat", "inactive_file") == 12
    assert memory._number(tmp_path / "memory.stat", "unevictable") is None
