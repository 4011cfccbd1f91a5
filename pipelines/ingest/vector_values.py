"""Vectors as sources hold them: lists of numbers of any width and type, or JSON text of one, as list<float32>."""

import json
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.ingest.values import Column, RowError, as_array, values

_VECTOR = pa.list_(pa.float32())


def vector_of(value: Any) -> list[float] | None:
    """Returns a vector as numbers; None where there is none.

    Args:
        value: a list of numbers, or its JSON text, as CSV files have it.

    Raises:
        RowError: it is neither.
    """
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, str):
            value = json.loads(value)
        numbers = np.asarray(value)
    except (ValueError, RecursionError):
        numbers = np.asarray(None)
    if numbers.ndim != 1 or numbers.dtype.kind not in "fiu":
        raise RowError("bad_vector", "the vector is no list of numbers")
    with np.errstate(over="ignore"):  # what is too large becomes inf, and its row is set aside for that
        return numbers.astype(np.float32).tolist()


def vector_column(column: Column) -> tuple[pa.Array, dict[int, RowError]]:
    """Returns `vector_of` of each value as list<float32>, null where it is None or raises, and the errors by row.

    Args:
        column: lists of numbers of any type, fixed-size or not, as Arrow has them, or any values of Python.
    """
    array = as_array(column)
    if array is not None and _is_numbers(array.type):
        return array.cast(_VECTOR, safe=False), {}
    vectors: list[list[float] | None] = []
    errors: dict[int, RowError] = {}
    for row, value in enumerate(column if array is None else values(array)):
        try:
            vectors.append(vector_of(value))
        except RowError as error:
            errors[row] = error
            vectors.append(None)
    return pa.array(vectors, _VECTOR), errors


def _is_numbers(kind: pa.DataType) -> bool:
    is_a = pa.types
    lists = is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind)
    return lists and (is_a.is_floating(kind.value_type) or is_a.is_integer(kind.value_type))
