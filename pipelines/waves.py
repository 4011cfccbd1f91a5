"""Plan, stream, commit: rows are made and written by Ray, and committed by the driver wave by wave.

`run` is the middle of a job: what the plan has counted is made by a chain of stages, written and committed. Only file
metadata reaches the driver. Waves are keyed by (run_id, group). Rows that are added are committed as they come: a wave
may end within a bucket, and a rerun makes the rest of it. Rows that replace others wait until their bucket is complete,
which it is when its rows and rejects make up what the plan has counted.
More rejects than allowed: what was only added stays, each row is right by itself; what would replace other rows is
committed for a rerun to go on from, but never as a complete version, so that readers keep the version of before.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from infra import metrics
from infra.errors import ConcurrentRunError
from infra.progress import Progress
from infra.report import RunReport
from infra.snapshot import Snapshot
from infra.table import Commit, CommitConflict, DataFile, Table
from pipelines.stages import counter, guarded

REASON, DETAIL = "reject_reason", "reject_detail"
WAVE_SECONDS = 600.0
"""Age of the last commit from which what is ready is committed, however few its rows: a kill costs no more."""
SHOWN, LEAST_ROWS, MOST_ROWS = 50, 64, 5_000
"""Blocks of a run's rows that are counted on the screen one by one, and rows that a block has at least and at most: a
kill costs the block that is being filled beside the wave."""

RESTARTS = 10
"""Number of times that an actor may die on a node that lives on, and start again: a row that kills it ends the job.
Fewer would end a job of many hours for deaths that no row has caused, such as memory that is short for a while."""
TASKS_PER_CPU, MOST_TOGETHER = 8, 8
"""Tasks of `each_bucket` per CPU, at least, so that no CPU waits long for the last; and buckets of a task, at most."""


class WriteFiles:
    """Stage: writes rows as files of one table; rows with a reject reason go to `rejects`.

    in:  the table's columns, and where rows can be rejected also reject_reason str (null: a good row), reject_detail
    out: one row per file: DataFile.to_row()
    """

    def __init__(
        self,
        table: Table,
        rejects: Table | None,
        job: str,
        run_id: str,
        key: str | None = None,
        rejected: Snapshot | None = None,
        count: Callable[[pa.Table], Mapping[str, int]] | None = None,
    ) -> None:
        """Names the table and what the driver has to know of each block.

        Args:
            key: the column by which `rejects` names a row.
            rejected: rows that `rejects` has already; a job that meets the same row every night writes it once.
            count: numbers of a block that travel to the driver with the metadata of the block's first file.
        """
        self.table, self.rejects, self.job, self.run_id, self.key = table, rejects, job, run_id, key
        self.rejected, self.count = rejected, count

    def __call__(self, batch: pa.Table) -> pa.Table:
        files: list[DataFile] = []
        good = batch
        if REASON in batch.column_names:
            good = batch.filter(pc.is_null(batch[REASON]))
            files += self._reject(batch.filter(pc.is_valid(batch[REASON])))
        good = good.select(self.table.spec.schema.names)
        if good.num_rows:
            files += self.table.write(good, self.run_id)
        metrics.ROWS.record(good.num_rows, job=self.job, table=self.table.spec.name)
        if self.count is not None and files:
            files[0] = replace(files[0], reasons=dict(self.count(batch)))
            metrics.count_tokens(self.job, files[0].reasons)
        return files_table(files)

    def _reject(self, bad: pa.Table) -> list[DataFile]:
        if not bad.num_rows:
            return []
        assert self.rejects is not None and self.key is not None, "a stage that rejects rows needs a rejects table"
        files = []
        for bucket in pc.unique(bad["bucket"]).to_pylist():
            rows = bad.filter(pc.equal(bad["bucket"], bucket))
            reasons = Counter(rows[REASON].to_pylist())
            metrics.count_rejects(self.job, reasons)
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
        """Returns the rows that `rejects` does not have yet, from this run or an earlier one."""
        if self.rejected is None or not self.rejected.files:
            return data
        mine = (pc.field("job") == self.job) & pc.field("key").isin(data["key"])
        known = self.rejected.read(["key", "reason"], filter=mine)
        both = [pc.binary_join_element_wise(rows["key"], rows["reason"], "\n") for rows in (data, known)]
        return data.filter(pc.invert(pc.is_in(both[0], value_set=both[1])))


_FILES = pa.schema(
    [(name, pa.int64() if name in ("size", "rows", "bucket") else pa.string()) for name in
     ("table", "path", "size", "rows", "bucket", "min_key", "max_key", "reasons", "root")]
)  # fmt: skip


def files_table(files: list[DataFile]) -> pa.Table:
    """File metadata as Ray rows; typed, so that a batch without a file has the same columns."""
    return pa.Table.from_pylist([file.to_row() for file in files], schema=_FILES)


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
    """Driver side: collects files and commits them in groups."""

    table: Table
    rejects: Table | None
    report: RunReport
    pending: Mapping[int, int]
    """Rows to come per bucket, from the plan."""
    wave_rows: int
    """Rows after which what is ready is committed: one wave."""
    metadata: dict[str, str]
    planned_on: int
    strict: bool = True
    """True if another run's appends undo the plan; they do not where each run has rows of its own."""
    complete: bool = False
    """True if the version planned on is complete: a run that adds nothing to it then leaves it as it is."""
    replace: bool = False
    """True if a bucket's new files take the place of those it has, so that it must be complete before its commit;
    otherwise the table only grows, by any files."""
    emptied: set[int] = field(default_factory=set)
    """Buckets, with `replace`, of which nothing is left; the next commit takes them out."""
    rejected: dict[int, Counter[str]] = field(default_factory=dict)
    """Rows set aside, by bucket and reason."""
    _got: Counter[int] = field(default_factory=Counter)
    _files: dict[int, list[DataFile]] = field(default_factory=dict)
    _ready: list[DataFile] = field(default_factory=list)
    _flushed: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        # A plan that another driver of this run has overtaken asks for a group that is there, and stops. Plans that
        # other runs' appends do not undo would not notice otherwise.
        seen = None if self.strict else self.planned_on
        self._group = len(self.table.committed(self.report.run_id, seen))
        self._reject_group = next_group(self.rejects, self.report.run_id) if self.rejects else 0

    def add(self, file: DataFile) -> int:
        """Takes a file's metadata; commits when a group is full. Returns the rows it stands for."""
        assert file.bucket is not None
        self._files.setdefault(file.bucket, []).append(file)
        self._got[file.bucket] += file.rows
        if not self.replace or self._got[file.bucket] == self.pending[file.bucket]:
            self._ready += self._files.pop(file.bucket)
            late = time.monotonic() - self._flushed > WAVE_SECONDS
            if late or sum(file.rows for file in self._ready) >= self.wave_rows:
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
        buckets = {file.bucket for file in self._ready if file.bucket is not None} | self.emptied
        replaced = buckets if self.replace else set()
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
        self._ready, self.emptied, self._flushed = [], set(), time.monotonic()

    def finish(self) -> None:
        """Commits the rest. The version is complete only when every bucket has all its rows, and a replacement only
        when no more rows than allowed were rejected on the way."""
        paid = all(self._got[bucket] == rows for bucket, rows in self.pending.items())
        if self._ready or self.emptied or not self.complete:
            self.flush(complete=paid)


