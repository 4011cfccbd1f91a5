"""Intervals by a bootstrap over people: every person counts Poisson(1) times in each resample [1].

Whole people are drawn, not rows: the answers of one person are alike. Weights are a function of (seed, owner_id,
resample) alone: workers that hold different people need not agree on anything, their weighted sums simply add up, and
all methods see the same resamples, so differences are paired. With Poisson(1) instead of exactly N draws the size of a
resample varies; scores are ratios of sums, so this matters little beyond some tens of people.

Several differences at once need wider intervals: the best of ten methods that all do nothing looks good by chance.
`simultaneous` widens them by the distribution of the greatest error among all of them, in the same resamples [2]; what
the methods have in common is thereby counted once.

[1] "Estimating Uncertainty for Massive Data Streams", Chamandy et al., 2012.
[2] "Resampling-Based Multiple Testing", Westfall and Young, 1993 (single-step max T).
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import ndtr, stdtrit

FEW_OWNERS = 30
"""Below this the intervals are rough; a report says so."""
FEWEST_OWNERS = 6
"""Below this nothing is claimed: five people all gain by chance in 1 of 32 cases, which is more than 2.5%."""
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_CDF = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])


def weights(owner_ids: Sequence[str], n_bootstrap: int, seed: int) -> np.ndarray:
    """Draws how often each owner counts in each resample, (N, R) uint8: about Poisson(1), independent of each other."""
    digests = b"".join(digest(owner, seed) for owner in owner_ids)
    state = np.frombuffer(digests, dtype="<u8")[:, None] + _GAMMA * np.arange(1, n_bootstrap + 1, dtype=np.uint64)
    # splitmix64: a counter-based generator, so that no generator per owner has to be set up
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.searchsorted(_CDF, uniform, side="right").astype(np.uint8)


def digest(owner_id: str, seed: int) -> bytes:
    """8 bytes that stand for an owner."""
    return hashlib.blake2b(f"{seed}\0{owner_id}".encode(), digest_size=8).digest()


def resampled_sums(owner_ids: Sequence[str], sums: np.ndarray, n_bootstrap: int, seed: int) -> np.ndarray:
    """Sums the items of each resample. Sums over other people may be added to them.

    Args:
        owner_ids: the owner of each item (N,); may repeat.
        sums: (N, K) `metrics.item_sums`.

    Returns:
        (R, K) float64.
    """
    owners, index = np.unique(np.asarray(owner_ids, dtype=object), return_inverse=True)
    own = np.zeros((len(owners), sums.shape[1]))
    np.add.at(own, index, sums)
    total = np.zeros((n_bootstrap, sums.shape[1]))
    step = max(1, 2**22 // n_bootstrap)  # 32 MB of weights at a time
    for start in range(0, len(owners), step):
        drawn = weights(owners[start : start + step].tolist(), n_bootstrap, seed)
        total += drawn.T.astype(np.float64) @ own[start : start + step]
    return total


def ci95(values: np.ndarray) -> tuple[float, float]:
    """Low and high end of the middle 95% of the resampled values; resamples without anyone are left out."""
    known = values[np.isfinite(values)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.percentile(known, [2.5, 97.5]).tolist()
    return low, high


def simultaneous(values: np.ndarray, drawn: np.ndarray, people: int) -> np.ndarray:
    """Computes 95% intervals of several values that leave out any one's truth in 2.5% of cases at each end.

    Args:
        values: (M,) the values themselves.
        drawn: (R, M) the same from each resample; resamples in which one is not finite are left out.
        people: how many people were drawn. The fewer, the wider: the bootstrap's spread is that of n, not of n - 1, and
            its quantiles are those of the normal distribution where Student's would be right.

    Returns:
        (M, 2) low and high ends, nan where no resample is left.
    """
    known = drawn[np.isfinite(drawn).all(axis=1)] if len(values) else drawn[:0]
    if not len(known) or people < 2:
        return np.full((len(values), 2), math.nan)
    spread = known.std(axis=0)
    error = np.divide(known - values, spread, out=np.zeros_like(known), where=spread > 0)
    over, under = (np.percentile(ends.max(axis=1), 97.5) for ends in (error, -error))
    wider = math.sqrt(people / (people - 1))
    over, under = (-wider * stdtrit(people - 1, ndtr(-max(end, 0.0))) for end in (over, under))
    return np.stack([values - over * spread, values + under * spread], axis=1)


def p_value(differences: np.ndarray, people: int) -> float | None:
    """The two-sided share of resampled differences on the other side of zero, at least 2 / (R + 1).

    Args:
        differences: (R,) one from each resample.
        people: how many people were drawn. Below FEWEST_OWNERS the result is None: the resamples of one person are all
            alike, and their share would be the smallest that there is.
    """
    if people < FEWEST_OWNERS:
        return None
    known = differences[np.isfinite(differences)]
    beyond = 1 + min(int((known <= 0).sum()), int((known >= 0).sum()))
    return min(1.0, 2 * beyond / (len(known) + 1))
