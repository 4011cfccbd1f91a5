"""The rows that each run has in a table of replies."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from infra.snapshot import Snapshot
from pipelines.waves import each_bucket


@dataclass(frozen=True)
class CountRuns:
    """in: bucket int. out: run_id, rows (of that run in the bucket)."""

    snapshot: Snapshot

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            found = self.snapshot.read(["run_id"], buckets=[bucket])["run_id"].value_counts()
            yield pa.table({"run_id": found.field("values"), "rows": found.field("counts")})


def count_runs(snapshot: Snapshot) -> Counter[str]:
    """Counts the rows of each run in this version; it needs a Ray session."""
    there: Counter[str] = Counter()
    for row in each_bucket(list(snapshot.by_bucket()), CountRuns(snapshot)):
        there[row["run_id"]] += row["rows"]
    return there
