"""Stage: how far users have moved between two versions of the table personas, as sums and histograms.

A user's move is the cosine distance of the two mean vectors: a matter of the history itself, whatever plug made the
persona.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines.evaluate import cohorts
from pipelines.evaluate.figures import PersonaDrift
from pipelines.histories import matrix
from pplug.history import cosine_distance

KIND = "distance"


@dataclass
class Moves:
    """The moves of the users of some buckets; parts add up."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(cohorts.BINS[KIND], np.int64))
    """Users in both versions, by bin of their distance."""
    total: float = 0.0
    """Sum of these distances."""
    above: int = 0
    """Users whose distance is above the threshold."""
    only: tuple[int, int] = (0, 0)
    """Users of the earlier and of the later version alone."""

    def __add__(self, other: "Moves") -> "Moves":
        only = (self.only[0] + other.only[0], self.only[1] + other.only[1])
        return Moves(self.counts + other.counts, self.total + other.total, self.above + other.above, only)

    def figures(self, versions: tuple[int, int], threshold: float) -> PersonaDrift:
        """The figures of report.json; median and 95th percentile are exact to the width of a bin."""
        drift = PersonaDrift(
            versions=list(versions),
            threshold=threshold,
            users=int(self.counts.sum()),
            gone=self.only[0],
            new=self.only[1],
        )
        if drift.users:
            places = np.cumsum(self.counts) / drift.users
            drift.mean, drift.share_above = self.total / drift.users, self.above / drift.users
            drift.median, drift.p95 = (
                cohorts.middle(KIND, int(np.searchsorted(places, share - 1e-9))) for share in (0.5, 0.95)
            )
        return drift


def measure(buckets: Sequence[int], earlier: Snapshot, later: Snapshot, threshold: float) -> Moves:
    """Compares the users of some buckets; one without a vector on a side counts as gone or new."""
    total = Moves()
    for bucket in buckets:
        sides = []
        for snapshot in (earlier, later):
            wanted = pc.field("n_items") > 0
            side = snapshot.read(["user_key", "mean_vector"], buckets=[bucket], filter=wanted).combine_chunks()
            has_vector = matrix(side["mean_vector"]).any(axis=1) if len(side) else np.zeros(0, bool)
            sides.append(side.filter(pa.array(has_vector)))
        place = pc.index_in(sides[0]["user_key"], value_set=pa.array(sides[1]["user_key"].to_pylist(), pa.string()))
        rows = pc.fill_null(place, -1).to_numpy().astype(np.int64)
        first = matrix(sides[0]["mean_vector"].take(pa.array(np.flatnonzero(rows >= 0))))
        second = matrix(sides[1]["mean_vector"].take(pa.array(rows[rows >= 0])))
        moved = cosine_distance(first, second)
        counts = np.bincount(cohorts.bins(KIND, moved), minlength=cohorts.BINS[KIND])
        only = (len(sides[0]) - len(first), len(sides[1]) - len(second))
        total += Moves(counts, float(moved.sum()), int((moved > threshold).sum()), only)
    return total
