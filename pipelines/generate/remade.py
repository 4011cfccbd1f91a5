"""Takes replies of a run out of `generations`: those that the rerun puts others in the place of.

Only the files that hold such rows are written anew; rows of other runs in them stay as they are.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import pyarrow.compute as pc

from infra.errors import ConcurrentRunError
from infra.report import RunReport
from infra.snapshot import DataFile, Snapshot, read_file, read_files
from infra.table import CommitConflict, Table
from pipelines.generate.pending import ReplyKey
from pipelines.waves import each_bucket, files_of, listed, next_group

TRIES = 5


class Owing(Protocol):
    """Says which replies of a run are made anew."""

    def owed(self, bucket: int) -> frozenset[ReplyKey]: ...


@dataclass(frozen=True)
class WithoutRemade:
    """in: bucket int. out: old and new files (JSON lists of DataFile.to_row()), one row per file written anew."""

    table: Table
    snapshot: Snapshot
    run_id: str
    pending: Owing

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            owed = self.pending.owed(bucket)
            for file in self.snapshot.by_bucket().get(bucket, ()):
                if owed and read_file(file.uri, ["run_id"], pc.field("run_id") == self.run_id).num_rows:
                    rows = read_files([file], spec=self.table.spec)
                    keys = zip(*(rows[name].to_pylist() for name in ("user_id", "request_id", "method")), strict=True)
                    samples = (sample or 0 for sample in rows["sample"].to_pylist())
                    again = pa.array([(*key, sample) in owed for key, sample in zip(keys, samples, strict=True)])
                    gone = pc.and_(pc.equal(rows["run_id"], self.run_id), again)
                    if not pc.any(gone).as_py():
                        continue
                    kept = rows.filter(pc.invert(gone))
                    new = self.table.write(kept, self.run_id) if kept.num_rows else []
                    yield pa.table({"old": [listed([file])], "new": [listed(new)]})


def drop_remade(
    table: Table, before: Snapshot, pending: Owing, buckets: list[int], report: RunReport, metadata: Mapping[str, str]
) -> Snapshot:
    """Commits the table without those replies of this run in these buckets that are made anew; returns that version.

    Until the run has ended, readers keep the newest complete version, which still holds them.

    Raises:
        ConcurrentRunError: others put the table's rows into other files again and again.
    """
    for _ in range(TRIES):
        stage = WithoutRemade(table, before, report.run_id, pending)
        old: list[DataFile] = []
        new: list[DataFile] = []
        for row in each_bucket(buckets, stage):
            old += files_of(row["old"])
            new += files_of(row["new"])
        try:
            table.drop_own(
                new,
                old,
                run_id=report.run_id,
                group=next_group(table, report.run_id),
                planned_on=before.version,
                metadata=metadata,
            )
        except CommitConflict:
            before = table.snapshot()
            continue
        return table.snapshot()
    raise ConcurrentRunError(
        f"table {table.spec.name}: others wrote its files anew during each of {TRIES} tries to replace some of "
        f"this run's replies; when they have ended, run it again with run_id={report.run_id}"
    )
