"""Table maintenance: compaction (many small files into few), vacuum (deleting unreferenced files), restore, forget.

All of it works while others read. Compaction changes no row: old and new files hold the same rows, which is checked
before the commit, and the commit says so (dataChange false), so that a writer whose plan is older goes on over it.
Vacuum removes files that no version within the retention names; uncommitted files of a running job are younger.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from infra import lease, log
from infra.errors import InputError
from infra.rows import conform
from infra.snapshot import DataFile, Snapshot, read_file, read_files
from infra.table import Commit, CommitConflict, Table

TARGET_BYTES = 128 * 2**20
"""Size of a file that is as good as a larger one: readers gain nothing by fewer files of more bytes."""
LEAST_RETENTION_HOURS = 1.0
"""Least retention: with less, files that a running job has not committed yet could be deleted."""


def cost(table: Table) -> dict[str, int]:
    """Counts files and bytes of a table's newest version, and of the dead files beside it."""
    existing, live = _data_files(table), {file.path for file in table.snapshot().files}
    dead = [size for name, (size, _) in existing.items() if name not in live]
    live_bytes = sum(size for name, (size, _) in existing.items() if name in live)
    return {"files": len(live), "bytes": live_bytes, "dead_files": len(dead), "dead_bytes": sum(dead)}


def _data_files(table: Table) -> dict[str, tuple[int, float]]:
    """Returns size and time of all files in the table's folder except its log."""
    files = table.storage.facts()
    return {name: (facts.size, facts.modified) for name, facts in files.items() if not name.startswith("_delta_log/")}


# --- compaction


def due(files: Iterable[DataFile], target_bytes: int = TARGET_BYTES) -> list[list[DataFile]]:
    """Groups a bucket's small files, each group to become one file of about the target size at most."""
    groups: list[list[DataFile]] = [[]]
    size = 0
    for file in sorted(files, key=lambda file: (file.size, file.path)):
        if file.size >= target_bytes:
            continue
        if groups[-1] and size + file.size > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(file)
        size += file.size
    return [group for group in groups if len(group) > 1]


@dataclass(frozen=True)
class Rewritten:
    """Files that hold the rows of other files."""

    old: list[DataFile]
    new: list[DataFile]
    dropped: int
    """Number of rows left out."""


def rewrite(
    table: Table, files: list[DataFile], run_id: str, keep: Callable[[pa.Table], pa.Array] | None = None
) -> Rewritten:
    """Writes the rows of some files of one bucket as one sorted file, which `Table.rewrite` then commits.

    Args:
        keep: function from rows to bool, true for rows that stay; all stay when None.

    Raises:
        ValueError: the files hold another number of rows than the log says, or the new file other rows than the old.
    """
    data = read_files(files, spec=table.spec)
    if data.num_rows != sum(file.rows for file in files):
        raise ValueError(
            f"table {table.spec.name}: {files[0].path} and {len(files) - 1} more hold {data.num_rows} rows, and the "
            f"log says {sum(file.rows for file in files)}; restore an earlier version"
        )
    kept = data if keep is None else data.filter(keep(data))
    order = [(column, "ascending") for column in table.spec.sort]
    kept = conform(kept, table.spec)
    kept = kept.sort_by(order) if order else kept
    new = table.write(kept, run_id) if kept.num_rows else []
    for file in new:
        if not _same(read_file(file.uri, kept.column_names), kept):
            raise ValueError(f"table {table.spec.name}: {file.path} does not hold the rows that were written to it")
    return Rewritten(files, new, data.num_rows - kept.num_rows)


def _same(one: pa.Table, other: pa.Table) -> bool:
    """Returns whether two tables hold the same rows; NaN, which is unequal to itself, equals NaN here."""
    return one.schema.equals(other.schema) and all(
        a.equals(b) or repr(a.to_pylist()) == repr(b.to_pylist())
        for a, b in zip(one.columns, other.columns, strict=True)
    )


# --- vacuum


@dataclass(frozen=True)
class Vacuumed:
    """The result of a vacuum."""

    deleted: int
    deleted_bytes: int
    kept: int
    """Number of dead files that are younger than the retention, or that a version within it names."""


