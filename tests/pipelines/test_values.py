"""Ids and texts of any type: one rule per value, and the same rule per column."""

import math
from datetime import UTC, date, datetime, time
from decimal import Decimal
from uuid import UUID

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.values import RowError, canonical_id, id_column, text_column, text_of, values

SOME = UUID("12345678-1234-5678-1234-567812345678")


def reason(call, *given) -> str:
    with pytest.raises(RowError) as error:
        call(*given)
    return error.value.reason


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (7, "7"), (7.0, "7"), (101.0, "101"), (-0.0, "0"),
        (np.int32(7), "7"), (np.float32(7), "7"), (10**30, "1" + "0" * 30),
        ("7.0", "7.0"), (" lead", " lead"), ("nul\0", "nul\0"), (b"raw", "raw"),
        (Decimal("7.00"), "7"), (Decimal("1E+3"), "1000"), (SOME, str(SOME)),
    ],
)  # fmt: skip
def test_an_id_is_text_or_a_whole_number_in_one_form(given, wanted):
    assert canonical_id(given, "user_id") == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (None, "missing_id"), ("", "missing_id"), (" \u3000", "missing_id"), (float("nan"), "missing_id"),
        (7.5, "wrong_type"), (float("inf"), "wrong_type"), (1e300, "wrong_type"), (True, "wrong_type"),
        (["7"], "wrong_type"), ({"id": 7}, "wrong_type"), (Decimal("7.5"), "wrong_type"),
        (date(2024, 1, 1), "wrong_type"),
        ("\ud800", "bad_utf8"), (b"\xff", "bad_utf8"),
    ],
)  # fmt: skip
def test_what_is_no_id_is_a_reject_and_inf_is_no_user(given, wanted):
    assert reason(canonical_id, given, "user_id") == wanted


def test_ids_of_a_pandas_column_with_a_gap_are_those_of_the_column_without_one():
    with_gap, errors = id_column(pa.array([101.0, None, 7.0]), "user_id")
    assert with_gap.to_pylist() == ["101", None, "7"] and {1: "missing_id"} == {r: e.reason for r, e in errors.items()}
    assert id_column(pa.array([101, 7]), "user_id")[0].to_pylist() == ["101", "7"]
    raw = pa.array([SOME.bytes, None], pa.binary(16))
    assert id_column(raw, "item_id")[0].to_pylist() == [str(SOME), None]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("as it is ", "as it is "), (7, "7"), (4.0, "4"), (0.1, "0.1"), (np.float32(0.1), "0.1"), (1.5, "1.5"),
        (True, "true"), (False, "false"), (Decimal("4.50"), "4.50"), (Decimal("1E+3"), "1000"),
        (date(2024, 2, 29), "2024-02-29"), (datetime(2024, 2, 29, 1, tzinfo=UTC), "2024-02-29T01:00:00+00:00"),
        (time(1, 2), "01:02:00"), (SOME, str(SOME)), (["a", 2, None, 0.5], "a, 2, 0.5"),
        (None, None), (float("nan"), None), (float("inf"), None), (Decimal("NaN"), None), ([], None),
    ],
)  # fmt: skip
def test_a_field_is_the_text_of_its_value(given, wanted):
    assert text_of(given) == wanted


@pytest.mark.parametrize("given", [{"a": 1}, [["a"]], [{"a": 1}], object()])
def test_a_nested_value_has_no_text(given):
    assert reason(text_of, given) == "wrong_type"


def test_float32_and_whole_floats_of_a_column_read_as_they_were_written():
    assert text_column(pa.array([0.1, 4, None], pa.float32()))[0].to_pylist() == ["0.1", "4", None]
    assert text_column(pa.array([4.0, 4.5, 1e-7]))[0].to_pylist() == ["4", "4.5", "1e-07"]
    assert text_column(pa.array([True, None]))[0].to_pylist() == ["true", None]


