"""Columns of any source, Arrow's or lists of Python values: paths into nested ones, and lists taken apart."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ingest.sources.base import NotThisFormat
from pipelines.ingest.values import Column, as_array, values

ELEMENTS = 2**24
"""Elements that a list to explode may have before their order numbers touch the next row's."""


_NAME = re.compile(r"[\w.-]{1,40}( [\w.-]{1,40}){0,2}")


def names_in_words(names: Sequence[str]) -> str:
    """Returns names of columns for a message. What does not look like a name may be a user's first row in a file
    without a header, and is counted."""
    shown = [name for name in names if _NAME.fullmatch(name)]
    rest = len(names) - len(shown)
    more = f" and {rest} that {'look' if rest > 1 else 'looks'} like no name (a file without a header?)" if rest else ""
    return ", ".join(shown[:20]) + more


def refuse_duplicates(names: Sequence[str]) -> None:
    """Raises NotThisFormat: two columns of a file have one name, and nobody can say which is meant."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise NotThisFormat(f"several columns have the name {names_in_words(twice[:5])}")


def top_columns(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Returns the columns of a file in which the wanted names or paths lie."""
    return [name for name in names if any(path == name or path.startswith(f"{name}.") for path in only)]


def paths(columns: pa.Schema) -> set[str]:
    """Returns every name by which a mapping may reach a value: columns, and fields of structs by their paths."""
    found: set[str] = set()

    def add(above: str, fields: Sequence[pa.Field]) -> None:
        for field in fields:
            found.add(f"{above}{field.name}")
            if pa.types.is_struct(field.type):
                add(f"{above}{field.name}.", list(field.type))

    add("", list(columns))
    return found


def at_path(columns: Mapping[str, Column], name: str) -> Column | None:
    """Returns a column by its name, or what lies at a path into nested ones such as actor.login; None without it."""
    if name in columns:
        return columns[name]
    for end in range(len(name) - 1, 0, -1):
        if name[end] == "." and name[:end] in columns:
            return _below(columns[name[:end]], name[end + 1 :].split("."))
    return None


def _below(column: Column, parts: Sequence[str]) -> Column | None:
    array = as_array(column)
    if array is None:
        rows: list[Any] = list(column)
        for part in parts:
            rows = [row.get(part) if isinstance(row, Mapping) else None for row in rows]
        return rows if any(row is not None for row in rows) else None
    for part in parts:
        at = array.type.get_field_index(part) if pa.types.is_struct(array.type) else -1
        if at < 0:
            return None
        array = as_array(pc.struct_field(array, [at]))
        assert array is not None
    return array


def exploded(columns: Mapping[str, Column], name: str) -> tuple[dict[str, Column], np.ndarray, np.ndarray]:
    """Makes one row per element of a list column, beside the other columns of its row.

    The element's own columns become columns, too. Where both have one of a name, it is the row's; the element's is
    reached by its path, such as profile.id.

    Returns:
        The columns; each new row's former row, (N,) int64; and its number in the list from 1, (N,) int64.

    Raises:
        NotThisFormat: the column is not there, or holds no list.
    """
    found = at_path(columns, name)
    array = None if found is None else as_array(found)
    if array is not None and pa.types.is_null(array.type):
        array = None
    if array is None:
        elements, parent = _elements(found, name)
        inside = _inside(elements)
    else:
        if not _is_list(array.type):
            raise NotThisFormat(f"the column {name} to explode holds no list")
        if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
            array = array.cast(pa.large_list(array.type.value_type))
        elements, parent = pc.list_flatten(array), pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        struct = elements.type if pa.types.is_struct(elements.type) else []
        inside = {child.name: pc.struct_field(elements, [at]) for at, child in enumerate(struct)}
    rows = pa.array(parent)
    whole = {other: _take(column, rows) for other, column in columns.items() if other != name}
    whole |= {child: column for child, column in inside.items() if child not in whole}
    number = np.arange(len(parent)) - np.searchsorted(parent, parent, side="left") + 1
    return {**whole, name: elements}, parent, number


def _elements(column: Column | None, name: str) -> tuple[list[Any], np.ndarray]:
    """Returns the elements of lists of Python values, and the row of each."""
    if column is None:
        raise NotThisFormat(f"there is no column {name} to explode")
    lists = [row if isinstance(row, list) else [] for row in plain(column)]
    if any(row is not None and not isinstance(row, list) for row in plain(column)):
        raise NotThisFormat(f"the column {name} to explode holds something that is no list")
    parent = np.repeat(np.arange(len(lists)), [len(row) for row in lists])
    return [one for row in lists for one in row], parent


def _inside(elements: Sequence[Any]) -> dict[str, Column]:
    names = dict.fromkeys(name for one in elements if isinstance(one, Mapping) for name in one)
    return {name: [one.get(name) if isinstance(one, Mapping) else None for one in elements] for name in names}


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        or pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind)
    )  # fmt: skip


def _take(column: Column, rows: pa.Array) -> Column:
    if isinstance(column, pa.Array | pa.ChunkedArray):
        return column.take(rows)
    return [column[row] for row in rows.to_pylist()]


def plain(column: Column) -> list[Any]:
    """Returns a column's values as Python has them."""
    array = as_array(column)
    return list(column) if array is None else values(array)


def schema_of(columns: Mapping[str, Column]) -> pa.Schema:
    """Returns the types of columns; Python values of several types count as text."""
    fields = []
    for name, column in columns.items():
        array = as_array(column)
        if array is None:
            try:
                array = pa.array(list(column))
            except (pa.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
                array = pa.array([], pa.string())
        fields.append((name, array.type))
    return pa.schema(fields)
