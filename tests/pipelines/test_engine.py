"""The vLLM engine against transformers on the same tiny model, and what never reaches it."""

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt
from pipelines.engines.transformers import TransformersEngine
from pipelines.engines.vllm import VLLMEngine
from pipelines.generate.personas import ragged_f32
from pipelines.generate.prompts import PROMPTS
from pipelines.generate.replies import Reply, check_rows
from pipelines.run import CpuShare
from pplug.llm import FrozenLLM, LLMConfig
from tests.pplug.models import tiny_bart, tiny_llama, tiny_t5

INPUTS = ["the cat sat on the mat", "dog", "a big red tree ran on the mat : film", "music nature", "one two three"]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="session")
def reply(llama):
    """One engine for the tests of this file, in float32: random weights leave ties that bfloat16 would turn."""
    config = EngineConfig(kv_cache_gib=1, dtype="float32")
    stage = Reply(llama, config, Decoding(max_tokens=12), "llm-x", "run-x", CpuShare(1, 2))
    yield stage
    stage.engine.shutdown()


@pytest.fixture(scope="session")
def llm(llama):
    return FrozenLLM.load(llama)


def persona(llm, rows, seed):
    values = np.random.default_rng(seed).normal(size=(rows, llm.dim)).astype(np.float32)
    return llm.embedding_norm * values / np.linalg.norm(values, axis=1, keepdims=True)


def prompts(llm, row_counts):
    return [
        EnginePrompt(f"r{i}", prompt.before, persona(llm, n, i), prompt.after)
        for i, (prompt, n) in enumerate(zip(llm.prompt_builder.prompts(INPUTS), row_counts, strict=True))
    ]


def greedy(llm, prompt, max_tokens):
    """transformers' own generate, one prompt at a time, from unpadded embeddings."""
    embed = llm.embedding
    parts = [
        embed(torch.tensor(prompt.before)),
        torch.from_numpy(prompt.soft_prompt),
        embed(torch.tensor(prompt.after)),
    ]
    embeds = torch.cat(parts)[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    out = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False)
    return llm.tokenizer.decode(out[0], skip_special_tokens=True)


def batch(prompts, errors=None):
    n = len(prompts)
    columns = {
        "bucket": [0] * n,
        "user_key": ["k"] * n,
        "request_id": [p.key for p in prompts],
        "method": ["plug"] * n,
        "user_id": ["u"] * n,
        "before": [p.before for p in prompts],
        "after": [p.after for p in prompts],
        "rows": ragged_f32([p.soft_prompt.ravel() for p in prompts]),
        "persona": ["attention"] * n,
        "plug_id": ["p"] * n,
        "encoder_id": ["e"] * n,
        "adapter_id": [None] * n,
        "adapter_key": [None] * n,
        "error": errors or [None] * n,
        "notes": [[]] * n,
    }
    return pa.table(columns, schema=PROMPTS)


def test_greedy_replies_with_prompt_embeddings_equal_those_of_transformers(reply, llm):
    asked = prompts(llm, [4, 1, 2, 0, 3])
    with torch.no_grad():
        want = [greedy(llm, prompt, 12) for prompt in asked]
    # vLLM writes a reply as it goes on from its prompt, with the space between two words
    got = [answer.text.strip() for answer in reply.engine.replies(asked)]
    assert got == want
    assert len(set(want)) > 1


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="engines are in bfloat16 only where there is AMX")
def test_each_token_of_a_bfloat16_reply_is_about_the_best_in_float32(llama, llm):
    stage = Reply(llama, EngineConfig(kv_cache_gib=1), Decoding(max_tokens=12), "llm-x", "run-x", CpuShare(1, 2))
    try:
        assert stage.engine.dtype == torch.bfloat16
        asked = prompts(llm, [4, 1, 2, 0, 3])
        replies = stage.engine.replies(asked)
    finally:
        stage.engine.shutdown()
    compared = 0
    for prompt, reply in zip(asked, replies, strict=True):
        written = torch.tensor(llm.tokenizer(reply.text, add_special_tokens=False)["input_ids"])
        if len(written) != reply.output_tokens - (reply.finish_reason == "stop"):
            continue  # a special token within the reply, which the text does not show
        parts = [torch.tensor(prompt.before), torch.from_numpy(prompt.soft_prompt), torch.tensor(prompt.after), written]
        embeds = torch.cat([part if part.ndim == 2 else llm.embedding(part) for part in parts])[None]
        with torch.no_grad():
            logits = llm.model(inputs_embeds=embeds).logits[0, -len(written) - 1 : -1]
        short = logits.amax(1) - logits.gather(1, written[:, None])[:, 0]
        assert (short < 0.02 * (logits.amax(1) - logits.amin(1))).all()
        compared += len(written)
    assert compared >= 12


def test_the_second_engine_gives_the_same_replies(llama, reply, llm):
    second = TransformersEngine(
        llama, EngineConfig(kind="transformers", dtype="float32"), Decoding(max_tokens=12), threads=2
    )
    asked = prompts(llm, [4, 1, 2, 0, 3])
    first = reply.engine.replies(asked)
    for a, b in zip(first, second.replies(asked), strict=True):
        assert (a.text.strip(), a.finish_reason, a.output_tokens) == (b.text, b.finish_reason, b.output_tokens)


