"""Scores against values worked out another way: counted by hand, scikit-learn's report, rouge_score's aggregator."""

import json
import math
import random

import numpy as np
import pytest
from rouge_score import rouge_scorer, scoring
from sklearn.metrics import classification_report, mean_absolute_error, root_mean_squared_error

from pplug import metrics, tasks

WORDS = "the a cat dog sat on mat Running, runs! board driver x86 é 漢字 2024".split()


def cases(n: int, make, seed: int) -> tuple[dict[str, str], dict[str, str]]:
    rng = random.Random(seed)
    pairs = [make(rng) for _ in range(n)]
    return ({f"{i}": gold for i, (gold, _) in enumerate(pairs)}, {f"{i}": guess for i, (_, guess) in enumerate(pairs)})


def label_case(labels):
    def make(rng):
        gold = rng.choice(labels[:-2])  # two labels never come up: macro F1 counts them all the same
        return f" {gold}\n", rng.choice([gold, f" {gold} ", rng.choice(labels), gold.upper() + "?", "", "nothing"])

    return make


@pytest.mark.parametrize("task", ["LaMP_2", "LaMP_2N"])
def test_classification_equals_scikit_learns_report_over_the_whole_label_list(task):
    labels = list(tasks.get(task).labels)
    golds, guesses = cases(1000, label_case(labels), seed=1)
    got = metrics.score(task, golds, guesses)
    gold, guess = [golds[i].strip() for i in golds], [guesses[i].strip() for i in golds]
    report = classification_report(gold, guess, labels=labels, output_dict=True, zero_division=0)
    assert got == {
        "accuracy": pytest.approx(sum(a == b for a, b in zip(gold, guess, strict=True)) / 1000, abs=1e-12),
        "f1": pytest.approx(report["macro avg"]["f1-score"], abs=1e-12),
    }


def test_f1_of_a_label_nobody_has_or_predicts_is_zero_and_counts():
    entry = tasks.get("LaMP_1").model_copy(update={"labels": ("[1]", "[2]", "[3]")})
    got = metrics.score(entry, {"a": "[1]", "b": "[2]"}, {"a": "[1]", "b": "[2]"})
    assert got == {"accuracy": 1.0, "f1": pytest.approx(2 / 3)}


def rating_by_the_rule(gold: str, guess: str) -> float:
    """The LaMP_3 rule in its own words: what is no number becomes whichever end is further away, 5 on a tie."""
    try:
        value = float(guess)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        value = {"1": 5.0, "2": 5.0, "3": 5.0, "4": 1.0, "5": 1.0}[gold.strip()]
    return value - float(gold)


def test_rating_follows_the_lamp_3_rule():
    guess = ["1", "2", " 3 ", "4.0", "5", "", "five", "4 stars", "nan", "inf", "-1", "1e1"]
    golds, guesses = cases(1000, lambda rng: (str(rng.randint(1, 5)), rng.choice(guess)), seed=2)
    errors = [rating_by_the_rule(golds[i], guesses[i]) for i in golds]
    got = metrics.score("LaMP_3", golds, guesses)
    assert got["mae"] == pytest.approx(math.fsum(map(abs, errors)) / 1000, abs=1e-12)
    assert got["rmse"] == pytest.approx(math.sqrt(math.fsum(e * e for e in errors) / 1000), abs=1e-12)
    gold = [float(golds[i]) for i in golds]
    values = [a + b for a, b in zip(gold, errors, strict=True)]
    assert got["mae"] == pytest.approx(mean_absolute_error(gold, values), abs=1e-12)
    assert got["rmse"] == pytest.approx(root_mean_squared_error(gold, values), abs=1e-12)


def test_another_rating_scale_takes_its_own_ends():
    entry = tasks.get("LaMP_3").model_copy(update={"labels": ("0", "10")})
    assert metrics.score(entry, {"a": "4"}, {"a": "?"})["mae"] == 6.0


