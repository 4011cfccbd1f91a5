"""Retrieval against BM25 worked out from its formula, and prompts against the benchmark's published wording."""

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from pplug import retrieval, tasks
from pplug.plain_text import TextTokenizer
from tests.pplug.models import word_tokenizer

TEXTS = ["a film of crime and crime", "the quiet nature of music", "music music music", "a a a a", "crime of the sea"]


def okapi(texts: list[str], query: str, k1: float = 1.5, b: float = 0.75, epsilon: float = 0.25) -> list[float]:
    """BM25 as its authors write it, word by word; a word in most of the texts weighs epsilon times the mean, and each
    word what Lucene gives it where the mean is not positive."""
    corpus = [text.split() for text in texts]
    vocabulary = {word for words in corpus for word in words}
    holding = {word: sum(word in words for words in corpus) for word in vocabulary}
    idf = {word: math.log((len(corpus) - n + 0.5) / (n + 0.5)) for word, n in holding.items()}
    floor = epsilon * sum(idf.values()) / len(idf)
    if floor > 0:
        idf = {word: floor if value < 0 else value for word, value in idf.items()}
    else:
        idf = {word: math.log((len(corpus) + 1) / (n + 0.5)) for word, n in holding.items()}
    mean = sum(map(len, corpus)) / len(corpus)
    return [
        sum(
            idf.get(word, 0) * words.count(word) * (k1 + 1) / (words.count(word) + k1 * (1 - b + b * len(words) / mean))
            for word in query.split()
        )
        for words in corpus
    ]


@pytest.mark.parametrize("query", ["crime", "music of the sea", "crime crime music", "unknown words", ""])
def test_bm25_ranks_as_the_formula_does_and_of_equals_the_newer_first(query):
    scores = okapi(TEXTS, query)
    want = sorted(range(len(TEXTS)), key=lambda i: (-round(scores[i], 9), -i))
    assert retrieval.WordIndex(TEXTS).rank(query).tolist() == want


def test_bm25_of_random_texts_ranks_as_the_formula_does():
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(30)]
    for _ in range(20):
        texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 25))]
        query = " ".join(rng.choices(vocabulary, k=6))
        scores = okapi(texts, query)
        got = [scores[i] for i in retrieval.WordIndex(texts).rank(query)]
        np.testing.assert_allclose(got, sorted(scores, reverse=True), atol=1e-9)


@pytest.mark.parametrize(
    "texts, query, want",
    [
        (["the red apple", "the blue car"], "the red apple", [0, 1]),
        (["cat dog likes", "cat dog hates", "cat bird", "cat dog"], "cat dog", [3, 1, 0, 2]),
        (["one two", "three four"], "one two", [0, 1]),  # each word has the weight 0 in the library
    ],
)
def test_among_few_texts_a_shared_word_counts_for_a_text(texts, query, want):
    assert retrieval.WordIndex(texts).rank(query).tolist() == want


def test_ordinary_texts_keep_the_scores_of_the_library():
    texts = [*TEXTS, "the old house by the sea"]
    library = BM25Okapi([text.split() for text in texts])
    assert library.average_idf > 0
    for query in ("crime of the sea", "music a quiet house"):
        scores = library.get_scores(query.split())
        index = retrieval.WordIndex(texts)
        assert index._index.get_scores(query.split()).tolist() == scores.tolist()
        assert index.rank(query).tolist() == sorted(range(6), key=lambda i: (-scores[i], -i))


def test_texts_without_a_word_are_ranked_by_age():
    assert retrieval.WordIndex(["", " ", ""]).rank("a").tolist() == [2, 1, 0]


def test_dense_recency_and_random():
    items = np.array([[1, 0], [0, 1], [0.6, 0.8], [0, 1]], np.float32)
    assert retrieval.nearest(items, np.array([0, 1], np.float32)).tolist() == [3, 1, 2, 0]
    assert retrieval.recency(3).tolist() == [2, 1, 0] and retrieval.recency(0).tolist() == []
    one, again, other = (retrieval.at_random(50, 4, key).tolist() for key in ("r1", "r1", "r2"))
    assert one == again != other and len(set(one)) == 4
    assert sorted(retrieval.at_random(3, 4, "r1").tolist()) == [0, 1, 2]
    drawn = [i for n in range(2000) for i in retrieval.at_random(5, 2, f"r{n}").tolist()]
    assert np.allclose(np.bincount(drawn) / 2000, 0.4, atol=0.05)


# --- the prompt -------------------------------------------------------------------------------------------------------

