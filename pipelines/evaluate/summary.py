"""The figures of an evaluation, from tallies: report.json's keys, and the same as a table for the screen.

Replies that were not understood stand in report.json with their user's id, so that `erase` finds them; the screen shows
how many they are and never a text.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate import breakdown, scoring, verdict
from pipelines.evaluate.cohorts import Survey
from pipelines.evaluate.replies import IDENTITIES
from pipelines.evaluate.report import page
from pipelines.evaluate.score import BASELINE, Scored, Tally, first
from pplug import intervals, metrics
from pplug.tasks import TaskEntry

UNDERSTOOD_AS = {"classification": "label of the task", "rating": "number"}
"""What a reply has to be to count as understood, by the kind of task; any text is one where texts are asked for."""
MANY = verdict.MOST_UNCLEAR


def summary(
    scored: Scored,
    entry: TaskEntry,
    survey: Survey,
    cuts: dict[str, tuple[int, int]],
    seconds: dict[str, float],
    repeats: int,
) -> dict[str, Any]:
    """The figures of report.json: per method n, scores, ci95, errors, replies not understood or cut, cost and, beside
    the baseline, paired differences and the users better and worse off; then the same by thirds of the users, the
    references that need no LLM, and the verdict.

    Where runs were pooled, each method's n, errors and users count every one of its repeats, which are at most
    `repeats`.
    """
    n_users = scored.users + len(scored.split_owners)
    methods, references = (_figures(tallies, entry) for tallies in (scored.methods, scored.references))
    found: dict[str, dict[str, Any]] = {}
    for name, tally in scored.methods.items():
        found[name] = {
            "n": int(tally.sums[0]),
            **_scores(methods[name]),
            "errors": tally.errors,
            "not_understood": _not_understood(tally, entry),
            "cut_at_the_limit": tally.cut,
            "cost": breakdown.cost(tally, entry, survey, seconds.get(name)),
        }
    _add_gains(found, scored, entry, methods, n_users)
    names = metrics.NAMES[entry.metric]
    judged = verdict.judge(
        names[0],
        {name: of[names[0]] for name, of in methods.items()},
        {name: of[names[0]] for name, of in references.items()},
        n_users,
    )
    unclear = {name: row["not_understood"]["share"] for name, row in found.items() if row["not_understood"]}
    return {
        "task": entry.name,
        "n_users": n_users,
        "n_requests": scored.answered,
        "not_generated": scored.labelled - scored.answered,
        "verdict": verdict.say(judged, entry.name, found, unclear, UNDERSTOOD_AS.get(entry.metric, "")),
        "methods": found,
        "references": {name: _scores(of) for name, of in references.items()},
        "groups": breakdown.of_thirds(scored, entry, survey, cuts, repeats),
        "warnings": _warnings(scored, entry, n_users),
    }


def _figures(tallies: Mapping[str, Tally], entry: TaskEntry) -> dict[str, dict[str, verdict.Figure]]:
    """By name and metric."""
    k, scores = metrics.columns(entry), scoring.scores(tallies, entry)
    drawn = {name: metrics.from_sums(entry, tally.resampled[:, :k]) for name, tally in tallies.items()}
    return {
        name: {metric: verdict.Figure(score, drawn[name][metric]) for metric, score in own.items()}
        for name, own in scores.items()
    }


def _scores(of_name: Mapping[str, verdict.Figure]) -> dict[str, Any]:
    return {
        "scores": {metric: figure.score for metric, figure in of_name.items()},
        "ci95": {metric: intervals.ci95(figure.drawn) for metric, figure in of_name.items()},
    }


def _add_gains(
    found: dict[str, dict[str, Any]],
    scored: Scored,
    entry: TaskEntry,
    figures: Mapping[str, Mapping[str, verdict.Figure]],
    people: int,
) -> None:
    """Differences to the baseline, paired: each by itself, and with intervals that hold for all candidates at once."""
    if BASELINE not in found:
        return
    for name in found:
        if name != BASELINE:
            gains = {}
            for metric, figure in figures[name].items():
                base = figures[BASELINE][metric]
                gains[metric] = {
                    "difference": figure.score - base.score,
                    "ci95": intervals.ci95(figure.drawn - base.drawn),
                    "p_value": intervals.p_value(figure.drawn - base.drawn),
                }
            found[name]["vs_none"] = gains
            found[name]["users_vs_none"] = breakdown.users(scored.methods[name], entry)
    for metric in metrics.NAMES[entry.metric]:
        pairs = {name: (figures[name][metric], figures[BASELINE][metric]) for name in verdict.candidates(found)}
        for name, row in verdict.differences(pairs, people).items():
            found[name]["vs_none"][metric] |= row


def _not_understood(tally: Tally, entry: TaskEntry) -> dict[str, Any] | None:
    """None where any text is an answer, or where there is no reply without an error."""
    replies = int(tally.sums[0]) - tally.errors
    if entry.metric not in UNDERSTOOD_AS or not replies:
        return None
    some = [{"user_id": row["user_id"], "text": row["text"]} for row in tally.unclear]
    return {"n": tally.n_unclear, "share": tally.n_unclear / replies, "replies": some}


def identities(parts: Sequence[Scored]) -> dict[str, str | None]:
    """Which models and decoding the replies are by; two plugs in two runs stand side by side."""
    made_by = {(kind, said) for part in parts for method, kind, said in part.made_by if method in part.methods}
    return {name: ", ".join(sorted(said for kind, said in made_by if kind == name)) or None for name in IDENTITIES}


def examples(scored: Scored, entry: TaskEntry, count: int) -> list[dict[str, Any]]:
    """Requests drawn at random among those that the methods answer differently, with the replies in one order."""
    told = entry.metric != "text"  # of a free text no reply is right or wrong
    return [
        {
            "input": row["input"],
            "target": row["target"],
            "replies": [
                {"method": name, "text": row["replies"][name],
                 "right": told and row["replies"][name].strip() == row["target"].strip()}
                for name in scored.methods if name in row["replies"]
            ],
        }
        for row in first(scored.examples, count)
    ]  # fmt: skip


def reply_warnings(scored: Scored, entry: TaskEntry) -> list[str]:
    """Methods of which many replies are no answer, or were cut: their scores tell little."""
    said, what = [], UNDERSTOOD_AS.get(entry.metric)
    for name, tally in scored.methods.items():
        replies = max(1, int(tally.sums[0]) - tally.errors)
        if what and tally.n_unclear > MANY * replies:
            said.append(f"{name}: {tally.n_unclear / replies:.0%} of the replies are no {what} and count as wrong")
        if tally.cut > MANY * replies:
            said.append(f"{name}: {tally.cut / replies:.0%} of the replies were cut at the limit of tokens")
    return said


def _warnings(scored: Scored, entry: TaskEntry, n_users: int) -> list[str]:
    said = []
    if n_users < intervals.FEW_OWNERS:
        said.append(f"only {n_users} users: the intervals are wide and rough")
    left = scored.labelled - scored.answered
    if left:
        said.append(
            f"{left} of {scored.labelled} requests with a target were not generated by this run and are left out"
        )
    said += [
        f"{name}: {tally.errors} replies were errors and count as empty predictions"
        for name, tally in scored.methods.items()
        if tally.errors
    ]
    return said + reply_warnings(scored, entry)


# --- on the screen ----------------------------------------------------------------------------------------------------


def table_text(found: dict[str, Any]) -> str:
    """The figures as tables for the screen; * marks a difference whose interval leaves out zero."""
    said = found["verdict"]
    text = [f"{found['task']}: {found['n_requests']} requests of {found['n_users']} users"]
    text += [said["headline"], *said["because"], *_methods_text(found["methods"])]
    if found["references"]:
        text += ["references, which need no LLM:", *_references_text(found["references"])]
    if found.get("reference"):
        text.append(f"best possible: {page.best_possible(found['reference'])}")
    return "\n".join([*text, *(f"note: {warning}" for warning in found["warnings"])])


def _methods_text(methods: Mapping[str, dict[str, Any]]) -> list[str]:
    names = list(next(iter(methods.values()))["scores"])
    compared = any("vs_none" in row for row in methods.values())
    unclear = any(row["not_understood"] for row in methods.values())
    head = ["method", "n", *["not understood"] * unclear, *(f"{name} [95%]" for name in names)]
    head += [*(f"{name} - {BASELINE} [95%]" for name in names), "users better / worse"] if compared else []
    lines = []
    for method, row in methods.items():
        cells = [method, str(row["n"]), *[page.unclear_share(row)] * unclear]
        cells += [cell(row["scores"][name], row["ci95"][name]) for name in names]
        if compared:
            gains = [row.get("vs_none", {}).get(name) for name in names]
            cells += ["" if gain is None else cell(gain["difference"], page.ends(gain), True) for gain in gains]
            cells.append(page.better_worse(row))
        lines.append(cells)
    return _aligned([head, *lines])


def _references_text(references: Mapping[str, dict[str, Any]]) -> list[str]:
    names = list(next(iter(references.values()))["scores"])
    lines = [["reference", *(f"{name} [95%]" for name in names), "what it is"]]
    for reference, row in references.items():
        cells = [cell(row["scores"][name], row["ci95"][name]) for name in names]
        lines.append([reference, *cells, row.get("about", "")])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def cell(value: float, interval: Sequence[float], signed: bool = False) -> str:
    """A figure with its interval."""
    form = "{:+.3f}" if signed else "{:.3f}"
    low, high = interval
    star = "*" if signed and not math.isnan(low) and (low > 0 or high < 0) else ""
    return f"{form.format(value)} [{form.format(low)}, {form.format(high)}]{star}"
