"""Another number of buckets for the tables of one root, which all have the same.

The new number is a multiple of the old one, so that the rows of a bucket go to buckets of their own and to no others.
Workers write each bucket's rows as new files. When those of all tables are there, one commit per table puts them and
the new number in place of the old ones. Between the first and the last of these commits a mark stands beside the
tables, for a job that joins two of them by bucket must not find the one as it was and the other as it is.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from infra.errors import InputError
from infra.rows import TableSpec
from infra.shards import buckets_of_keys
from infra.snapshot import DataFile, Snapshot, read_files
from infra.storage import Storage
from infra.table import Table
from infra.upkeep import TARGET_BYTES

MARK = "_rebucket.json"
"""Name of the mark, beside the tables' folders."""


@dataclass(frozen=True)
class Rebucketing:
    """A table as it is, and the same table with the new number of buckets."""

    table: Table
    before: Snapshot
    """The newest version, with the old number."""
    buckets_before: int

    @property
    def summary(self) -> str:
        """Describes it in words."""
        name, rows = self.table.spec.name, self.before.rows
        return f"{name}: {self.buckets_before} to {self.table.buckets} buckets, {rows} rows"

    def write(self, bucket: int, run_id: str) -> list[DataFile]:
        """Writes the rows of an old bucket as files of the new ones, and checks that none is lost.

        Raises:
            ValueError: the old files hold another number of rows than the log says.
        """
        made: list[DataFile] = []
        for files in _together(self.before.by_bucket()[bucket]):
            rows = read_files(files, spec=self.table.spec)
            at = rows.schema.get_field_index("bucket")
            rows = rows.set_column(at, rows.schema.field(at), buckets_of_keys(rows["user_key"], self.table.buckets))
            made += self.table.write(rows, run_id)
        old, new = sum(file.rows for file in self.before.by_bucket()[bucket]), sum(file.rows for file in made)
        if old != new:
            raise ValueError(
                f"table {self.table.spec.name}: bucket {bucket} holds {new} rows, and the log says {old}; restore an "
                "earlier version"
            )
        return made


def pending(uri: str, spec: TableSpec, buckets: int) -> Rebucketing | None:
    """Returns what is to be done to a table; None when it has this number already.

    Raises:
        InputError: the number is no multiple of the table's, or a run has not ended on the table.
    """
    table = Table.open(uri, spec)
    if table.buckets == buckets:
        return None
    if buckets % table.buckets:
        raise InputError(
            f"buckets={buckets}: table {spec.name} has {table.buckets}; expected a multiple of it, such as "
            f"{2 * table.buckets} or {4 * table.buckets}"
        )
    before = table.snapshot()
    run_id = before.metadata.get("run_id")
    if run_id is not None and before.metadata.get("complete") != "true":
        raise InputError(
            f"{table.uri}: run {run_id} has not ended on table {spec.name}, and would go on by the old buckets; run it "
            "again to its end, or restore the table, then this"
        )
    return Rebucketing(replace(table, buckets=buckets), before, table.buckets)


def _together(files: list[DataFile]) -> Iterator[list[DataFile]]:
    """Groups files, up to the size of one that compaction would leave alone; a larger one is a group of its own."""
    group: list[DataFile] = []
    for file in files:
        if group and sum(one.size for one in group) + file.size > TARGET_BYTES:
            yield group
            group = []
        group.append(file)
    if group:
        yield group


# --- the mark


def begun(root: str) -> int | None:
    """Returns the number of buckets that tables of this root are being brought to; None where nothing is under way."""
    try:
        return int(json.loads(Storage(root).read_bytes(MARK))["buckets"])
    except FileNotFoundError:
        return None


def refuse_between(root: str) -> None:
    """Raises InputError when some tables of this root have the new number of buckets and others the old one."""
    buckets = begun(root)
    if buckets is not None:
        raise InputError(
            f"{root}: the job `rebucket` is between two tables, or broke off there: some have {buckets} buckets, "
            f"others not yet; run `rebucket --buckets {buckets}` on them to its end, then this"
        )


def begin(root: str, buckets: int, run_id: str) -> None:
    """Puts the mark down."""
    Storage(root).write_bytes(MARK, json.dumps({"buckets": buckets, "run_id": run_id}).encode())


def end(root: str) -> None:
    """Takes the mark away."""
    Storage(root).delete(MARK)
