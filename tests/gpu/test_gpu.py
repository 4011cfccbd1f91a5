"""These tests show what a CUDA device alone can show (`make test-gpu`). Without one all of them are skipped.

The engine on a GPU is another one than on a CPU (vLLM's Model Runner V2, with an overlay kernel for prompt embeddings):
its replies to rows, by adapters, and after preemptions are compared with those of transformers.
"""

import os

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from infra import device
from infra.shards import user_key
from pipelines.engines.adapters import AdapterName, Adapters
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, PromptSizes
from pipelines.engines.transformers import TransformersEngine
from pipelines.engines.vllm import VLLMEngine
from pplug.adapter import base_shapes, to_bytes
from pplug.encoder import EncoderConfig, TextEncoder
from pplug.llm import FrozenLLM, LLMConfig
from pplug.lora_pass import _Rows
from pplug.objective import target_loss
from pplug.splice import Prompt
from tests.pipelines.test_adapters import snapshot_of
from tests.pplug import mesh
from tests.pplug.models import tiny_bert, tiny_llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TARGETS = ("q_proj", "v_proj")
TEXTS = ["the cat sat on the mat", "dog", "a big red tree ran on the mat : film", "music nature", "one two three"]


def seen() -> tuple[str, str | None, int]:
    return device.assigned().type, os.environ.get("CUDA_VISIBLE_DEVICES"), device.assigned_gpus()


