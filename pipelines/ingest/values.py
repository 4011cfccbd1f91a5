"""Values of any file as texts: one rule for ids and one for fields, per value and per column.

An id is text as it stands, or a whole number in its canonical form: 7, 7.0 of a column of numbers and a decimal 7.00
are all "7", since programs turn whole numbers with a gap into floats. A UUID is its text. Nothing else is an id.
A field is text as it stands, a number in the shortest form that gives it again in its own width (4.0 is "4"), a decimal
with its zeros, true or false, a date or time in ISO form, or a list of such, joined by ", ". An infinite number is no
value. Mappings and lists of lists have no text.
The columns' functions give exactly what the values' functions give, without a Python call per row where types allow.
"""

import math
from collections.abc import Callable, Sequence
from datetime import date, time
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import flat

Column: TypeAlias = pa.Array | pa.ChunkedArray | Sequence[Any]
WHITE_SPACE = "".join(char for char in map(chr, range(0x3001)) if char.isspace())
"""Characters that `str.strip` removes; Arrow's own list is another one."""
_EXACT = 2**53
"""Below this size every whole number has a float of its own."""
_EXACT_OF = {2: 2**11, 4: 2**24}
"""The same for floats of fewer bytes than eight. From it on, the id of another user may have become this number."""
_UUID_BYTES = 16


