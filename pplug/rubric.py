"""Judged answers: a request's rubric of aspects, the judge's prompt per aspect, and what its replies say [1].

Route: a request's target (JSON) -> Rubric -> one prompt per aspect -> the judge's replies (JSON) -> scores of 0 to
BEST -> one text per reply of a method (JSON), which the metric `coverage` reads.

[1] "LaMP-QA: A Benchmark for Personalized Long-form Question Answering", arXiv:2506.00137: aspects, scale and score.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError

from pplug.settings import Settings

BEST = 2
"""Score of an aspect that a reply covers very well; 1 is somewhat, 0 not at all."""
PROMPT = """You judge whether a response to a question covers one aspect that matters to the person who asked.

question: {question}
details: {details}
response: {response}
aspect: {aspect}
reason: {reason}
evidence: {evidence}

Answer with a JSON object that has the one field match_score: 0 if the response does not cover this aspect, 1 if it \
covers it somewhat, 2 if it covers it very well. Give no explanation. Example: {{"match_score": 1}}"""
"""Question to the judge; the wording is ours, fields and scale are the benchmark's."""
JUDGEMENT = '{"match_scores": '
"""Beginning of every text that stands for a judged reply."""
_OBJECT = re.compile(r"\{[^{}]*\}")


class Aspect(Settings):
    """One thing that the person who asks expects of an answer."""

    aspect: str = Field(min_length=1)
    """Name of the aspect."""
    reason: str = ""
    """Reason for which it matters to the person."""
    evidence: str = ""
    """Words of the person that it was taken from."""


class Rubric(Settings):
    """The target of a request whose answer is judged."""

    aspects: tuple[Aspect, ...] = Field(min_length=1)
    """Aspects to judge the answer by."""
    narrative: str = ""
    """The person's own explanation of the question. The judge sees it; who answers does not."""


def read(target: str) -> Rubric:
    """A request's rubric.

    Raises:
        ValueError: the target is no rubric; nothing of it is told.
    """
    try:
        return Rubric.model_validate_json(target)
    except ValidationError as wrong:
        places = ", ".join(sorted({_place(error["loc"]) for error in wrong.errors()}))
        raise ValueError(
            'a target of a rubric task is JSON such as {"aspects": [{"aspect": ..., "reason": ..., "evidence": ...}], '
            f'"narrative": ...}}; wrong here: {places}'
        ) from None


def _place(loc: tuple[int | str, ...]) -> str:
    """Place of an error without any word of the target, whose unknown keys stand in pydantic's."""
    known = {*Rubric.model_fields, *Aspect.model_fields}
    parts = [str(part) if isinstance(part, int) or part in known else "an unknown key" for part in loc]
    return ".".join(parts) or "the whole"


def prompts(question: str, response: str, rubric: Rubric) -> list[str]:
    """The questions to the judge, one per aspect."""
    return [
        PROMPT.format(question=question, details=rubric.narrative, response=response, **aspect.model_dump())
        for aspect in rubric.aspects
    ]


def score_of(reply: str) -> int | None:
    """The score that a judge's reply gives; None where it has no JSON object with a match_score of 0 to BEST."""
    for found in _OBJECT.findall(reply):
        try:
            score = json.loads(found).get("match_score")
        except ValueError:
            continue
        if isinstance(score, int | float) and not isinstance(score, bool) and score in range(BEST + 1):
            return int(score)
    return None


def judgement(scores: Sequence[int | None], target: str, reply: str) -> str:
    """The text that stands for a judged reply, with digests of the rubric and of the reply that were judged.

    Args:
        scores: one per aspect; None is an aspect on which the judge's reply could not be read.
    """
    judged = json.dumps({"rubric": _digest(target), "reply": _digest(reply)})
    return f"{JUDGEMENT}{json.dumps(list(scores))}, {judged[1:]}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def is_of(text: str, target: str, reply: str | None = None) -> bool:
    """False for a judgement by another rubric, or of another reply where one is given.

    A judgement from before there were digests does not tell, and counts as one of these.
    """
    try:
        known: Any = json.loads(text)
    except ValueError:
        return True
    now = {"rubric": _digest(target)} | ({} if reply is None else {"reply": _digest(reply)})
    return not isinstance(known, dict) or all(known.get(name, own) == own for name, own in now.items())


def aspects_of(text: str, target: str) -> int:
    """Number of aspects of the rubric that a text, if it is a judgement, was judged by.

    Raises:
        ValueError: the target is no rubric, or not the one of the judgement.
    """
    aspects = read(target).aspects
    if not is_of(text, target):
        raise ValueError("the reply was judged by another rubric; run `judge` again with the run_id of the judgements")
    return len(aspects)


def read_judgement(text: str) -> list[int | None] | None:
    """The scores of such a text, None for each that could not be read; None where the text is no judgement."""
    try:
        value: Any = json.loads(text)
        scores = value["match_scores"]
    except (ValueError, KeyError, TypeError):
        return None
    return scores if isinstance(scores, list) else None


def was_read(text: str) -> bool:
    """True if the text is a judgement of which at least one aspect was read."""
    return any(score is not None for score in read_judgement(text) or ())
