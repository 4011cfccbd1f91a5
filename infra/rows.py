"""Rows in the form that a table asks for: its spec, the check of columns and types, 16-bit vectors, Parquet files.

Nothing here knows where a table lies. A message names columns and types, never a value: values are users' data.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq


@dataclass(frozen=True)
class TableSpec:
    """A table's columns and the layout of its files."""

    name: str
    schema: pa.Schema
    schema_version: int
    """Version of this table's columns and of their meaning. A table of another version is not opened: raising it needs
    an entry in `steps`, and the job `migrate` brings older tables up to it."""
    sort: tuple[str, ...]
    """Columns that a file is sorted by, user_key first: a user's rows lie together and row groups can be skipped."""
    vectors: tuple[str, ...] = ()
    """Columns of list<float32> that are finite, rounded to 16 bits and stored with BYTE_STREAM_SPLIT."""
    bucketed: bool = True
    row_group_rows: int | None = 65_536
    """Rows that are read together; None where they follow from the width of the vectors: as few as cost no space."""
    added: tuple[str, ...] = ()
    """Columns that came after the first release of this schema version. They may be null: tables and files that were
    written without them are read with nulls."""
    steps: Mapping[int, Callable[[pa.Table], pa.Table]] = field(default_factory=dict)
    """Step from each older schema version to the next one. It gets the rows of one bucket with the columns that the
    older table has, and returns as many rows with the columns of the next version; `bucket` and `user_key` stay."""

    def empty(self, columns: Sequence[str]) -> pa.Table:
        """A table of these columns without rows."""
        return pa.schema([self.schema.field(name) for name in columns]).empty_table()


def conform(data: pa.Table, spec: TableSpec) -> pa.Table:
    """Returns the data with the table's columns, order and types, and with vectors rounded to 16 bits.

    Raises:
        ValueError: a column is missing, unknown or of another type; the message names it and what was expected.
    """
    wanted, got = spec.schema.names, data.column_names
    for column in wanted:
        if got.count(column) != 1:
            problem = "is missing" if column not in got else f"occurs {got.count(column)} times"
            raise ValueError(f"table {spec.name}: column {column!r} {problem}; the data has {', '.join(got)}")
    extra = [column for column in got if column not in wanted]
    if extra:
        raise ValueError(f"table {spec.name}: column {extra[0]!r} is not one of the table's: {', '.join(wanted)}")
    columns = []
    for target in spec.schema:
        column = _cast(data[target.name], target, spec.name)
        if column.null_count and spec.bucketed and target.name in ("bucket", "user_key"):
            raise ValueError(f"table {spec.name}: column {target.name!r} is null in {column.null_count} rows")
        columns.append(_to_16_bits(column, target.name, spec.name) if target.name in spec.vectors else column)
    return pa.table(columns, schema=spec.schema)


def _cast(column: pa.ChunkedArray, target: pa.Field, table: str) -> pa.ChunkedArray:
    if isinstance(column.type, pa.BaseExtensionType):  # Ray's tensors
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if column.type == target.type:
        return column
    wrong = f"table {table}: column {target.name!r} is {column.type}, expected {target.type}"
    if not _same_kind(column.type, target.type):
        raise ValueError(wrong)
    try:
        return pc.cast(column, options=pc.CastOptions(target.type, allow_time_truncate=True))
    except pa.ArrowInvalid as error:  # its message may quote a value
        raise ValueError(f"{wrong}, and not every value fits") from error


def _same_kind(got: pa.DataType, wanted: pa.DataType) -> bool:
    """Says whether a cast only changes how values are held. Arrow would cast numbers to strings as well."""
    kinds = pa.types
    if kinds.is_null(got):
        return True
    if kinds.is_dictionary(got):
        return _same_kind(got.value_type, wanted)
    if _listy(wanted):
        return _listy(got) and _same_kind(got.value_type, wanted.value_type)
    if kinds.is_map(wanted):
        ours, theirs = (got.key_type, got.item_type) if kinds.is_map(got) else (None, None)
        return ours is not None and _same_kind(ours, wanted.key_type) and _same_kind(theirs, wanted.item_type)
    if kinds.is_timestamp(wanted):
        return kinds.is_timestamp(got) and (got.tz is None) == (wanted.tz is None)
    stringy = (kinds.is_string, kinds.is_large_string, kinds.is_string_view)
    binary = (kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view)
    groups = (stringy, binary, (kinds.is_integer,), (kinds.is_floating,), (kinds.is_boolean,))
    return any(any(is_it(got) for is_it in group) and any(is_it(wanted) for is_it in group) for group in groups)


