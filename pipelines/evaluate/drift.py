"""Stage: how far users have moved between two versions of the table personas, as sums and histograms.

A user's move is the cosine distance of the two mean vectors: of the history itself, whatever plug made the persona.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.evaluate import cohorts as groups
from pipelines.histories import matrix
from pplug.history import cosine_distance

KIND = "distance"


@dataclass
class Drift:
    """The part of some buckets; adds up."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(groups.BINS[KIND], np.int64))
    """Users in both versions, by bin of their distance."""
    total: float = 0.0
    above: int = 0
    only: tuple[int, int] = (0, 0)
    """Users of the earlier and of the later version alone."""

    def __add__(self, other: "Drift") -> "Drift":
        only = (self.only[0] + other.only[0], self.only[1] + other.only[1])
        return Drift(self.counts + other.counts, self.total + other.total, self.above + other.above, only)

    def figures(self) -> dict[str, float | int]:
        """users, mean, median and 95th percentile of the distance, share above the threshold, users come and gone."""
        n = int(self.counts.sum())
        places = np.cumsum(self.counts) / max(1, n)
        median, most = (groups.lowest(KIND, int(np.searchsorted(places, share - 1e-9))) for share in (0.5, 0.95))
        found: dict[str, float | int] = {"users": n, "gone": self.only[0], "new": self.only[1]}
        if n:
            found |= {"mean": self.total / n, "median": median, "p95": most, "share_above": self.above / n}
        return found


def drift(buckets: Sequence[int], earlier: Snapshot, later: Snapshot, threshold: float) -> Drift:
    """Compares the users of some buckets; one without a vector on a side counts as gone or new."""
    total = Drift()
    for bucket in buckets:
        sides = []
        for snapshot in (earlier, later):
            wanted = pc.field("n_items") > 0
            sides.append(snapshot.read(["user_key", "mean_vector"], buckets=[bucket], filter=wanted).combine_chunks())
        place = pc.index_in(sides[0]["user_key"], value_set=pa.array(sides[1]["user_key"].to_pylist(), pa.string()))
        rows = pc.fill_null(place, -1).to_numpy().astype(np.int64)
        first = matrix(sides[0]["mean_vector"].take(pa.array(np.flatnonzero(rows >= 0))))
        second = matrix(sides[1]["mean_vector"].take(pa.array(rows[rows >= 0])))
        moved = cosine_distance(first, second)
        moved = moved[np.isfinite(moved)]
        counts = np.bincount(groups.bins(KIND, moved), minlength=groups.BINS[KIND])
        only = (len(sides[0]) - len(first), len(sides[1]) - len(second))
        total += Drift(counts, float(moved.sum()), int((moved > threshold).sum()), only)
    return total
