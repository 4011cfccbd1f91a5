"""Upkeep of a table: small files of many nights into few, files that nobody needs any more away, old versions back.

All work while others read. Compaction changes no row: old and new files hold the same rows, which is checked before
the commit, and the commit says so (dataChange false), so that a writer whose plan is older goes on over it. Vacuum
removes what no version within the retention names; what a running job has written and not yet committed is younger.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from infra import log
from infra.errors import InputError
from infra.rows import conform
from infra.snapshot import DataFile, Snapshot, read_file, read_files
from infra.table import Commit, Table

TARGET_BYTES = 128 * 2**20
"""A file of this size is as good as a larger one; design.md section 3."""
LEAST_RETENTION_HOURS = 1.0
"""Less could remove what a running job has written and not yet committed."""


def cost(table: Table) -> dict[str, int]:
    """What a table costs: files and bytes of its newest version, and those that lie dead beside them."""
    there, live = _data_files(table), {file.path for file in table.snapshot().files}
    dead = [size for name, (size, _) in there.items() if name not in live]
    live_bytes = sum(size for name, (size, _) in there.items() if name in live)
    return {"files": len(live), "bytes": live_bytes, "dead_files": len(dead), "dead_bytes": sum(dead)}


def _data_files(table: Table) -> dict[str, tuple[int, float]]:
    """Size and time of all in the table's folder but its log."""
    found = table.storage.facts()
    return {name: (facts.size, facts.modified) for name, facts in found.items() if not name.startswith("_delta_log/")}


# --- compaction


def due(files: Iterable[DataFile], target_bytes: int = TARGET_BYTES) -> list[list[DataFile]]:
    """Groups of a bucket's files to make one of: small ones, together about the target at most."""
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
    """Rows left out."""


def rewrite(
    table: Table, files: list[DataFile], run_id: str, keep: Callable[[pa.Table], pa.Array] | None = None
) -> Rewritten:
    """Writes the rows of some files of one bucket as one file, sorted; to be committed by `Table.rewrite`.

    Args:
        keep: rows -> bool, true for those that stay; all when None.

    Raises:
        ValueError: the files hold other rows than the log says, or the new file than the old ones.
    """
    data = read_files(files, spec=table.spec)
    if data.num_rows != sum(file.rows for file in files):
        raise ValueError(
            f"table {table.spec.name}: {files[0].path} and {len(files) - 1} more hold {data.num_rows} rows, the log "
            f"says {sum(file.rows for file in files)}; restore an earlier version"
        )
    kept = data if keep is None else data.filter(keep(data))
    order = [(column, "ascending") for column in table.spec.sort]
    kept = conform(kept, table.spec)
    kept = kept.sort_by(order) if order else kept
    new = table.write(kept, run_id) if kept.num_rows else []
    for file in new:
        if not read_file(file.uri, kept.column_names).equals(kept):
            raise ValueError(f"table {table.spec.name}: {file.path} does not hold the rows that were written to it")
    return Rewritten(files, new, data.num_rows - kept.num_rows)


# --- vacuum


@dataclass(frozen=True)
class Vacuumed:
    """What a vacuum found dead."""

    deleted: int
    deleted_bytes: int
    kept: int
    """Dead files that are younger than the retention, or that a version within it names."""


def vacuum(table: Table, retention_hours: float, *, alone: bool = False) -> Vacuumed:
    """Deletes files that the newest version, the newest complete one and all within the retention do not name.

    A file that no version names (an orphan of a killed write) goes when it is older than the retention.

    Args:
        alone: nobody else is at work (`lease.alone`): no retention is too short, and the newest version alone counts.

    Raises:
        InputError: a retention below one hour while others may be at work.
    """
    if retention_hours < LEAST_RETENTION_HOURS and not alone:
        raise InputError(
            f"retention_hours={retention_hours:g} is below {LEAST_RETENTION_HOURS:g}: files that a running job has "
            "written and not yet committed could go; give more hours than the longest job takes"
        )
    since = time.time() - retention_hours * 3600
    there = _data_files(table)  # listed before the log is read: what is committed in between is not in this list
    newest = table.snapshot()
    dead = there.keys() - {file.path for file in newest.files}
    needed: set[str] = set()
    if not alone:
        try:
            needed |= {file.path for file in table.snapshot(complete=True).files}
        except InputError:
            pass  # no run has ended yet
        needed |= _removed_since(table, newest.version, since)
    old = [name for name in sorted(dead - needed) if alone or there[name][1] < since]
    drafts = [name for name, modified in _drafts(table).items() if alone or modified < since]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(table.storage.delete, [*old, *drafts]))
    return Vacuumed(len(old), sum(there[name][0] for name in old), len(dead) - len(old))


