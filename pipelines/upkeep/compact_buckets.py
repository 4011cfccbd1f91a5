"""Stage of compaction: merges a bucket's small files, and drops vectors that no item of the histories needs.

Only file metadata travels on; the driver puts the new files in the place of the old ones.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from infra import upkeep
from infra.snapshot import DataFile, Snapshot, read_file
from infra.table import Table
from pipelines.histories import pair_keys
from pipelines.waves import listed


@dataclass(frozen=True)
class CompactBucket:
    """in: bucket int. out: old and new files (JSON lists of DataFile.to_row()), dropped (number of rows left out)."""

    table: Table
    snapshot: Snapshot
    histories: Snapshot | None
    """For a table of vectors, the items that need them; None where every row stays."""
    target_bytes: int
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            files = self.snapshot.by_bucket()[bucket]
            keep = self._live(bucket)
            groups = upkeep.due(files, self.target_bytes)
            if keep is not None:  # a file that is large enough still loses unneeded vectors
                due = {file.path for group in groups for file in group}
                groups += [[file] for file in files if file.path not in due and _has_dead(file, keep)]
            for group in groups:
                done = upkeep.rewrite(self.table, group, self.run_id, keep)
                yield pa.table({"old": [listed(done.old)], "new": [listed(done.new)], "dropped": [done.dropped]})
            if not groups:
                yield pa.table({"old": ["[]"], "new": ["[]"], "dropped": [0]})

    def _live(self, bucket: int) -> Callable[[pa.Table], pa.Array] | None:
        if self.histories is None:
            return None
        needed = pc.unique(pair_keys(self.histories.read(["user_key", "text_hash"], buckets=[bucket])))
        return lambda rows: pc.is_in(pair_keys(rows), value_set=needed)


def _has_dead(file: DataFile, keep: Callable[[pa.Table], pa.Array]) -> bool:
    return not pc.all(keep(read_file(file.uri, ["user_key", "text_hash"])), min_count=0).as_py()
