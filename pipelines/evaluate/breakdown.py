"""The figures of report.json beyond the scores, from tallies: whom a method helps, and what it costs.

groups            by history length, history age and distance from the average user: score and gain in each third
users_vs_none     share of users better, worse and as well off as with the method `none`
cost              tokens per request, seconds per reply where they are known, bytes kept per user beside the history
All come from sums that are as long as there are methods and resamples, whatever the number of users.
"""

import numpy as np

from pipelines.evaluate import cohorts
from pipelines.evaluate.figures import BASELINE, Cohort, Cohorts, CohortScore, Cost, Share, UserShares
from pipelines.evaluate.replies import COSTS
from pipelines.evaluate.score import Columns, Scored, Tally
from pplug import intervals, metrics
from pplug.tasks import TaskSpec

UNITS = {"length": "items", "age": "days", "distance": "1 - cosine"}
VALUE_BYTES = 2
"""Vectors and personas hold 16-bit values."""


def by_thirds(
    scored: Scored, task: TaskSpec, census: cohorts.Census, cuts: dict[str, tuple[int, int]], repeats: int = 1
) -> dict[str, Cohorts]:
    """Figures of the thirds by kind of fact; a third without a request is left out.

    A third's n counts requests: a method has `repeats` replies to each.
    """
    columns, metric = Columns(metrics.columns(task)), metrics.names(task)[0]
    groups: dict[str, Cohorts] = {}
    for kind, cut in cuts.items():
        counts, thirds = census.counts[kind], []
        for third, ends in enumerate(cohorts.ranges(kind, counts, cut)):
            if ends is None:
                continue
            at = columns.third(kind, third)
            scores = {
                name: _cohort_score(tally, at, scored.methods.get(BASELINE)) for name, tally in scored.methods.items()
            }
            n = int(max(tally.sums[at][0] for tally in scored.methods.values())) // repeats
            thirds.append(Cohort(low=ends[0], high=ends[1], n=n, methods=scores))
        unknown = census.requests - int(counts.sum())
        groups[kind] = Cohorts(unit=UNITS[kind], metric=metric, unknown=unknown, thirds=thirds)
    return groups


def _cohort_score(tally: Tally, at: slice, baseline: Tally | None) -> CohortScore:
    """Score in one third, and beside the baseline the paired difference."""
    score = _ratio(tally.sums[at])
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = np.divide(*tally.resampled[:, at].T[::-1])
        if baseline is None or baseline is tally:
            return CohortScore(score=score, ci95=intervals.ci95(drawn))
        gain = drawn - np.divide(*baseline.resampled[:, at].T[::-1])
    return CohortScore(
        score=score,
        ci95=intervals.ci95(drawn),
        difference=score - _ratio(baseline.sums[at]),
        difference_ci95=intervals.ci95(gain),
    )


def _ratio(pair: np.ndarray) -> float:
    return float(pair[1] / pair[0]) if pair[0] else float("nan")


def user_shares(tally: Tally, task: TaskSpec) -> UserShares:
    """Shares of users better, worse and as well off, with intervals; n is 0 where the baseline was not scored."""
    at = Columns(metrics.columns(task)).users
    total = tally.sums[at]
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = tally.resampled[:, at][:, 1:] / tally.resampled[:, at][:, :1]
    shares = {}
    for place, name in enumerate(("better", "worse", "equal")):
        share = float(total[1 + place] / total[0]) if total[0] else float("nan")
        shares[name] = Share(share=share, ci95=intervals.ci95(drawn[:, place]))
    return UserShares(n=int(total[0]), **shares)


def cost(tally: Tally, task: TaskSpec, census: cohorts.Census, seconds: float | None) -> Cost:
    """Tokens per request, seconds per reply, and bytes per user of all that the method reads beside the history: item
    vectors or a stored persona, an adapter, a profile."""
    sums = dict(zip(COSTS, tally.sums[Columns(metrics.columns(task)).costs].tolist(), strict=True))
    n = tally.sums[0]
    width = len(census.vectors) if census.users else 0
    sizes = {
        "vectors": width * VALUE_BYTES * census.items / max(1, census.requests),
        "stored_persona": census.persona_values * VALUE_BYTES,
        **census.row_bytes,
    }
    stored = [name for name in COSTS[2:] if sums[name] and not (name == "stored_persona" and sums["vectors"])]
    kept = [sizes.get(name, 0.0) for name in stored]
    return Cost(
        prompt_tokens=float(sums["prompt_tokens"] / n),
        output_tokens=float(sums["output_tokens"] / n),
        seconds_per_reply=seconds,
        bytes_per_user=sum(kept) if all(kept) else None,
    )
