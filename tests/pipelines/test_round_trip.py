"""Any table of odd values, in every format: what goes in comes out byte for byte, or is a reject; nothing else happens.

A file is written by another library than the one that reads it, read in pieces of a few bytes where the format allows
it, and compared with the values that it was written from.
"""

import csv
import json
import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.source_rows import COUNT, ITEM, REJECT, ROWS
from pipelines.ingest.sources import records
from pipelines.ingest.sources.base import CsvForm
from pplug import history
from tests.pipelines.parsed import parsed

TASK = {"name": "odd", "item": "{text}", "item_without_label": "{text}", "metric": "text"}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PLAIN = CsvForm(delimiter=",", quote='"', header=True, encoding="utf-8")

# What readers of files trip over stands beside all other characters: quotes, delimiters, line ends, marks.
odd = st.sampled_from(
    ["", " ", "007", "-1", "1e3", "NULL", "nan", "true", '"', '""', ",", ";", "\t", "\n", "\r\n", "\r", "\ufeff",
     "\u2028", "\x00", "\x1a", "é", "e\u0301", "👩\u200d👧", "\\", "\\N", "{", "[", "#", "=1+1", "\u00a0",
     "\x1f", "\u3000", "12345678901234567890"]
)  # fmt: skip
unicode = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.one_of(odd, unicode, st.builds("".join, st.lists(odd, max_size=3)))
surrogates = st.builds("{}{}".format, unicode, st.sampled_from(["\ud800", "\udfff"]))
moments = st.datetimes(datetime(1995, 1, 1), datetime(2024, 1, 1)).map(lambda moment: moment.replace(tzinfo=UTC))


def table_of(ids, fields):
    """Rows as dicts; the time may be missing, the field `extra` too."""
    row = {
        "user_id": ids,
        "item_id": ids,
        "occurred_at": st.none() | moments,
        "text": fields,
        "extra": st.none() | fields,
    }
    return st.lists(st.fixed_dictionaries(row), min_size=1, max_size=6)


quick = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def read(path, **config):
    return parsed(IngestConfig(tables="-", source=str(path), **config), TASK)


def compare(got, rows, text_of=str):
    """Compares rows as they came out with those that were written."""
    assert got.schema == ROWS
    by_kind = {kind: [row for row in got.to_pylist() if row["kind"] == kind] for kind in (ITEM, REJECT, COUNT)}
    assert sum(row["seq"] for row in by_kind[COUNT]) == len(rows) == len(by_kind[ITEM]) + len(by_kind[REJECT])
    out = sorted(by_kind[ITEM], key=lambda row: row["seq"])
    good = [row for row in rows if not wrong(row)]
    for row, source in zip(out, good, strict=True):
        fields = {name: text_of(source[name]) for name in ("text", "extra") if source[name] is not None}
        assert (row["user_id"], row["id"]) == (text_of(source["user_id"]), text_of(source["item_id"]))
        assert dict(row["fields"]) == fields
        assert row["text_hash"] == history.text_hash(fields)
        assert row["at"] == source["occurred_at"]
    bad = [row for row in rows if wrong(row)]
    for reject, source in zip(sorted(by_kind[REJECT], key=lambda row: row["seq"]), bad, strict=True):
        assert reject["reason"] in wrong(source)
    assert len({row["place"] for row in by_kind[ITEM] + by_kind[REJECT]}) == len(rows)


def wrong(row):
    """Reasons for which a row must be rejected; none for a good one."""
    values = [row[name] for name in ("user_id", "item_id", "text", "extra")]
    found = {"bad_utf8"} if any(isinstance(value, str) and not sound(value) for value in values) else set()
    found |= {"empty_text"} if isinstance(row["text"], str) and not row["text"].strip() else set()
    blank = any(isinstance(row[name], str) and not row[name].strip() for name in ("user_id", "item_id"))
    return found | ({"missing_id"} if blank else set())


def sound(text):
    try:
        return bool(text.encode("utf-8")) or True
    except UnicodeEncodeError:
        return False


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "PIECE_BYTES", 64)
        yield


# --- one format after the other ---


# Python's writer leaves a lone \r without quotes where lines end in \n: no reader could tell it from a line end.
forms = st.sampled_from([(csv.QUOTE_MINIMAL, "\r\n"), (csv.QUOTE_ALL, "\n"), (csv.QUOTE_ALL, "\r\n")])


@quick
@given(table_of(texts, texts), forms)
def test_csv(rows, form):
    quoting, end = form
    rows = [row | {"extra": row["extra"] or None} for row in rows]  # CSV has no null beside the empty text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "odd.csv")
        write_csv(path, rows, quoting=quoting, lineterminator=end)
        got = read(path, csv=PLAIN)
    columns = got.schema.get_field_index("fields")
    fields = [without_empty(pairs) for pairs in got["fields"].to_pylist()]
    hashes = [None if pairs is None else history.text_hash(dict(pairs)) for pairs in fields]
    got = got.set_column(columns, ROWS.field("fields"), pa.array(fields, ROWS.field("fields").type))
    at = got.schema.get_field_index("text_hash")
    compare(got.set_column(at, ROWS.field("text_hash"), pa.array(hashes, pa.string())), rows)


def without_empty(pairs):
    return None if pairs is None else [(name, text) for name, text in pairs if text or name != "extra"]


