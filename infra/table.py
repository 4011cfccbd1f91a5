"""Delta tables with the rules that make a run repeatable: workers write Parquet files, the driver commits them.

- A file that no commit names is not in the table: a killed write leaves an orphan and nothing else.
- Before a commit the newest version is loaded; a (run_id, group) already in it is not committed again. The library
  refuses only a concurrent duplicate; after a lost answer it would take the same files twice.
- A replacement is committed on the version it was planned on or not at all (`CommitConflict`): removals and additions
  in one append commit without retries. The library's own overwrite accepts files outside its filter, and a stale one
  keeps both writers' files.
- The log holds user_key ranges and never a user id; vectors are 16-bit values in float32 columns, byte-stream split.
"""

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra import addresses, lease, log
from infra.errors import ConcurrentRunError, InputError, NoCompleteVersionError
from infra.rows import TableSpec, conform, in_order, write_parquet
from infra.snapshot import DataFile, Snapshot, read_file, read_files
from infra.storage import Storage, is_transient, retrying

if TYPE_CHECKING:
    from deltalake import DeltaTable
    from deltalake.transaction import AddAction

__all__ = ["Commit", "DataFile", "Snapshot", "Table", "CommitConflict", "TableSpec", "read_file", "read_files"]

T = TypeVar("T")
COMMIT_TRIES = 8
"""Tries for appends that lose the race for a version number, and for answers lost on the way."""


class CommitConflict(Exception):
    """Another run has committed since the plan was made: plan again on the current version."""

    def __init__(self, table: str, current: int, planned_on: int) -> None:
        super().__init__(
            f"table {table} is at version {current}, but the plan was made on version {planned_on}: another run has "
            "committed in between; plan again on the current version"
        )
        self.current, self.planned_on = current, planned_on

    def __reduce__(self) -> tuple[type, tuple[str, int, int]]:
        return CommitConflict, (str(self.args[0]).split()[1], self.current, self.planned_on)


@dataclass(frozen=True)
class Commit:
    """A commit of the table."""

    version: int
    already: bool
    """True if the commit existed before this call; the files of this call were then not added."""