def test_a_time_that_python_cannot_hold_and_bytes_that_are_no_text_cost_their_row_alone():
    for column in (
        pa.array([2**62, 0], pa.timestamp("s")),
        pa.array([b"\xff", b"ok"]).view(pa.string()),
        pa.array([{"a": 1}, None]),
        pa.array([[["x"]], ["y"]], pa.list_(pa.list_(pa.string()))),
    ):
        texts, errors = text_column(column)
        assert len(texts) == 2 and texts[0].as_py() is None and 0 in errors


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(max_size=6), st.dates(), st.datetimes(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.lists(st.one_of(st.text(), st.integers(), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2), st.sampled_from(["\ud800", " ", "7.0", SOME]),
)  # fmt: skip
ARROW = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1), pa.uint64(): st.integers(0, 2**64 - 1), pa.int8(): st.integers(-9, 9),
    pa.float64(): st.floats(), pa.float32(): st.floats(width=32), pa.bool_(): st.booleans(),
    pa.string(): st.text(st.characters(exclude_categories=["Cs"])), pa.large_string(): st.sampled_from(["", " ", "x"]),
    pa.binary(): st.binary(max_size=5), pa.date32(): st.dates(), pa.timestamp("us"): st.datetimes(),
    pa.timestamp("us", "UTC"): st.datetimes(timezones=st.just(UTC)), pa.time64("us"): st.times(),
    pa.decimal128(20, 4): st.decimals(-10**9, 10**9, places=4), pa.list_(pa.string()): st.lists(st.sampled_from("ab")),
    pa.list_(pa.float64()): st.lists(st.floats(), max_size=2), pa.struct({"a": pa.int64()}): st.just({"a": 1}),
    pa.dictionary(pa.int32(), pa.string()): st.sampled_from(["a", "", "b"]), pa.null(): st.none(),
}  # fmt: skip


@st.composite
def columns(draw):
    """A column of any kind, and its values as Python has them."""
    kind = draw(st.sampled_from([None, *ARROW]))
    if kind is None:
        given = draw(st.lists(anything, max_size=8))
        return given, given
    given = draw(st.lists(st.one_of(st.none(), ARROW[kind]), max_size=8))
    array = pa.array(given, kind)
    return draw(st.sampled_from([array, pa.chunked_array([array])])), values(array)


def one_by_one(rule, given):
    texts, errors = [], {}
    for row, value in enumerate(given):
        try:
            texts.append(rule(value))
        except RowError as error:
            texts.append(None)
            errors[row] = (error.reason, error.detail)
    return texts, errors


@settings(max_examples=150, deadline=None)
@given(columns())
def test_columns_give_what_their_values_give(drawn):
    column, given = drawn
    for twin, rule in (
        (lambda column: id_column(column, "user_id"), lambda value: canonical_id(value, "user_id")),
        (text_column, text_of),
    ):
        texts, errors = twin(column)
        wanted = one_by_one(rule, given)
        assert texts.type == pa.string() and texts.to_pylist() == wanted[0]
        assert {row: (error.reason, error.detail) for row, error in errors.items()} == wanted[1]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_the_text_of_a_float_gives_it_again(number):
    assert float(text_of(number)) == number and math.isfinite(float(text_of(np.float32(1))))


@pytest.mark.parametrize(
    ("number", "kind", "least"),
    [
        (np.float16, pa.float16(), 2048),
        (np.float32, pa.float32(), 16777216),
        (np.float64, pa.float64(), 9007199254740992),
    ],
)
def test_a_float_that_may_be_the_id_of_two_users_is_none(number, kind, least):
    """From `least` on, `least + 1` is the same float as `least`."""
    assert number(least) == number(least + 1) and number(least - 1) != number(least)
    texts, errors = id_column(pa.array(np.array([least - 1, least, -least, 1 - least], number), kind), "user_id")
    assert texts.to_pylist() == [str(least - 1), None, None, str(1 - least)] and sorted(errors) == [1, 2]
    assert canonical_id(number(least - 1), "user_id") == str(least - 1)
    for lost in (least, -least):
        assert reason(canonical_id, number(lost), "user_id") == "wrong_type"
    assert text_of(number(7)) == "7"
