"""Job `restore`: takes tables of a population back to an earlier complete version, as a new version on top.

`config.py` describes the job and its keys.
"""

from typing import Any

from infra import lease, upkeep
from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from infra.table import CommitConflict, Table
from pipelines import tables
from pipelines.run import begin
from pipelines.upkeep.config import RestoreConfig as Config
from pipelines.waves import next_group

MADE_FROM_HISTORIES = {
    "embeddings": "refresh",
    "personas": "refresh",
    "adapters": "adapt",
    "profiles": "generate --write-profiles",
}
"""Tables that follow the histories, and the job that brings each up to date."""
_ORDER = ("generations", "profiles", "adapters", "personas", "embeddings", "requests", "histories", "rejects")
"""Order of the tables: replies go back before their requests, so that no reader sees a reply without its request."""


def run(config: Config) -> int:
    """Runs the job; returns the exit code."""
    report = begin("restore", config)
    names = tables.chosen(config.tables, config.names)
    with lease.no_other_writer(config.tables, report.run_id):
        _restore(config, report, sorted(names, key=_rank))
    report.extra["tables"] = tables.costs(config.tables, names)
    return report.finish()


def _rank(name: str) -> int:
    base = name.partition("-")[0]
    return _ORDER.index(base) if base in _ORDER else len(_ORDER)


def _restore(config: Config, report: RunReport, names: list[str]) -> None:
    """Checks all tables before the first commit: if one cannot go back, the others stay as they are."""
    targets: list[tuple[Table, Snapshot, list[str]]] = []
    left: list[InputError] = []
    for name in names:
        table = tables.open_table(config.tables, name)
        try:
            version = config.version if config.before is None else upkeep.version_before(table, config.before)
        except InputError as error:
            may_stay = name == "rejects" or isinstance(error, upkeep.BeganWithRun)
            if config.names is not None or not may_stay:
                raise
            print(f"restore: table {name} began with that run, or its log ends there: it stays as it is", flush=True)
            left.append(error)
            continue
        if version is None:
            if config.names is not None:
                raise InputError(f"{table.uri}: run {config.before} has written nothing to table {name}")
            continue
        target = table.snapshot(version)
        runs = upkeep.undone(table, target, table.version)
        upkeep.check_restorable(table, target)
        targets.append((table, target, runs))
    if not targets and left:
        raise left[0]
    if not targets:
        raise InputError(f"{config.tables}: run {config.before} has written to none of {', '.join(names)}")
    report.planned = len(targets)
    restored: dict[str, Any] = {}
    for table, target, runs in targets:
        name = table.spec.name
        with report.stage(f"restore {name}") as stage:
            before = table.snapshot()
            try:
                done = upkeep.restore(table, target, report.run_id, next_group(table, report.run_id))
            except CommitConflict as error:
                raise InputError(f"{error}. That run has no lease here: end it, then run this again") from error
            stage.rows = abs(before.rows - target.rows)
        if done is None:
            report.already_there += 1
            continue
        report.written += 1
        report.table_written(name, done.version)
        restored[name] = {"version": target.version, "rows": target.rows, "rows_before": before.rows, "undone": runs}
        print(
            f"{name}: version {done.version} is version {target.version} again ({target.rows} rows, before "
            f"{before.rows}); the rows of {', '.join(runs)} are taken back",
            flush=True,
        )
    report.extra["restored"] = restored
    _say_what_follows(config, {table.spec.name for table, _, _ in targets})


def _say_what_follows(config: Config, restored: set[str]) -> None:
    """Names the tables that were made from the later histories, with the jobs that make them anew."""
    if "histories" not in restored:
        return
    behind = [name for name in tables.names(config.tables) if name.partition("-")[0] in MADE_FROM_HISTORIES]
    behind = [name for name in behind if name not in restored]
    if behind:
        jobs = dict.fromkeys(MADE_FROM_HISTORIES[name.partition("-")[0]] for name in behind)
        print(
            f"{', '.join(behind)} were made from the later histories: run {', '.join(jobs)} before the next generate",
            flush=True,
        )
