"""The end of a reply: end tokens of all files, stop texts and special tokens, and thoughts."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from pipelines.engines.base import Decoding
from pipelines.engines.ending import Ending, end_ids
from pipelines.engines.vllm_args import tokenizer_args
from pplug.llm import load_tokenizer
from pplug.splice import PromptBuilder, PromptLayout
from tests.pplug.models import tiny_llama, word_tokenizer
from tests.pplug.token_kinds import byte_bpe

TEMPLATE = (
    "{% for message in messages %}<turn> {{ message['content'] }} <end>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn> {% endif %}"
)


@pytest.fixture
def tokenizer(tmp_path):
    made = word_tokenizer(tmp_path)
    made.add_tokens([AddedToken("<turn>", special=True), AddedToken("<end>", special=True)])
    made.add_tokens([AddedToken(name, special=False) for name in ("<think>", "</think>")])
    made.add_tokens([AddedToken(name, special=True) for name in ("<|channel|>", "<|message|>")])
    made.chat_template = TEMPLATE
    return made


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def builder(tokenizer, **layout):
    return PromptBuilder(tokenizer, PromptLayout(**layout), encoder_decoder=False)


def test_end_tokens_of_the_tokenizer_the_configs_and_the_template_count(tmp_path, tokenizer):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7], "repetition_penalty": 1.3}))
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 9}}))
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert end_ids(tmp_path, builder(tokenizer)) == (2, 7, 9, end)
    assert end_ids(tmp_path, builder(tokenizer, chat="never")) == (2, 7, 9)


def ending(tmp_path, tokenizer, **decoding):
    return Ending(tmp_path, builder(tokenizer), Decoding(**decoding))


def test_a_stop_text_that_is_a_special_token_stops_by_its_id(tmp_path, tokenizer):
    own = ending(tmp_path, tokenizer, stop=("<turn>", "red film"), stop_token_ids=(30,))
    turn = tokenizer.convert_tokens_to_ids("<turn>")
    assert {turn, 30, 2} <= set(own.stop_ids) and own.stop_texts == ["red film"]
    reply = ids(tokenizer, "the cat <turn> dog")
    assert own.length(reply) == (3, True) and own.text(reply[:3]) == "the cat"


def test_a_reply_ends_with_the_token_that_completes_a_stop_text(tmp_path, tokenizer):
    own = ending(tmp_path, tokenizer, stop=("cat sat",))
    reply = [*ids(tokenizer, "the cat sat on the mat"), 2]
    assert own.length(reply) == (3, True)
    assert own.cut(reply[:3]) == "the "


def test_a_stop_text_within_the_least_number_of_tokens_is_none(tmp_path, tokenizer):
    """vLLM looks for one behind them; it may begin before their end."""
    reply = ids(tokenizer, "the cat sat on the cat sat")
    for least, length, text in (
        (2, 3, "the "),
        (3, 7, "the cat sat on the "),
        (6, 7, "the cat sat on the "),
        (7, 7, None),
    ):
        own = ending(tmp_path, tokenizer, stop=("cat sat",), min_tokens=least)
        assert own.length(reply) == (length, text is not None), least
        assert own.cut(reply[:length]) == text, least


def test_padding_is_no_output(tmp_path, tokenizer):
    own = ending(tmp_path, tokenizer)
    assert own.length([5, 6, 2, 0, 0]) == (3, True)
    assert own.length([5, 6, 7]) == (3, False)


def test_thoughts_are_cut_and_counted(tmp_path, tokenizer):
    own = ending(tmp_path, tokenizer, stop=("mat",))
    asked = ids(tokenizer, "<turn> the")
    for reply, prompt, answer in [
        ("the cat", asked, (None, ())),
        ("<think> the cat </think> dog ran", asked, ("dog ran", ("thinking_cut",))),
        ("<think> the cat", asked, ("", ("thinking_unfinished",))),
        ("the cat </think> dog ran on mat", [*asked, *ids(tokenizer, "<think>")], ("dog ran on", ("thinking_cut",))),
        ("the cat", [*asked, *ids(tokenizer, "<think>")], ("", ("thinking_unfinished",))),
        ("dog", [*asked, *ids(tokenizer, "<think> </think>")], (None, ())),
        ("<|channel|> the <|message|> cat", asked, ("", ("thinking_unfinished",))),
    ]:
        assert own.answer(ids(tokenizer, reply), prompt) == answer, reply


def test_what_a_plug_has_learned_to_answer_is_no_thought(tmp_path, tokenizer):
    """Its targets stand right behind a prompt that opens a thought, and end as a reply does."""
    own, opened = ending(tmp_path, tokenizer), ids(tokenizer, "<turn> the <think>")
    end = [tokenizer.eos_token_id]
    assert own.answer(ids(tokenizer, "dog") + end, opened) == (None, ())
    assert own.answer(ids(tokenizer, "dog"), opened) == ("", ("thinking_unfinished",))
    assert own.answer(ids(tokenizer, "<think> dog") + end, opened) == ("", ("thinking_unfinished",))


def test_a_stop_text_ends_a_thought_and_makes_it_no_answer(tmp_path, tokenizer):
    own, opened = ending(tmp_path, tokenizer, stop=("cat sat",)), ids(tokenizer, "<turn> the <think>")
    reply = ids(tokenizer, "the cat sat")
    assert own.length(reply) == (3, True) and own.answer(reply, opened) == ("", ("thinking_unfinished",))


def test_the_last_channel_of_a_reply_is_its_answer(tmp_path, tokenizer):
    tokenizer.add_tokens(["final", "analysis"])
    own = ending(tmp_path, tokenizer)
    reply = "<|channel|> analysis <|message|> the cat <end> <|channel|> final <|message|> dog ran"
    assert own.answer(ids(tokenizer, reply), []) == ("dog ran", ("thinking_cut",))


def test_vllm_takes_our_tokenizer_where_it_would_choose_another(tmp_path):
    """A byte-level tokenizer under the name of Llama's class: vLLM decodes replies by what AutoTokenizer loads."""
    text, want = "the cat  sat on\nthe mat", byte_bpe(tmp_path)
    plain = Path(tiny_llama(tmp_path / "made"))
    assert tokenizer_args(plain, load_tokenizer(plain), tmp_path / "none") == {}
    folder = Path(shutil.copytree(plain, tmp_path / "llm"))
    want.save_pretrained(folder)
    said = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(said | {"tokenizer_class": "LlamaTokenizerFast"}))
    ids = want(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(folder).decode(ids) != text, "it chooses right by now"
    place = tokenizer_args(folder, load_tokenizer(folder), tmp_path / "copy")["tokenizer"]
    assert AutoTokenizer.from_pretrained(place).decode(ids) == text


def test_words_that_only_look_like_thoughts_stay(tmp_path):
    plain = word_tokenizer(tmp_path)
    own = Ending(tmp_path, builder(plain), Decoding())
    assert own.answer(plain("<think> cat")["input_ids"], []) == (None, ())