@pytest.mark.parametrize("task", ["LaMP_4", "LaMP_5", "LaMP_7"])
def test_text_equals_rouge_score_averaged(task):
    def make(rng):
        gold = " ".join(rng.choices(WORDS, k=rng.randint(0, 12)))
        return f"{gold} ", rng.choice([gold, " ".join(rng.choices(WORDS, k=rng.randint(0, 12))), "\n" + gold[::-1]])

    golds, guesses = cases(1000, make, seed=3)
    scorer = rouge_scorer.RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    total = {"rouge1": 0.0, "rougeL": 0.0}
    for i in golds:
        one: dict[str, scoring.Score] = scorer.score(target=golds[i], prediction=guesses[i])
        for name in total:
            total[name] += one[name].fmeasure / 1000
    assert metrics.score(task, golds, guesses) == pytest.approx(total, abs=1e-12)


def test_rouge_of_a_known_pair_and_no_stemming():
    got = metrics.score("LaMP_5", {"a": "the cat sat on the mat"}, {"a": "on the mat the cat sits"})
    assert got["rouge1"] == pytest.approx(5 / 6)  # all but sat/sits: without stemming they differ
    assert got["rougeL"] == pytest.approx(3 / 6)  # "on the mat"


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("LaMP_2", label_case(list(tasks.get("LaMP_2").labels))),
        ("LaMP_3", lambda rng: (str(rng.randint(1, 5)), rng.choice(["1", "5", "x"]))),
        ("LaMP_6", lambda rng: tuple(" ".join(rng.choices(WORDS, k=6)) for _ in range(2))),
    ],
)
def test_scores_from_sums_equal_the_score_of_the_repeated_items(task, make):
    golds, guesses = cases(60, make, seed=4)
    ids, sums = metrics.item_sums(task, golds, guesses)
    counts = np.random.default_rng(0).integers(0, 4, size=(5, len(ids)))
    got = metrics.from_sums(task, counts @ sums)
    for resample, row in enumerate(counts):
        many = [(f"{i}#{copy}", i) for i, times in zip(ids, row, strict=True) for copy in range(times)]
        want = metrics.score(task, {k: golds[i] for k, i in many}, {k: guesses[i] for k, i in many})
        assert {name: got[name][resample] for name in got} == pytest.approx(want, abs=1e-9)


def test_per_item_values_average_to_the_score():
    golds, guesses = {"a": "1", "b": "3", "c": "5"}, {"a": "2", "b": "?", "c": "5"}
    assert metrics.per_item("LaMP_3", golds, guesses) == {
        "a": {"mae": 1.0, "squared_error": 1.0},
        "b": {"mae": 2.0, "squared_error": 4.0},  # a tie: 5.0
        "c": {"mae": 0.0, "squared_error": 0.0},
    }
    assert metrics.per_item("LaMP_2", {"a": "comedy"}, {"a": "action"}) == {"a": {"accuracy": 0.0}}
    assert set(metrics.per_item("LaMP_4", {"a": "x"}, {"a": "x"})["a"]) == {"rouge1", "rougeL"}


@pytest.mark.parametrize(
    ("task", "replies", "want"),
    [
        ("LaMP_2", ["comedy", " comedy\n", "Comedy", "a comedy", "", "sci-fi"], [1, 1, 0, 0, 0, 1]),
        ("LaMP_3", ["3", " 4.0 ", "7", "four", "nan", "inf", "", "4/5"], [1, 1, 1, 0, 0, 0, 0, 0]),
        ("LaMP_5", ["", "a title"], [1, 1]),
    ],
)
def test_a_reply_that_is_no_answer_is_told_from_a_wrong_one(task, replies, want):
    assert [metrics.understood(task, reply) for reply in replies] == [bool(one) for one in want]


