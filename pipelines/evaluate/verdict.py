"""The verdict: the claims that an evaluation makes, which its controls must allow. Page and screen say its words.

Each method that is neither a control nor told the truth is judged twice, by paired differences over people:
  - its gain over the method `none`, with intervals corrected for the number of methods;
  - its gain over its controls: the same method by the same LLM with the persona or the adapter of another user, with a
    persona of no history or of a training without any, or with no adapter. A hybrid's control keeps every other part:
    that of plug+bm25 is plug:other-user+bm25, for items in a prompt may help whatever user wrote them. Intervals are
    corrected for all pairs of a method and a control of it, and a method has to beat every control it has.
"It is the user" needs a control with another user's persona or adapter that was run and beaten. Methods that only
retrieve or read a profile have no such control, and what a control keeps of the user cannot tell that it is not them.
The best method is also set against the best of the references that need no LLM.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np

from pipelines.evaluate.figures import (
    BASELINE,
    BestReference,
    ControlDifference,
    Difference,
    Judgement,
    MostUnclear,
    Verdict,
)
from pipelines.evaluate.wording import between, direction, leaves_out_zero, percent, points, share, turned, value
from pipelines.methods import PARTS, known_part, known_parts
from pplug import intervals, metrics

USER = "helps, and it is the user"
UNKNOWN = "helps; whether it is the user is not known"
NO_DIFFERENCE = "no difference seen"
HARMS = "harms"
_CONTROLS = sorted((part for part in PARTS.values() if part.instead), key=lambda part: part.kind != "other-user")
NOT_THE_USER = {part.kind: f"helps, but {part.instead.as_good}" for part in _CONTROLS if part.instead}
"""Verdict on a method that helps no more than a control of this kind; the control of another user speaks first."""
OTHER = NOT_THE_USER["other-user"]
MANY = 0.2
"""Share of replies that are no answer, or that were cut, above which headline and warnings say so."""

Pair = TypeVar("Pair", bound=Hashable)


@dataclass(frozen=True)
class Figure:
    """A method's score by one metric, and the same in every resample."""

    score: float
    drawn: np.ndarray
    """Scores (R,) of R resamples."""


@dataclass(frozen=True)
class Control:
    """A method that repeats another one with less of the user in it."""

    name: str
    replaced: tuple[str, ...]
    """Parts that are not the user's, such as plug:other-user."""
    kept: tuple[str, ...]
    """Parts that are the user's own."""

    @property
    def kind(self) -> str:
        """The replacement for the user: other-user, or else no-history, soft-prompt or none (no adapter)."""
        kinds = [part.partition(":")[2] for part in self.replaced]
        return "other-user" if "other-user" in kinds else kinds[0]


def is_control(method: str) -> bool:
    """Tells whether a method replaces the user: by another user, by no history, by a training without any, or by no
    adapter."""
    return any(part.instead for part in known_parts(method))


def is_bound(method: str) -> bool:
    """Tells whether a method is told the truth."""
    return any(part.group == "oracle" for part in known_parts(method))


def candidates(names: Iterable[str]) -> list[str]:
    """Methods that may be claimed to help: neither the baseline nor a control, and not told the truth."""
    return [name for name in names if name != BASELINE and not is_control(name) and not is_bound(name)]


def differences(pairs: Mapping[Pair, tuple[Figure, Figure]], people: int) -> dict[Pair, Difference]:
    """First minus second of each pair, with intervals corrected for the number of pairs."""
    if not pairs:
        return {}
    values = np.array([one.score - other.score for one, other in pairs.values()])
    drawn = np.stack([one.drawn - other.drawn for one, other in pairs.values()], axis=1)
    ends = intervals.simultaneous(values, drawn, people).tolist()
    return {
        pair: Difference(difference=float(difference), ci95_corrected=own)
        for pair, difference, own in zip(pairs, values, ends, strict=True)
    }