def write_csv(path, rows, **form):
    with open(path, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, **form)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow(["" if value is None else in_iso(value) for value in (row[name] for name in rows[0])])


def in_iso(value):
    """A moment in another zone, so that the zone counts."""
    if not isinstance(value, datetime):
        return value
    return (value + timedelta(hours=2)).isoformat().replace("+00:00", "+02:00")


large = st.integers(-(2**70), 2**70)


@quick
@given(table_of(texts | surrogates | large, texts | surrogates | large), st.booleans())
def test_json_lines(rows, ascii):
    dumped = [json.dumps(row, ensure_ascii=ascii or not all_sound(row), default=in_iso) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "odd.jsonl")
        path.write_text("".join(f"{line}\n" for line in dumped), encoding="utf-8", newline="")
        compare(read(path), rows)


@quick
@given(table_of(texts | surrogates | large, texts | surrogates | large), st.booleans())
def test_json_arrays(rows, ascii):
    ascii = ascii or not all(map(all_sound, rows))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "odd.json")
        path.write_text(json.dumps(rows, ensure_ascii=ascii, default=in_iso), encoding="utf-8", newline="")
        compare(read(path), rows)


def all_sound(row):
    return all(sound(value) for value in row.values() if isinstance(value, str))


kinds = st.sampled_from([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
times = st.sampled_from([pa.timestamp("us", tz="UTC"), pa.timestamp("us"), pa.timestamp("ns", tz="Europe/Paris")])
whole = st.integers(-(2**63), 2**63 - 1)


@quick
@given(table_of(texts, texts) | table_of(whole, texts), kinds, times, st.integers(1, 3))
def test_parquet(rows, kind, time, group):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "odd.parquet")
        pq.write_table(arrow(rows, kind, time), path, row_group_size=group)
        compare(read(path), rows)


@settings(quick, max_examples=10)
@given(table_of(texts, texts) | table_of(whole, texts), st.integers(1, 6))
def test_delta(rows, split):
    table = arrow(rows, pa.string(), pa.timestamp("us", tz="UTC"))
    with tempfile.TemporaryDirectory() as folder:
        write_deltalake(folder, table.slice(0, split))
        if len(rows) > split:
            write_deltalake(folder, table.slice(split), mode="append")
        got = read(folder)
    ordered = sorted(rows, key=repr)  # files of a table have no order that the test could know
    out = got.filter(pa.array([kind == ITEM for kind in got["kind"].to_pylist()])).to_pylist()
    keys = Counter((row["user_id"], row["id"], row["at"], *sorted(row["fields"])) for row in out)
    assert keys == Counter(
        (str(row["user_id"]), str(row["item_id"]), row["occurred_at"], *sorted(
            (name, row[name]) for name in ("text", "extra") if row[name] is not None))
        for row in ordered if not wrong(row)
    )  # fmt: skip
    assert sum(kind == REJECT for kind in got["kind"].to_pylist()) == len(rows) - len(out)


def arrow(rows, kind, time):
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        if name == "occurred_at":
            columns[name] = pa.array([value and value.replace(tzinfo=None) for value in values], pa.timestamp("us"))
            columns[name] = columns[name].cast(pa.timestamp("us", tz="UTC")).cast(time)
        else:
            columns[name] = pa.array(values, pa.int64() if isinstance(values[0], int) else pa.string())
            columns[name] = columns[name].cast(kind) if pa.types.is_string(columns[name].type) else columns[name]
    return pa.table(columns)


# --- all of them at once, through the tables ---


def test_one_odd_table_per_format_goes_through_a_whole_run(population, ray_session):
    words = ['"', ",\n", "\ufeffx", "007", "\rx", "a\u2028b", "👩\u200d👧", "\x00z", "\\N", "1e3", " x "]
    moment = datetime(2021, 3, 4, 5, 6, 7, 89, UTC)
    names = ["a.csv", "b.jsonl", "c.json", "d.parquet", "e"]
    given = {}
    for name in names:
        rows = [
            {"user_id": f"{word}{name}", "item_id": word, "occurred_at": moment + timedelta(microseconds=at),
             "text": f"{word}.", "extra": None}
            for at, word in enumerate(words)
        ]  # fmt: skip
        path = population.folder / name
        if name == "a.csv":
            write_csv(path, rows)
        elif name == "d.parquet":
            pq.write_table(arrow(rows, pa.string(), pa.timestamp("us")), path)
        elif name == "e":
            write_deltalake(path, arrow(rows, pa.string(), pa.timestamp("us", tz="UTC")).drop_columns("extra"))
        else:
            lines = [json.dumps(row, default=in_iso) for row in rows]
            path.write_text("\n".join(lines) if name == "b.jsonl" else f"[{','.join(lines)}]")
        given |= {(row["user_id"], row["item_id"]): (row["text"], row["occurred_at"]) for row in rows}
    sources = tuple(str(population.folder / name) for name in names)
    assert population.ingest(source=sources, task=population.task(TASK), csv=PLAIN, columns={"text": "text"}) == 0
    got = {
        (user, row["item_id"]): (row["fields"]["text"], row["occurred_at"])
        for user, rows in population.items().items()
        for row in rows
    }
    assert got == given and len(got) == len(names) * len(words) == population.report["planned"]
