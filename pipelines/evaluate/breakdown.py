"""Whom a method helps and what it costs, from tallies: the parts of evaluate's report.json beyond the scores.

groups            by history length, history age and distance from the average user: score and gain of each third
users_vs_none     share of users better, worse and as well off as with the method `none`
cost              tokens a request, seconds a reply where they are known, bytes kept a user beside the history
All from sums that are as long as there are methods and resamples, whatever the number of users.
"""

from typing import Any

import numpy as np

from pipelines.evaluate import cohorts as groups
from pipelines.evaluate.replies import COSTS
from pipelines.evaluate.score import BASELINE, Columns, Scored, Tally
from pplug import intervals, metrics
from pplug.tasks import TaskEntry

UNITS = {"length": "items", "age": "days", "distance": "1 - cosine"}
VALUE_BYTES = 2
"""Vectors and personas hold 16-bit values."""


def of_thirds(
    scored: "Scored", entry: "TaskEntry", survey: groups.Survey, cuts: dict[str, tuple[int, int]], repeats: int = 1
) -> Any:
    """By kind of group: unit, how many requests have no such fact, and a row a third: range, n, figures by method.

    n counts requests: of each, a method has `repeats` replies.
    """
    columns, metric = Columns(metrics.columns(entry)), metrics.NAMES[entry.metric][0]
    found: dict[str, Any] = {}
    for kind, cut in cuts.items():
        counts, rows = survey.counts[kind], []
        for third, between in enumerate(groups.ranges(kind, counts, cut)):
            if between is None:
                continue
            at = columns.third(kind, third)
            figures = {name: _figure(tally, at, scored.methods.get(BASELINE)) for name, tally in scored.methods.items()}
            n = int(max(tally.sums[at][0] for tally in scored.methods.values())) // repeats
            rows.append({"from": between[0], "to": between[1], "n": n, "methods": figures})
        unknown = survey.requests - int(counts.sum())
        found[kind] = {"unit": UNITS[kind], "metric": metric, "unknown": unknown, "thirds": rows}
    return found


def _figure(tally: "Tally", at: slice, baseline: "Tally | None") -> dict[str, Any]:
    """Score of one third, and beside the baseline the paired difference."""
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.divide(*tally.resampled[:, at].T[::-1])
        found: dict[str, Any] = {"score": _ratio(tally.sums[at]), "ci95": intervals.ci95(drawn)}
        if baseline is not None and baseline is not tally:
            gain = drawn - np.divide(*baseline.resampled[:, at].T[::-1])
            found |= {
                "difference": found["score"] - _ratio(baseline.sums[at]),
                "difference_ci95": intervals.ci95(gain),
            }
    return found


def _ratio(pair: np.ndarray) -> float:
    return float(pair[1] / pair[0]) if pair[0] else float("nan")


def users(tally: "Tally", entry: "TaskEntry") -> dict[str, Any]:
    """Shares of users better, worse, equal, with intervals; n 0 where the baseline was not scored."""
    at = Columns(metrics.columns(entry)).users
    total = tally.sums[at]
    found: dict[str, Any] = {"n": int(total[0])}
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = tally.resampled[:, at][:, 1:] / tally.resampled[:, at][:, :1]
    for place, name in enumerate(("better", "worse", "equal")):
        share = float(total[1 + place] / total[0]) if total[0] else float("nan")
        found[name] = {"share": share, "ci95": intervals.ci95(drawn[:, place])}
    return found


def cost(tally: "Tally", entry: "TaskEntry", survey: groups.Survey, seconds: float | None) -> dict[str, Any]:
    """Tokens a request, seconds a reply, and bytes a user of all that the method reads beside the history: item vectors
    or a stored persona, an adapter, a profile."""
    sums = dict(zip(COSTS, tally.sums[Columns(metrics.columns(entry)).costs].tolist(), strict=True))
    n = tally.sums[0]
    width = len(survey.vectors) if survey.users else 0
    sizes = {
        "vectors": width * VALUE_BYTES * survey.items / max(1, survey.requests),
        "stored_persona": survey.persona_values * VALUE_BYTES,
        **survey.row_bytes,
    }
    read = [name for name in COSTS[2:] if sums[name] and not (name == "stored_persona" and sums["vectors"])]
    kept = [sizes.get(name, 0.0) for name in read]
    return {
        "prompt_tokens": sums["prompt_tokens"] / n,
        "output_tokens": sums["output_tokens"] / n,
        "seconds_per_reply": seconds,
        "bytes_per_user": sum(kept) if all(kept) else None,
    }
