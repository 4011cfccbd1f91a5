"""The references that need no LLM, on cases small enough to be worked out by hand."""

import pickle

import numpy as np
import pytest

from pplug import references, tasks
from pplug.references import Classifier
from pplug.tasks import TaskSpec

NEWS = TaskSpec(
    name="news",
    marker="article: ",
    item="{topic}: {title}",
    item_without_label="{title}",
    input="Which topic? article: {title}",
    target="topic",
    metric="classification",
    labels=("arts", "money", "sport"),
)
STARS = NEWS.model_copy(update={"metric": "rating", "labels": ("1", "2", "3", "4", "5")})
WORDS = NEWS.model_copy(update={"metric": "text", "labels": ()})


def test_an_answer_counts_only_when_it_is_one_of_the_tasks_labels_or_on_its_scale():
    assert references.answer({"topic": " sport ", "title": "x"}, NEWS) == "sport"
    assert references.answer({"topic": "Sport", "title": "x"}, NEWS) is None
    assert references.answer({"title": "x"}, NEWS) is None
    said = ["3", "3.5", "0", "6", "nan", "inf", "many", ""]
    assert [references.answer({"topic": text}, STARS) for text in said] == ["3", "3.5"] + [None] * 6
    assert [references.answer({"topic": text}, WORDS) for text in (" a title", "  ")] == ["a title", None]


def test_an_item_reads_as_the_request_that_would_be_made_from_it():
    assert references.text_of({"title": "a game", "topic": "sport"}, NEWS) == "a game"  # behind the marker, no label
    no_request = NEWS.model_copy(update={"input": None, "item_without_label": "title {title}"})
    assert references.text_of({"title": "a game"}, no_request) == "title a game"


def test_of_equally_frequent_labels_the_one_counts_that_is_more_frequent_overall_then_the_first():
    assert references.most_frequent(np.array([1, 2, 0]), np.array([9, 1, 1])) == 1
    assert references.most_frequent(np.array([2, 2, 0]), np.array([1, 3, 9])) == 1
    assert references.most_frequent(np.array([2, 2, 0]), np.array([3, 3, 9])) == 0
    assert references.most_frequent(np.zeros(3), np.array([0, 1, 4])) == 2  # a user without items


def test_times_user_is_bayes_rule_by_hand():
    """K = 10. n = (0, 3, 0): own = (5, 6, 2) / 13 with q = (.5, .3, .2); own / q = (10, 20, 10) / 13."""
    shares = np.array([0.5, 0.3, 0.2])
    found = references.times_user(np.array([0.6, 0.4, 0.0]), np.array([0, 3, 0]), shares)
    np.testing.assert_allclose(found, [6 / 14, 8 / 14, 0])  # .6 * 10 against .4 * 20: the user's label wins
    np.testing.assert_allclose(references.times_user(np.array([0.6, 0.4, 0]), np.zeros(3), shares), [0.6, 0.4, 0])
    unseen = references.times_user(np.array([1.0, 0.0, 0.0]), np.array([0, 0, 50]), np.array([0.5, 0.5, 0.0]))
    np.testing.assert_allclose(unseen, [1, 0, 0])  # a label without a training text stays impossible


def test_the_classifier_tells_labels_by_their_words_and_knows_their_shares():
    texts = ["a goal in the match", "the match was lost", "the team scored a goal", "stocks fell", "banks and stocks"]
    model = Classifier(texts, [2, 2, 2, 1, 1], 3)
    np.testing.assert_allclose(model.shares, [0, 0.4, 0.6])
    found = model.probabilities(["goal for the team", "stocks of banks", ""])
    assert found.argmax(axis=1).tolist()[:2] == [2, 1]
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert (found[:, 0] == 0).all() and model.probabilities([]).shape == (0, 3)
    again = pickle.loads(pickle.dumps(Classifier(texts, [2, 2, 2, 1, 1], 3)))
    np.testing.assert_array_equal(again.probabilities(texts), model.probabilities(texts))


def test_the_classifiers_probabilities_are_those_of_scikit_learn():
    from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline

    texts, labels = ["a b", "b c", "c d", "d e", "e f", "f a"], [0, 0, 1, 1, 2, 2]
    hashing = HashingVectorizer(ngram_range=(1, 2), n_features=2**18, alternate_sign=False, norm=None)
    for used in (labels, [0, 0, 0, 2, 2, 2]):
        sgd = SGDClassifier("log_loss", alpha=1 / 60, max_iter=15, tol=None, average=True, random_state=0)
        peer = make_pipeline(hashing, TfidfTransformer(sublinear_tf=True), sgd).fit(texts, used)
        want = np.zeros((6, 3))
        want[:, sorted(set(used))] = peer.predict_proba(texts)
        np.testing.assert_allclose(Classifier(texts, used, 3).probabilities(texts), want, atol=1e-5)


def test_one_label_alone_is_nothing_to_learn_from():
    with pytest.raises(ValueError, match="at least two labels"):
        Classifier(["a", "b"], [1, 1], 3)


def test_the_most_similar_item_gives_its_own_answer():
    items = [
        {"title": "red fox runs", "topic": "first"},
        {"title": "blue sea shines", "topic": "second"},
        {"title": "old house", "topic": " "},
        {"topic": "no title"},
        {"title": "grey stone", "topic": "last"},
    ]
    assert references.most_similar("a blue sea", items, WORDS) == "second"
    assert references.most_similar("old house", items, WORDS) == "last"  # without an answer it is passed over
    assert references.most_similar("blue", [], WORDS) == "" == references.most_similar("old", items[2:4], WORDS)


def test_the_more_similar_of_two_items_gives_its_answer():
    items = [{"title": "the red apple", "topic": "fruit"}, {"title": "the blue car", "topic": "traffic"}]
    assert references.most_similar("the red apple", items, WORDS) == "fruit"


def test_every_reference_is_told_in_one_sentence():
    for task in tasks.lamp_entries():
        for text in references.ABOUT[task.metric].values():
            assert text.endswith(".") and text.count(".") == 1
