"""Keys (user_id, item_id) that a Delta table no longer has, told within a fixed memory whatever the table's size.

A key that has gone stood in a file that the newest version no longer has: only the keys of such files are read of an
old version. Most of them stand in the new files, since an update or a merge has written their rows again; only where
some do not, the files that stayed are read too, for another row with such a key. DuckDB compares the keys as they are
read, and keeps on the local disk what exceeds its memory. What has gone is held in memory.
"""

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from infra import temporary
from infra.cores import cores
from infra.errors import InputError
from infra.storage import Storage, retrying
from pipelines.ingest.sources.columns import paths
from pipelines.ingest.sources.delta import rows_of
from pipelines.ingest.values import id_column

if TYPE_CHECKING:
    import duckdb
    from deltalake import DeltaTable

KEYS = ("user_id", "item_id")
MEMORY = "2GB"
"""Memory of the comparison; beyond it DuckDB writes to the local disk."""
Rows: TypeAlias = pads.Dataset | pa.RecordBatchReader


class Comparison:
    """Tells which keys a table's newest version no longer has: ask for some, then call `missing`.

    `held` has the newest version's keys of the users asked for, as far as it had to be read.
    """

    def __init__(
        self, connection: "duckdb.DuckDBPyConnection", table: "DeltaTable", names: Sequence[str], address: str,
        stayed: Collection[str],
    ) -> None:  # fmt: skip
        self._connection, self._names, self._address = connection, names, address
        self._table, self._stayed = table, frozenset(map(unquote, stayed))
        rows = self._rows(table)
        self._files = frozenset(rows.files) if isinstance(rows, pads.FileSystemDataset) else None
        self._asked = set[str]()
        for name in ("asked", "held"):
            self._do(f"create table {name} (user_id varchar, item_id varchar)")

    def ask(self, keys: pa.Table) -> None:
        """Asks for keys, given as ids of the histories."""
        self._insert("asked", "from keys", lambda: iter(keys.to_batches()))

    def ask_version(self, table: "DeltaTable") -> None:
        """Asks for the keys of a version, but for those of files that the newest has too. Of a version that cannot be
        read, no key is asked for.

        Raises:
            InputError: the version has no such columns.
            OSError: a file of the version cannot be read.
        """
        rows = self._rows(table)
        removed = None
        if self._files is not None and isinstance(rows, pads.FileSystemDataset):
            removed = set(rows.files) - self._files - self._asked
        self._insert("asked", "from keys", lambda: self._keys(table, removed))
        self._asked |= removed or set()

    def missing(self) -> tuple[pa.Table, list[str]]:
        """Returns the keys asked for that the newest version has not, each once and sorted, and the users among them of
        whom it has nothing.

        Raises:
            OSError: a file of the newest version cannot be read.
        """
        of_users = "from keys semi join ({asked}) using (user_id)"
        left = "from asked anti join held using (user_id, item_id)"
        new = None if self._files is None else self._files - self._stayed
        self._insert("held", of_users.format(asked="from asked"), lambda: self._keys(self._table, new))
        if self._files is not None and self._do(f"select 1 {left} limit 1"):
            stayed = self._files & self._stayed
            self._do(f"create table candidates as select distinct * {left}")
            self._insert("held", of_users.format(asked="from candidates"), lambda: self._keys(self._table, stayed))
        self._do(f"create table gone as select distinct * {left}")
        gone = self._connection.sql("from gone order by user_id, item_id").to_arrow_table()
        users = self._do("select distinct user_id from gone anti join held using (user_id) order by user_id")
        return gone.cast(pa.schema([(name, pa.string()) for name in KEYS])), [user for (user,) in users]

    def _do(self, statement: str) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement).fetchall()

    def _keys(self, table: "DeltaTable", files: Collection[str] | None) -> Iterator[pa.RecordBatch]:
        """Opens the rows anew each time, because a stream is read only once."""
        if files is not None and not files:
            return iter(())
        return keys_in(self._rows(table), self._names, self._address, files)

    def _rows(self, table: "DeltaTable") -> Rows:
        return retrying(lambda: rows_of(table, Storage(self._address)), f"opening the rows of {self._address}")

    def _insert(self, into: str, selected: str, batches: Callable[[], Iterator[pa.RecordBatch]]) -> None:
        """Inserts all of the keys or none; DuckDB takes them batch by batch, as `keys`."""

        def insert() -> None:
            errors = list[Exception]()
            schema = pa.schema([(name, pa.string()) for name in KEYS])
            reader = pa.RecordBatchReader.from_batches(schema, _noting(batches, errors))
            self._connection.register("keys", reader)
            try:
                self._do(f"insert into {into} {selected}")
            except Exception:
                if not errors:
                    raise
            finally:
                self._connection.unregister("keys")
            if errors:  # DuckDB's own error has only the words of what the reader raised
                raise errors[0]

        retrying(insert, f"reading the keys of {self._address}")


