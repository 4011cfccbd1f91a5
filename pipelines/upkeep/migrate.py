"""Job `migrate`: brings the tables of a population to the schema versions that this release reads.

`config.py` describes the job and its keys; `infra/migration.py` has the rules.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from infra import lease, migration, session
from infra.errors import InputError
from infra.migration import Migration
from infra.report import RunReport
from infra.table import CommitConflict
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import MigrateConfig as Config
from pipelines.waves import each_bucket, files_of, listed, next_group


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    names = tables.chosen(config.tables, config.names)
    if config.dry_run:
        waiting = _pending(config, names)
        lines = [one.summary for one in waiting] or ["every table has the schema version that this release reads"]
        print("\n".join(f"migrate would do: {line}" if waiting else f"migrate: {line}" for line in lines), flush=True)
        return 0
    report = begin("migrate", config)
    report.extra["migrated"] = {}
    with lease.no_other_writer(config.tables, report.run_id):
        waiting = _pending(config, names)
        report.planned, report.already_there = len(names), len(names) - len(waiting)
        if waiting:
            session.start(writes={"tables": config.tables})
        for one in waiting:
            with report.stage(f"migrate {one.table.spec.name}") as stage:
                stage.rows = one.before.rows
                _migrate(one, report)
    return report.finish()


def _pending(config: Config, names: list[str]) -> list[Migration]:
    """Looks at all tables first: one that cannot be migrated keeps the others as they are."""
    looked = [migration.pending(tables.location(config.tables, name), tables.spec_of(name)) for name in names]
    return [one for one in looked if one is not None]


def _migrate(one: Migration, report: RunReport) -> None:
    buckets = list(one.before.by_bucket())
    stage = MigrateBucket(one, report.run_id)
    files = [file for row in each_bucket(buckets, stage) for file in files_of(row["files"])]
    name, group = one.table.spec.name, next_group(one.table, report.run_id)
    try:
        version = one.table.replace_schema(files, before=one.before, run_id=report.run_id, group=group)
    except CommitConflict as error:
        raise InputError(f"{error}. That run has no lease here: end it, then run this again") from error
    report.written += 1
    report.table_written(name, version)
    report.extra["migrated"][name] = {
        "from": one.before.spec.schema_version,
        "to": one.table.spec.schema_version,
        "rows": sum(file.rows for file in files),
    }
    print(f"{one.summary}; done in version {version}", flush=True)


@dataclass(frozen=True)
class MigrateBucket:
    """in: bucket int. out: files (JSON list of DataFile.to_row()) with the bucket's rows as this release has them."""

    migration: Migration
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield pa.table({"files": [listed(self.migration.write(bucket, self.run_id))]})
