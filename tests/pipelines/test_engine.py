"""The vLLM engine against transformers on the same tiny model, and what never reaches it."""

import contextlib
import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.errors import InputError
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, NextTokens, ResolvedDecoding
from pipelines.engines.transformers import TransformersEngine
from pipelines.engines.vllm import VLLMEngine
from pipelines.generate.personas import ragged_f32
from pipelines.generate.prompts import PROMPTS
from pipelines.generate.replies import Reply, check_rows
from pipelines.run import CpuShare
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from tests.pplug.models import WORDS, tiny_bart, tiny_llama, tiny_t5

INPUTS = ["the cat sat on the mat", "dog", "a big red tree ran on the mat : film", "music nature", "one two three"]


SECOND_END = "film"
"""A word that ends a reply beside the tokenizer's own token, as chat models have two."""


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    ends = [2, 4 + WORDS.index(SECOND_END)]
    others = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.7, "top_k": 5}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends} | others))
    return LLMConfig(model=str(folder))


@pytest.fixture(scope="session")
def reply(llama):
    """One engine for the tests of this file, in float32: random weights leave ties that bfloat16 would turn."""
    config = EngineConfig(kv_cache_gib=1, dtype="float32")
    stage = Reply(llama, config, Decoding(max_tokens=12), llm_id(llama), "run-x", CpuShare(1, 2))
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
        embed(torch.tensor(prompt.before, dtype=torch.long)),
        torch.from_numpy(prompt.soft_prompt),
        embed(torch.tensor(prompt.after, dtype=torch.long)),
    ]
    embeds = torch.cat(parts)[None]
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    plain = {"do_sample": False, "repetition_penalty": 1.0, "top_k": None, "temperature": None}
    out = llm.model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_tokens, **plain)
    return llm.tokenizer.decode(out[0], skip_special_tokens=True).removesuffix(f" {SECOND_END}")


@contextlib.contextmanager
def using(engine, decoding):
    """The engine, answering by another decoding."""
    before = engine.decoding
    engine.use(decoding)
    try:
        yield engine
    finally:
        engine.use(before)


def batch(prompts, errors=None, samples=None):
    n = len(prompts)
    columns = {
        "bucket": [0] * n,
        "user_key": ["k"] * n,
        "request_id": [p.key for p in prompts],
        "method": ["plug"] * n,
        "user_id": ["u"] * n,
        "input_hash": ["h"] * n,
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
        "samples": [samples] * n,
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


def test_rows_right_before_a_reply_give_the_replies_of_transformers(reply, second, llm):
    """As with llm.layout.rows=last: nothing stands behind the rows."""
    asked = [dataclasses.replace(one, before=one.before + one.after, after=[]) for one in prompts(llm, [4, 1, 2, 0, 3])]
    with torch.no_grad():
        want = [greedy(llm, prompt, 12) for prompt in asked]
    for engine in (reply.engine, second):
        assert [answer.text.strip() for answer in engine.replies(asked)] == want
    assert want != [greedy(llm, prompt, 12) for prompt in prompts(llm, [4, 1, 2, 0, 3])]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="engines are in bfloat16 only where there is AMX")
def test_each_token_of_a_bfloat16_reply_is_about_the_best_in_float32(llama, llm):
    stage = Reply(llama, EngineConfig(kv_cache_gib=1), Decoding(max_tokens=12), llm_id(llama), "run-x", CpuShare(1, 2))
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


@pytest.fixture(scope="session")
def second(llama):
    return TransformersEngine(
        llama, EngineConfig(kind="transformers", dtype="float32"), Decoding(max_tokens=12), threads=2
    )


def test_the_second_engine_gives_the_same_replies(second, reply, llm):
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


