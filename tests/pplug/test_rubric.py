"""Rubrics, the judge's replies and the share of aspects that they find covered."""

import json
from hashlib import blake2b

import pytest

from pplug import metrics, rubric, tasks


def target(*names: str) -> str:
    return json.dumps(
        {"aspects": [{"aspect": name, "reason": "r", "evidence": "e"} for name in names], "narrative": "n"}
    )


def test_each_aspect_is_asked_about_with_the_question_and_the_reply():
    first, second = rubric.prompts("Why {owls}?", "They {call}.", rubric.read(target("sleep", "time")))
    for text, name in ((first, "sleep"), (second, "time")):
        for words in ("Why {owls}?", "They {call}.", "details: n", f"aspect: {name}", "reason: r", "evidence: e"):
            assert words in text
    assert rubric.score_of(first.rpartition("Example:")[2]) == 1  # the example is an answer that can be read


@pytest.mark.parametrize(("reply", "score"), [
    ('{"match_score": 2}', 2), ('```json\n{"match_score": 0}\n```', 0), ('So: {"why": "x", "match_score": 1.0} .', 1),
    ('{"score": 1} {"match_score": 2}', 2), ("2", None), ('{"match_score": 3}', None), ('{"match_score": true}', None),
    ('{"match_score": "2"}', None), ('{"match_score": 1', None), ("[1]", None), ("", None),
])  # fmt: skip
def test_a_judges_reply_is_read_as_json_or_not_at_all(reply, score):
    assert rubric.score_of(reply) == score


def test_a_reply_scores_what_its_aspects_got_of_what_they_could_get():
    task = tasks.get("LaMP_QA")
    golds = {"a": target("x", "y"), "b": target("x"), "c": target("x", "y", "z"), "d": target("x")}
    judged = {"a": [2, 1], "b": [0], "c": [2, None, 1], "d": [None]}
    texts = {name: rubric.judgement(scores, golds[name], "An answer.") for name, scores in judged.items()}
    values = metrics.per_item(task, golds, texts)
    assert {name: row["coverage"] for name, row in values.items()} == {"a": 3 / 4, "b": 0, "c": 3 / 6, "d": 0}
    assert metrics.score(task, golds, texts) == {"coverage": pytest.approx((3 / 4 + 3 / 6) / 4)}
    assert [metrics.understood(task, text) for text in texts.values()] == [True, True, True, False]
    with pytest.raises(ValueError, match="have not been judged; run `judge`"):
        metrics.score(task, golds, dict.fromkeys(golds, "An answer."))


def test_a_judgement_by_another_rubric_or_of_another_reply_is_told_and_one_of_before_counts():
    task, first, other = tasks.get("LaMP_QA"), target("x", "y"), target("y", "x")
    text = rubric.judgement([2, None], first, "An answer.")
    assert json.loads(text) == {"match_scores": [2, None]} | {
        name: blake2b(words.encode(), digest_size=8).hexdigest()
        for name, words in (("rubric", first), ("reply", "An answer."))
    }
    assert text.startswith(rubric.JUDGEMENT) and rubric.is_of(text, first, "An answer.")
    assert not rubric.is_of(text, other, "An answer.") and not rubric.is_of(text, first, "Another.")
    assert metrics.score(task, {"a": first}, {"a": text}) == {"coverage": 0.5}
    with pytest.raises(metrics.GoldError, match="the gold of id 'a': the reply was judged by another rubric"):
        metrics.score(task, {"a": other}, {"a": text})
    for before in ('{"match_scores": [2, null]}', "[1]", "no JSON"):
        assert rubric.is_of(before, other, "Another.")


def test_a_target_that_is_no_rubric_is_refused_without_its_text():
    for text in ("secret", '{"aspects": []}', '{"aspects": [{"aspect": "", "reason": "secret"}]}',
                 '{"aspects": [{"aspect": "a", "secret": 1}], "secret": 2}'):  # fmt: skip
        with pytest.raises(ValueError, match="a target of a rubric task is JSON") as caught:
            rubric.read(text)
        assert "secret" not in str(caught.value)
