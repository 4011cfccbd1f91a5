"""Verdict: what the report of an evaluation claims, and no more than its controls allow. Page and screen say its words.

Each method that is neither a control nor told the truth is judged twice, by paired differences over people:
  - its gain over the method `none`, with intervals corrected for the number of methods;
  - its gain over its controls: the same method with the persona or the adapter of another user, of no history or of a
    training without any. A hybrid's control keeps every other part: that of plug+bm25 is plug:other-user+bm25, for
    items in a prompt may help whoever wrote them. Intervals are corrected for all pairs of a method and a control of
    it, and a method has to beat every control it has.
"It is the user" needs a control with another user's persona or adapter that was run and beaten. Methods that only
retrieve or read a profile have no such control, and what a control keeps of the user cannot tell that it is not them.
The best method is also set against the best of the references that need no LLM.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from pipelines.evaluate.report.charts import between, gain, is_bound, is_control, percent, sign, value
from pplug import intervals

BASELINE = "none"
USER = "helps, and it is the user"
OTHER = "helps, but another's history helps as much"
NO_HISTORY = "helps, but no history at all helps as much"
SOFT_PROMPT = "helps, but a prompt trained without any history helps as much"
UNKNOWN = "helps; whether it is the user is not known"
NO_DIFFERENCE = "no difference seen"
HARMS = "harms"
NOT_THE_USER = {"other-user": OTHER, "no-history": NO_HISTORY, "soft-prompt": SOFT_PROMPT}
MOST_UNCLEAR = 0.2
"""Share of replies that are no answer, above which the headline says so."""


Pair = TypeVar("Pair", bound=Hashable)


@dataclass(frozen=True)
class Figure:
    """A method's score by one metric, and the same in every resample."""

    score: float
    drawn: np.ndarray
    """(R,)"""


@dataclass(frozen=True)
class Control:
    """A method that stands for another with less of the user in it."""

    name: str
    replaced: tuple[str, ...]
    """Its parts that are not the user's, such as plug:other-user."""
    kept: tuple[str, ...]
    """Its parts that still are."""

    @property
    def kind(self) -> str:
        """other-user, or else no-history or soft-prompt."""
        kinds = [part.partition(":")[2] for part in self.replaced]
        return "other-user" if "other-user" in kinds else kinds[0]