@contextmanager
def comparison(
    table: "DeltaTable", names: Sequence[str], address: str, stayed: Collection[str]
) -> Iterator[Comparison]:
    """Opens a comparison with a table's newest version, and removes at its end what it has written to the disk.

    Args:
        names: the table's columns for user_id and item_id.
        stayed: paths, as the log has them, of the files that the old version has too; those are read last.

    Raises:
        InputError: the local disk has no room for the keys.
    """
    import duckdb

    with temporary.folder("keys") as folder, duckdb.connect() as connection:
        for setting in (
            f"memory_limit = '{MEMORY}'",
            f"threads = {min(4, cores())}",
            "preserve_insertion_order = false",
            # The stream of keys has no known length: DuckDB must not take it for the smaller side and hold it all.
            "disabled_optimizers = 'join_order,build_side_probe_side'",
        ):
            connection.execute(f"set {setting}").fetchall()
        connection.execute("set temp_directory = ?", [folder]).fetchall()
        try:
            yield Comparison(connection, table, names, address, stayed)
        except duckdb.Error as error:  # its words may hold values
            raise InputError(
                f"{address}: the keys of its versions cannot be compared in {folder} ({type(error).__name__}); where "
                "that disk is full, set TMPDIR to a folder on a larger one"
            ) from error


def _noting(batches: Callable[[], Iterator[pa.RecordBatch]], errors: list[Exception]) -> Iterator[pa.RecordBatch]:
    try:
        yield from batches()
    except Exception as error:
        errors.append(error)
        raise


def only_moved(address: str, since: int, version: int) -> bool:
    """Says whether the log tells that all files that were removed after a version were only written anew (OPTIMIZE), so
    that no row has gone. False where the log no longer has all commits."""
    log = Storage(address).join("_delta_log")
    try:
        for commit in range(since + 1, version + 1):
            for line in log.read_bytes(f"{commit:020}.json").splitlines():
                removed = json.loads(line).get("remove") if b'"remove"' in line else None
                if removed is not None and removed.get("dataChange", True):
                    return False
    except FileNotFoundError:
        return False
    return True


def refuse_missing(columns: pa.Schema, names: Sequence[str], address: str) -> None:
    """Raises InputError where a table has no columns of these names, or no fields at these paths."""
    if not set(names) <= paths(columns):
        raise InputError(
            f"{address}: no columns {' and '.join(map(repr, names))} for user_id and item_id; --follow finds "
            f"rows that have gone by them; it has {', '.join(columns.names[:20])}"
        )


def keys_in(
    rows: Rows, names: Sequence[str], address: str, files: Collection[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yields the keys of rows batch by batch, as ids of the histories; rows without a key have none.

    Args:
        files: paths of the files that are read of a dataset; None for all.

    Raises:
        InputError: the table has no such columns.
        OSError: a file of the version cannot be read.
    """
    refuse_missing(rows.schema, names, address)
    columns = {
        ours: pc.field(*[name] if name in rows.schema.names else name.split("."))
        for ours, name in zip(KEYS, names, strict=True)
    }
    if not isinstance(rows, pads.Dataset):
        scanner = pads.Scanner.from_batches(rows, columns=columns)
    else:
        parts = [part for part in rows.get_fragments() if files is None or part.path in files]
        scanner = pads.FileSystemDataset(parts, rows.schema, rows.format, rows.filesystem).scanner(columns)
    try:
        for batch in scanner.to_batches():
            yield from keys_of(pa.Table.from_batches([batch]), KEYS).drop_null().to_batches()
    except pa.ArrowInvalid as error:  # a stream's word for a file that is not there
        raise OSError(f"a file of the table cannot be read: {error}") from error


def keys_of(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Returns the keys of rows as ids of the histories, null where a row cannot have one."""

    def column(name: str) -> pa.ChunkedArray:
        first, *below = [name] if name in rows.column_names else name.split(".")
        return pc.struct_field(rows[first], below) if below else rows[first]

    return pa.table({ours: id_column(column(name), ours)[0] for ours, name in zip(KEYS, names, strict=True)})


def no_keys() -> pa.Table:
    """Returns a table of no key."""
    return pa.table({name: pa.array([], pa.string()) for name in KEYS})