def controls(method: str, names: Iterable[str]) -> list[Control]:
    """Finds the methods that repeat this one with its persona, its adapter or both replaced, and keep all else."""
    own, suitable = _roles(method), []
    for name in names:
        parts = _roles(name)
        changed = sorted(parts[role] for role in own if role in parts and is_control(parts[role]))
        kept = [role for role in own if parts.get(role) == own[role]]
        if changed and parts.keys() == own.keys() and len(changed) + len(kept) == len(own):
            suitable.append(Control(name, tuple(changed), tuple(own[role] for role in kept)))
    return suitable


def wanted_control(method: str) -> str | None:
    """Names the control that could tell whether it is the user; None where a method has no such control."""
    roles = _roles(method)
    parts = [other if (other := f"{role}:other-user") in PARTS else part for role, part in roles.items()]
    return None if parts == list(roles.values()) else "+".join(parts)


def _roles(method: str) -> dict[str, str]:
    """Parts by what they do: parts of one group do the same where the group has a control of another user."""
    groups = {part: known.group if (known := known_part(part)) else part for part in method.split("+")}
    return {group if f"{group}:other-user" in PARTS else part: part for part, group in groups.items()}


def judge(
    metric: str,
    methods: Mapping[str, Figure],
    references: Mapping[str, Figure],
    people: int,
    llms: Mapping[str, Set[str]] = MappingProxyType({}),
) -> Judgement:
    """Judges the methods by one metric; `say` adds the words.

    Differences are method minus other, and their intervals hold for all methods at once.

    Args:
        llms: identities of the LLMs that a method replies by, where they are known; a method that replies by another
            LLM is no control.
    """
    own, turn = candidates(methods), metrics.sign(metric)
    judgement = Judgement(metric=metric, n_methods=len(own), n_users=people)
    if not own:
        return judgement
    best = judgement.best = max(own, key=lambda name: turn * methods[name].score)
    if references:
        name = max(references, key=lambda name: turn * references[name].score)
        beside = differences({one: (methods[one], references[name]) for one in own}, people)[best]
        beaten = _clear(metric, beside, people) > 0
        judgement.reference = BestReference(name=name, score=references[name].score, **beside.dump(), beaten=beaten)
    if BASELINE not in methods:
        return judgement
    gains = differences({one: (methods[one], methods[BASELINE]) for one in own}, people)
    against = _against_controls(methods, own, people, llms)
    judgement.methods = {one: _words(metric, gains[one], against[one], people) for one in own}
    judgement.words, judgement.gain = judgement.methods[best], gains[best]
    judgement.controls = {control.name: difference for control, difference in against[best]}
    judgement.control = max(judgement.controls, key=lambda name: turn * methods[name].score, default=None)
    return judgement


def _against_controls(
    methods: Mapping[str, Figure], own: Sequence[str], people: int, llms: Mapping[str, Set[str]]
) -> dict[str, list[tuple[Control, ControlDifference]]]:
    """The controls of each method with the difference to each."""
    pairs = {
        (one, control): (methods[one], methods[control.name])
        for one in own
        for control in controls(one, methods)
        if control.name not in llms or llms.get(one, set()) <= llms[control.name]
    }
    against: dict[str, list[tuple[Control, ControlDifference]]] = {one: [] for one in own}
    for (one, control), difference in differences(pairs, people).items():
        to_control = ControlDifference(**difference.dump(), kind=control.kind, keeps=list(control.kept))
        against[one].append((control, to_control))
    return against


def _clear(metric: str, difference: Difference, people: int) -> int:
    """+1 for a difference in favour that is no chance, -1 for one against, else 0."""
    return direction(turned(metric, difference.difference, difference.ci95_corrected)[1], people)


def _words(
    metric: str, over_none: Difference, against: Sequence[tuple[Control, ControlDifference]], people: int
) -> str:
    effect = _clear(metric, over_none, people)
    if effect <= 0:
        return HARMS if effect else NO_DIFFERENCE
    unbeaten = [control for control, difference in against if _clear(metric, difference, people) <= 0]
    whole = {control.kind for control in unbeaten if not control.kept}
    for kind, words in NOT_THE_USER.items():
        if kind in whole:
            return words
    beaten_others = any(control.kind == "other-user" for control, _ in against)
    return USER if beaten_others and not unbeaten else UNKNOWN