ASKED = {
    "LaMP_1": 'For an author who has written the paper with the title "X", which reference is related? Just answer '
    'with [1] or [2] without further explanation. [1]: "A" [2]: "B"',
    "LaMP_2": "tags: [a, b] description: D",
    "LaMP_2N": "categories: [a] article: T",
    "LaMP_3": "explanation. review: R",
    "LaMP_4": "Generate a headline for the following article: T",
    "LaMP_5": "Generate a title for the following abstract of a paper: A",
    "LaMP_6": "Generate a subject for the following email: T",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: T",
}
PUBLISHED = {
    "LaMP_1": 'For an author who has written the paper with the title, and "title 1", and "title 2" "X", which '
    'reference is related? Just answer with [1] or [2] without further explanation. [1]: "A" [2]: "B"',
    "LaMP_2": 'the tag for the movie: "description 1" is "tag 1" , and the tag for the movie: "description 2" is '
    '"tag 2" . ' + ASKED["LaMP_2"],
    "LaMP_2N": 'the category for the article: "text 1" is "category 1" , and the category for the article: "text 2" is '
    '"category 2" . ' + ASKED["LaMP_2N"],
    "LaMP_3": 'score 1 is the score for "text 1" , and score 2 is the score for "text 2" . ' + ASKED["LaMP_3"],
    "LaMP_4": '"title 1" is the title for "text 1" , and "title 2" is the title for "text 2" . ' + ASKED["LaMP_4"],
    "LaMP_5": '"title 1" is a title for "abstract 1" , and "title 2" is a title for "abstract 2" . Following the given '
    "patterns " + ASKED["LaMP_5"],
    "LaMP_6": '"title 1" is the title for "text 1" , and "title 2" is the title for "text 2" . ' + ASKED["LaMP_6"],
    "LaMP_7": '"text 1" , and "text 2"  are written by a person. Following the given patterns ' + ASKED["LaMP_7"],
}
WORDS = {
    "LaMP_1": "title 1 abstract 1",
    "LaMP_2": "description 1",
    "LaMP_2N": "title 1 text 1",
    "LaMP_3": "text 1",
    "LaMP_4": "title 1 text 1",
    "LaMP_5": "title 1 abstract 1",
    "LaMP_6": "text 1",
    "LaMP_7": "text 1",
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(word_tokenizer(tmp_path_factory.mktemp("words")))


def items(task: str, *lengths: int) -> list[dict[str, str]]:
    """An item for each length: fields `<name> <number>`, made longer by that many words."""
    names = tasks.slots(tasks.get(task).retrieval.pattern) + tasks.get(task).fields
    return [{name: f"{name} {n}" + " w" * more for name in names} for n, more in enumerate(lengths, start=1)]


def size(tokenizer, text: str) -> int:
    return len(tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("task", list(PUBLISHED))
def test_prompts_are_worded_as_published(task, tokenizer):
    entry = tasks.get(task)
    got = retrieval.compose(items(task, 0, 0), ASKED[task], entry, tokenizer, 256, 0.6)
    assert got.prefix + got.suffix == PUBLISHED[task] and not got.cut
    assert retrieval.words(items(task, 0)[0], entry) == WORDS[task]
    if task == "LaMP_1":
        assert got.prefix == ""  # the items stand inside the request
    else:
        assert got.suffix == ASKED[task]


def test_without_an_item_the_prompt_is_the_request(tokenizer):
    for task, asked in ASKED.items():
        assert retrieval.compose([], asked, tasks.get(task), tokenizer, 20, 0.6) == ("", asked, False)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(sorted(PUBLISHED)),
    st.lists(st.integers(0, 150), min_size=1, max_size=6),
    st.integers(0, 300),
    st.integers(40, 300),
)
def test_the_budget_holds_and_a_request_within_its_share_is_never_cut(tokenizer, task, lengths, asked_more, budget):
    entry, asked = tasks.get(task), ASKED[task] + " q" * asked_more + " zz"
    shown = items(task, *lengths)
    got = retrieval.compose(shown, asked, entry, tokenizer, budget, 0.6)
    text = got.prefix + got.suffix
    if text == asked:
        return  # no item fits
    assert size(tokenizer, text) <= budget
    assert got.cut == ("zz" not in text)  # the last word of the request
    if size(tokenizer, asked) <= 0.6 * budget:
        assert text.count("q") == asked.count("q")
    else:  # the request keeps at least its share
        assert size(tokenizer, text) - size(tokenizer, asked.replace(" q", "")) - text.count(" q") <= 0.4 * budget + 1
    if task == "LaMP_2":
        assert '"tag 1' + " w" * lengths[0] + '"' in text  # the label is never cut


def test_what_a_short_item_leaves_goes_to_the_next(tokenizer):
    entry = tasks.get("LaMP_3")
    shown = [{"score": "5", "text": "w"}, {"score": "1", "text": "w " * 200}, {"score": "3", "text": "w " * 200}]
    asked = "review: R"
    text = retrieval.compose(shown, asked, entry, tokenizer, 100, 0.6).prefix
    first, second, third = (line.count("w") for line in text.split(", and "))
    # shares a, a, a of which the first needs one token: 1, 2a - 1, a
    assert first == 1 and second == 2 * third - 1
    assert 100 - 3 <= size(tokenizer, text + asked) <= 100


def test_what_does_not_fit_at_all_is_left_out_least_like_first(tokenizer):
    entry = tasks.get("LaMP_4")
    long_title = [{"title": f"t{n} " * 9, "text": "w " * 30} for n in range(4)]
    got = retrieval.compose(long_title, "article: T", entry, tokenizer, 50, 0.6).prefix
    assert "t0" in got and "t3" not in got
    assert retrieval.compose(long_title, "article: T", entry, tokenizer, 12, 0.6) == ("", "article: T", False)


def test_a_missing_field_is_named_and_no_text_told(tokenizer):
    with pytest.raises(ValueError, match="'tag'") as error:
        retrieval.compose([{"description": "secret words"}], "q", tasks.get("LaMP_2"), tokenizer, 200, 0.6)
    assert "secret" not in str(error.value)
    none = tasks.get("LaMP_2").model_copy(update={"retrieval": None})
    with pytest.raises(ValueError, match="give its entry `retrieval`"):
        retrieval.compose([{"description": "x", "tag": "y"}], "q", none, tokenizer, 200, 0.6)
