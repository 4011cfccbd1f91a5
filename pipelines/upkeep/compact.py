"""Job `compact`: merges the small files of many nights, sorted by user, and changes no row.

`config.py` describes the job and its keys.
"""

import dataclasses

from infra import lease, session
from infra.report import RunReport
from infra.snapshot import DataFile, Snapshot
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.compact_buckets import CompactBucket
from pipelines.upkeep.config import CompactConfig as Config
from pipelines.waves import each_bucket, files_of, next_group
from pplug.encoder import OWN_ID

TRIES = 3
"""Number of plans for one table before it is left to the next compaction."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("compact", config)
    names = tables.chosen(config.tables, config.names)
    report.extra |= {"left": {}, "rows_dropped": {}}
    session.start(writes={"tables": config.tables})
    with lease.writing(config.tables, report.run_id):
        for name in names:
            with report.stage(f"compact {name}") as stage:
                stage.rows = _compact(config, report, tables.open_table(config.tables, name))
    report.extra["tables"] = tables.costs(config.tables, names)
    return report.finish()


def _compact(config: Config, report: RunReport, table: "Table") -> int:
    """Compacts one table, and plans again when others commit to it; returns the number of replaced files."""
    name, left = table.spec.name, report.extra["left"]
    replaced: list[str] = []
    for _ in range(TRIES):
        left.pop(name, None)
        snapshot = table.snapshot()
        if snapshot.files and snapshot.metadata.get("complete") != "true":
            writer = snapshot.metadata.get("run_id")
            left[name] = f"run {writer} has not ended on it: run it again to its end, then compact"
            break
        try:
            _rewrite(config, report, table, snapshot, replaced)
            break
        except CommitConflict:  # our commits stay, the rest is planned anew
            left[name] = f"others committed to it, or brought items for it, during each of {TRIES} tries"
    unchanged = len(table.snapshot().files)
    report.planned += len(replaced) + unchanged
    report.written += len(replaced)
    report.already_there += unchanged
    return len(replaced)


def _rewrite(config: Config, report: RunReport, table: "Table", snapshot: "Snapshot", replaced: list[str]) -> None:
    """Plans on a complete version and commits in waves; adds the replaced files to `replaced`."""
    name = table.spec.name
    of_vectors = name.startswith("embeddings")
    given = name.startswith(tables.embeddings_name(OWN_ID))
    if of_vectors and given:
        # ingest commits such vectors before their items, and no encoder could make them again: asked between the two
        # snapshots, so that a writer that has ended by now has its items in the second
        of_vectors = not lease.another_writes(config.tables, report.run_id)
    histories = tables.open_table(config.tables, "histories").snapshot(complete=True) if of_vectors else None
    stage = CompactBucket(table, snapshot, histories, config.target_mb * 2**20, report.run_id)
    old: list[DataFile] = []
    new: list[DataFile] = []
    below, dropped = snapshot, 0

    def refuse_needed() -> None:
        """Ends a plan that may drop a vector whose item has come back: a refresh that found it makes none."""
        assert histories is not None, "only vectors are dropped, by the items there are"
        now = tables.open_table(config.tables, "histories").snapshot(complete=True).version
        if now != histories.version or given and lease.another_writes(config.tables, report.run_id):
            raise CommitConflict("histories", now, histories.version)

    def commit() -> None:
        nonlocal below, dropped
        if dropped:
            refuse_needed()
        group, same = next_group(table, report.run_id), not dropped
        done = table.rewrite(new, old, below=below, run_id=report.run_id, group=group, same_rows=same)
        below = dataclasses.replace(below, version=done.version)
        replaced.extend(file.path for file in old)
        lost = report.extra["rows_dropped"]
        lost[table.spec.name] = lost.get(table.spec.name, 0) + dropped
        report.table_written(table.spec.name, below.version)
        old.clear()
        new.clear()
        dropped = 0

    for row in each_bucket(list(snapshot.by_bucket()), stage):
        old += files_of(row["old"])
        new += files_of(row["new"])
        dropped += row["dropped"]
        if len(old) >= config.wave_files:
            commit()
    if old:
        commit()
