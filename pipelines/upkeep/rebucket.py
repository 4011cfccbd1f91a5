"""Job `rebucket`: gives all tables of a population a greater number of buckets.

`config.py` describes the job and its keys; `infra/rebucketing.py` has the rules.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pyarrow as pa

from infra import lease, rebucketing, session
from infra.errors import InputError
from infra.rebucketing import Rebucketing
from infra.report import RunReport
from infra.snapshot import DataFile
from infra.table import CommitConflict
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import RebucketConfig as Config
from pipelines.waves import each_bucket, files_of, listed, next_group


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    tables.chosen(config.tables, None)  # refuses a folder without tables before there is a lease in it
    report = begin("rebucket", config)
    report.extra["rebucketed"] = {}
    with lease.alone(config.tables, report.run_id):
        _refuse_another_number(config)
        # listed only now: a run that has just ended may have made a table
        names = [name for name in tables.chosen(config.tables, None) if tables.spec_of(name).bucketed]
        looked = [
            rebucketing.pending(tables.location(config.tables, name), tables.spec_of(name), config.buckets)
            for name in names
        ]
        waiting = [one for one in looked if one is not None]
        report.planned, report.already_there = len(names), len(names) - len(waiting)
        if waiting:
            session.start(writes={"tables": config.tables})
        made = [_written(one, report) for one in waiting]
        if waiting:
            rebucketing.begin(config.tables, config.buckets, report.run_id)
        for one, files in zip(waiting, made, strict=True):
            _commit(one, files, report)
        rebucketing.end(config.tables)
    return report.finish()


def _refuse_another_number(config: Config) -> None:
    begun = rebucketing.begun(config.tables)
    if begun not in (None, config.buckets):
        raise InputError(
            f"buckets={config.buckets}: an earlier run has brought some tables of {config.tables} to {begun} buckets, "
            f"and broke off; run `rebucket --buckets {begun}` first"
        )


def _written(one: Rebucketing, report: RunReport) -> list[DataFile]:
    """Writes the table's rows as files of the new buckets; no version names them yet."""
    stage = SplitBucket(one, report.run_id)
    with report.stage(f"split {one.table.spec.name}") as split:
        files = [file for row in each_bucket(list(one.before.by_bucket()), stage) for file in files_of(row["files"])]
        split.rows = one.before.rows
    return files


def _commit(one: Rebucketing, files: list[DataFile], report: RunReport) -> None:
    name, group = one.table.spec.name, next_group(one.table, report.run_id)
    metadata = {
        key: _by_new_bucket(value, one) if key in tables.BY_BUCKET else value
        for key, value in one.before.metadata.items()
    }
    before = dataclasses.replace(one.before, metadata=metadata)
    try:
        version = one.table.replace_schema(files, before=before, run_id=report.run_id, group=group)
    except CommitConflict as error:
        raise InputError(f"{error}. That run has no lease here: end it, then run this again") from error
    report.written += 1
    report.table_written(name, version)
    facts = {"from": one.buckets_before, "to": one.table.buckets, "rows": one.before.rows, "files": len(files)}
    report.extra["rebucketed"][name] = facts
    print(f"rebucket: {one.summary}; done in version {version}, before which there are the old buckets", flush=True)


def _by_new_bucket(text: str, one: Rebucketing) -> str:
    """Repeats the facts of an old bucket for each bucket that its rows have gone to."""
    said: Mapping[str, object] = json.loads(text)
    to = range(0, one.table.buckets, one.buckets_before)
    return json.dumps({int(bucket) + more: value for bucket, value in said.items() for more in to})


@dataclass(frozen=True)
class SplitBucket:
    """in: bucket int, an old one. out: files (JSON list of DataFile.to_row()) of the new ones, with its rows."""

    rebucketing: Rebucketing
    run_id: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for bucket in batch["bucket"].to_pylist():
            yield pa.table({"files": [listed(self.rebucketing.write(bucket, self.run_id))]})
