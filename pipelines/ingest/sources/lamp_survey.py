"""The first pass over a LaMP split, before anything is written: it checks ids, golds and task, and assigns histories.

A question's history is exactly its profile. Where one user asks several questions, one history serves them all only if
dates prove it: each profile must be what the union of them held at some time. Otherwise each question is its own user.
A user's only question gets such a time, too, where its profile has dates: another split may bring later items.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.ingest.sources.base import Options
from pipelines.ingest.sources.discover import SHOWN
from pipelines.ingest.sources.lamp_files import LampFiles, Survey, golds, questions
from pipelines.ingest.times import TimeRule
from pipelines.ingest.values import RowError
from pplug import tasks
from pplug.history import text_hash
from pplug.tasks import TaskSpec

_SAMPLE = 50
_NO_TIME = np.iinfo(np.int64).min


def survey(files: LampFiles, entry: TaskSpec, options: Options) -> tuple[str | None, Survey]:
    """Checks ids, golds and task, and decides which user's history each question has.

    Returns:
        An error in the source, or None; and the survey.
    """
    scope, time = options.history_scope, options.rules.time
    answers = golds(files)[1]
    ids: list[str] = []
    damaged: set[str] = set()
    owners: dict[str, list[tuple[str, np.ndarray]]] = {}
    asked_by: Counter[str] = Counter()
    without_marker = sample = 0
    for question in questions(files):
        ids.append(question.id)
        if question.error is not None:
            damaged.add(question.id)
            continue
        if sample < _SAMPLE:
            sample += 1
            without_marker += entry.marker not in str(question.value.get("input", ""))
        owner = question.value.get("user_id")
        if owner is not None:
            asked_by[str(owner)] += 1
        if owner is not None and scope != "question":
            owners.setdefault(str(owner), []).append((question.id, _digest(question.value["profile"], time)))
    problem = _id_problem(files, ids, damaged, answers) or _task_problem(
        files, entry, answers, sample > 0 and without_marker == sample
    )
    if problem:
        return problem, Survey()
    problem, found = _share_histories(owners, set(ids), scope)
    problem = problem or _owner_problem(asked_by, set(found.user_of.values()), options)
    return (problem, Survey()) if problem else (None, found)


def _owner_problem(asked_by: Counter[str], known: set[str], options: Options) -> str | None:
    """Returns why histories of one question each cannot be used.

    Args:
        asked_by: number of questions by user.
        known: users with a history of their own.
    """
    unknown = set(asked_by) - known
    apart = {user for user in unknown if asked_by[user] > 1}
    if options.derives and apart:
        return (
            f"derive_requests: {len(apart)} users have several questions with a history each, which no dates prove to "
            "be one, so that requests made of these histories would not be known as one user's; keep the published "
            "questions (derive_requests=0)"
        )
    if options.parted and apart:
        return (
            f"parts: {len(apart)} users have several questions with a history each, and each history would be in a "
            "part by itself, so that one user's questions would be in several parts; leave parts and part out and take "
            "the published splits, or try history_scope=auto, which joins histories whose dates prove them to be one"
        )
    if not options.keep_questions and unknown:
        return (
            f"questions=skip: the questions of {len(unknown)} users have a history each, and without the questions "
            "nothing would say whose these are, so that `erase` could not find them; keep the published questions "
            "(questions=keep)"
        )
    return None


def _id_problem(files: LampFiles, ids: list[str], damaged: set[str], answers: dict[str, Any]) -> str | None:
    known = set(ids)
    if len(known) < len(ids):
        seen: set[str] = set()
        twice = [i for i in ids if i in seen or seen.add(i)]  # type: ignore[func-returns-value]
        twice = [i for i in twice if i not in damaged]
        if twice:
            where = f"{files.folder}/{files.questions}"
            return f"{where}: {len(twice)} ids occur twice ({_first(twice)}); ids must be unique"
    if files.outputs is None:
        return None
    if "" in damaged:  # a question whose id cannot be read may be the one that a gold belongs to
        answers = {i: answer for i, answer in answers.items() if i in known}
    strange, lacking = [i for i in answers if i not in known], [i for i in ids if i not in answers and i not in damaged]
    problems = [f"{len(strange)} golds have no question ({_first(strange)})"] * bool(strange)
    problems += [f"{len(lacking)} questions have no gold ({_first(lacking)})"] * bool(lacking)
    if problems:
        return (
            f"{files.outputs} does not match {files.questions} in {files.folder}: {'; '.join(problems)}; "
            "take both files from one release"
        )
    return None


def _first(ids: Sequence[str]) -> str:
    """The first ids of questions, which are numbers of the benchmark and tell nothing of a person."""
    return ", ".join(ids[:SHOWN]) + (f" and {len(ids) - SHOWN} more" if len(ids) > SHOWN else "")


def _task_problem(files: LampFiles, entry: TaskSpec, golds: dict[str, Any], no_marker: bool) -> str | None:
    answers = [str(answer).strip() for answer in golds.values() if answer is not None]
    outside = sum(answer not in entry.labels for answer in answers)
    wrong_labels = entry.metric == "classification" and 2 * outside > len(answers)
    if not no_marker and not wrong_labels:
        return None
    fitting = [
        other.name
        for other in tasks.lamp_entries()
        if other.metric == "classification" and answers and set(answers) <= set(other.labels)
    ]
    why = (
        f"no question holds its marker {entry.marker!r}"
        if no_marker
        else f"{outside} of {len(answers)} golds are outside its {len(entry.labels)} labels"
    )
    hint = (
        f"--task {fitting[0]} would fit"
        if fitting and fitting[0] != entry.name
        else "give --task a YAML file of your own"
    )
    return f"{files.folder}: these are not questions of task {entry.name}: {why}; {hint}"


def _digest(profile: list[Any], time: TimeRule) -> np.ndarray:
    """Returns (N, 3) int64: item id, content and time, by which profiles can be compared."""
    rows = []
    for item in profile:
        try:
            at = time.microseconds(item.get("date"))
            content = text_hash({str(k): str(v) for k, v in item.items() if k not in ("id", "date")})
        except (RowError, AttributeError):
            continue  # a reject; the second pass says so
        number = int(text_hash({"id": str(item.get("id"))})[:15], 16)
        rows.append((number, int(content[:15], 16), _NO_TIME if at is None else at))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def _share_histories(
    owners: dict[str, list[tuple[str, np.ndarray]]], ids: set[str], scope: str
) -> tuple[str | None, Survey]:
    survey, unproven = Survey(), 0
    for owner, asked in owners.items():
        alone = len(asked) == 1
        cuts = None if alone and not len(asked[0][1]) else _cuts([digest for _, digest in asked])
        if cuts is None and alone:
            cuts = [None]
        if cuts is None:
            unproven += 1
            continue
        for (question, _), cut in zip(asked, cuts, strict=True):
            survey.user_of[question] = owner
            if cut is not None:
                survey.as_of[question] = cut
    if scope == "user" and unproven:
        return (
            f"history_scope=user: the profiles of {unproven} users' questions are not, by their dates, earlier and "
            "later states of one history; use history_scope=question or auto"
        ), Survey()
    both = (ids - set(survey.user_of)) & set(survey.user_of.values())
    if both:
        return (
            f"{len(both)} ids are those of a question and of another question's user; use history_scope=question"
        ), Survey()
    return None, survey


def _cuts(digests: list[np.ndarray]) -> list[int | None] | None:
    """Returns a time per profile before which exactly its items of the union lie; None when there is none."""
    union = np.unique(np.concatenate(digests), axis=0)
    times = union[:, 2]
    if len(np.unique(union[:, 0])) < len(union) or (len(times) and times.min() == _NO_TIME):
        return None  # an item with two contents, or without a date
    cuts: list[int | None] = []
    for digest in digests:
        inside = np.isin(union[:, 0], digest[:, 0])
        newest = times[inside].max() if inside.any() else times.min(initial=0) - 1
        if (times[~inside] <= newest).any():
            return None
        cuts.append(int(newest) + 1)
    return cuts