class RowError(Exception):
    """A row that cannot be used: a reason to count by, and a detail that helps to mend the source."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


# --- per value ------------------------------------------------------------------------------------------------------


def canonical_id(value: object, name: str) -> str:
    """Returns an id as text.

    Raises:
        RowError: it is missing or blank (missing_id), of another kind (wrong_type), or no Unicode (bad_utf8).
    """
    if isinstance(value, str | bytes):
        text = _unicode(value)
        if not text.strip():
            raise _missing_id(name)
        return text
    if value is None or value != value:
        raise _missing_id(name)
    if isinstance(value, bool | np.bool_):
        raise _no_id(name)
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating) and math.isfinite(value) and _whole(value):
        if abs(int(value)) >= _EXACT_OF.get(np.asarray(value).itemsize, _EXACT):
            raise _no_id(name)
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    if isinstance(value, UUID):
        return str(value)
    raise _no_id(name)


def text_of(value: object) -> str | None:
    """Returns a field as text, None for no value: null, an empty list, and a number that is not finite.

    Raises:
        RowError: it has no text (wrong_type), or is no Unicode (bad_utf8).
    """
    if isinstance(value, str | bytes):
        return _unicode(value)
    if value is None:
        return None
    if isinstance(value, bool | np.bool_):
        return "true" if value else "false"
    if isinstance(value, int | np.integer):
        return str(int(value))
    if isinstance(value, float | np.floating):
        return _float(value)
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else None
    if isinstance(value, date | time):
        return value.isoformat() if value == value else None  # pandas' NaT is a date, too
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, list | tuple | np.ndarray):
        if any(isinstance(one, list | tuple | np.ndarray) for one in value):
            raise RowError("wrong_type", "a list of lists has no text")
        texts = [text for one in value if (text := text_of(one)) is not None]
        return ", ".join(texts) if texts else None
    raise RowError("wrong_type", f"{type(value).__name__} has no text")


def _float(value: float | np.floating) -> str | None:
    if not math.isfinite(value):
        return None
    return str(int(value)) if _whole(value) else str(value)


def _whole(number: float | np.floating) -> bool:
    return number == int(number) and -_EXACT <= float(number) <= _EXACT


def _unicode(value: str | bytes) -> str:
    """Returns text that a file can hold."""
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise RowError("bad_utf8", f"byte {error.start} of a text is not UTF-8") from error
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError("bad_utf8", f"character {error.start} of a text is half a surrogate pair") from error
    return value


def _missing_id(name: str) -> RowError:
    return RowError("missing_id", f"{name} is missing or empty")


def _no_id(name: str) -> RowError:
    return RowError(
        "wrong_type", f"{name} is neither text nor a whole number nor a UUID, or it is a float too large to be exact"
    )


# --- per column -----------------------------------------------------------------------------------------------------


def id_column(column: Column, name: str) -> tuple[pa.Array, dict[int, RowError]]:
    """Returns `canonical_id` of each value, null where it raises, and the errors by row.

    Args:
        column: values of any type; a column of 16 bytes each holds UUIDs.
        name: name of the id in errors.
    """
    array = as_array(column)
    if array is None:
        return _each(column, lambda value: canonical_id(value, name))
    kind = array.type
    if pa.types.is_integer(kind):
        texts = array.cast(pa.string())
    elif _is_text(kind) and (valid := _valid_text(array)) is not None:
        blank = pc.equal(pc.utf8_trim(valid, characters=WHITE_SPACE), "")
        texts = pc.if_else(blank, pa.scalar(None, pa.string()), valid)
    elif pa.types.is_floating(kind):
        values = array.cast(pa.float64())
        exact = float(_EXACT_OF.get(kind.bit_width // 8, _EXACT))
        whole = pc.and_(pc.equal(values, pc.trunc(values)), pc.less(pc.abs(values), exact))
        whole = pc.fill_null(whole, False)
        texts = pc.if_else(whole, values, None).cast(pa.int64()).cast(pa.string())
        missing = pc.is_null(values, nan_is_null=True).to_numpy(zero_copy_only=False)
        lost = np.flatnonzero(texts.is_null().to_numpy(zero_copy_only=False))
        return texts, {int(row): _missing_id(name) if missing[row] else _no_id(name) for row in lost}
    else:
        return _distinct(array, lambda value: canonical_id(value, name))
    missing = texts.is_null().to_numpy(zero_copy_only=False)
    return texts, {int(row): _missing_id(name) for row in np.flatnonzero(missing)}


def text_column(column: Column) -> tuple[pa.Array, dict[int, RowError]]:
    """Returns `text_of` of each value, null where it is None or raises, and the errors by row.

    Args:
        column: values of any type; a column of 16 bytes each holds UUIDs.
    """
    array = as_array(column)
    if array is None:
        return _each(column, text_of)
    kind = array.type
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        return array.cast(pa.string()), {}
    if pa.types.is_boolean(kind):
        return pc.if_else(array, "true", "false"), {}
    if _is_text(kind) and (valid := _valid_text(array)) is not None:
        return valid, {}
    return _distinct(array, text_of)


def blank(texts: pa.Array) -> np.ndarray:
    """Returns True where a text is null or white space alone, (N,) bool."""
    found = pc.fill_null(pc.equal(pc.utf8_trim(texts, characters=WHITE_SPACE), ""), True)
    return found.to_numpy(zero_copy_only=False)


def as_array(column: Column) -> pa.Array | None:
    """Returns a column as one Arrow array without dictionary or extension type, or None for mixed Python values.

    Python values count as an array only where all are text or all whole numbers: Arrow's own conversion of others
    changes them.
    """
    if isinstance(column, pa.Array | pa.ChunkedArray):
        array = flat(column)
        if isinstance(array, pa.ChunkedArray):  # more than one array can hold
            array = pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in array.chunks])
        if pa.types.is_dictionary(array.type):
            return as_array(array.dictionary_decode())
        return array.storage if isinstance(array, pa.ExtensionArray) else array
    kinds = set(map(type, column)) - {type(None)}
    try:
        if kinds <= {str}:
            return pa.array(column, pa.string())
        if kinds == {int}:
            return pa.array(column, pa.int64())
    except (UnicodeEncodeError, pa.ArrowInvalid, OverflowError):  # half a surrogate pair; beyond 64 bits
        pass
    return None


def values(array: pa.Array) -> list[Any]:
    """Returns an array's values as Python has them; text that is not UTF-8 as bytes, times beyond Python's as None.

    Floats keep their width, times are cut to microseconds, and 16 bytes each are UUIDs.
    """
    kind = array.type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width == _UUID_BYTES:
        return [None if raw is None else UUID(bytes=raw) for raw in array.to_pylist()]
    if pa.types.is_floating(kind) and kind != pa.float64():
        numbers = array.fill_null(0).to_numpy(zero_copy_only=False)
        return [n if there else None for n, there in zip(numbers, array.is_valid().to_pylist(), strict=True)]
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        whole = np.floor_divide(array.cast(pa.int64()).fill_null(0).to_numpy(), 1000)  # a cast rounds towards 1970
        there = array.is_valid().to_numpy(zero_copy_only=False)
        array = pa.array(whole, pa.int64(), mask=~there).cast(pa.timestamp("us", tz=kind.tz))
    elif pa.types.is_time64(kind) and kind.unit == "ns":
        array = array.cast(pa.time64("us"), safe=False)
    try:
        return array.to_pylist()
    except UnicodeDecodeError:
        return [_python(one) for one in (array.cast(pa.large_binary()) if _is_text(kind) else array)]
    except (ValueError, OverflowError):  # a time beyond the year 9999, an unknown zone
        return [_python(one) for one in array]


def _python(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return b"\xff"  # somewhere in a list
    except (ValueError, OverflowError):
        return Beyond()


class Beyond:
    """A value that Python has no object for, such as a time in the year 30000."""


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
        or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )  # fmt: skip


def _valid_text(array: pa.Array) -> pa.Array | None:
    """Returns a column of texts or bytes as strings; None where one is not UTF-8."""
    try:
        if pa.types.is_string(array.type):
            array.validate(full=True)
            return array
        return array.cast(pa.large_binary()).cast(pa.string())
    except pa.ArrowInvalid:
        return None


def _distinct(array: pa.Array, rule: Callable[[Any], str | None]) -> tuple[pa.Array, dict[int, RowError]]:
    """Applies a rule once to each distinct value where Arrow can tell them apart, else to each row."""
    try:
        coded = pc.dictionary_encode(array, null_encoding="mask")
        if len(coded.dictionary) == len(array):
            return _each(values(array), rule)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # lists and mappings; text that is not UTF-8
        return _each(values(array), rule)
    texts, errors = _each(values(coded.dictionary), rule)
    codes = coded.indices
    bad: dict[int, RowError] = {}
    if errors:
        rows = pc.is_in(codes, value_set=pa.array(list(errors), codes.type)).to_numpy(zero_copy_only=False)
        bad = {int(row): errors[codes[int(row)].as_py()] for row in np.flatnonzero(rows)}
    nothing = codes.is_null().to_numpy(zero_copy_only=False)
    if nothing.any():
        try:
            rule(None)
        except RowError as error:
            bad |= {int(row): error for row in np.flatnonzero(nothing)}
    return texts.take(codes), bad


def _each(column: Sequence[Any], rule: Callable[[Any], str | None]) -> tuple[pa.Array, dict[int, RowError]]:
    texts: list[str | None] = []
    errors: dict[int, RowError] = {}
    for row, value in enumerate(column):
        try:
            texts.append(rule(value))
        except RowError as error:
            errors[row] = error
            texts.append(None)
    return pa.array(texts, pa.string()), errors