def test_rows_carry_their_identities_and_lengths(reply, llm, llama):
    prompt = prompts(llm, [4, 1, 2, 0, 3])[0]
    row = reply(batch([prompt])).to_pylist()[0]
    assert row["llm_id"] == llm_id(llama) and row["run_id"] == "run-x" and row["plug_id"] == "p"
    assert row["input_hash"] == "h"
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
    begins: dict = {"max_new_tokens": 8}
    if made is tiny_bart:  # as published BARTs are asked; with beams it would count for the length of a reply
        begun = {"forced_bos_token_id": 1, "max_new_tokens": 9}
        begins |= begun if beams == 1 else {"decoder_input_ids": torch.tensor([[2, 1]])}
    for prompt, got in zip(asked, engine.replies(asked), strict=True):
        embed = llm.embedding
        ids = [torch.tensor(part, dtype=torch.long) for part in (prompt.before, prompt.after)]
        embeds = torch.cat([embed(ids[0]), torch.from_numpy(prompt.soft_prompt), embed(ids[1])])[None]
        with torch.no_grad():
            out = llm.model.generate(inputs_embeds=embeds, num_beams=beams, do_sample=False, **begins)
        assert got.text == llm.tokenizer.decode(out[0], skip_special_tokens=True)


def test_check_rows_lets_good_rows_through():
    assert check_rows(np.ones(8, np.float32), 4, 10.0) is None
    assert check_rows(np.zeros(0, np.float32), 4, 10.0) is None
    assert "dtype float64" in check_rows(np.ones(8), 4, 10.0)


def test_sampling_depends_on_the_request_and_not_on_its_batch(llama, reply, llm):
    asked = prompts(llm, [4, 1, 2, 0, 3])
    with using(reply.engine, Decoding(max_tokens=12, temperature=1.0, seed=7)) as engine:
        together = [answer.text for answer in engine.replies(asked)]
        alone = [engine.replies([prompt])[0].text for prompt in asked]
    assert together == alone


def test_each_sample_of_a_request_draws_by_itself_and_is_a_row(reply, second, llm):
    asked = prompts(llm, [4, 1, 2, 0, 3])
    for engine in (reply.engine, second):
        with using(engine, Decoding(max_tokens=12, temperature=1.0, seed=7, n=3)):
            stage = as_stage(reply, engine)
            rows, alone = stage(batch(asked, samples=[0, 1, 2])).to_pylist(), stage(batch(asked)).to_pylist()
            later = stage(batch(asked[:1], samples=[2])).to_pylist()
            stage.engine = None  # the engine is not this stage's to end
        assert [(row["request_id"], row["sample"]) for row in rows] == [(p.key, s) for p in asked for s in (0, 1, 2)]
        assert [row["text"] for row in rows[::3]] == [row["text"] for row in alone]
        assert {row["sample"] for row in alone} == {None} and later[0] == rows[2]
        assert len({row["text"] for row in rows}) > len(asked)


def as_stage(reply, engine):
    """The stage with another engine."""
    stage = type(reply).__new__(type(reply))
    stage.__dict__.update(reply.__dict__ | {"engine": engine, "decoding": engine.decoding})
    stage.read_labels()
    return stage


# --- both engines answer alike: labels, ends, penalties, probabilities ------------------------------------------------

ROWS = [4, 1, 2, 0, 3]
LABELS = ("cat", "cat sat", "music", "dog sat on", "red", "nature")


def within(*labels, **more):
    return ResolvedDecoding(constrain="labels", labels=labels or LABELS, **({"max_tokens": 6} | more))


def alike(reply, second, llm, decoding, rows=ROWS):
    """The replies of both engines, which are the same."""
    asked = prompts(llm, rows)
    with using(reply.engine, decoding) as one, using(second, decoding) as other:
        pairs = list(zip(one.replies(asked), other.replies(asked), strict=True))
    for a, b in pairs:
        assert a.error is b.error is None
        assert (a.text.strip(), a.finish_reason, a.output_tokens) == (b.text.strip(), b.finish_reason, b.output_tokens)
    return [a for a, _ in pairs]


def test_replies_are_labels_with_and_without_persona_rows(reply, second, llm):
    free = {answer.text.strip() for answer in alike(reply, second, llm, Decoding(max_tokens=6))}
    assert free.isdisjoint(LABELS)
    found = alike(reply, second, llm, within()) + alike(reply, second, llm, within(), rows=[0, 0, 0, 0, 0])
    assert {answer.text.strip() for answer in found} <= set(LABELS)
    assert {answer.finish_reason for answer in found} == {"stop"}
    ratings = alike(reply, second, llm, within("one", "two", "three"))
    assert {answer.text.strip() for answer in ratings} <= {"one", "two", "three"}