def vacuum(table: Table, retention_hours: float, *, alone: bool = False) -> Vacuumed:
    """Deletes files that the newest version, the newest complete one and all within the retention do not name.

    A file that no version names (an orphan of a killed write) is deleted when it is older than the retention.

    Args:
        alone: no other job is at work (`lease.alone`): any retention will do, and only the newest version counts.

    Raises:
        InputError: the retention is below one hour while other jobs may be at work.
    """
    if retention_hours < LEAST_RETENTION_HOURS and not alone:
        raise InputError(
            f"retention_hours={retention_hours:g} is below {LEAST_RETENTION_HOURS:g}: files that a running job has "
            "written and not yet committed could go; give more hours than the longest job takes"
        )
    since = time.time() - retention_hours * 3600
    existing = _data_files(table)  # listed before the log is read: files committed in between are not in this list
    newest = table.snapshot()
    dead = existing.keys() - {file.path for file in newest.files}
    needed: set[str] = set()
    if not alone:
        try:
            needed |= {file.path for file in table.snapshot(complete=True).files}
        except InputError:
            pass  # no run has ended yet
        needed |= _removed_since(table, newest.version, since)
    old = [name for name in sorted(dead - needed) if alone or existing[name][1] < since]
    drafts = [name for name, modified in _drafts(table).items() if alone or modified < since]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(table.storage.delete, [*old, *drafts]))
    return Vacuumed(len(old), sum(existing[name][0] for name in old), len(dead) - len(old))


def _removed_since(table: Table, newest: int, since: float) -> set[str]:
    """Returns the files that a version younger than `since` still named."""
    removed: set[str] = set()
    for version in range(newest, -1, -1):
        entries = log.entries(table.storage, version)
        if entries is None or log.written_at(entries) < since:
            break
        removed |= {entry["remove"]["path"] for entry in entries if "remove" in entry}
    return removed


def _drafts(table: Table) -> dict[str, float]:
    """Returns the files that killed commits have left in the log's folder; they never become a version."""
    known = (".json", ".parquet", ".crc", "_last_checkpoint")
    files = table.storage.facts("_delta_log")
    return {name: facts.modified for name, facts in files.items() if not name.endswith(known)}


# --- restore


class BeganWithRun(InputError):
    """A table's log is whole, and a run's first commit stands before every complete version."""


def version_before(table: Table, run_id: str) -> int | None:
    """Finds the newest complete version from before a run's first commit; None if the run has committed nothing here.

    Raises:
        BeganWithRun: no version was complete by then.
        InputError: the log no longer reaches back so far.
    """
    if not table.committed(run_id):
        return None
    begun, version = False, table.version
    for info in log.back_from(table.storage, version):
        version = info["version"]
        if begun and info.get("complete") == "true":
            return int(info["version"])
        begun = begun or log.is_group(info, run_id, 0)
    kind = BeganWithRun if version == 0 else InputError
    raise kind(
        f"{table.uri}: table {table.spec.name} has no complete version from before run {run_id} in its log; "
        "it cannot be taken back to before that run: name the tables to take back, as in `restore histories,requests`"
    )


def undone(table: Table, target: Snapshot, newest: int) -> list[str]:
    """Lists the runs that have committed after a version, newest first.

    Raises:
        InputError: users have been erased in between, or the log no longer reaches back so far.
    """
    runs: list[str] = []
    for info in log.back_from(table.storage, newest):
        if info["version"] <= target.version:
            return runs
        if log.ERASED in info or log.ERASING in info:
            raise InputError(
                f"{table.uri}: run {log.writer(info)} has erased users from table {table.spec.name} after version "
                f"{target.version}: that version would bring them back; choose one from after the erase"
            )
        runs += [log.writer(info)] * (log.writer(info) not in runs)
    raise InputError(
        f"{table.uri}: the log of table {table.spec.name} no longer reaches back to version {target.version}; "
        "choose a younger version"
    )


def restored_since(table: Table, version: int) -> bool:
    """Says whether an older version has been put back after this one, so that some of its rows may be gone.

    A log that no longer reaches back to this version, or is another table's, could not tell: it counts as such.
    """
    for info in log.back_from(table.storage, table.version):
        if info["version"] == version:
            return False
        if log.RESTORED in info:
            return True
    return True


