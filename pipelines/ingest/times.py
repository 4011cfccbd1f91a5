"""Times of any file as microseconds since 1970 UTC: what a number means, and which times are plausible.

A time without a zone is UTC. Text in ISO form and dates are times as they stand. Numbers, and texts of digits, go by
`TimeRule.unit`; with `auto` only numbers that can hardly be anything else are taken for a time.
"""

import math
import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ingest.values import Column, RowError, as_array, values
from pplug.settings import Settings

_TIME_NAME = re.compile(
    r"(?i)(?<![a-z])(time|date|day|year|created|updated|timestamp|when|ts)(?![a-z])|"
    r"(time|date|timestamp|utc|epoch|_at|(?<=[a-z])At)$"
)
_ISO = r"^[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?(Z|\+00:00)?)?$"
"""Texts that Arrow and Python read alike."""
_SAMPLE = 20
"""Number of first values that tell whether a column may hold times."""
Unit = Literal["auto", "s", "ms", "us", "ns", "days", "excel", "filetime", "year", "yyyymmdd"]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_DAY_US = 86_400_000_000
_SCALES: dict[str, tuple[int, int, int]] = {
    # microseconds = number * first // second + third
    "s": (1_000_000, 1, 0),
    "ms": (1_000, 1, 0),
    "us": (1, 1, 0),
    "ns": (1, 1_000, 0),
    "days": (_DAY_US, 1, 0),
    "excel": (_DAY_US, 1, -25_569 * _DAY_US),  # days since 1899-12-30
    "filetime": (1, 10, -11_644_473_600_000_000),  # 100 ns since 1601
}
_UNKNOWN = frozenset({0, -1})
"""Numbers that programs write for a time that they do not know."""
_NULL = np.iinfo(np.int64).min
_AUTO_FROM = {"s": 3652 * _DAY_US, "ms": 3652 * _DAY_US, "us": 3652 * _DAY_US, "ns": 9131 * _DAY_US}
"""First times that auto takes a number for, in microseconds: 1980, and 1995 for ns. Below them lie counts of days,
FILETIMEs (1974 as ns) and .NET ticks (1990 as ns)."""