def test_a_worker_works_on_the_gpu_that_ray_assigns_and_one_without_sees_none(ray_session):
    import ray

    kind, visible, gpus = ray.get(ray.remote(num_gpus=1)(seen).remote())
    assert (kind, gpus) == ("cuda", 1) and visible
    assert ray.get(ray.remote(num_cpus=0)(seen).remote()) == ("cpu", "", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vectors_of_a_gpu_are_those_of_a_cpu(tmp_path, dtype):
    folder = str(tiny_bert(tmp_path, dim=32))
    texts = [" ".join(TEXTS[i % 5] for i in range(n % 4 + 1)) for n in range(200)]
    want = TextEncoder(EncoderConfig(model=folder, dtype="float32", max_tokens=64), "cpu").encode(texts)
    encoder = TextEncoder(EncoderConfig(model=folder, dtype=dtype, max_tokens=64), "cuda")
    assert encoder.device.type == "cuda"
    got = encoder.encode(texts)
    least = 0.9999 if dtype == "float32" else 0.999
    assert (want * got).sum(1).min() > least
    np.testing.assert_array_equal(got, encoder.encode(texts))


def test_a_plug_that_is_trained_on_a_gpu_has_the_gradient_of_a_cpu(tmp_path):
    folder = str(tiny_llama(tmp_path, width=128))
    gradients = []
    for kind in ("cpu", "cuda"):
        plug, llm, fitter = mesh.fitter(folder, torch.device(kind))
        fitter._gradients(np.arange(8), 0)
        gradients.append(torch.cat([parameter.grad.flatten().cpu() for parameter in fitter.parameters]))
        assert llm.embedding.weight.device.type == next(plug.parameters()).device.type == kind
    assert (gradients[1] - gradients[0]).norm() <= 1e-3 * gradients[0].norm() > 0


@pytest.mark.parametrize("width", [64, 100, 128, 192])
def test_the_gradient_of_padded_prompts_is_a_number_at_every_width(tmp_path, width):
    """By its default, torch's attention gives none at widths of 64 more than a multiple of 128."""
    config = LLMConfig(model=str(tiny_llama(tmp_path, width=128)), dtype="bfloat16")
    plug, _, _ = mesh.fitter(config.model, torch.device("cuda"))  # what a training turns off
    llm = FrozenLLM.load(config, device=torch.device("cuda"))
    assert llm.model.config._attn_implementation == "sdpa" and next(plug.parameters()).is_cuda
    prompts = [Prompt([], [5] * (width - 5)), Prompt([], [6] * (width // 2))]
    rows = torch.randn(2, 2, llm.dim, device="cuda").requires_grad_()
    loss, _ = target_loss(llm, prompts, rows, [2, 2], [[7, 8, 9], [7]])
    loss.backward()
    assert rows.grad.isfinite().all() and rows.grad.norm() > 0


def test_a_window_is_read_by_a_kernel_that_keeps_no_scores():
    torch.manual_seed(0)
    lengths, window = [30, 40], 12
    q, k, v = (torch.randn(sum(lengths), heads, 32) for heads in (4, 2, 2))
    rows = {kind: _Rows(lengths, 0, 0, sum(lengths), torch.device(kind)) for kind in ("cpu", "cuda")}
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION]):
        got = rows["cuda"].attend(q.cuda(), k.cuda(), v.cuda(), 0.2, window)
    torch.testing.assert_close(got.cpu(), rows["cpu"].attend(q, k, v, 0.2, window), rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm"), width=128)), dtype="float32")


def prompts(engine, count, names=()):
    """Prompts longer than a block of the cache, with 0 to 3 persona rows; every other one by the adapters in turn."""
    rng, out = np.random.default_rng(0), []
    for i in range(count):
        words = " ".join(TEXTS[(i + k) % 5] for k in range(6))
        before = [1, *engine.tokenizer(words, add_special_tokens=False)["input_ids"]]
        rows = rng.normal(size=(i % 4, engine.dim)).astype(np.float32)
        name = names[i // 2 % len(names)] if names and i % 2 else None
        out.append(EnginePrompt(str(i), before, rows, [5, 6 + i % 9], name))
    return out


def texts_of(replies):
    assert all(reply.error is None for reply in replies)
    return [reply.text.strip() for reply in replies]


def test_model_runner_v2_replies_to_rows_as_transformers_does(llm):
    decoding, config = Decoding(max_tokens=16), EngineConfig(dtype="float32", gpu_memory_utilization=0.3)
    engine = VLLMEngine(llm, config, decoding, 1, sizes=PromptSizes(3, 40))
    try:
        assert engine._engine.vllm_config.use_v2_model_runner
        asked = prompts(engine, 40)
        got = texts_of(engine.replies(asked))
        assert got == texts_of(engine.replies(asked))  # out of the prefix cache
    finally:
        engine.shutdown()
    other = TransformersEngine(llm, EngineConfig(kind="transformers", dtype="float32"), decoding, 1)
    assert got == texts_of(other.replies(asked))


def test_the_engine_answers_rows_in_bfloat16(llm):
    """Another attention than that of float32. Its first words are transformers', but for what rounding turns."""
    decoding, config = Decoding(max_tokens=1), EngineConfig(dtype="bfloat16", gpu_memory_utilization=0.3)
    engine = VLLMEngine(llm, config, decoding, 1, sizes=PromptSizes(3, 40))  # its probe compares rows with ids
    try:
        assert engine.about == "vllm, bfloat16"
        got = texts_of(engine.replies(prompts(engine, 40)))
    finally:
        engine.shutdown()
    other = TransformersEngine(llm, EngineConfig(kind="transformers", dtype="bfloat16"), decoding, 1)
    want = texts_of(other.replies(prompts(other, 40)))
    assert sum(one == two for one, two in zip(got, want, strict=True)) >= 30


def test_replies_by_adapters_with_rows_stay_the_same_where_requests_are_preempted(llm, tmp_path):
    """Too few blocks for all requests at once: some are set back and read again, rows included."""
    from vllm.v1.metrics.reader import get_metrics_snapshot

    rng = torch.Generator().manual_seed(0)
    weights = [
        {
            module: (torch.randn(8, inside, generator=rng) / 8, torch.randn(outside, 8, generator=rng) / 8)
            for module, (inside, outside) in base_shapes(llm.model, TARGETS).items()
        }
        for _ in range(2)
    ]
    rows = {
        f"user-{i}": {"adapter_id": f"f-{i}", "weights": to_bytes(weights[i], "llm-x")} for i in range(len(weights))
    }
    names = [AdapterName(user_key(user), row["adapter_id"]) for user, row in rows.items()]
    found = []
    for few in (False, True):
        snapshot = snapshot_of(tmp_path / str(few), rows)
        adapters = Adapters(snapshot, 4, "llm-x", 8, TARGETS)
        args = {"num_gpu_blocks_override": 24, "disable_log_stats": False} if few else {}
        config = EngineConfig(
            dtype="float32", gpu_memory_utilization=0.3, max_loras=2, max_cpu_loras=2, max_num_batched_tokens=128,
            max_num_seqs=64, enable_prefix_caching=False, args=args,
        )  # fmt: skip
        engine = VLLMEngine(llm, config, Decoding(max_tokens=64), 1, adapters, PromptSizes(3, 40))
        try:
            found.append(texts_of(engine.replies(prompts(engine, 32, names))))
            if few:
                assert engine._engine.vllm_config.use_v2_model_runner
                counted = {metric.name: metric for metric in get_metrics_snapshot()}
                assert counted["vllm:num_preemptions"].value > 0
        finally:
            engine.shutdown()
    assert found[0] == found[1]