def _listy(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _to_16_bits(column: pa.ChunkedArray, name: str, table: str) -> pa.ChunkedArray:
    chunks = []
    for chunk in column.chunks:
        values = chunk.flatten()
        if values.null_count:
            raise ValueError(f"table {table}: column {name!r} has {values.null_count} null values inside its vectors")
        with np.errstate(over="ignore"):  # what is too large becomes inf and is refused below
            rounded = values.to_numpy(zero_copy_only=False).astype(np.float16).astype(np.float32)
        bad = int(np.count_nonzero(~np.isfinite(rounded)))
        if bad:
            raise ValueError(
                f"table {table}: column {name!r} has {bad} values that are NaN, infinite or beyond 16-bit floats "
                "(65504); set those rows aside before writing"
            )
        lengths = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), pa.int32())
        mask = pc.is_null(chunk) if chunk.null_count else None
        chunks.append(pa.ListArray.from_arrays(offsets, pa.array(rounded), type=column.type, mask=mask))
    return pa.chunked_array(chunks, column.type)


RUN_ROWS = 32
"""Rows of a stretch that lie in order already, on average, from which it is passed on as it is."""


def in_order(data: pa.Table, columns: Sequence[str]) -> pa.Table:
    """Sorts rows by these columns."""
    order = pc.sort_indices(data, sort_keys=[(column, "ascending") for column in columns])
    return rows_at(data, order.to_numpy())


def rows_at(data: pa.Table, rows: np.ndarray) -> pa.Table:
    """Rows of a table by their numbers; long stretches of neighbours are not copied.

    Arrow's `take` moves each value of a vector by itself: where a night puts a few new rows between thousands that
    stay, it would need more time than reading or writing them.
    """
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
    if len(starts) * RUN_ROWS >= len(rows):
        return data.take(pa.array(rows))
    ends = np.append(starts[1:], len(rows))
    parts = [data.slice(rows[start], end - start) for start, end in zip(starts, ends, strict=True)]
    return pa.concat_tables([data.slice(0, 0), *parts])


STREAM_BYTES = 65_536
"""Bytes of each of a row group's four byte streams of vectors, at least. zstd compresses blocks of 131,072 bytes, and
two streams of this size fill one. With three halves of it a block mixes streams and a value takes 1.94 bytes for 1.78;
with half of it 2.22, and with twice as much 1.76 (random vectors of 64 to 4,096 values)."""


def group_rows(data: pa.Table, spec: TableSpec) -> int:
    """Number of rows of a row group: 171 at D=384."""
    if spec.row_group_rows is not None:
        return spec.row_group_rows
    width = pc.max(pc.list_value_length(data[spec.vectors[0]])).as_py() or 1
    return STREAM_BYTES // width + 1  # one more: up to 262,144 bytes in all zstd takes other settings, which cost 7%


def write_parquet(data: pa.Table, out: pa.NativeFile, spec: TableSpec) -> int:
    """Writes sorted, conforming rows; returns the file's size in bytes.

    Vectors get BYTE_STREAM_SPLIT and zstd without a dictionary: 1.76 bytes per 16-bit value in float32, 3.72 plain.
    """
    # Paths as pyarrow writes them; delta-rs's own writer says `.item` (platform.md section 5).
    vectors = [f"{column}.list.element" for column in spec.vectors]
    pq.write_table(
        data,
        out,
        compression="zstd",
        row_group_size=group_rows(data, spec),
        use_byte_stream_split=vectors or False,
        use_dictionary=[leaf for leaf in _leaves(data.schema) if leaf not in vectors],
        write_page_index=True,
    )
    return out.tell()


def _leaves(schema: pa.Schema) -> list[str]:
    """Lists the Parquet paths of the columns that may be dictionary-encoded."""
    paths = []
    for column in schema:
        if pa.types.is_map(column.type):
            paths += [f"{column.name}.key_value.key", f"{column.name}.key_value.value"]
        else:
            paths.append(f"{column.name}.list.element" if _listy(column.type) else column.name)
    return paths
