"""Profiles in prompts: how one is asked for, what room it takes, what it takes from nobody."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pplug import profile, retrieval, tasks
from pplug.plain_text import TextTokenizer
from pplug.profile import ProfileConfig, profile_id
from tests.pplug.models import word_tokenizer

CONFIG = ProfileConfig(prompt="{items}. Who is this?", text="About: {profile}\n")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(word_tokenizer(tmp_path_factory.mktemp("words")))


def words(text: str) -> int:
    """Tokens of a text, counted without the tokenizer: words and signs."""
    return len(re.findall(r"\w+|[^\w\s]+", text))


def films(*texts: str) -> list[dict[str, str]]:
    return [{"description": text, "tag": f"t{i}"} for i, text in enumerate(texts)]


def test_a_profile_is_asked_for_with_the_items_as_retrieval_writes_them_newest_first(tokenizer):
    got = profile.question(films("new", "old"), CONFIG, tasks.get("LaMP_2"), tokenizer, 100)
    assert got == 'the tag for the movie: "new" is "t0" , and the tag for the movie: "old" is "t1" . Who is this?'
    # a task that puts items into the request itself, and one with words of its own around them
    papers = [{"title": f"T{i}", "abstract": f"A{i}"} for i in range(2)]
    assert profile.question(papers, CONFIG, tasks.get("LaMP_1"), tokenizer, 100) == '"T0", and "T1". Who is this?'
    got = profile.question(papers, CONFIG, tasks.get("LaMP_5"), tokenizer, 100)
    assert got == '"T0" is a title for "A0" , and "T1" is a title for "A1" . Who is this?'


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 200))
def test_the_question_stays_within_its_budget_and_leaves_out_the_oldest_first(tokenizer, lengths, budget):
    shown = films(*("w " * n for n in lengths))
    got = profile.question(shown, CONFIG, tasks.get("LaMP_2"), tokenizer, budget)
    there = [f'"t{i}"' in got for i in range(len(lengths))]
    assert words(got) <= budget and there == sorted(there, reverse=True)
    if got:
        assert got.endswith("Who is this?") and there[0]
    else:
        assert budget < words('the tag for the movie: "w" is "t0" . Who is this?')
    line = words('the tag for the movie: " " is "t0" , and')
    if budget >= (line + max(lengths)) * len(lengths) + 5:  # an equal share is enough for the longest
        assert all(there) and got.count("w ") == sum(lengths)


def test_an_item_without_a_field_of_the_pattern_is_named_and_no_text_told(tokenizer):
    with pytest.raises(ValueError, match="'tag'") as error:
        profile.question([{"description": "secret"}], CONFIG, tasks.get("LaMP_2"), tokenizer, 100)
    assert "secret" not in str(error.value)


def test_a_profile_is_cut_to_its_tokens_wording_included(tokenizer):
    made = CONFIG.model_copy(update={"max_tokens": 6})
    assert profile.prefix("a b c d e f", "q", made, tokenizer, 100, 0.6) == "About: a b c d\n"
    assert profile.prefix("a b", "q", made, tokenizer, 100, 0.6) == "About: a b\n"
    assert profile.prefix("a b", "q", made.model_copy(update={"max_tokens": 2}), tokenizer, 100, 0.6) == ""


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 200), st.integers(1, 120), st.integers(20, 200), st.integers(0, 4),
    st.integers(20, 200),
)  # fmt: skip
def test_a_request_within_its_share_stands_whole_behind_profile_and_items(
    tokenizer, told, asked, max_tokens, limit, k, budget
):
    """As the prompt stage puts them together: the profile first, then what retrieval still has room for."""
    config, input = CONFIG.model_copy(update={"max_tokens": max_tokens}), "review: " + " ".join(["q"] * asked)
    budget = min(budget, limit)
    first = profile.prefix("p " * told, input, config, tokenizer, limit, 0.6)
    assert words(first) <= max_tokens
    reserved = max(0, words(first) - (limit - budget))
    shown = [{"score": "5", "text": "w " * 30} for _ in range(k)]
    rest = "".join(retrieval.compose(shown, input, tasks.get("LaMP_3"), tokenizer, budget, 0.6, reserved)[:2])
    if words(input) <= 0.6 * budget:
        assert rest.endswith(input) and words(first + rest) <= limit
        assert rest == input or words(rest) <= budget - reserved
    room = min(max_tokens, limit - min(words(input), int(0.6 * limit)))
    if told + 2 <= room:
        assert first == "About: " + "p " * told + "\n"


def test_the_identity_is_of_what_makes_a_profile_and_not_of_how_it_is_used():
    entry = tasks.get("LaMP_2")
    base = profile_id(CONFIG, "llm", "decoding", entry)
    used = CONFIG.model_copy(update={"text": "{profile} ", "max_tokens": 9, "llm_id": "x"})
    assert profile_id(used, "llm", "decoding", entry) == base
    others = [
        profile_id(CONFIG.model_copy(update=change), "llm", "decoding", entry)
        for change in ({"items": 3}, {"prompt": "{items}?"}, {"prompt_tokens": 99})
    ]
    others += [profile_id(CONFIG, "llm-2", "decoding", entry), profile_id(CONFIG, "llm", "decoding-2", entry)]
    others += [profile_id(CONFIG, "llm", "decoding", tasks.get("LaMP_4"))]
    assert len({base, *others}) == 7


def test_templates_without_their_slot_are_refused():
    for wrong in ({"prompt": "Who?"}, {"prompt": "{items} {input}"}, {"text": "About"}, {"text": "{profile}{profile}"}):
        with pytest.raises(ValueError, match="must hold"):
            ProfileConfig(**wrong)