def _removed_since(table: Table, newest: int, since: float) -> set[str]:
    """Files that a version younger than this still named."""
    found: set[str] = set()
    for version in range(newest, -1, -1):
        entries = log.entries(table.storage, version)
        if entries is None or log.written_at(entries) < since:
            break
        found |= {entry["remove"]["path"] for entry in entries if "remove" in entry}
    return found


def _drafts(table: Table) -> dict[str, float]:
    """What killed commits have left in the log's folder: not yet a version, and never one."""
    known = (".json", ".parquet", ".crc", "_last_checkpoint")
    found = table.storage.facts("_delta_log")
    return {name: facts.modified for name, facts in found.items() if not name.endswith(known)}


# --- restore


def version_before(table: Table, run_id: str) -> int | None:
    """The newest complete version from before a run's first commit; None where the run has committed nothing here.

    Raises:
        InputError: the log no longer reaches back so far, or no version was complete by then.
    """
    if not table.committed(run_id):
        return None
    begun = False
    for said in log.back_from(table.storage, table.version):
        if begun and said.get("complete") == "true":
            return int(said["version"])
        begun = begun or log.is_group(said, run_id, 0)
    raise InputError(
        f"{table.uri}: table {table.spec.name} has no complete version from before run {run_id} in its log; "
        "it cannot be taken back to before that run"
    )


def undone(table: Table, target: Snapshot, newest: int) -> list[str]:
    """The runs whose commits stand after a version, newest first.

    Raises:
        InputError: users have been erased in between, or the log no longer reaches back so far.
    """
    runs: list[str] = []
    for said in log.back_from(table.storage, newest):
        if said["version"] <= target.version:
            return runs
        if log.ERASED in said or log.ERASING in said:
            raise InputError(
                f"{table.uri}: run {log.writer(said)} has erased users from table {table.spec.name} after version "
                f"{target.version}: that version would bring them back; choose one from after the erase"
            )
        runs += [log.writer(said)] * (log.writer(said) not in runs)
    raise InputError(
        f"{table.uri}: the log of table {table.spec.name} no longer reaches back to version {target.version}; "
        "choose a younger version"
    )


def restored_since(table: Table, version: int) -> bool:
    """Whether an older version has been put back after this one: rows that it held may be missing now."""
    for said in log.back_from(table.storage, table.version):
        if said["version"] <= version:
            return False
        if log.RESTORED in said:
            return True
    return False


def check_restorable(table: Table, target: Snapshot) -> None:
    """Refuses a version that is not complete, or of which files have been deleted.

    Raises:
        InputError: either of these; the message says which, and what to choose instead.
    """
    name = table.spec.name
    if target.metadata.get("complete") != "true":
        raise InputError(
            f"{table.uri}: version {target.version} of table {name} is not complete: run "
            f"{target.metadata.get('run_id', '(none)')} had not ended; choose a version that ended a run"
        )
    there = table.storage.facts()
    gone = [file for file in target.files if file.path not in there or there[file.path].size != file.size]
    if gone:
        raise InputError(
            f"{table.uri}: {len(gone)} of {len(target.files)} files of version {target.version} of table {name} are "
            f"gone or damaged, such as {gone[0].path}: a vacuum deletes what no version within its retention names; "
            "choose a younger version"
        )


def restore(table: Table, target: Snapshot, run_id: str, group: int) -> Commit | None:
    """Makes the files of an older complete version the table's files again, by one new commit.

    Only while nobody else writes here (`lease.no_other_writer`): a vacuum could delete the old files meanwhile.

    Returns:
        The commit; None when the table holds these files and says the same already.

    Raises:
        InputError: as `check_restorable`.
        CommitConflict: somebody has committed meanwhile.
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
    """Ends what a table's log and folder still hold of rows that are gone: old files, old versions, old entries.

    Only under `lease.alone`. Who wrote files before this and commits afterwards is refused, for they are deleted. The
    log begins anew with a checkpoint; which runs have committed what stays known.

    Returns:
        The version from which the table goes on, with exactly the rows it had.
    """
    vacuum(table, 0, alone=True)
    done = table.rewrite(
        [], [], below=table.snapshot(), run_id=run_id, group=group, same_rows=True, more={log.ERASED: run_id}
    )
    table._load().create_checkpoint()
    now = f"{done.version:020d}"
    for name in table.storage.list("_delta_log"):
        if now not in name and not name.endswith("_last_checkpoint"):
            table.storage.delete(name)
    return done.version