@pytest.mark.parametrize(
    ("task", "golds", "guesses", "says"),
    [
        ("LaMP_2", {"q1": "comedy", "q2": "action"}, {"q2": "action", "q9": "comedy"}, "'q1'.*'q9'"),
        ("LaMP_2", {}, {}, "nothing to score"),
        ("LaMP_2", {"q1": "politics"}, {"q1": "comedy"}, "outside its 15 labels.*'q1'.*another task"),
        ("LaMP_3", {"q1": "good"}, {"q1": "5"}, "gold of id 'q1' is no number from 1 to 5"),
        ("LaMP_3", {"q1": "9"}, {"q1": "5"}, "gold of id 'q1' is no number from 1 to 5"),
        ("LaMP_9", {"q1": "9"}, {"q1": "5"}, "LaMP_9.*not known"),
    ],
)
def test_what_cannot_be_scored_is_named(task, golds, guesses, says):
    with pytest.raises(ValueError, match=says):
        metrics.score(task, golds, guesses)


def test_meteor_matches_forms_and_stems_and_no_synonyms():
    """By hand [Banerjee and Lavie 2005]: F = 10PR/(R + 9P), penalty 0.5 (chunks/matches)^3."""
    entry = tasks.get("LongLaMP_topic")
    golds = {
        "same": "the cat sat",
        "stem": "the cats were running",
        "order": "a b c d",
        "none": "big dog",
        "two": "It ran. Dogs sat.",
    }
    texts = {
        "same": "The cat sat",
        "stem": "the cat runs",
        "order": "c d a b",
        "none": "large hound",
        "two": "Dogs sat. It ran.",
    }
    # matches, words of the text, words of the gold, chunks
    counted = {"same": (3, 3, 3, 1), "stem": (3, 3, 4, 2), "order": (4, 4, 4, 2), "two": (6, 6, 6, 4)}
    got = {name: row["meteor"] for name, row in metrics.per_item(entry, golds, texts).items()}
    for name, (matches, words, gold_words, chunks) in counted.items():
        precision, recall = matches / words, matches / gold_words
        mean = 10 * precision * recall / (recall + 9 * precision)
        assert got[name] == pytest.approx(mean * (1 - 0.5 * (chunks / matches) ** 3)), name
    assert got["none"] == 0
    assert list(metrics.score(entry, golds, texts)) == ["rouge1", "rougeL", "meteor"]
    assert metrics.names(tasks.get("LaMP_5")) == ("rouge1", "rougeL")
    with pytest.raises(ValueError, match="no metric 'bleu' of text; it has rouge1, rougeL, meteor"):
        metrics.names(entry.model_copy(update={"scores": ("bleu",)}))


@pytest.mark.parametrize(("task", "first", "then"), [("LaMP_2", "f1", "accuracy"), ("LaMP_3", "rmse", "mae")])
def test_the_first_metric_is_a_mean_over_answers(task, first, then):
    entry = tasks.get(task)
    assert metrics.names(entry.model_copy(update={"scores": (then, first)})) == (then, first)
    with pytest.raises(ValueError, match=f"{first!r} is no mean over answers, .* begin with {then}"):
        metrics.names(entry.model_copy(update={"scores": (first, then)}))


def test_a_rubric_that_is_none_is_told_with_its_request():
    entry, judged = tasks.get("LaMP_QA"), '{"match_scores": [1]}'
    golds = {"q1": json.dumps({"aspects": [{"aspect": "a", "reason": "", "evidence": ""}]}), "q2": '{"aspects": []}'}
    with pytest.raises(metrics.GoldError, match="the gold of id 'q2': a target of a rubric task is JSON") as told:
        metrics.score(entry, golds, dict.fromkeys(golds, judged))
    assert told.value.request == "q2"


def test_the_key_scores_changes_no_stored_entry_and_no_identity_of_tasks_without_it():
    assert (
        "scores" not in tasks.get("LaMP_5").to_json() and '"scores":["rouge1"' in tasks.get("LongLaMP_topic").to_json()
    )
    for name in ("LaMP_5", "LongLaMP_topic"):
        assert tasks.TaskSpec.from_json(tasks.get(name).to_json()) == tasks.get(name)