def candidates(names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Methods that may be claimed to help: neither the baseline nor a control, and not told the truth."""
    return [name for name in names if name != BASELINE and not is_control(name) and not is_bound(name)]


def differences(pairs: Mapping[Pair, tuple[Figure, Figure]], people: int) -> dict[Pair, dict[str, Any]]:
    """First minus second of each pair, with intervals corrected for the number of pairs."""
    if not pairs:
        return {}
    values = np.array([one.score - other.score for one, other in pairs.values()])
    drawn = np.stack([one.drawn - other.drawn for one, other in pairs.values()], axis=1)
    ends = intervals.simultaneous(values, drawn, people).tolist()
    return {
        name: {"difference": float(difference), "ci95_corrected": own}
        for name, difference, own in zip(pairs, values, ends, strict=True)
    }


def controls(method: str, names: Sequence[str] | Mapping[str, Any]) -> list[Control]:
    """Those of the names that are the method with its persona, its adapter or both replaced, and all else kept."""
    own, found = _roles(method), []
    for name in names:
        parts = _roles(name)
        changed = sorted(parts[role] for role in own if role in parts and is_control(parts[role]))
        kept = [role for role in own if parts.get(role) == own[role]]
        if changed and parts.keys() == own.keys() and len(changed) + len(kept) == len(own):
            found.append(Control(name, tuple(changed), tuple(own[role] for role in kept)))
    return found


def wanted_control(method: str) -> str | None:
    """The control that could tell whether it is the user; None where there is none of this kind."""
    roles = _roles(method)
    parts = [f"{role}:other-user" if role in ("plug", "adapter") else part for role, part in roles.items()]
    return None if "plug" not in roles and "adapter" not in roles else "+".join(parts)


def _roles(method: str) -> dict[str, str]:
    """Part by what it does: all kinds of plug do the same, so do all kinds of adapter."""
    parts = {part: part.partition(":")[0] for part in method.split("+")}
    return {role if role in ("plug", "adapter") else part: part for part, role in parts.items()}


def judge(metric: str, methods: Mapping[str, Figure], references: Mapping[str, Figure], people: int) -> dict[str, Any]:
    """The verdict as data; `say` adds its words.

    Returns:
        metric, n_methods (that may be claimed to help), best (the one with the best score), words (of the best), gain
        (of the best over `none`), controls (of the best: differences to each), control (the best of them), reference
        (the best of those without an LLM: name, score, difference of the best method to it, beaten), methods (words by
        method). Differences are method minus other; `ci95_corrected` holds for all methods at once. What cannot be told
        is None or empty.
    """
    own, turn = candidates(methods), sign(metric)
    found: dict[str, Any] = {"metric": metric, "n_methods": len(own), "n_users": people, "best": None, "words": None}
    found |= {"gain": None, "control": None, "controls": {}, "reference": None, "methods": {}}
    if not own:
        return found
    found["best"] = best = max(own, key=lambda name: turn * methods[name].score)
    if references:
        name = max(references, key=lambda name: turn * references[name].score)
        beside = differences({one: (methods[one], references[name]) for one in own}, people)[best]
        beaten = _clear(metric, beside, people) > 0
        found["reference"] = {"name": name, "score": references[name].score, **beside, "beaten": beaten}
    if BASELINE not in methods:
        return found
    gains = differences({one: (methods[one], methods[BASELINE]) for one in own}, people)
    against = _against_controls(methods, own, people)
    found["methods"] = {one: _words(metric, gains[one], against[one], people) for one in own}
    found |= {"words": found["methods"][best], "gain": gains[best]}
    found["controls"] = {control.name: row for control, row in against[best]}
    if found["controls"]:
        found["control"] = max(found["controls"], key=lambda name: turn * methods[name].score)
    return found


def _against_controls(
    methods: Mapping[str, Figure], own: Sequence[str], people: int
) -> dict[str, list[tuple[Control, dict[str, Any]]]]:
    """By method: each of its controls with the difference to it."""
    pairs = {(one, control): (methods[one], methods[control.name]) for one in own for control in controls(one, methods)}
    found: dict[str, list[tuple[Control, dict[str, Any]]]] = {one: [] for one in own}
    for (one, control), row in differences(pairs, people).items():
        found[one].append((control, row | {"kind": control.kind, "keeps": list(control.kept)}))
    return found


def _clear(metric: str, row: Mapping[str, Any], people: int) -> int:
    """+1 for a difference in favour that is no chance, -1 for one against, else 0."""
    _, (low, high) = gain(metric, row["difference"], row["ci95_corrected"])
    return 0 if people < intervals.FEWEST_OWNERS else int(low > 0) - int(high < 0)


def _words(
    metric: str, over_none: Mapping[str, Any], against: Sequence[tuple[Control, Mapping[str, Any]]], people: int
) -> str:
    effect = _clear(metric, over_none, people)
    if effect <= 0:
        return HARMS if effect else NO_DIFFERENCE
    unbeaten = [control for control, row in against if _clear(metric, row, people) <= 0]
    whole = {control.kind for control in unbeaten if not control.kept}
    for kind, words in NOT_THE_USER.items():
        if kind in whole:
            return words
    beaten_others = any(control.kind == "other-user" for control, _ in against)
    return USER if beaten_others and not unbeaten else UNKNOWN


# --- in words ---------------------------------------------------------------------------------------------------------


def say(
    found: Mapping[str, Any],
    task: str,
    scored: Sequence[str] | Mapping[str, Any],
    unclear: Mapping[str, float],
    what: str,
) -> dict[str, Any]:
    """The verdict with its headline and the sentences that say why.

    Args:
        found: as `judge` gives it.
        scored: names of all methods.
        unclear: by method, the share of its replies that are no answer.
        what: what such replies are not: a label of the task.
    """
    worst = max(unclear, key=lambda name: unclear[name], default=None)
    many: dict[str, Any] | None = None
    if worst is not None and unclear[worst] > MOST_UNCLEAR:
        many = {"method": worst, "share": unclear[worst]}
    parts = [_claim(found, task, scored)]
    reference, best = found["reference"], found["best"]
    if reference and not reference["beaten"]:
        score = value(found["metric"], reference["score"])
        parts.append(f"{best} does not beat {reference['name']}, which needs no LLM and reaches {score}")
    if many:
        every = " (and of every other method)" * (len(unclear) > 1 and min(unclear.values()) == many["share"])
        parts.append(f"{value('accuracy', many['share'])} of the replies of {worst}{every} are no {what}")
    return dict(found) | {"not_understood": many, "headline": ". ".join(parts), "because": _because(found)}


def _amount(metric: str, number: float) -> str:
    """A gain in words: 4.2 points, 0.031."""
    return f"{100 * number:.1f} points" if percent(metric) else f"{number:.3f}"


def _claim(found: Mapping[str, Any], task: str, scored: Sequence[str] | Mapping[str, Any]) -> str:
    metric, best, words = found["metric"], found["best"], found["words"]
    if words is None:
        return f"{task}: scores of {', '.join(scored)}"
    middle, _ = gain(metric, found["gain"]["difference"], found["gain"]["ci95_corrected"])
    among = f", the best of {found['n_methods']} methods," if found["n_methods"] > 1 else ""
    if words == NO_DIFFERENCE:
        return f"Personalisation: {words}; the gain of {best}{among} may be chance"
    if words == HARMS:
        even, loss = "even " * bool(among), _amount(metric, -middle)
        return f"Personalisation {words}: {even}{best}{among} loses {loss} of {metric}"
    return f"Personalisation {words}: {best} gains {_amount(metric, middle)} of {metric}"


def _because(found: Mapping[str, Any]) -> list[str]:
    best, words, metric = found["best"], found["words"], found["metric"]
    if found["n_users"] < intervals.FEWEST_OWNERS and words is not None:
        return [f"Nothing is claimed of fewer than {intervals.FEWEST_OWNERS} users: all of them may gain by chance."]
    said = []
    for name, row in found["controls"].items():
        middle, interval = gain(metric, row["difference"], row["ci95_corrected"])
        chance = "" if interval[0] > 0 or interval[1] < 0 else ", which may be chance"
        keeps = f"; {name} keeps the user's own {' and '.join(row['keeps'])}" if row["keeps"] else ""
        unit = " points" if percent(metric) else ""
        said.append(
            f"{best} minus its control {name}: {value(metric, middle, True)}{unit} "
            f"({between(metric, interval, True)}){chance}{keeps}."
        )
    if words == UNKNOWN and not any(row["kind"] == "other-user" for row in found["controls"].values()):
        control = wanted_control(best)
        said.append(
            f"No control of {best} with another user's history was run; generate {control} too."
            if control
            else f"No control shows whether {best} would gain as much from another user's history."
        )
    others = [name for name, own in found["methods"].items() if own == USER]
    if words == UNKNOWN and others:
        said.append(f"{', '.join(others)}, which {'has a control' if len(others) == 1 else 'have controls'}: {USER}.")
    return said