class TimeRule(Settings):
    """Meaning of the times of a source. A value that it does not allow is a reject, never a wrong time."""

    unit: Unit = "auto"
    """Meaning of numbers: seconds, ms, us or ns since 1970, days since 1970, excel (days since 1900), filetime, year or
    yyyymmdd. With auto, 8 digits of a date are that date, a number from 1000 to 2999 is 1 January of that year, and
    another number counts from 1970 in s, ms, us or ns by its size if that is 1980 or later (1995 for ns)."""
    format: str | None = None
    """Form of the texts as in Python's strptime, such as %d.%m.%Y %H:%M. Without it, texts are ISO dates and times."""
    earliest: date | None = None
    """First plausible day; earlier times are rejects. It is 1900-01-02 when not given, and then the numbers 0 and -1,
    which mostly stand for an unknown time, are rejects for each unit but excel."""
    latest: date | None = None
    """Last plausible day; it is the end of next year when not given."""

    @cached_property
    def window(self) -> tuple[int, int]:
        """First and last plausible time, in microseconds."""
        last = self.latest or date(datetime.now(UTC).year + 1, 12, 31)
        return _day(self.earliest or date(1900, 1, 2)), _day(last) + _DAY_US - 1

    def microseconds(self, value: object) -> int | None:
        """Returns a time as microseconds since 1970 UTC, None for no value: null, NaN or a blank text.

        Raises:
            RowError: it is no time, or lies outside the plausible window (bad_date).
        """
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if value is None or (isinstance(value, str) and not value.strip()) or value != value:
            return None
        try:
            found = self._moment(value)
        except (ValueError, OverflowError, ArithmeticError):
            raise _no_time() from None
        if found is None:
            raise _no_time()
        if not self.window[0] <= found <= self.window[1]:
            raise _implausible()
        return found

    def column(self, column: Column) -> tuple[pa.Array, dict[int, RowError]]:
        """Returns `microseconds` of each value as int64, null where it is None or raises, and the errors by row."""
        array = as_array(column)
        if array is None:
            return self._each(column)
        kind = array.type
        if pa.types.is_timestamp(kind):
            return self._counted(array.cast(pa.int64()), kind.unit, stamped=True)
        if pa.types.is_date(kind):
            unit = "days" if pa.types.is_date32(kind) else "ms"
            whole = array.cast(pa.int32() if unit == "days" else pa.int64())
            return self._counted(whole.cast(pa.int64()), unit, stamped=True)
        if pa.types.is_integer(kind) and kind != pa.uint64() and self.format is None:
            return self._numbers(array.cast(pa.int64()))
        if pa.types.is_string(kind) and self.format is None:
            return self._iso(array)
        return self._each(values(array))

    # --- one value --------------------------------------------------------------------------------------------------

    def _moment(self, value: object) -> int | None:
        if isinstance(value, datetime):
            return _since_epoch(value)
        if isinstance(value, date):
            return _day(value)
        if isinstance(value, bool | np.bool_):
            return None
        if isinstance(value, int | np.integer):
            value = int(value)
            return self._number(value) if self.format is None else self._parsed(str(value))
        if isinstance(value, float | np.floating | Decimal):
            number = int(value) if value == int(value) else value
            return self._number(number) if self.format is None else self._parsed(str(number))
        if not isinstance(value, str):
            return None
        text = value.strip()
        if self.format is not None:
            return self._parsed(text)
        if not text.isascii():
            return None
        if text.removeprefix("-").isdigit():  # fromisoformat takes the ms of 2021 for a day of 1612
            return self._number(int(text))
        try:
            return _since_epoch(datetime.fromisoformat(text))
        except ValueError:
            number = float(text) if "_" not in text else math.nan
            return self._number(int(number) if number == int(number) else Decimal(text))

    def _parsed(self, text: str) -> int:
        assert self.format is not None
        return _since_epoch(datetime.strptime(text, self.format))

    def _number(self, number: int | float | np.floating | Decimal) -> int | None:
        whole = isinstance(number, int)
        if self.unit in ("auto", "yyyymmdd") and whole and 10_000_000 <= number < 100_000_000:
            day = int(number)
            return _day(date(day // 10_000, day // 100 % 100, day % 100))
        if self.unit in ("auto", "year") and whole and 1000 <= number < 3000:
            return _day(date(int(number), 1, 1))
        if self.unit in ("year", "yyyymmdd"):
            return None
        unit = self.unit if self.unit != "auto" else _unit_by_size(abs(number))
        if self.earliest is None and unit != "excel" and number in _UNKNOWN:
            return None
        times, over, plus = _SCALES[unit]
        if isinstance(number, int):
            found = number * times // over + plus
        else:
            found = math.floor(Decimal(str(number)) * times / over + Decimal("0.5")) + plus
        if self.unit == "auto" and found < _AUTO_FROM[unit]:
            return None
        return found

    # --- columns ----------------------------------------------------------------------------------------------------

    def _each(self, column: Any) -> tuple[pa.Array, dict[int, RowError]]:
        found: list[int | None] = []
        errors: dict[int, RowError] = {}
        for row, value in enumerate(column):
            try:
                found.append(self.microseconds(value))
            except RowError as error:
                errors[row] = error
                found.append(None)
        return pa.array(found, pa.int64()), errors

    def _iso(self, texts: pa.Array) -> tuple[pa.Array, dict[int, RowError]]:
        """Times of texts: Arrow reads those in ISO form, 50 times as fast as Python, and Python all others."""
        if not (plain := _matches(texts, _ISO)).any():
            return self._each(values(texts))
        stripped = pc.replace_substring_regex(texts, r"(Z|\+00:00)$", "")
        try:
            read = pc.if_else(pa.array(plain), stripped, None).cast(pa.timestamp("us")).cast(pa.int64())
        except pa.ArrowInvalid:  # there is no such day
            return self._each(values(texts))
        times, errors = self._checked(read.fill_null(0).to_numpy(), plain, plain, _no_time)
        others = np.flatnonzero(~plain & texts.is_valid().to_numpy(zero_copy_only=False))
        if not len(others):
            return times, errors
        found, wrong = self._each(values(texts.take(pa.array(others))))
        place = np.full(len(texts), -1)
        place[others] = np.arange(len(others))
        times = pc.if_else(pa.array(place >= 0), found.take(pa.array(np.maximum(place, 0))), times)
        return times, errors | {int(others[row]): error for row, error in wrong.items()}

    def _counted(self, array: pa.Array, unit: str, stamped: bool) -> tuple[pa.Array, dict[int, RowError]]:
        """Times of a column that says its unit itself."""
        there = array.is_valid().to_numpy(zero_copy_only=False)
        number = array.fill_null(0).to_numpy()
        found, fits = _scaled(number, unit)
        return self._checked(found, there, there & fits, _implausible)

    def _numbers(self, array: pa.Array) -> tuple[pa.Array, dict[int, RowError]]:
        there = array.is_valid().to_numpy(zero_copy_only=False)
        number = array.fill_null(0).to_numpy()
        found = np.zeros(len(number), np.int64)
        is_time = np.zeros(len(number), bool)
        rest = there.copy()
        if self.unit in ("auto", "yyyymmdd"):
            rows = rest & (number >= 10_000_000) & (number < 100_000_000)
            found[rows], is_time[rows] = _of_days(number[rows])
            rest &= ~rows
        if self.unit in ("auto", "year"):
            rows = rest & (number >= 1000) & (number < 3000)
            found[rows] = (number[rows] - 1970).astype("datetime64[Y]").astype("datetime64[us]").astype(np.int64)
            is_time |= rows
            rest &= ~rows
        if self.unit not in ("year", "yyyymmdd"):
            unit_of = _units_by_size(number) if self.unit == "auto" else np.full(len(number), self.unit)
            for unit in np.unique(unit_of[rest]):
                rows = np.flatnonzero(rest & (unit_of == unit))
                time, fits = _scaled(number[rows], unit)
                if self.earliest is None and unit != "excel":
                    fits &= ~np.isin(number[rows], list(_UNKNOWN))
                if self.unit == "auto":
                    fits &= time >= _AUTO_FROM[unit]
                found[rows], is_time[rows] = time, fits
        return self._checked(found, there, is_time, _no_time)

    def _checked(
        self, found: np.ndarray, there: np.ndarray, is_time: np.ndarray, error: Callable[[], RowError]
    ) -> tuple[pa.Array, dict[int, RowError]]:
        inside = is_time & (found >= self.window[0]) & (found <= self.window[1])
        errors = {int(row): _implausible() if is_time[row] else error() for row in np.flatnonzero(there & ~inside)}
        return pa.array(found, pa.int64(), mask=~inside), errors


def _matches(texts: pa.Array, pattern: str) -> np.ndarray:
    try:
        found = pc.match_substring_regex(texts, pattern)
    except pa.ArrowInvalid:  # a text that is not UTF-8
        return np.zeros(len(texts), bool)
    return found.fill_null(False).to_numpy(zero_copy_only=False)


def _scaled(number: np.ndarray, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns times in microseconds, and True where 64 bits hold them."""
    times, over, plus = _SCALES[unit]
    limit = (2**62) // times
    fits = (number >= -limit) & (number <= limit)
    return np.where(fits, number, 0) * times // over + plus, fits


def _of_days(number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times of yyyymmdd, and True where there is such a day."""
    year, month, day = number // 10_000, number // 100 % 100, number % 100
    sound = (month >= 1) & (month <= 12) & (day >= 1)
    months = (year - 1970) * 12 + np.where(sound, month, 1) - 1
    first = months.astype("datetime64[M]")
    length = ((first + 1).astype("datetime64[D]") - first.astype("datetime64[D]")).astype(np.int64)
    days = first.astype("datetime64[D]").astype(np.int64) + day - 1
    return days * _DAY_US, sound & (day <= length)


def _unit_by_size(size: Any) -> str:
    return next((unit for unit, end in (("s", 1e11), ("ms", 1e14), ("us", 1e17)) if size < end), "ns")


def _units_by_size(number: np.ndarray) -> np.ndarray:
    size = np.abs(number.astype(np.float64))
    return np.select([size < 1e11, size < 1e14, size < 1e17], ["s", "ms", "us"], "ns")


def _since_epoch(moment: datetime) -> int:
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MICROSECOND


def _day(day: date) -> int:
    return (day.toordinal() - 719_163) * _DAY_US


def _no_time() -> RowError:
    return RowError("bad_date", "no ISO date or time, and no number that is surely one; see time.unit, time.format")


def _implausible() -> RowError:
    return RowError("bad_date", "a time outside the plausible window; time.earliest and time.latest widen it")


def looks_like_time(name: str, column: Column) -> bool:
    """Says whether a column may hold times: its name says so, or its first values are dates or large numbers that
    `TimeRule` takes for times."""
    array = as_array(column)
    if array is not None and (pa.types.is_timestamp(array.type) or pa.types.is_date(array.type)):
        return True
    if _TIME_NAME.search(name):
        return True
    some = column[:_SAMPLE] if array is None else values(array.slice(0, _SAMPLE))
    found = [one for one in some if one is not None and one == one]
    try:
        return bool(found) and all(
            TimeRule().microseconds(one) is not None and len(str(one).strip()) >= len("20240102") for one in found
        )
    except RowError:
        return False
