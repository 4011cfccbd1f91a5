"""Times of any file: what is one, what a number means, and that a column gives what its values give."""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.times import TimeRule
from pipelines.ingest.values import RowError, values

WIDE = {"earliest": date(1, 1, 2), "latest": date(9999, 12, 30)}


def us(moment: datetime) -> int:
    return (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("2024-02-29", datetime(2024, 2, 29)),
        ("2024-02-29T12:30:01.5Z", datetime(2024, 2, 29, 12, 30, 1, 500_000)),
        ("2024-02-29 12:30+02:00", datetime(2024, 2, 29, 10, 30)),
        (1_700_000_000, datetime(2023, 11, 14, 22, 13, 20)),
        ("1700000000", datetime(2023, 11, 14, 22, 13, 20)),
        (1_700_000_000.25, datetime(2023, 11, 14, 22, 13, 20, 250_000)),
        ("1700000000.25", datetime(2023, 11, 14, 22, 13, 20, 250_000)),
        (Decimal("1700000000.250001"), datetime(2023, 11, 14, 22, 13, 20, 250_001)),
        (1_700_000_000_123, datetime(2023, 11, 14, 22, 13, 20, 123_000)),
        (1_700_000_000_123_456, datetime(2023, 11, 14, 22, 13, 20, 123_456)),
        (1_700_000_000_123_456_789, datetime(2023, 11, 14, 22, 13, 20, 123_456)),
        ("1612101231200", datetime(2021, 1, 31, 13, 53, 51, 200_000)),  # ISO's basic form would be the year 1612
        (date(2024, 1, 1), datetime(2024, 1, 1)),
        (20240102, datetime(2024, 1, 2)),
        ("20240102", datetime(2024, 1, 2)),
        (20240102.0, datetime(2024, 1, 2)),
        (2024, datetime(2024, 1, 1)),
        ("2024", datetime(2024, 1, 1)),
        ("1965", datetime(1965, 1, 1)),  # papers' years in LaMP
        ("1969-07-20", datetime(1969, 7, 20)),
    ],
)
def test_times_of_all_kinds_are_microseconds_utc(given, wanted):
    assert TimeRule().microseconds(given) == us(wanted)
    assert TimeRule().column([given, None])[0].to_pylist() == [us(wanted), None]


@pytest.mark.parametrize(
    "given",
    [
        "soon", True, [], "2024-02-30", float("inf"), "0000-01-01", 10**30, -(10**30), {"at": 1},
        0, -1, 0.0, "0", "-1",  # an unknown time
        19_700, 45_000, 45_000.5,  # days since 1970, days of Excel
        133_500_000_000_000_000, 638_000_000_000_000_000,  # FILETIME, .NET ticks
        20240230, 20241301, 20_240_102_123_000, 12, 999, 3000, 86_400,
        "9999-12-31", "0001-01-01", datetime(9999, 12, 31), 253_402_300_799, "1900-01-01", "1_700_000_000", "٢٠٢٤",
    ],
)  # fmt: skip
def test_what_is_no_plausible_time_is_refused(given):
    with pytest.raises(RowError, match="bad_date"):
        TimeRule().microseconds(given)
    times, errors = TimeRule().column([given, "2024-01-01"])
    assert times.to_pylist() == [None, us(datetime(2024, 1, 1))] and errors[0].reason == "bad_date"


def test_no_time_is_no_error():
    nothing = (None, "", "  ", float("nan"))
    assert {TimeRule().microseconds(value) for value in nothing} == {None}
    assert TimeRule().column(list(nothing)) == (pa.nulls(4, pa.int64()), {})


@pytest.mark.parametrize(
    ("unit", "given", "wanted"),
    [
        ("s", 86_400, datetime(1970, 1, 2)),
        ("ms", "1700000000123", datetime(2023, 11, 14, 22, 13, 20, 123_000)),
        ("us", 1_700_000_000_123_456, datetime(2023, 11, 14, 22, 13, 20, 123_456)),
        ("ns", 800_000_000_000_000_000, datetime(1995, 5, 9, 6, 13, 20)),
        ("days", 19_724, datetime(2024, 1, 2)),
        ("days", 19_724.5, datetime(2024, 1, 2, 12)),
        ("excel", 45_293, datetime(2024, 1, 2)),
        ("excel", "45293.75", datetime(2024, 1, 2, 18)),
        ("filetime", 133_485_408_000_000_000, datetime(2024, 1, 1)),
        ("year", 2024, datetime(2024, 1, 1)),
        ("yyyymmdd", 20240102, datetime(2024, 1, 2)),
        ("s", "2024-01-02", datetime(2024, 1, 2)),  # the unit is that of numbers
    ],
)
def test_a_unit_says_what_numbers_mean(unit, given, wanted):
    assert TimeRule(unit=unit).microseconds(given) == us(wanted)