def test_bad_rows_become_errors_and_their_neighbours_replies_do_not_change(reply, llm):
    good = prompts(llm, [4, 1, 2, 0, 3])
    clean = reply(batch(good)).to_pylist()
    bad = {
        "nan": good[0].soft_prompt.copy(),
        "inf": good[0].soft_prompt.copy(),
        "huge": good[0].soft_prompt * 1e6,
        "zero": good[0].soft_prompt * 0,
    }
    bad["nan"][1, 3] = np.nan
    bad["inf"][0, 0] = np.inf
    bad["width"] = np.ones((1, llm.dim + 1), np.float32)
    mixed = [EnginePrompt(name, good[0].before, rows, good[0].after) for name, rows in bad.items()]
    long = EnginePrompt("long", [1] * 200, good[0].soft_prompt, [5])
    out = {row["request_id"]: row for row in reply(batch([*mixed, *good, long])).to_pylist()}
    for name, what in {
        "nan": "not finite",
        "inf": "not finite",
        "huge": "above the limit",
        "zero": "all zeros",
        "width": f"not a multiple of the LLM's width {llm.dim}",
        "long": "engine's context of 128 leaves 116 beside max_tokens=12",
    }.items():
        assert what in out[name]["error"] and out[name]["text"] == "" and out[name]["finish_reason"] == "error"
    for row in clean:
        assert out[row["request_id"]] == row and row["error"] is None
    assert reply(batch(good)).to_pylist() == clean  # and the next batch is served as before


def test_rows_carry_their_identities_and_lengths(reply, llm):
    prompt = prompts(llm, [4, 1, 2, 0, 3])[0]
    row = reply(batch([prompt])).to_pylist()[0]
    assert row["llm_id"] == "llm-x" and row["run_id"] == "run-x" and row["plug_id"] == "p"
    assert row["prompt_tokens"] == len(prompt.before) + 4 + len(prompt.after)
    assert 0 < row["output_tokens"] <= 12
    assert row["decoding_id"] == Decoding(max_tokens=12).decoding_id != Decoding(max_tokens=13).decoding_id


def test_many_threads_share_one_engine(reply, llm):
    from concurrent.futures import ThreadPoolExecutor

    asked = prompts(llm, [4, 1, 2, 0, 3])
    want = [answer.text for answer in reply.engine.replies(asked)]
    with ThreadPoolExecutor(8) as pool:
        for answers in pool.map(lambda _: reply.engine.replies(asked), range(16)):
            assert [answer.text for answer in answers] == want


def test_a_model_that_treats_embeddings_in_its_own_way_is_refused(reply, monkeypatch):
    monkeypatch.setattr(
        "pipelines.engines.vllm.embedding_rows", lambda folder, ids: torch.randn(len(ids), reply.engine.dim)
    )
    with pytest.raises(InputError, match="the engine replies otherwise to the same tokens given as embeddings"):
        reply.engine.probe(reply_folder(reply))


def reply_folder(reply):
    from pathlib import Path

    return Path(reply.engine._engine.vllm_config.model_config.model)


def test_beams_need_the_second_engine(llama):
    with pytest.raises(InputError, match="engine.kind=transformers"):
        VLLMEngine(llama, EngineConfig(), Decoding(num_beams=4), threads=1)


@pytest.mark.parametrize("made", [tiny_t5, tiny_bart])
@pytest.mark.parametrize("beams", [1, 4])
def test_encoder_decoder_replies_equal_those_of_transformers(tmp_path, beams, made):
    """A batch against one at a time, unpadded."""
    config = LLMConfig(model=str(made(tmp_path)))
    decoding = Decoding(max_tokens=8, num_beams=beams)
    engine = TransformersEngine(config, EngineConfig(kind="transformers"), decoding, threads=2)
    llm = FrozenLLM.load(config)
    asked = prompts(llm, [4, 1, 2, 0, 3])
    for prompt, got in zip(asked, engine.replies(asked), strict=True):
        embed = llm.embedding
        ids = [torch.tensor(part, dtype=torch.long) for part in (prompt.before, prompt.after)]
        embeds = torch.cat([embed(ids[0]), torch.from_numpy(prompt.soft_prompt), embed(ids[1])])[None]
        with torch.no_grad():
            out = llm.model.generate(inputs_embeds=embeds, max_new_tokens=8, num_beams=beams, do_sample=False)
        assert got.text == llm.tokenizer.decode(out[0], skip_special_tokens=True)


def test_check_rows_lets_good_rows_through():
    assert check_rows(np.ones(8, np.float32), 4, 10.0) is None
    assert check_rows(np.zeros(0, np.float32), 4, 10.0) is None
    assert "dtype float64" in check_rows(np.ones(8), 4, 10.0)


def test_sampling_depends_on_the_request_and_not_on_its_batch(llama, reply, llm):
    hot = Decoding(max_tokens=12, temperature=1.0, seed=7)
    asked = prompts(llm, [4, 1, 2, 0, 3])
    before, reply.engine.decoding = reply.engine.decoding, hot
    try:
        together = [answer.text for answer in reply.engine.replies(asked)]
        alone = [reply.engine.replies([prompt])[0].text for prompt in asked]
    finally:
        reply.engine.decoding = before
    assert together == alone
