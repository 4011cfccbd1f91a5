"""The end of every job: files are written by Ray tasks, and committed by the driver as buckets are complete.

Only file metadata reaches the driver. A bucket is complete when its rows and rejects make up what the plan says it
owes; complete buckets are committed in groups, keyed by (run_id, group).
More rejects than allowed: what was only added stays, each row is right by itself; what would replace other rows is
committed for a rerun to go on from, but never as a complete version, so that readers keep the version of before.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from infra.errors import ConcurrentRunError
from infra.report import RunReport, progress
from infra.snapshot import Snapshot
from infra.table import Commit, CommitConflict, DataFile, Table

REASON, DETAIL = "reject_reason", "reject_detail"


class WriteFiles:
    """Stage: writes rows as files of one table; rows with a reject reason go to `rejects`.

    in:  the table's columns, and where rows can be rejected also reject_reason str (null: a good row), reject_detail
    out: one row a file: DataFile.to_row()
    """

    def __init__(
        self,
        table: Table,
        rejects: Table | None,
        job: str,
        run_id: str,
        key: str | None = None,
        rejected: Snapshot | None = None,
    ) -> None:
        self.table, self.rejects, self.job, self.run_id, self.key = table, rejects, job, run_id, key
        self.rejected = rejected
        """What stands in `rejects` already: a job that meets the same row every night writes it once."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        files: list[DataFile] = []
        good = batch
        if REASON in batch.column_names:
            good = batch.filter(pc.is_null(batch[REASON]))
            files += self._reject(batch.filter(pc.is_valid(batch[REASON])))
        good = good.select(self.table.spec.schema.names)
        if good.num_rows:
            files += self.table.write(good, self.run_id)
        return files_table(files)

    def _reject(self, bad: pa.Table) -> list[DataFile]:
        if not bad.num_rows:
            return []
        assert self.rejects is not None and self.key is not None, "a stage that rejects rows needs a rejects table"
        files = []
        for bucket in pc.unique(bad["bucket"]).to_pylist():
            rows = bad.filter(pc.equal(bad["bucket"], bucket))
            reasons = Counter(rows[REASON].to_pylist())
            data = self._not_yet(
                pa.table(
                    {
                        "job": pa.repeat(self.job, rows.num_rows),
                        "run_id": pa.repeat(self.run_id, rows.num_rows),
                        "key": rows[self.key].cast(pa.string()),
                        "reason": rows[REASON],
                        "detail": rows[DETAIL],
                    }
                )
            )
            # The bucket travels with the metadata only: it tells which bucket's count these rejects pay. Those that
            # stand in the table already pay too, as a row of metadata without a file.
            paid = self.rejects.write(data, self.run_id)
            if data.num_rows < rows.num_rows:
                paid.append(DataFile(self.rejects.spec.name, "", 0, rows.num_rows - data.num_rows, None, "", ""))
            files += [replace(file, bucket=bucket, reasons={}) for file in paid]
            files[-1] = replace(files[-1], reasons=dict(reasons))
        return files

    def _not_yet(self, data: pa.Table) -> pa.Table:
        """Those that do not stand in `rejects`, from this run or an earlier one."""
        if self.rejected is None or not self.rejected.files:
            return data
        mine = (pc.field("job") == self.job) & pc.field("key").isin(data["key"])
        known = self.rejected.read(["key", "reason"], filter=mine)
        both = [pc.binary_join_element_wise(rows["key"], rows["reason"], "\n") for rows in (data, known)]
        return data.filter(pc.invert(pc.is_in(both[0], value_set=both[1])))


def files_table(files: list[DataFile]) -> pa.Table:
    """File metadata as Ray rows; typed, so that a batch without a file has the same columns."""
    rows = [file.to_row() for file in files]
    schema = pa.schema(
        {
            "table": pa.string(),
            "path": pa.string(),
            "size": pa.int64(),
            "rows": pa.int64(),
            "bucket": pa.int64(),
            "min_key": pa.string(),
            "max_key": pa.string(),
            "reasons": pa.string(),
            "root": pa.string(),
        }
    )
    return pa.Table.from_pylist(rows, schema=schema)


