"""Job `drop-run`: takes the replies of runs out of `generations`, by name or by age.

`config.py` describes the job and its keys.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from infra import lease, log, session, upkeep
from infra.errors import ConcurrentRunError, InputError
from infra.report import RunReport
from infra.snapshot import DataFile, Snapshot, read_file
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import DropRunConfig as Config
from pipelines.upkeep.count_runs import count_runs
from pipelines.waves import each_bucket, files_of, listed, next_group

TRIES = 3
DAY_S = 24 * 3600.0
_NAMED = 10


@dataclass(frozen=True)
class WithoutRuns:
    """in: bucket int. out: old and new files (JSON lists of DataFile.to_row()), dropped (a JSON object, rows by run);
    one row per file that is written anew."""

    table: Table
    snapshot: Snapshot
    runs: tuple[str, ...]
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            for file in self.snapshot.by_bucket()[bucket]:
                found = read_file(file.uri, ["run_id"], pc.field("run_id").isin(self.runs))["run_id"].to_pylist()
                if not found:
                    continue
                done = upkeep.rewrite(self.table, [file], self.run_id, self._stays)
                dropped = json.dumps(Counter(found))
                yield pa.table({"old": [listed(done.old)], "new": [listed(done.new)], "dropped": [dropped]})

    def _stays(self, rows: pa.Table) -> pa.Array:
        return pc.invert(pc.is_in(rows["run_id"], value_set=pa.array(self.runs, pa.string())))


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("drop-run", config)
    table = tables.open_table(config.tables, "generations")
    session.start(writes={"tables": config.tables})
    with lease.writing(config.tables, report.run_id), report.stage("drop-run generations") as stage:
        stage.rows = _drop(config, report, table)
    report.extra["tables"] = tables.costs(config.tables, ["generations"])
    return report.finish()


def _drop(config: Config, report: RunReport, table: Table) -> int:
    """Commits the table without the runs' replies; returns their number."""
    for _ in range(TRIES):
        before = table.snapshot()
        if before.files and before.metadata.get("complete") != "true":
            raise InputError(
                f"{table.uri}: run {before.metadata.get('run_id')} has not ended on it; run it again to its end, then "
                "this"
            )
        there = count_runs(before)
        runs = _chosen(config, report, table, there)
        report.extra["runs"] = {}
        if not runs:
            return 0
        old: list[DataFile] = []
        new: list[DataFile] = []
        dropped: Counter[str] = Counter()
        for row in each_bucket(list(before.by_bucket()), WithoutRuns(table, before, runs, report.run_id)):
            old += files_of(row["old"])
            new += files_of(row["new"])
            dropped += Counter(json.loads(row["dropped"]))
        report.extra["runs"] = dict(dropped)
        group = next_group(table, report.run_id)
        try:
            done = table.rewrite(new, old, below=before, run_id=report.run_id, group=group, same_rows=False)
        except CommitConflict:
            continue
        report.planned = report.written = dropped.total()
        report.table_written("generations", done.version)
        for name, rows in sorted(dropped.items()):
            print(f"drop-run: run {name}: {rows} replies dropped", flush=True)
        return dropped.total()
    raise ConcurrentRunError(f"{table.uri}: others committed to it during each of {TRIES} tries; run it again later")


def _chosen(config: Config, report: RunReport, table: Table, there: Counter[str]) -> tuple[str, ...]:
    """The runs whose replies go.

    Raises:
        InputError: a run that is named has no reply.
    """
    if config.runs is not None:
        unknown = sorted(set(config.runs) - there.keys())
        if unknown:
            some = ", ".join(sorted(there)[:_NAMED]) + (" and others" if len(there) > _NAMED else "")
            raise InputError(f"{table.uri}: no reply of run {', '.join(unknown)}; it holds those of {some or 'no run'}")
        return config.runs
    assert config.older_than_days is not None, "the config has seen to it"
    last, earliest = _last_commits(table)
    limit = time.time() - config.older_than_days * DAY_S
    # a run without an entry in the log is older than all entries that there are
    old = {run for run in there if last.get(run, earliest) < limit}
    unknown = sorted(there.keys() - last.keys() - old)
    if unknown:
        report.extra["age_unknown"] = unknown
        print(f"drop-run: the log no longer says how old {', '.join(unknown[:_NAMED])} are: they stay", flush=True)
    return tuple(sorted(old))


def _last_commits(table: Table) -> tuple[dict[str, float], float]:
    """Time of each run's newest commit, in seconds since 1970, and of the earliest commit that the log still has."""
    last: dict[str, float] = {}
    earliest = time.time()
    for entry in log.back_from(table.storage, table.version):
        earliest = float(entry.get("timestamp", 0)) / 1000
        if entry.get("run_id") == log.writer(entry):  # a compaction's entry repeats the newest run's id
            last.setdefault(entry["run_id"], earliest)
    return last, earliest