def test_a_constrained_reply_takes_the_likeliest_way_at_each_place(reply, second, llm):
    ids = {label: llm.prompt_builder.words.ids([label])[0] for label in LABELS}
    ends = second.end_ids
    for prompt, answer in zip(prompts(llm, ROWS), alike(reply, second, llm, within()), strict=True):
        begun: list[int] = []
        while True:
            ways = {other[len(begun)] for other in ids.values() if other[: len(begun)] == begun != other}
            ways |= set(ends) if begun in ids.values() else set()
            logits = logits_after(llm, prompt, begun)
            best = max(ways, key=lambda way: logits[way])
            if best in ends:
                break
            begun.append(best)
        assert ids[answer.text.strip()] == begun


def logits_after(llm, prompt, begun):
    parts = [torch.tensor(prompt.before), torch.from_numpy(prompt.soft_prompt), torch.tensor(prompt.after + begun)]
    embeds = torch.cat([part if part.ndim == 2 else llm.embedding(part) for part in parts])[None]
    with torch.no_grad():
        return llm.model(inputs_embeds=embeds).logits[0, -1]


def test_sampled_replies_are_labels_too(reply, second, llm):
    hot = within(temperature=1.5, seed=3)
    for engine in (reply.engine, second):
        with using(engine, hot):
            found = [answer.text.strip() for _ in range(2) for answer in engine.replies(prompts(llm, ROWS))]
        assert set(found) <= set(LABELS) and len(set(found)) > 1


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("made", [tiny_t5, tiny_bart])
def test_encoder_decoders_and_beams_stay_within_labels(tmp_path, made, beams):
    config = LLMConfig(model=str(made(tmp_path)))
    decoding = within(num_beams=beams, label_logprobs=True)
    engine = TransformersEngine(config, EngineConfig(kind="transformers"), decoding, threads=1)
    asked = prompts(engine.llm, ROWS)
    found = engine.replies(asked)
    assert {answer.text for answer in found} <= set(LABELS)
    assert [answer.text for answer in found] == [engine.replies([prompt])[0].text for prompt in asked]
    # the first token of a label, behind what the decoder has read before it
    begun = {tiny_t5: [0], tiny_bart: [2, 1]}[made]
    llm, prompt = engine.llm, asked[0]
    parts = [torch.tensor(prompt.before), torch.from_numpy(prompt.soft_prompt), torch.tensor(prompt.after)]
    embeds = torch.cat([part if part.ndim == 2 else llm.embedding(part.long()) for part in parts])[None]
    with torch.no_grad():
        logits = llm.model(inputs_embeds=embeds, decoder_input_ids=torch.tensor([begun])).logits[0, -1]
    (got,) = engine.next_logprobs([NextTokens(prompt, (), (5, 9))])
    assert got == pytest.approx(logits.log_softmax(-1)[[5, 9]].tolist(), abs=1e-4)


def test_each_labels_probability_stands_beside_the_reply(reply, second, llm):
    decoding = within(label_logprobs=True)
    asked, tables = prompts(llm, ROWS), []
    for engine in (reply.engine, second):
        with using(engine, decoding):
            stage = as_stage(reply, engine)
            tables.append(stage(batch(asked)).to_pylist())
            stage.engine = None  # the engine is not this stage's to end
    first_ids = [llm.prompt_builder.words.ids([label])[0][0] for label in ("music", "red")]
    for prompt, one, other in zip(asked, *tables, strict=True):
        a, b = dict(one["label_logprobs"]), dict(other["label_logprobs"])
        assert list(a) == list(LABELS) and sum(np.exp(list(a.values()))) == pytest.approx(1, abs=1e-4)
        assert a == pytest.approx(b, abs=1e-3)
        logits = logits_after(llm, prompt, [])
        assert a["music"] - a["red"] == pytest.approx((logits[first_ids[0]] - logits[first_ids[1]]).item(), abs=1e-3)
        assert one["text"].strip() in a


def test_a_regular_expression_limits_both_engines(reply, second, llm):
    found = alike(reply, second, llm, Decoding(max_tokens=6, regex="(cat|dog|red)(sat|ran)?"))
    assert {answer.text.replace(" ", "") for answer in found} <= {
        first + then for first in ("cat", "dog", "red") for then in ("", "sat", "ran")
    }


