"""The tiny LM: it learns, its folder loads elsewhere, and its texts are cut into tokens as prompts are."""

import random

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from pplug.splice import PromptBuilder, PromptLayout
from pplug.tiny_lm import TinyLMConfig, encode, score, train_lm, train_tokenizer

WORDS = ("red", "green", "blue", "black")
TINY = TinyLMConfig(
    vocab_size=300,
    width=32,
    heads=1,
    layers=2,
    ffn_width=64,
    max_model_len=64,
    max_tokens=64,
    batch_tokens=512,
    steps=150,
).model_copy(update={"precision": "float32", "val_fraction": 0.1, "learning_rate": 1e-2})


def echoes(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """The answer is the word that the question names."""
    rng = random.Random(seed)
    return [(f"{'so ' * rng.randrange(4)}say {word}", word) for word in rng.choices(WORDS, k=n)]


@pytest.fixture(scope="module")
def trained():
    return train_lm(echoes(400), TINY)


def test_it_learns_what_the_texts_show(trained):
    assert trained.facts["heldout_texts"] == 40
    assert trained.facts["heldout_target_exact"] > 0.95
    assert trained.facts["steps"] == 150 and trained.facts["parameters"] == trained.model.num_parameters()


def test_the_folder_loads_elsewhere_and_replies_as_trained(trained, tmp_path):
    trained.save(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    prompt = tokenizer("say green\n", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenizer.bos_token_id
    out = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(out, skip_special_tokens=True) == "green"
    torch.testing.assert_close(
        model(**prompt).logits, trained.model(**prompt).logits, msg="the saved weights are not those that were trained"
    )
    assert (tmp_path / "training.json").exists()


def test_texts_become_the_same_tokens_as_prompts_and_targets_of_the_line():
    texts = [("say red", "red"), ("what?  \n", "two words"), ("", "black")]
    tokenizer = train_tokenizer(texts, TINY, "\n")
    prompt_builder = PromptBuilder(tokenizer, PromptLayout(), encoder_decoder=False)
    prompts, targets = (
        prompt_builder.prompts([text for text, _ in texts]),
        prompt_builder.targets([t for _, t in texts], 32),
    )
    expected = [(p.before + p.after + t, len(t)) for p, t in zip(prompts, targets, strict=True)]
    assert encode(texts, tokenizer, 64) == expected


def test_a_long_text_loses_the_end_of_its_input_only():
    text = ("word " * 100, "red")
    tokenizer = train_tokenizer([text], TINY)
    (whole, _), (cut, answer) = encode([text], tokenizer, 1000)[0], encode([text], tokenizer, 20)[0]
    end = tokenizer("\n", add_special_tokens=False)["input_ids"] + whole[-answer:]
    assert len(cut) == 20 and cut[-len(end) :] == end
    assert cut[: -len(end)] == whole[: 20 - len(end)]


@pytest.mark.parametrize("text", ["naïve café ☕", "数据", "tab\tand\nline", " two  spaces ", "\u0000 zero"])
def test_any_text_survives_the_tokenizer(trained, text):
    ids = trained.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert trained.tokenizer.decode(ids) == text


def test_losses_do_not_depend_on_what_shares_a_batch(trained):
    rows = encode(echoes(30, seed=5), trained.tokenizer, 64)
    together = score(trained.model, rows, TINY, trained.tokenizer.pad_token_id)
    alone = [score(trained.model, [row], TINY, trained.tokenizer.pad_token_id) for row in rows]
    tokens = [len(ids) - 1 for ids, _ in rows]
    by_hand = sum(one["heldout_loss"] * n for one, n in zip(alone, tokens, strict=True)) / sum(tokens)
    assert together["heldout_loss"] == pytest.approx(by_hand, rel=1e-5)


def test_the_same_seed_gives_the_same_model_and_another_seed_another():
    short = TINY.model_copy(update={"steps": 5})
    first, again = train_lm(echoes(60), short), train_lm(echoes(60), short)
    other = train_lm(echoes(60), short.model_copy(update={"seed": 1}))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.model.lm_head.weight[:50], other.model.lm_head.weight[:50])


def test_a_budget_of_minutes_ends_the_training_and_progress_reaches_one():
    seen = []
    budget = TINY.model_copy(update={"steps": None, "max_minutes": 0.01})
    facts = train_lm(echoes(60), budget, seen.append).facts
    assert seen[-1].done == 1 and seen[-1].step == facts["steps"]
    assert facts["seconds"] < 10
    assert [now.done for now in seen] == sorted(now.done for now in seen)


@pytest.mark.slow
def test_the_first_part_of_a_run_reads_short_texts_only():
    """Long texts have an answer of their own here: who has not read them gives that of the short ones."""
    rng = random.Random(1)
    long = [(f"{rng.randrange(10**29, 10**30)} say {word}", "grey") for word in rng.choices(WORDS, k=200)]
    sizes = TINY.model_copy(update={"short_tokens": 24})
    exact = {}
    for share in (0.0, 0.99):
        made = train_lm(echoes(200) + long, sizes.model_copy(update={"short_first": share}))
        rows = encode(long[:50], made.tokenizer, 64)
        assert (
            min(len(ids) for ids, _ in rows) > 24 > max(len(ids) for ids, _ in encode(echoes(50), made.tokenizer, 64))
        )
        exact[share] = score(made.model, rows, sizes, made.tokenizer.pad_token_id)["heldout_target_exact"]
    assert exact[0.0] > 0.9 and exact[0.99] < 0.1
    with pytest.raises(ValueError, match="no text has at most short_tokens=24 tokens"):
        train_lm(long, sizes.model_copy(update={"short_first": 0.5}))


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"width": 96, "heads": 4}, "multiple of 32"),
        ({"max_tokens": 600}, "raise that"),
        ({"steps": None}, "one of them"),
    ],
)
def test_sizes_that_cannot_be_are_refused_and_the_message_says_why(wrong, says):
    with pytest.raises(ValidationError, match=says):
        TinyLMConfig(**wrong)


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="nothing is left"):
        train_lm([], TINY)
