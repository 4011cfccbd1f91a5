"""Columns as whole numbers: equal values get equal codes, without a Python object per row."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def encode(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) int: equal values, equal codes, counted by first appearance; null is a value."""
    return pc.dictionary_encode(flat(large(column)), null_encoding="encode").indices.to_numpy()


def flat(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def large(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings with 64-bit offsets: a bucket's texts together may pass 2 GiB."""
    return column.cast(pa.large_string()) if pa.types.is_string(column.type) else column
