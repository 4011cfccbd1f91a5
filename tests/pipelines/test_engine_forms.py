"""Replies with a form, by both engines: JSON by a schema, and an answer after thoughts.

The model is made by hand: its next token depends on the last one alone, so that what it writes is known beforehand.
"""

import json

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt
from pipelines.engines.transformers import TransformersEngine
from pipelines.generate.replies import Reply
from pipelines.run import CpuShare
from pplug.llm import LLMConfig, llm_id
from tests.pipelines.test_engine import as_stage, batch, using

SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["bad", "good"]}, "n": {"enum": [7]}},
    "required": ["mood", "n"],
    "additionalProperties": False,
}
FOLLOWS = {"a": "<think>", "<think>": "h", "h": "m", "m": "</think>", "</think>": "o", "o": "k", "k": "</s>",
           "c": "o", '"': "g"}  # fmt: skip
"""The token after a token."""


def byte_tokenizer(folder):
    """One token per byte, and the two tags of thoughts, which are no special tokens, as Qwen3 has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate([*names, *alphabet])}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(names)
    core.add_tokens([AddedToken(name, normalized=False, special=False) for name in ("<think>", "</think>")])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    made.save_pretrained(folder)
    return made


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    tokenizer = byte_tokenizer(folder)
    size = len(tokenizer)
    width = -(-size // 32) * 32
    config = LlamaConfig(
        vocab_size=size, hidden_size=width, intermediate_size=32, num_hidden_layers=1, head_dim=32,
        num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=128,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size, width))
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        head = model.lm_head.weight.zero_()
        for space in " \n\t\r":  # a schema allows them anywhere, and a model that only liked them would never end
            head[ids(tokenizer, space)[0]] = -1
        for token, following in FOLLOWS.items():
            head[ids(tokenizer, following)[0], ids(tokenizer, token)[0]] = 1
    model.save_pretrained(folder)
    return LLMConfig(model=str(folder))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def stages(llm):
    """The stage with either engine."""
    made = Reply(llm, EngineConfig(dtype="float32"), Decoding(max_tokens=24), llm_id(llm), "run-x", CpuShare(1, 1))
    second = TransformersEngine(llm, EngineConfig(kind="transformers"), Decoding(max_tokens=24), threads=1)
    yield made, as_stage(made, second)
    made.engine.shutdown()


def replies(stage, texts, decoding):
    """Rows for prompts that end so; the first has a persona row before its text."""
    row = np.full((1, stage.engine.dim), 0.1, np.float32)
    none = row[:0]
    asked = [EnginePrompt(text, [1], none if i else row, ids(stage.engine.tokenizer, text)) for i, text in
             enumerate(texts)]  # fmt: skip
    with using(stage.engine, decoding):
        return stage(batch(asked)).to_pylist()


def test_thoughts_that_the_model_writes_are_cut_and_counted(stages):
    for stage in stages:
        rows = replies(stage, ["a", "xa", "c", "x<think>"], Decoding(max_tokens=24))
        assert [row["text"] for row in rows] == ["ok"] * 4
        assert [row["notes"] for row in rows] == [["thinking_cut"], ["thinking_cut"], [], ["thinking_cut"]]
        assert [row["output_tokens"] for row in rows] == [7, 7, 3, 6]  # thoughts and end are output
        assert {row["finish_reason"] for row in rows} == {"stop"}
        short = replies(stage, ["a", "c"], Decoding(max_tokens=3))
        assert [(row["text"], row["notes"]) for row in short] == [("", ["thinking_unfinished"]), ("ok", [])]
        assert [row["finish_reason"] for row in short] == ["length", "stop"]


def test_replies_follow_a_json_schema(stages):
    for stage in stages:
        rows = replies(stage, ["a", "c", "the"], Decoding(max_tokens=60, json_schema=SCHEMA))
        assert {row["error"] for row in rows} == {None} and {row["finish_reason"] for row in rows} == {"stop"}
        assert [json.loads(row["text"]) for row in rows] == [{"mood": "good", "n": 7}] * 3  # after " it likes g
        assert all(row["notes"] == [] for row in rows)


def test_a_thought_that_the_prompt_opens_before_its_rows_is_cut(stages):
    """As with llm.layout.rows=last, where a template opens the thought; the row is the embedding of the tag itself."""
    for stage in stages:
        tag = ids(stage.engine.tokenizer, "<think>")
        row = np.eye(stage.engine.dim, dtype=np.float32)[tag]
        before = [1, *ids(stage.engine.tokenizer, "x<think>")]
        with using(stage.engine, Decoding(max_tokens=24)):
            (found,) = stage(batch([EnginePrompt("x", before, row, [])])).to_pylist()
        assert (found["text"], found["notes"]) == ("ok", ["thinking_cut"])


def test_json_that_max_tokens_leaves_no_room_for_ends_at_the_limit(stages):
    for stage in stages:
        (row,) = replies(stage, ["a"], Decoding(max_tokens=5, json_schema=SCHEMA))
        assert row["finish_reason"] == "length" and row["output_tokens"] == 5