# --- in words ---------------------------------------------------------------------------------------------------------


def say(judgement: Judgement, task: str, scored: Iterable[str], unclear: Mapping[str, float], answer: str) -> Verdict:
    """Adds the headline and the sentences that say why.

    Args:
        scored: names of all methods.
        unclear: share of the replies that are no answer, by method.
        answer: what those replies should be: a label of the task.
    """
    worst = max(unclear, key=lambda name: unclear[name], default=None)
    many = None
    if worst is not None and unclear[worst] > MANY:
        many = MostUnclear(method=worst, share=unclear[worst])
    parts = [_claim(judgement, task, scored)]
    reference = judgement.reference
    if reference and not reference.beaten and judgement.n_users >= intervals.FEWEST_OWNERS:
        score = value(judgement.metric, reference.score)
        parts.append(f"{judgement.best} does not beat {reference.name}, which needs no LLM and reaches {score}")
    if many:
        every = " (and of every other method)" * (len(unclear) > 1 and min(unclear.values()) == many.share)
        parts.append(f"{share(many.share)} of the replies of {worst}{every} are no {answer}")
    return Verdict(
        **dict(judgement), not_understood=many, headline=". ".join(parts), because=_because(judgement, scored)
    )


def _claim(judgement: Judgement, task: str, scored: Iterable[str]) -> str:
    metric, best, words = judgement.metric, judgement.best, judgement.words
    if judgement.gain is None:
        return f"{task}: scores of {', '.join(scored)}"
    middle, _ = turned(metric, judgement.gain.difference, judgement.gain.ci95_corrected)
    among = f", the best of {judgement.n_methods} methods," if judgement.n_methods > 1 else ""
    if words == NO_DIFFERENCE:
        return f"Personalisation: {words}; the gain of {best}{among} may be chance"
    if words == HARMS:
        even, loss = "even " * bool(among), _amount(metric, -middle)
        return f"Personalisation {words}: {even}{best}{among} loses {loss} of {metric}"
    return f"Personalisation {words}: {best} gains {_amount(metric, middle)} of {metric}"


def _amount(metric: str, number: float) -> str:
    """A gain in words: 4.2 points, 0.031."""
    return f"{100 * number:.1f} points" if percent(metric) else f"{number:.3f}"


def _because(judgement: Judgement, scored: Iterable[str]) -> list[str]:
    best, words, metric = judgement.best, judgement.words, judgement.metric
    if best is None or words is None:
        return []
    if judgement.n_users < intervals.FEWEST_OWNERS:
        return [f"Nothing is claimed of fewer than {intervals.FEWEST_OWNERS} users: all of them may gain by chance."]
    sentences = []
    for name, row in judgement.controls.items():
        middle, interval = turned(metric, row.difference, row.ci95_corrected)
        chance = "" if leaves_out_zero(interval) else ", which may be chance"
        keeps = f"; {name} keeps the user's own {' and '.join(row.keeps)}" if row.keeps else ""
        gain = f"{points(metric, middle)} ({between(metric, interval, True)})"
        sentences.append(f"{best} minus its control {name}: {gain}{chance}{keeps}.")
    if words == UNKNOWN and not any(row.kind == "other-user" for row in judgement.controls.values()):
        control = wanted_control(best)
        by_another = any(control.kind == "other-user" for control in controls(best, scored))
        run = f"was run by the LLM of {best}" if by_another else "was run"
        sentences.append(
            f"No control of {best} with another user's history {run}; generate {control} too."
            if control
            else f"No control shows whether {best} would gain as much from another user's history."
        )
    others = [name for name, own in judgement.methods.items() if own == USER]
    if words == UNKNOWN and others:
        have = "has a control" if len(others) == 1 else "have controls"
        sentences.append(f"{', '.join(others)}, which {have}: {USER}.")
    return sentences