@dataclass(frozen=True)
class Step:
    """One stage of a stream: a class that every actor makes once, or a function that tasks call."""

    stage: Any
    options: Mapping[str, Any]
    restarts: int | None = None
    """Number of times that one actor may die and start again; None for tasks."""


def actors(
    stage: type, *args: Any, size: int, least: int | None = None, rows: int | None = 1, gpus: float = 0.0,
    restarts: int = RESTARTS, **options: Any,
) -> Step:  # fmt: skip
    """A stage with a state of its own, such as a model, in a pool of actors.

    Args:
        args: of the stage's constructor.
        size: number of actors, at most.
        least: number of actors that the stage starts with; Ray Data adds others and takes them away again, as there is
            work and the cluster has room. None: `size`.
        rows: rows that the stage gets at a time; None passes blocks on as they come.
        gpus: GPUs of one actor.
        restarts: number of times that one actor may die and start again; lost nodes do not count.
        options: further options of `Dataset.map_batches`; those of `ActorPoolStrategy` stand in a mapping `pool`.
    """
    pool = ray.data.ActorPoolStrategy(min_size=least or size, max_size=size, **options.pop("pool", {}))
    given = {"fn_constructor_args": args, "batch_size": rows, "num_gpus": gpus or None, "compute": pool}
    return Step(stage, given | options, restarts)


def tasks(stage: Callable[[pa.Table], Any], rows: int | None = 1) -> Step:
    """A stage without a state, in Ray tasks. `rows`: rows that it gets at a time; None passes blocks on as they come.

    An object's bound `__call__` is taken, since Ray Data would look for the constructor's arguments of a class.
    """
    plain = isinstance(stage, (partial, FunctionType, MethodType))
    call: Any = stage
    return Step(call if plain else call.__call__, {"batch_size": rows})