@dataclass(frozen=True)
class Table:
    """A table at an address. It pickles, opens the log anew for each question and keeps nothing between them."""

    uri: str
    spec: TableSpec
    buckets: int

    # -- making and opening

    @classmethod
    def exists(cls, uri: str) -> bool:
        """Says whether the address has a Delta log."""
        return bool(Storage(uri).list("_delta_log", recursive=False))

    @classmethod
    def create(cls, uri: str, spec: TableSpec, buckets: int) -> "Table":
        """Makes an empty table, with bucket count and schema version in its description.

        Raises:
            InputError: the address has a table already or cannot have one, or the bucket count is below 1.
        """
        from deltalake import DeltaTable
        from deltalake.exceptions import DeltaError

        table = cls(Storage(uri).uri, spec, buckets)
        if buckets < 1:
            raise InputError(f"table {spec.name}: buckets={buckets}; expected 1 or more")
        addresses.refuse_misread(table.uri)
        storage = table.storage
        if not storage.is_s3:
            storage.filesystem.create_dir(storage.path)
        try:
            DeltaTable.create(storage.uri, spec.schema, mode="error", **table._definition())
        except DeltaError as error:
            if not cls.exists(uri):
                raise
            raise InputError(
                f"{storage.uri}: table {spec.name} cannot be made, because the address has a table already"
            ) from error
        return table

    def _definition(self) -> dict[str, Any]:
        """Builds the library's arguments that define a table, beside its columns."""
        facts = {"table": self.spec.name, "buckets": self.buckets, "schema_version": self.spec.schema_version}
        return {
            "partition_by": ["bucket"] if self.spec.bucketed else None,
            "name": self.spec.name,
            "description": json.dumps(facts),
            # 30 days by default: the newest complete version could then outlive its metadata in the log.
            "configuration": {"delta.logRetentionDuration": "interval 365 days"},
            "storage_options": self.storage.delta_options(),
        }

    @classmethod
    def open(cls, uri: str, spec: TableSpec) -> "Table":
        """Opens an existing table and checks it against the spec.

        Raises:
            InputError: there is no table, it has another schema version, or its columns differ.
        """
        table, delta = cls._opened(uri, spec)
        _check_schema_version(table.uri, spec, delta)
        _check_columns(table.uri, spec, delta)
        return table

    @classmethod
    def open_as_stored(cls, uri: str, spec: TableSpec) -> "Table":
        """Opens a table with the schema version and the columns that it has, whatever the spec says.

        It is there to be read: columns that a file was written without are null.

        Raises:
            InputError: there is no table.
        """
        table, delta = cls._opened(uri, spec)
        columns = pa.schema(delta.schema().to_arrow())
        _, stored = _description(table.uri, spec, delta)
        return replace(table, spec=replace(spec, schema=columns, schema_version=stored, added=tuple(columns.names)))

    @classmethod
    def _opened(cls, uri: str, spec: TableSpec) -> "tuple[Table, DeltaTable]":
        uri = Storage(uri).uri
        addresses.refuse_misread(uri)
        if not cls.exists(uri):
            raise InputError(
                f"{uri}: there is no table {spec.name} here; check the address or run the job that writes it"
            )
        delta = cls(uri, spec, 0)._load()
        return cls(uri, spec, _description(uri, spec, delta)[0]), delta

    @classmethod
    def open_or_create(cls, uri: str, spec: TableSpec, buckets: int) -> "Table":
        """Opens the table with the bucket count it was made with, or makes one with this count."""
        if not cls.exists(uri):
            try:
                return cls.create(uri, spec, buckets)
            except InputError:
                if not cls.exists(uri):  # else another driver was quicker, and its table is as good
                    raise
        table = cls.open(uri, spec)
        table._add_columns()
        return table

    def _add_columns(self) -> None:
        """Gives a table the columns that its spec has got since; its rows have nulls there.

        The commit repeats the metadata of the one before it, but belongs to no group: a complete version stays so.
        """
        from deltalake import CommitProperties, Schema

        delta = self._load()
        known = {field.name for field in delta.schema().fields}
        missing = [field for field in Schema.from_arrow(self.spec.schema).fields if field.name not in known]
        if not missing:
            return
        metadata = log.metadata_of(self.storage, delta.version())
        metadata = {key: value for key, value in metadata.items() if key not in ("group", *log.OF_ONE_COMMIT)}
        try:
            delta.alter.add_columns(missing, commit_properties=CommitProperties(custom_metadata=metadata))
        except Exception:
            known = {field.name for field in self._load().schema().fields}
            if any(field.name not in known for field in missing):  # else another driver was quicker
                raise

    @property
    def storage(self) -> Storage:
        return Storage(self.uri)

    def _load(self, version: int | None = None) -> "DeltaTable":
        from deltalake import DeltaTable

        options = self.storage.delta_options()
        return retrying(
            lambda: DeltaTable(self.uri, version=version, storage_options=options), f"open table {self.spec.name}"
        )

    def _asked(self, question: Callable[[], T]) -> T:
        """Asks the library about a loaded version, with retries: it may read the log once more for the answer."""
        return retrying(question, f"read the log of table {self.spec.name}")

    # -- worker side: files

    def write(self, data: pa.Table, run_id: str, stored: pa.Table | None = None) -> list[DataFile]:
        """Writes rows as one Parquet file per bucket. They are in the table once a commit names the files.

        Args:
            stored: rows that were read from this table and are written beside the others: nothing is checked or
                rounded again.

        Raises:
            ValueError: a column is missing, unknown or of another type, a bucket is out of range, or a vector is not
                finite in 16 bits. The message names the column, never a value of a user.
        """
        data = conform(data, self.spec)
        if stored is not None:
            data = pa.concat_tables([stored.select(self.spec.schema.names).cast(self.spec.schema), data])
        order = [*(["bucket"] if self.spec.bucketed else []), *self.spec.sort]
        data = in_order(data, order) if order else data
        if not len(data):
            return []
        if not self.spec.bucketed:
            return [self._write_file(data, None, run_id)]
        # Rows lie by bucket now: each bucket is one slice, however many buckets a block touches.
        present, starts = np.unique(data["bucket"].to_numpy(), return_index=True)
        if not 0 <= present[0] <= present[-1] < self.buckets:
            raise ValueError(
                f"table {self.spec.name}: the data has buckets {present[0]} to {present[-1]}, but the table has "
                f"{self.buckets}; compute bucket with the table's own count"
            )
        data, ends = data.drop_columns(["bucket"]), [*starts[1:], len(data)]
        return [
            self._write_file(data.slice(start, end - start), int(bucket), run_id)
            for bucket, start, end in zip(present, starts, ends, strict=True)
        ]

    def _write_file(self, data: pa.Table, bucket: int | None, run_id: str) -> DataFile:
        folder = "" if bucket is None else f"bucket={bucket}/"
        path = f"{folder}part-{_safe(run_id)}-{uuid.uuid4().hex}.parquet"
        storage = self.storage

        def write() -> int:
            with storage.open_output(path) as out:
                return write_parquet(data, out, self.spec)

        size = retrying(write, f"write {storage.full(path)}")
        low, high = "", ""
        if "user_key" in data.column_names:
            span = pc.min_max(data["user_key"]).as_py()
            low, high = span["min"] or "", span["max"] or ""
        return DataFile(self.spec.name, path, size, len(data), bucket, low, high, root=self.uri)

    # -- reading

    def snapshot(self, version: int | None = None, complete: bool = False) -> Snapshot:
        """Reads the files of a version from the log: the newest, the newest complete one, or a given one.

        Args:
            version: number of the version to read, complete or not (time travel).
            complete: takes the newest version whose commit ended a run; later commits of unfinished runs are not seen.

        Raises:
            InputError: there is no complete version, no such version (any more), or it has another schema version.
        """
        from deltalake.exceptions import DeltaError

        try:
            delta = self._load(version)
            if version is None and complete and (whole := self._newest_complete(delta.version())) != delta.version():
                delta = self._load(whole)
        except DeltaError as error:
            if version is None:
                raise
            raise InputError(
                f"{self.uri}: version {version} of table {self.spec.name} cannot be read ({error}); the newest is "
                f"{self.version}"
            ) from error
        buckets, stored = _description(self.uri, self.spec, delta)
        if buckets != self.buckets:
            raise InputError(
                f"{self.uri}: version {delta.version()} of table {self.spec.name} has {buckets} buckets, and this job "
                f"goes by {self.buckets}: `rebucket` has changed their number; choose a version of after it, or start "
                "the job again"
            )
        if stored != self.spec.schema_version:
            raise InputError(
                f"{self.uri}: version {delta.version()} of table {self.spec.name} has schema version {stored}, and "
                f"this release reads version {self.spec.schema_version}: the table has been migrated since; choose a "
                "later version"
            )
        return self._snapshot_of(delta)

    def _snapshot_of(self, delta: "DeltaTable") -> Snapshot:
        actions = self._asked(lambda: pa.table(delta.get_add_actions(flatten=True))).to_pylist()
        keys = "user_key" in self.spec.schema.names
        unknown = [action["path"] for action in actions if action["num_records"] is None]
        if unknown:
            raise InputError(
                f"{self.uri}: the log names file {unknown[0]} without a row count: another program has written to "
                f"table {self.spec.name}; restore an earlier version of the table"
            )
        files = [
            DataFile(
                table=self.spec.name,
                path=action["path"],
                size=action["size_bytes"],
                rows=action["num_records"],
                bucket=action["partition.bucket"] if self.spec.bucketed else None,
                min_key=(action.get("min.user_key") or "") if keys else "",
                max_key=(action.get("max.user_key") or "") if keys else "",
                root=self.uri,
            )
            for action in actions
        ]
        metadata = log.metadata_of(self.storage, delta.version())
        return Snapshot(delta.version(), metadata, files, self.uri, self.spec)

    def _newest_complete(self, newest: int) -> int:
        for entry in log.back_from(self.storage, newest):
            if entry.get("complete") == "true":
                return int(entry["version"])
        raise NoCompleteVersionError(
            f"{self.uri}: table {self.spec.name} has no complete version yet: the run that writes it has not ended; "
            "run it again with the same run_id until it ends with exit code 0"
        )

    @property
    def version(self) -> int:
        """Number of the newest version, read from the log each time."""
        return self._load().version()

    def history(self, limit: int | None = None) -> list[dict[str, Any]]:
        """Lists the commits, newest first: version, timestamp (ms), operation, and the metadata."""
        return list(islice(log.back_from(self.storage, self.version), limit))

    def metadata_of_run(self, run_id: str) -> dict[str, str]:
        """Returns the metadata of a run's commits, by key the newest value that is not empty.

        Nothing is known of commits that the log has lost to its age; an erase notes what it deletes.
        """
        found: dict[str, str] = {}
        groups = len(self.committed(run_id))
        for entry in log.back_from(self.storage, self.version) if groups else ():
            if entry.get("run_id") == run_id:
                for key, value in log.metadata_of(self.storage, entry["version"]).items():
                    found[key] = found.get(key) or value
                groups -= not log.is_rewritten(entry)
                if not groups:
                    break
            for key, value in log.told(entry).get(run_id, {}).get("said", {}).items():
                found[key] = found.get(key) or value
            if log.RUNS in entry:
                break
        return found

    def committed(self, run_id: str, version: int | None = None) -> range:
        """Returns the groups that this run has committed by a version, 0 to the last; None: by the newest. A rerun
        starts at their number."""
        delta = self._load(version)
        last = self._asked(lambda: delta.transaction_version(run_id))
        return range(0 if last is None else last + 1)

    def unended(self, runs: Iterable[str], version: int) -> list[str]:
        """Lists those of these runs that have committed up to a version without an end: it holds a part of their rows.

        A version may be complete in spite of them, when another run has ended on it. Nothing is known of commits that
        the log has lost to its age; an erase notes what it deletes.
        """
        newest = log.newest_of(self.storage, version, [run for run in runs if self.committed(run)])
        return [info["run_id"] for info in newest if info.get("complete") != "true"]

    def last_commits(self, runs: Iterable[str], version: int) -> dict[str, int]:
        """Returns the version of each of these runs' newest commit of rows up to a version, as far as the log goes."""
        newest = log.newest_of(self.storage, version, [run for run in runs if self.committed(run)], with_rows=True)
        return {info["run_id"]: int(info["version"]) for info in newest}

    # -- driver side: commits

    def commit(
        self,
        files: Iterable[DataFile],
        *,
        run_id: str,
        group: int,
        mode: Literal["append", "replace"],
        buckets: Iterable[int] = (),
        more: Iterable[DataFile] = (),
        old: list[DataFile] | None = None,
        planned_on: int,
        metadata: Mapping[str, str] | None = None,
        complete: bool = False,
        strict: bool = False,
    ) -> Commit:
        """Adds files to the table, all or none, once for each (run_id, group).

        Args:
            files: files of `write`; an empty list can mark a run complete.
            group: number 0, 1, 2, ... within the run. A rerun goes on at `len(committed(run_id))`.
            mode: "append", or "replace": these files take the place of all files of `buckets`.
            more: in mode "replace", files that other buckets grow by in the same commit.
            old: in mode "replace", the files of `buckets` that go, if others stay. A compaction is then a conflict.
            planned_on: the version that the plan was made on; after a commit of one's own, that commit's version.
            metadata: identities and the like; never anything of a user.
            complete: whether this commit ends the run.
            strict: an append, too, refuses a version that moved, because its plan depends on the table's rows.

        Returns:
            The version, and whether the group existed before this call: then these files were NOT added now. A
            group that landed although its answer was lost within the call is a commit like any other.

        Raises:
            InputError: the group existed, and an older version of the table has been restored since.
            CommitConflict: plan again. An append goes on over commits that only appended; any commit goes on over
                those that put the same rows into other files.
            ConcurrentRunError: another run works alone on the tables of this root (`lease.alone`), or files are not on
                S3 any more.
            ValueError: a file is of another table or bucket, is named twice, or is not on this disk.
        """
        files, wanted, beside = list(files), set(buckets), list(more)
        if mode not in ("append", "replace"):
            raise ValueError(f"table {self.spec.name}: mode {mode!r}; expected append or replace")
        if (mode == "replace") != bool(wanted):
            raise ValueError(
                f"table {self.spec.name}: mode {mode!r} with buckets {sorted(wanted)}; only replace names buckets"
            )
        self._check_files(files, wanted if mode == "replace" else None)
        self._check_files(beside, None)
        if twice := wanted & {file.bucket for file in beside}:
            raise ValueError(f"table {self.spec.name}: bucket {min(twice)} is to be replaced and to grow in one commit")
        info = log.metadata_for(metadata or {}, run_id, group, complete)
        harmless = {"append", "same rows", "own rows"} if mode == "append" and not strict else {"same rows"}
        harmless = harmless if old is None else set()  # the old files' rows may stand in others since

        def removed(delta: "DeltaTable") -> list[DataFile]:
            existing = self._snapshot_of(delta).files if old is None and wanted else old or []
            return [file for file in existing if file.bucket in wanted]

        return self._commit(files + beside, removed, info, run_id, group, planned_on, harmless, data_change=True)

    def rewrite(
        self,
        new: Iterable[DataFile],
        old: Iterable[DataFile],
        *,
        below: Snapshot,
        run_id: str,
        group: int,
        same_rows: bool,
        more: Mapping[str, str] | None = None,
    ) -> Commit:
        """Puts files in the place of others, on a complete version, and repeats that version's metadata.

        Args:
            below: the newest version, on which the plan was made.
            same_rows: the new files hold the rows of the old ones, so that older plans go on over this commit.
            more: further metadata.

        Raises:
            CommitConflict: another run has committed since `below`: plan again.
            ValueError: the number of rows differs in spite of `same_rows`; otherwise as in `commit`.
        """
        new, old = list(new), list(old)
        rows = sum(file.rows for file in new), sum(file.rows for file in old)
        if same_rows and rows[0] != rows[1]:
            raise ValueError(
                f"table {self.spec.name}: {rows[1]} rows would become {rows[0]}, but a rewrite keeps all rows"
            )
        self._check_files(new, None)
        info = log.rewritten(below.metadata, run_id, group, more or {})
        commit = self._commit(new, lambda delta: old, info, run_id, group, below.version, set(), not same_rows)
        return self._ours(commit, below.version)

    def _ours(self, commit: Commit, planned_on: int) -> Commit:
        """Refuses a commit that a second driver of the run has made: it has removed other files than ours."""
        if commit.already:
            raise CommitConflict(self.spec.name, commit.version, planned_on)
        return commit

    def drop_own(
        self,
        new: Iterable[DataFile],
        old: Iterable[DataFile],
        *,
        run_id: str,
        group: int,
        planned_on: int,
        metadata: Mapping[str, str],
    ) -> Commit:
        """Puts files in the place of others, without some of this run's own rows; rows of other runs all stay.

        The run goes on afterwards, so the version is not complete. Runs that only append go on over this commit.

        Raises:
            CommitConflict: the old files may no longer exist: plan again. Appends in between do no harm.
            ValueError: a file is of another table.
        """
        new, old = list(new), list(old)
        self._check_files(new, None)
        info = log.metadata_for(metadata, run_id, group, complete=False) | {log.OWN_ROWS: "true"}
        commit = self._commit(new, lambda delta: old, info, run_id, group, planned_on, {"append"}, data_change=True)
        return self._ours(commit, planned_on)

    def replace_schema(self, files: Iterable[DataFile], *, before: Snapshot, run_id: str, group: int) -> int:
        """Puts these files, this spec's columns and its schema version in the place of an older version's.

        The library makes one commit of it, and takes away all files that it finds in the table. So this is to be called
        under `lease.no_other_writer`, and goes on only if `before` is still the newest version.

        Returns:
            The new version. It repeats the metadata of `before`, so that a complete version stays complete.

        Raises:
            CommitConflict: another run has committed since `before`.
            InputError: another run has committed at the same moment, without a lease.
            ConcurrentRunError: another run works alone on the tables of this root.
        """
        from deltalake import CommitProperties, Schema, Transaction
        from deltalake.transaction import create_table_with_add_actions

        files, version = list(files), before.version + 1
        self._check_files(files, None)
        same = {"complete": before.metadata.get("complete", "false")}
        info = log.rewritten(before.metadata, run_id, group, same)
        done = False
        for attempt in range(COMMIT_TRIES):
            if log.is_group(log.metadata_of(self.storage, version), run_id, group):
                return version
            if done:
                raise InputError(
                    f"{self.uri}: another run has written version {version} of table {self.spec.name} without a lease "
                    "while the table was migrated: its rows are in that version only, and have to be written again"
                )
            if self.version != before.version:
                raise CommitConflict(self.spec.name, self.version, before.version)
            lease.refuse_if_not_alone(self.uri.rpartition("/")[0], run_id)
            self._check_there(files)
            try:
                create_table_with_add_actions(
                    self.uri,
                    Schema.from_arrow(self.spec.schema),
                    _additions(files, change=True),
                    mode="overwrite",
                    commit_properties=CommitProperties(
                        custom_metadata=info, app_transactions=[Transaction(run_id, group)], max_commit_retries=0
                    ),
                    **self._definition(),
                )
                done = True
            except Exception as error:
                _pause_or_raise(error, attempt, f"commit schema version {self.spec.schema_version} of {self.spec.name}")
        raise AssertionError("the last attempt returns or raises")

    def _commit(
        self,
        files: list[DataFile],
        removed: "Callable[[DeltaTable], list[DataFile]]",
        metadata: dict[str, str],
        run_id: str,
        group: int,
        planned_on: int,
        harmless: set[str],
        data_change: bool,
    ) -> Commit:
        """Commits once per (run_id, group), on the planned version or over commits of the `harmless` kinds."""
        for attempt in range(COMMIT_TRIES):
            delta = self._load()
            last = self._asked(partial(delta.transaction_version, run_id))
            if last is not None and last >= group:  # 0 is a group too
                version = self._version_of(run_id, group)
                undone = None if version is None else log.taken_back(self.storage, version, delta.version())
                if undone is not None:
                    raise InputError(
                        f"{self.uri}: run {run_id} had committed to table {self.spec.name} in version {version}, and "
                        f"run {undone} has restored an older version since: the rows of this run are gone; give "
                        "another run_id to write them again"
                    )
                ours = attempt > 0 and log.added(self.storage, version) == {file.path for file in files}
                return Commit(delta.version() if version is None else version, already=not ours)
            if delta.version() != planned_on and (
                not harmless or log.kinds(self.storage, planned_on, delta.version()) - harmless
            ):
                raise CommitConflict(self.spec.name, delta.version(), planned_on)
            lease.refuse_if_not_alone(self.uri.rpartition("/")[0], run_id)
            self._check_there(files)
            try:
                self._commit_on(delta, files, removed(delta), metadata, run_id, group, data_change)
                return Commit(delta.version() + 1, already=False)  # without retries it is this version or none
            except Exception as error:
                _pause_or_raise(error, attempt, f"commit group {group} of run {run_id} to table {self.spec.name}")
        raise AssertionError("the last attempt returns or raises")

    def _commit_on(
        self,
        delta: "DeltaTable",
        files: list[DataFile],
        removed: list[DataFile],
        metadata: dict[str, str],
        run_id: str,
        group: int,
        change: bool = True,
    ) -> None:
        from deltalake import CommitProperties, Transaction
        from deltalake.transaction import RemoveAction

        now = int(time.time() * 1000)
        removals = [RemoveAction(f.path, change, now, f.size, log.partition(f)) for f in removed]
        delta.create_write_transaction(
            [*removals, *_additions(files, change)],
            mode="append",  # with "overwrite" the library chooses what goes, see the head of this file
            schema=self.spec.schema,
            partition_by=["bucket"] if self.spec.bucketed else None,
            commit_properties=CommitProperties(
                custom_metadata=metadata, app_transactions=[Transaction(run_id, group)], max_commit_retries=0
            ),
        )

    def _check_files(self, files: list[DataFile], replaced: set[int] | None) -> None:
        name = self.spec.name
        if len({file.path for file in files}) < len(files):
            raise ValueError(f"table {name}: a file is named twice in one commit")
        for file in files:
            if file.table != name:
                raise ValueError(f"table {name}: file {file.path} was written for table {file.table}")
            if replaced is not None and file.bucket not in replaced:
                raise ValueError(
                    f"table {name}: file {file.path} is of bucket {file.bucket}, but this commit replaces only buckets "
                    f"{_some(sorted(replaced))}; its rows would be doubled"
                )

    def _check_there(self, files: list[DataFile]) -> None:
        """Refuses files that are not there: a commit of them would lose rows, and no reader could open the table."""
        with ThreadPoolExecutor(32) as pool:
            gone = [file for file, there in zip(files, pool.map(self._is_there, files), strict=True) if not there]
        if gone and self.storage.is_s3:
            raise ConcurrentRunError(
                f"table {self.spec.name}: {len(gone)} of the {len(files)} files that this run has written are gone "
                f"(the first is {gone[0].uri}): a vacuum has deleted them, because this run was held for longer than "
                "its retention; nothing was committed. Run it again, and give the vacuum more hours than a job takes"
            )
        if gone:
            raise ValueError(
                f"table {self.spec.name}: {gone[0].uri} is not on this machine's disk; workers on other machines need "
                "a shared disk or s3:// for tables, and a vacuum more hours than the longest job takes"
            )

    def _is_there(self, file: DataFile) -> bool:
        return self.storage.exists(file.path)

    def _version_of(self, run_id: str, group: int) -> int | None:
        for entry in log.back_from(self.storage, self.version):
            if log.is_group(entry, run_id, group):
                return int(entry["version"])
        return None


