"""A JSON array is read record by record: as json reads it whole, and up to the damage where it is damaged."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.ingest.sources import json_array
from pipelines.ingest.sources.json_array import first_array, values
from pipelines.ingest.values import RowError


class Counted(io.BytesIO):
    """A stream that counts what is read of it."""

    reads = taken = 0

    def read(self, size=-1):
        data = super().read(size)
        self.reads, self.taken = self.reads + 1, self.taken + len(data)
        return data


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20)
names = st.text(max_size=5)
trees = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(names, inner), max_leaves=20)
separators = st.sampled_from([(",", ":"), (", ", ": "), ("\n,\t", " : \r\n")])


@settings(max_examples=150, deadline=None)
@given(st.lists(trees), st.booleans(), separators, st.integers(1, 9), st.booleans())
def test_an_array_is_what_json_reads_whatever_the_size_of_a_chunk(found, ascii, between, chunk, wrapped):
    before, json_array._CHUNK = json_array._CHUNK, chunk
    try:
        given = {"note": {"data": [1]}, "data": found, "more": 1} if wrapped else found
        text = json.dumps(given, ensure_ascii=ascii, separators=between)
        stream = Counted(text.encode("utf-8", "surrogatepass"))
        assert list(values(stream, "data" if wrapped else None)) == found
        assert stream.reads > 1
    finally:
        json_array._CHUNK = before


@pytest.mark.parametrize("number", ["0.5", "12e3", "1.5E-7", "-0.25e+2"])
def test_a_number_across_the_border_of_a_chunk_is_one(number):
    for inside in range(1, len(number)):
        before = " " * (2**16 - 1 - inside)
        found, ended = read(f"[{before}{number}, 1]".encode())
        assert (found, ended) == ([float(number), 1], True), inside


def read(text: bytes) -> tuple[list, bool]:
    """The values of an array, and whether it ends as it should."""
    found = []
    try:
        for value in values(io.BytesIO(text)):
            found.append(value)
    except (ValueError, RecursionError):
        return found, False
    return found, True


def test_numbers_and_characters_that_fit_nowhere_come_through():
    odd = [{"n": 2**70, "m": -(2**63)}, {"t": "\ud800"}, {"e": "\U0001f600"}, 1e400]
    assert read(json.dumps(odd).encode()) == (odd, True)
    assert read(b"\xef\xbb\xbf[]") == ([], True)


def test_what_stands_before_the_damage_is_read():
    good = b'[{"a": 1}, {"a": 2}'
    for rest in (b"", b",", b", {", b', {"a": "x', b' {"a": 3}]', b', {"a": \x00}]', b", nul]"):
        assert read(good + rest) == ([{"a": 1}, {"a": 2}], False), rest
    assert read(good + b"] more") == ([{"a": 1}, {"a": 2}], False)
    assert read(good + b"," + b"[" * 100_000) == ([{"a": 1}, {"a": 2}], False)
    assert read(b"") == read(b"{}") == ([], False)


def test_a_byte_that_is_no_utf_8_costs_its_record_alone():
    (first, second, third), ended = read(b'[{"a": "x"}, {"a": "y\xffz"}, {"a": "\xc3\xa9"}]')
    assert ended and first == {"a": "x"} and third == {"a": "\u00e9"}
    with pytest.raises(UnicodeEncodeError):
        second["a"].encode("utf-8")


def test_damage_in_the_middle_does_not_read_the_rest():
    stream = Counted(b'[{"a": 1}, {"a" 2}, ' + b'{"a": 3}, ' * 500_000 + b"{}]")
    found = values(stream)
    assert next(found) == {"a": 1}
    with pytest.raises(ValueError):
        next(found)
    assert stream.taken < 500_000


def test_a_name_that_stands_twice_costs_its_record_alone():
    first, second, third = read(b'[{"a": 1}, {"b": {"a": 1, "a": 2}}, {"a": 3}]')[0]
    assert first == {"a": 1} and third == {"a": 3}
    assert isinstance(second, RowError) and second.reason == "duplicate_key"


@pytest.mark.parametrize(
    ("beginning", "name"),
    [
        ('{"count": 2, "rows": [ {"a": 1}, {"a', "rows"),
        ('{"tags": ["x"], "deep": {"rows": [{}]}, "items": [{', "items"),
        ('{"rows": []}', None),
        ('{"a": 1}', None),
        ('{"a": "cut o', None),
        ("[1]", None),
    ],
)
def test_the_array_of_records_in_an_object_is_found_by_its_beginning(beginning, name):
    assert first_array(beginning) == name


def test_an_object_with_a_name_of_a_record_is_one_wherever_that_name_stands():
    for beginning in (
        '{"user_id": "ann", "tags": [{"name": "a"}]}',
        '{"tags": [{"name": "b"}], "user_id": "ann", "t',
    ):
        assert first_array(beginning) == "tags" and first_array(beginning, {"user_id"}) is None
    assert first_array('{"tags": [{"user_id": "b"}], "n": 1}', {"user_id"}) == "tags"


def test_an_array_of_records_comes_before_the_object_and_the_arrays_around_it():
    for beginning in (
        '{"user_id": "ann", "tags": [{"name": "a"}], "rows": [{"n": 1, "user_id": "b"',
        '{"rows": [{"user_id": "b"}], "user_id": "ann"}',
        '{"tags": [{"name": "a"}], "rows": [ {"user_id": "b"}]}',
    ):
        assert first_array(beginning, {"user_id"}) == "rows"