def check_restorable(table: Table, target: Snapshot) -> None:
    """Refuses a version that is not complete, or some of whose files have been deleted.

    Raises:
        InputError: the message says which of the two, and which version to choose instead.
    """
    name = table.spec.name
    if target.metadata.get("complete") != "true":
        raise InputError(
            f"{table.uri}: version {target.version} of table {name} is not complete: run "
            f"{target.metadata.get('run_id', '(none)')} had not ended; choose a version that ended a run"
        )
    existing = table.storage.facts()
    gone = [file for file in target.files if file.path not in existing or existing[file.path].size != file.size]
    if gone:
        raise InputError(
            f"{table.uri}: {len(gone)} of {len(target.files)} files of version {target.version} of table {name} are "
            f"gone or damaged, such as {gone[0].path}: a vacuum deletes files that no version within its retention "
            "names; choose a younger version"
        )


def restore(table: Table, target: Snapshot, run_id: str, group: int) -> Commit | None:
    """Makes the files of an older complete version the table's files again, by one new commit.

    It needs `lease.no_other_writer`: a vacuum could delete the old files meanwhile.

    Returns:
        The commit; None when the table has these files and this metadata already.

    Raises:
        InputError: as in `check_restorable`.
        CommitConflict: another run has committed meanwhile.
    """
    check_restorable(table, target)
    newest = table.snapshot()
    now, then = {file.path for file in newest.files}, {file.path for file in target.files}
    if now == then and log.rewritten(newest.metadata, "", 0, {}) == log.rewritten(target.metadata, "", 0, {}):
        return None
    return table.rewrite(
        [file for file in target.files if file.path not in now],
        [file for file in newest.files if file.path not in then],
        below=dataclasses.replace(newest, metadata=target.metadata),
        run_id=run_id,
        group=group,
        same_rows=False,
        more={log.RESTORED: str(target.version)},
    )


def forget(table: Table, run_id: str, group: int) -> int:
    """Deletes everything that a table's log and folder still hold of rows that are gone: files, versions, entries.

    It needs `lease.alone`. A run that wrote files before it and commits afterwards is refused, because its files are
    deleted. The log begins anew with a checkpoint, which still knows the commits of each run, and with a commit that
    repeats what the runs have said of themselves (`noted`).

    Returns:
        The version from which the table goes on, with exactly the rows it had.

    Raises:
        CommitConflict: another run has committed meanwhile. Its commit stays; forget again.
        ConcurrentRunError: another run works alone on the tables of this root, or this run's own lease has run out.
    """
    lease.refuse_if_not_alone(table.uri.rpartition("/")[0], run_id)  # vacuum would delete what a writer is to commit
    vacuum(table, 0, alone=True)
    below = table.snapshot()
    more = {log.ERASED: run_id, **noted(table, below.version)}
    done = table.rewrite([], [], below=below, run_id=run_id, group=group, same_rows=True, more=more)
    _refuse_newer(table, done.version)
    table._load(done.version).create_checkpoint()
    for name in table.storage.list("_delta_log"):
        number = name.removeprefix("_delta_log/")[:20]
        # A later commit is another run's only word of its rows. What has no number is a draft.
        older = int(number) < done.version if number.isdecimal() else not name.endswith("_last_checkpoint")
        if older:
            table.storage.delete(name)
    _refuse_newer(table, done.version)
    return done.version


def runs_said(table: Table, version: int) -> dict[str, dict[str, Any]]:
    """Returns what the log up to a version says of each run (`log.runs`), by which reruns and readers go.

    Nothing of a table whose rows name no run, nor of one without buckets: nobody goes on with the runs of `rejects`.
    """
    return log.runs(table.storage, version) if _names_runs(table) else {}


def noted(table: Table, version: int) -> dict[str, str]:
    """Returns the metadata that keeps what the log up to a version says of each run; what it says later is forgotten.

    Args:
        version: -1 for nothing.
    """
    return {log.RUNS: json.dumps(runs_said(table, version))} if _names_runs(table) else {}


def _names_runs(table: Table) -> bool:
    return table.spec.bucketed and "run_id" in table.spec.schema.names


def _refuse_newer(table: Table, version: int) -> None:
    if table.version != version:
        raise CommitConflict(table.spec.name, table.version, version)