def _description(uri: str, spec: TableSpec, delta: "DeltaTable") -> tuple[int, int]:
    """Returns bucket count and schema version, which a table's description records."""
    try:
        facts = json.loads(delta.metadata().description or "")
        return int(facts["buckets"]), int(facts["schema_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{uri}: a Delta table, but its description does not record buckets and schema_version: it was not "
            f"made as table {spec.name}; give the address of one that was"
        ) from error


def _check_schema_version(uri: str, spec: TableSpec, delta: "DeltaTable") -> None:
    _, stored = _description(uri, spec, delta)
    if stored < spec.schema_version:
        raise InputError(
            f"{uri}: table {spec.name} has schema version {stored}, and this release reads version "
            f"{spec.schema_version}; run the job `migrate` on these tables first"
        )
    if stored > spec.schema_version:
        raise InputError(
            f"{uri}: table {spec.name} has schema version {stored}, and this release reads version "
            f"{spec.schema_version}: the table is newer; use a release that reads version {stored}"
        )


def _check_columns(uri: str, spec: TableSpec, delta: "DeltaTable") -> None:
    from deltalake import Schema

    wanted = {field.name: str(field.type) for field in Schema.from_arrow(spec.schema).fields}
    stored = {field.name: str(field.type) for field in delta.schema().fields}
    for column in spec.added:
        if column not in stored:
            del wanted[column]
    for column in [*wanted, *stored]:
        if wanted.get(column) != stored.get(column):
            raise InputError(
                f"{uri}: column {column!r} of table {spec.name} is {stored.get(column, 'missing')}, expected "
                f"{wanted.get(column, 'no such column')}; use the release that wrote the table, or write a new one"
            )


# -- small parts of a commit


def _additions(files: list[DataFile], change: bool) -> "list[AddAction]":
    from deltalake.transaction import AddAction

    now = int(time.time() * 1000)
    return [AddAction(f.path, f.size, log.partition(f), now, change, log.stats(f)) for f in files]


def _pause_or_raise(error: Exception, attempt: int, what: str) -> None:
    """Waits after a lost race or a lost answer: the next attempt loads the table and sees which. Raises the rest."""
    if attempt == COMMIT_TRIES - 1 or not (log.lost_race(error) or is_transient(error)):
        error.add_note(f"while: {what}")
        raise error
    time.sleep(np.random.default_rng().uniform(0.05, min(5.0, 0.1 * 2**attempt)))


def _safe(run_id: str) -> str:
    """Returns a run id as part of a file name: itself, or its hash where it holds anything unusual."""
    return (
        run_id if re.fullmatch(r"[A-Za-z0-9._-]{1,80}", run_id) else hashlib.blake2b(run_id.encode()).hexdigest()[:16]
    )


def _some(values: list[int]) -> str:
    return ", ".join(map(str, values[:10])) + (f" and {len(values) - 10} more" if len(values) > 10 else "")