def test_stop_texts_end_replies_alike(reply, second, llm):
    whole = [answer.text.split() for answer in alike(reply, second, llm, Decoding(max_tokens=12))]
    stop = next(words[2] for words in whole if len(words) > 4 and words[2] not in words[:2])
    found = alike(reply, second, llm, Decoding(max_tokens=12, stop=(stop,)))
    assert any(answer.finish_reason == "stop" and answer.output_tokens == 3 for answer in found)
    assert all(stop not in answer.text for answer in found)
    least = alike(reply, second, llm, Decoding(max_tokens=12, stop=(stop,), min_tokens=5))
    assert any(stop in answer.text and answer.output_tokens > 5 for answer in least)


@pytest.mark.parametrize("wrong", [{"regex": "("}, {"temperature": 3.0}, {"stop_token_ids": (10**6,)}])
def test_a_decoding_that_the_engine_refuses_is_refused_once_and_at_the_start(reply, wrong):
    with using(reply.engine, Decoding(max_tokens=4, **wrong)) as engine:
        with pytest.raises(InputError, match="decoding: vLLM does not take it"):
            engine._try_decoding()
    reply.engine._try_decoding()


def test_penalties_count_alike_and_leave_the_engine_alive(reply, second, llm):
    """A public report says that embeddings with any penalty kill vLLM (vllm#57719): this release answers."""
    plain = [answer.text for answer in alike(reply, second, llm, Decoding(max_tokens=12))]
    for more in ({"repetition_penalty": 1.7}, {"presence_penalty": 1.0}, {"frequency_penalty": 0.8}):
        found = [answer.text for answer in alike(reply, second, llm, Decoding(max_tokens=12, **more))]
        assert found != plain, more


def test_least_tokens_and_probabilities_of_tokens_are_alike(reply, second, llm):
    decoding = Decoding(max_tokens=8, min_tokens=5, logprobs=True)
    asked = prompts(llm, ROWS)
    with using(reply.engine, decoding) as one, using(second, decoding) as other:
        pairs = list(zip(one.replies(asked), other.replies(asked), strict=True))
    for a, b in pairs:
        assert a.text.strip() == b.text.strip() and a.output_tokens == b.output_tokens >= 5
        assert len(a.token_logprobs) == a.output_tokens
        assert a.token_logprobs == pytest.approx(b.token_logprobs, abs=1e-3)


def test_sampling_from_one_token_is_greedy(reply, second, llm):
    greedy = [answer.text for answer in alike(reply, second, llm, Decoding(max_tokens=8))]
    found = alike(reply, second, llm, Decoding(max_tokens=8, temperature=1.0, top_k=1))
    assert [answer.text for answer in found] == greedy
    certain = alike(reply, second, llm, Decoding(max_tokens=8, temperature=1.0, min_p=1.0))
    assert [answer.text for answer in certain] == greedy


def test_the_rows_of_a_prompt_are_no_tokens_to_a_penalty(reply, llm):
    """The id beside a row is one of the prompt's own, so that no other token is made less likely."""
    prompt = dataclasses.replace(prompts(llm, ROWS)[0], soft_prompt=persona(llm, 3, 9))
    with using(reply.engine, Decoding(repetition_penalty=1.5)) as engine:
        inputs = engine._inputs(prompt)
    beside = [
        token for token, real in zip(inputs["prompt_token_ids"], inputs["prompt_is_token_ids"], strict=True) if not real
    ]
    assert len(beside) == 3 and set(beside) <= {*prompt.before, *prompt.after}


def test_a_prompt_that_the_engine_refuses_is_that_rows_error_alone(reply, llm):
    whole, nothing = prompts(llm, ROWS)[0], np.zeros((0, llm.dim), np.float32)
    found = reply.engine.replies([EnginePrompt("empty", [], nothing, []), whole])
    assert found[0].error is not None and found[0].error.startswith("the engine refused the prompt")
    assert found[1].error is None and found[1].output_tokens
    asked = [NextTokens(EnginePrompt("empty", [], nothing, []), (), (5,)), NextTokens(whole, (), (5,))]
    lost, known = reply.engine.next_logprobs(asked)
    assert lost is None and len(known) == 1