def test_a_window_that_is_given_lets_the_epoch_itself_and_old_times_in():
    rule = TimeRule(unit="s", earliest="1960-01-01")
    assert [rule.microseconds(value) for value in (0, -1, -86_400)] == [0, -1_000_000, -86_400_000_000]
    assert TimeRule(earliest="1800-01-01").microseconds("1850") == us(datetime(1850, 1, 1))
    with pytest.raises(RowError):
        TimeRule(earliest="1800-01-01").microseconds(45_000)  # days of Excel stay what they are
    with pytest.raises(RowError):
        TimeRule(latest="2023-12-31").microseconds("2024-01-01")
    assert TimeRule(latest="2023-12-31").microseconds("2023-12-31T23:59:59.999999") == us(datetime(2024, 1, 1)) - 1


def test_a_format_reads_texts_and_whole_numbers_and_nothing_else():
    rule = TimeRule(format="%d.%m.%Y %H:%M")
    assert rule.microseconds("31.01.2024 07:05") == us(datetime(2024, 1, 31, 7, 5))
    assert TimeRule(format="%Y%m%d%H%M%S").microseconds(20_240_102_123_000) == us(datetime(2024, 1, 2, 12, 30))
    assert rule.microseconds(datetime(2024, 1, 1, tzinfo=UTC)) == us(datetime(2024, 1, 1))
    with pytest.raises(RowError):
        rule.microseconds("2024-01-31")


def test_a_timestamp_that_overflows_costs_its_row_alone():
    for kind in (pa.timestamp("s"), pa.timestamp("ms"), pa.date64()):
        number = 2**62 // 86_400_000 * 86_400_000
        times, errors = TimeRule().column(pa.array([number, 0 if kind == pa.date64() else 86_400_000], kind))
        assert errors[0].reason == "bad_date" and times[1].as_py() is not None


whole = st.one_of(
    st.integers(-(2**63), 2**63 - 1), st.integers(-5, 4000), st.integers(19_000_000, 21_000_000),
    *(st.integers(-10, 2 * 10**9).map(lambda s, scale=scale: s * scale) for scale in (1, 1000, 10**6, 10**9)),
    st.dates().map(lambda day: int(f"{day:%Y%m%d}") if day.year > 999 else 0),
)  # fmt: skip
COLUMNS = {
    None: st.one_of(whole, st.floats(), st.text(max_size=12), st.dates(), st.datetimes(), whole.map(str), st.booleans(),
                    st.datetimes(timezones=st.just(UTC)).map(lambda at: at.isoformat()), st.binary(max_size=4)),
    pa.int64(): whole, pa.uint64(): st.integers(0, 2**64 - 1), pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.float64(): st.one_of(st.floats(), whole.map(float)), pa.float32(): st.floats(width=32),
    pa.string(): st.one_of(whole.map(str), st.dates().map(str)), pa.date32(): st.dates(),
    pa.timestamp("us"): st.datetimes(), pa.timestamp("us", "UTC"): st.datetimes(timezones=st.just(UTC)),
    pa.timestamp("ns"): st.integers(-(2**62), 2**62), pa.bool_(): st.booleans(), pa.list_(pa.int64()): st.just([1]),
    pa.decimal128(20, 3): st.decimals(0, 10**12, places=3),
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_columns_give_what_their_values_give(data):
    kind = data.draw(st.sampled_from(list(COLUMNS)))
    given = data.draw(st.lists(st.one_of(st.none(), COLUMNS[kind]), max_size=8))
    rule = TimeRule(
        unit=data.draw(st.sampled_from(["auto", "s", "ns", "days", "excel", "filetime", "year", "yyyymmdd"])),
        **data.draw(st.sampled_from([{}, WIDE])),
    )
    array = given if kind is None else pa.array(given, kind)
    times, errors = rule.column(array)
    wanted, wrong = [], {}
    for row, value in enumerate(given if kind is None else values(array)):
        try:
            wanted.append(rule.microseconds(value))
        except RowError as error:
            wanted.append(None)
            wrong[row] = error.reason
    assert times.to_pylist() == wanted
    assert {row: error.reason for row, error in errors.items()} == wrong
    assert all(isinstance(row, int) for row in errors) and np.all([t is None or abs(t) < 2**62 for t in wanted])