def stream(buckets: Sequence[int], steps: Sequence[Step], *, together: int = 1) -> "ray.data.Dataset":
    """A stream of work that begins with one row per bucket, `together` rows in a block, which one task takes."""
    blocks = max(1, -(-len(buckets) // together))
    data = ray.data.from_items([{"bucket": bucket} for bucket in buckets], override_num_blocks=blocks)
    for step in steps:
        stage = step.stage if step.restarts is None else guarded(step.stage, step.restarts, counter())
        data = data.map_batches(stage, batch_format="pyarrow", **step.options)
    return data


def each_bucket(buckets: Sequence[int], stage: Callable[[pa.Table], Any]) -> Iterator[dict[str, Any]]:
    """Calls a stage (in: bucket) for every bucket, in Ray tasks, and yields the rows that it gives.

    A task costs 15 ms, as much as a look into a small bucket: where there are many, it takes several.
    """
    if buckets:
        at_once = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
        together = min(MOST_TOGETHER, max(1, len(buckets) // at_once))
        yield from stream(buckets, [tasks(stage)], together=together).iter_rows()


def plan(
    buckets: Sequence[int], count: Callable[[pa.Table], Iterator[pa.Table]], report: RunReport
) -> dict[int, dict[str, Any]]:
    """Counts what is pending and what exists already in each bucket, and notes it in the report.

    Args:
        count: stage. in: bucket. out: one row per bucket: bucket, pending, existing, and what else the job counts.
    """
    counts: dict[int, dict[str, Any]] = {}
    with report.stage("plan") as stage:
        for row in each_bucket(buckets, count):
            counts[row["bucket"]] = row
            report.planned += row["pending"] + row["existing"]
            report.already_there += row["existing"]
        stage.rows = len(counts)
    return counts


def run(
    report: RunReport,
    name: str,
    unit: str,
    *,
    into: Table,
    before: Snapshot,
    pending: Mapping[int, int],
    unchanged: Mapping[int, int] | None = None,
    gone: Mapping[int, int] | None = None,
    steps: Sequence[Step],
    metadata: Mapping[str, str],
    wave_rows: int,
    block_rows: int | None = None,
    rejects: Table | None = None,
    key: str | None = None,
    complete: bool | None = None,
    strict: bool = True,
    count: Callable[[pa.Table], Mapping[str, int]] | None = None,
    counted: Callable[[Mapping[str, int]], None] | None = None,
) -> "Committer":
    """Makes the pending rows in one stream and commits them wave by wave: the middle of every job that writes rows.

    Where nothing is pending, Ray has nothing to do; a version that is not complete yet is then completed. The function
    has more than 60 lines because its head says in one place what each job decides.

    Args:
        name: the stage's name in the report. `unit`: its rows in words, such as `replies`.
        into: the table; `before`: its version that the plan was made on.
        pending: rows to make per bucket, as the plan has counted them.
        unchanged: rows per bucket that the steps pass on as they are; given, a bucket's rows replace those it had.
        gone: rows per bucket that go without another in their place.
        steps: stages from a bucket to rows of the table, with reject columns where `rejects` is given.
        metadata: stands in every commit.
        wave_rows: rows after which what is ready is committed.
        block_rows: rows of one file's block, at most, and fewer where there are few rows, so that the screen shows how
            far the run is; None takes blocks as they come.
        key: the column by which `rejects` names a row.
        complete: whether `before` needs no further commit where nothing is pending; by default, whether it is complete,
            and not by another run's end alone.
        strict: whether another run's appends undo the plan; not where each run has rows of its own.
        count: numbers of a block of rows, counted in the worker; `counted` gets them on the driver.

    Returns:
        What was committed, for what the job reports beside.
    """
    todo = {bucket: n for bucket, n in sorted(pending.items()) if n or (gone or {}).get(bucket)}
    if complete is None:
        complete = before.metadata.get("complete") == "true"
        complete = complete and (strict or not into.unended([report.run_id], before.version))
    kept = {bucket: (unchanged or {}).get(bucket, 0) for bucket in todo}
    committer = Committer(
        table=into,
        rejects=rejects,
        report=report,
        pending={bucket: n + kept[bucket] for bucket, n in todo.items()},
        wave_rows=wave_rows,
        metadata=dict(metadata),
        planned_on=before.version,
        strict=strict,
        complete=complete,
        replace=unchanged is not None,
        emptied={bucket for bucket, n in todo.items() if not n + kept[bucket]},
    )
    with report.stage(name) as stage:
        stage.rows = sum(todo.values())
        if buckets := [bucket for bucket in todo if bucket not in committer.emptied]:
            rejected = rejects.snapshot() if rejects is not None else None
            write = WriteFiles(into, rejects, report.job, report.run_id, key, rejected, count)
            shown = min(MOST_ROWS, max(LEAST_ROWS, stage.rows // SHOWN))
            rows = None if block_rows is None else min(block_rows, shown)
            _commit_as_they_come(stream(buckets, [*steps, tasks(write, rows)]), committer, unit, counted)
        committer.finish()
    report.written -= sum(kept.values())  # they existed, and exist again
    return committer


def _commit_as_they_come(
    files: "ray.data.Dataset",
    committer: "Committer",
    unit: str,
    counted: Callable[[Mapping[str, int]], None] | None,
) -> None:
    with Progress(sum(committer.pending.values()), unit) as bar:
        for batch in files.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in batch.to_pylist():
                file = DataFile.from_row(row)
                if counted is not None and file.table == committer.table.spec.name:
                    counted(file.reasons)
                bar.update(committer.add(file))


def listed(files: list[DataFile]) -> str:
    """Files in one cell of a row."""
    return json.dumps([file.to_row() for file in files])


def files_of(text: str) -> list[DataFile]:
    """The files that `listed` has put into a cell."""
    return [DataFile.from_row(row) for row in json.loads(text)]