def next_group(table: Table, run_id: str) -> int:
    """The group a run goes on with: 0, or the one after the last it has committed."""
    return len(table.committed(run_id))


def commit_first(table: Table, files: list[DataFile], *, run_id: str, group: int, **how: Any) -> Commit:
    """Table.commit for a group that only this driver can have made.

    Raises:
        ConcurrentRunError: another run moved the table, or another driver of this run has committed the group (its
            files then are others than ours, and counting ours as written would lose or double rows).
    """
    try:
        commit = table.commit(files, run_id=run_id, group=group, **how)
    except CommitConflict as error:
        raise ConcurrentRunError(_overtaken(str(error), run_id)) from error
    if commit.already:
        what = f"table {table.spec.name} holds group {group} of this run: another run has committed it"
        raise ConcurrentRunError(_overtaken(f"{what}, under the same run_id", run_id))
    return commit


def _overtaken(what: str, run_id: str) -> str:
    return (
        f"{what}. This run stops here; what it has committed stays and nothing is doubled: when the other has ended, "
        f"run it again with run_id={run_id}"
    )


@dataclass
class Committer:
    """Driver side: collects files and commits groups of complete buckets."""

    table: Table
    rejects: Table | None
    report: RunReport
    owed: Mapping[int, int]
    """Rows that each bucket owes, from the plan."""
    group_rows: int
    """Rows after which the complete buckets are committed: one wave."""
    metadata: dict[str, str]
    planned_on: int
    strict: bool = True
    """Whether another run's appends undo the plan; not where each run has rows of its own."""
    complete: bool = False
    """Whether the version planned on is complete: a run that adds nothing to it then leaves it as it is."""
    replace: bool = False
    """Whether a bucket's new files take the place of those it has; else the table only grows."""
    rejected: dict[int, Counter[str]] = field(default_factory=dict)
    """Rows set aside, by bucket and reason."""
    _got: Counter[int] = field(default_factory=Counter)
    _files: dict[int, list[DataFile]] = field(default_factory=dict)
    _ready: list[DataFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group = next_group(self.table, self.report.run_id)
        self._reject_group = next_group(self.rejects, self.report.run_id) if self.rejects else 0

    def add(self, file: DataFile) -> int:
        """Takes a file's metadata; commits when a group is full. Returns the rows it stands for."""
        assert file.bucket is not None
        self._files.setdefault(file.bucket, []).append(file)
        self._got[file.bucket] += file.rows
        if self._got[file.bucket] == self.owed[file.bucket]:
            self._ready += self._files.pop(file.bucket)
            if sum(file.rows for file in self._ready) >= self.group_rows:
                self.flush()
        return file.rows

    def flush(self, complete: bool = False) -> None:
        """Commits what is ready; `complete` marks the version that readers take."""
        bad = [file for file in self._ready if file.table == "rejects"]
        good = [file for file in self._ready if file.table != "rejects"]
        new = [replace(file, bucket=None) for file in bad if file.path]
        if new and self.rejects is not None:
            version = self.rejects.commit(
                new,
                run_id=self.report.run_id,
                group=self._reject_group,
                mode="append",
                planned_on=self.rejects.version,
                complete=True,  # a reject stands by itself: readers need not wait for the run's end
            ).version
            self._reject_group += 1
            self.report.table_written("rejects", version)
        for file in bad:
            assert file.bucket is not None
            self.rejected.setdefault(file.bucket, Counter()).update(file.reasons)
            for reason, n in file.reasons.items():
                self.report.reject(reason, n)
        # Waves that replace rows are there for a rerun; to readers the last one shows them, or nothing does.
        complete = complete and not (self.replace and self.report.too_many_rejects)
        # a bucket whose rows all became rejects is replaced by nothing
        replaced = {file.bucket for file in self._ready if file.bucket is not None} if self.replace else set()
        if good or replaced or (complete and not self.complete):
            commit = commit_first(
                self.table,
                good,
                run_id=self.report.run_id,
                group=self._group,
                mode="replace" if replaced else "append",
                buckets=replaced,
                planned_on=self.planned_on,
                metadata=self.metadata,
                complete=complete,
                strict=self.strict,
            )
            self._group += 1
            self.planned_on, self.complete = commit.version, complete
            self.report.table_written(self.table.spec.name, commit.version)
            self.report.written += sum(file.rows for file in good)
        self._ready = []

    def finish(self) -> None:
        """Commits the rest. Complete only when every bucket has paid what it owes, and a replacement only when no more
        rows than allowed were rejected on the way."""
        paid = not self._files and sum(self._got.values()) == sum(self.owed.values())
        if self._ready or not self.complete:
            self.flush(complete=paid)


@dataclass
class Replacer:
    """Driver side: collects whole buckets made anew, replaces them wave by wave; readers see the last commit only."""

    table: Table
    report: RunReport
    wave_rows: int
    metadata: dict[str, str]
    planned_on: int
    replaced: int = 0
    """Buckets so far."""
    _files: list[DataFile] = field(default_factory=list)
    _buckets: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._group = next_group(self.table, self.report.run_id)

    def add(self, bucket: int, file: DataFile | None) -> None:
        """Takes a bucket's new file, or that nothing is left of it."""
        self._buckets.append(bucket)
        self._files += [file] if file is not None else []
        self.replaced += 1
        if sum(file.rows for file in self._files) >= self.wave_rows:
            self.flush()

    def flush(self, complete: bool = False) -> None:
        """Commits what has come; `complete` marks the version that readers take."""
        commit = commit_first(
            self.table,
            self._files,
            run_id=self.report.run_id,
            group=self._group,
            mode="replace" if self._buckets else "append",
            buckets=self._buckets,
            planned_on=self.planned_on,
            metadata=self.metadata,
            complete=complete,
            strict=True,
        )
        self._group, self.planned_on, self._files, self._buckets = self._group + 1, commit.version, [], []
        self.report.table_written(self.table.spec.name, commit.version)


def plan(
    buckets: list[int], count: Callable[[pa.Table], Iterator[pa.Table]], report: RunReport
) -> dict[int, dict[str, Any]]:
    """What each bucket owes and what is there already, counted by Ray tasks and noted in the report.

    Args:
        count: stage. in: bucket. out: a row a bucket: bucket, owed, there, and what else the job counts.
    """
    counts: dict[int, dict[str, Any]] = {}
    with report.stage("plan") as stage:
        for row in bucket_rows(buckets).map_batches(count, batch_size=1, batch_format="pyarrow").iter_rows():
            counts[row["bucket"]] = row
            report.planned += row["owed"] + row["there"]
            report.already_there += row["there"]
        stage.rows = len(counts)
    return counts


def commit_stream(
    files: "ray.data.Dataset", committer: Committer, what: str, seen: Callable[[pa.Table], None] | None = None
) -> None:
    """Runs the stream and commits as files come."""
    with progress(sum(committer.owed.values()), what) as bar:
        for batch in files.iter_batches(batch_size=None, batch_format="pyarrow"):
            if seen is not None:
                seen(batch)
            for row in batch.to_pylist():
                bar.update(committer.add(DataFile.from_row(row)))
    committer.finish()


def bucket_rows(buckets: list[int]) -> "ray.data.Dataset":
    """One row a bucket, one block a row: the source of every stream of work."""
    return ray.data.from_items([{"bucket": bucket} for bucket in buckets], override_num_blocks=max(1, len(buckets)))


def listed(files: list[DataFile]) -> str:
    """Files in one cell of a row."""
    return json.dumps([file.to_row() for file in files])


def files_of(text: str) -> list[DataFile]:
    """The files of one of the stage's lists."""
    return [DataFile.from_row(row) for row in json.loads(text)]
