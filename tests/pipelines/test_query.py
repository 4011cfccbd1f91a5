"""SQL over a source's files: each row once, whatever the form, the number and the folders of the files."""

from traceback import format_exception

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.errors import InputError
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.look import options_of
from pipelines.ingest.sources import query, records
from pipelines.ingest.sources.base import FORMATS, NotThisFormat
from tests.pipelines.test_sources import ROWS, as_csv, forms, jsonl, look, plain, read


def test_a_query_over_any_form_gives_its_rows(tmp_path):
    query = (
        "select user_id as uid, item_id, upper(text) as text from source where user_id <> 'u1' order by item_id desc"
    )
    wanted = [{"user_id": row["user_id"], "item_id": row["item_id"], "text": row["text"].upper()}
              for row in reversed(ROWS) if row["user_id"] != "u1"]  # fmt: skip
    found = forms(tmp_path)
    for name in ("a.JSONL", "pretty.json", "semi.csv", "wide.csv", "a.parquet", "delta"):
        rows, rejects = read(found[name], query=query, columns={"user_id": "uid"})
        assert (plain(rows), rejects) == (wanted, {}), name
    both = [str(found["a.JSONL"]), str(found["a.parquet"])]
    rows, _ = read(both, query="select user_id, count(*) || '' as item_id, max(text) as text from source group by all")
    assert {row["user_id"]: row["item_id"] for row in rows} == {"u0": "6", "u1": "4", "u2": "4"}
    with pytest.raises(InputError, match="`source` has the columns user_id, item_id, text"):
        read(found["a.csv"], query="select nothing from source")


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_query_counts_each_row_of_a_large_file_once(tmp_path, monkeypatch, form):
    rows = [{"user_id": f"u{n}", "item_id": str(n), "text": f"text {n}" * 9} for n in range(2000)]
    path = jsonl(tmp_path / f"a.{form}", rows)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    elif form == "csv":
        path.write_text(as_csv(rows))
    monkeypatch.setattr(records, "PIECE_BYTES", path.stat().st_size // 5)
    query = "select 'u' as user_id, count(*) as item_id, 'x' as text from source"
    assert look(path, query=query).pieces[0].size == path.stat().st_size
    (found,), rejects = read(path, query=query)
    assert (found["item_id"], rejects) == ("2000", {})


def test_text_files_are_lines_for_a_query(tmp_path):
    (tmp_path / "chat.txt").write_bytes(b"1/2/24, 10:15 - Ann: hello\r\n1/2/24, 10:16 - Bob: hi: there\r\n")
    query = """select regexp_extract(line, '- ([^:]+):', 1) as user_id, number as item_id,
               regexp_extract(line, '- [^:]+: (.*)', 1) as text from source"""
    rows, _ = read(tmp_path / "chat.txt", format="text", query=query)
    assert plain(rows) == [
        {"user_id": "Ann", "item_id": "1", "text": "hello"}, {"user_id": "Bob", "item_id": "2", "text": "hi: there"}
    ]  # fmt: skip
    with pytest.raises(InputError, match="neither its name nor its first bytes tell a format"):
        read(tmp_path / "chat.txt")


def test_a_query_reads_many_files_of_json_and_an_empty_one_among_them(tmp_path):
    for number in range(6):
        jsonl(tmp_path / f"{number}.jsonl", [row | {"user_id": f"v{number}"} for row in ROWS])
    (tmp_path / "nothing.jsonl").write_text("")
    query = "select user_id, count(*) as item_id, 'x' as text from source group by all order by all"
    rows, rejects = read(tmp_path, query=query)
    assert [(row["user_id"], row["item_id"]) for row in rows] == [(f"v{n}", str(len(ROWS))) for n in range(6)]
    assert rejects == {}


@pytest.mark.parametrize("at", [0, 40])
@pytest.mark.parametrize(
    ("raised", "reached"),
    [
        (ConnectionResetError("peer"), False),
        (type("EndpointConnectionError", (Exception,), {})("s3"), False),
        (PermissionError("no"), False),
        (OSError("When reading: HTTP status 503, SlowDown"), False),
        (OSError("Corrupt snappy compressed data."), True),
    ],
)
def test_a_file_out_of_reach_of_a_query_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, at, raised, reached):
    rows = pa.table({"user_id": ["u"] * 8192, "item_id": ["i"] * 8192, "text": ["words"] * 8192})
    pq.write_table(rows, tmp_path / "a.parquet")

    def batches():
        yield from rows.to_batches() * at
        raise raised

    def view(connection, part, options, folder, number, limit, bad) -> str:
        found = batches() if limit is None else iter(rows.to_batches())  # a look at the file succeeds
        connection.register(f"part{number}", pa.RecordBatchReader.from_batches(rows.schema, found))
        return f"part{number}"

    monkeypatch.setattr(query, "_view", view)
    if reached:
        _, rejects = read(tmp_path / "a.parquet", query="select * from source")
        assert rejects == {"query": "unreadable_file"}
    else:
        with pytest.raises(ConnectionError, match=r"a\.parquet: the file cannot be read now"):
            read(tmp_path / "a.parquet", query="select * from source")


def test_a_value_that_a_query_cannot_convert_is_no_lost_connection_and_is_not_shown(tmp_path):
    """Beyond the first rows DuckDB's error is another one, and its words quote the value."""
    said = [str(number) for number in range(300_000)] + ["the server timed out, try again"]
    ids = [str(number) for number in range(len(said))]
    pq.write_table(pa.table({"user_id": ["u"] * len(said), "item_id": ids, "text": said}), tmp_path / "a.parquet")
    numbers = "select user_id, item_id, text::int as text from source"
    (piece,) = look(tmp_path / "a.parquet", query=numbers).pieces
    options = options_of(IngestConfig(tables="unused", source=str(tmp_path), query=numbers))
    with pytest.raises(NotThisFormat) as caught:
        list(FORMATS["query"].batches(piece, options))
    assert str(caught.value).startswith("the query fails with Conversion") and "try_cast" in str(caught.value)
    assert "timed out" not in "".join(format_exception(caught.value))


def test_a_query_over_files_without_a_row_gives_none_and_a_damaged_one_is_named(tmp_path):
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name, query="select nothing from source") == ([], {})
    (tmp_path / "cut.json").write_text('[{"user_id": "u", "te')
    rows, rejects = read(tmp_path / "cut.json", query="select * from source")
    assert rows == [] and list(rejects.values()) == ["unreadable_file"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_a_column_of_the_files_stands_before_one_of_their_folders_and_folders_give_texts(tmp_path, form):
    for day in ("2024-01-01", "2024-01-02"):
        path = jsonl(tmp_path / f"day={day}" / f"month={day[:7]}" / f"a.{form}", [ROWS[0] | {"Day": "5"}])
        if form == "csv":
            path.write_text(as_csv([ROWS[0] | {"Day": "5"}]))
    query = "select user_id, item_id, day || month[:4] as text from source"
    assert [row["text"] for row in read(tmp_path, query=query)[0]] == ["52024"] * 2


def test_a_query_leaves_uuids_as_they_stand(tmp_path):
    user = "550E8400-E29B-41D4-A716-446655440000"
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0] | {"user_id": user, "more": {"UUID": user}, "day": "2024-01-02"}])
    (row,), _ = read(path, query="select user_id, item_id, more.UUID as text, year(day::date) as year from source")
    assert (row["user_id"], row["text"], row["year"]) == (user, user, "2024")


def test_a_query_over_json_gives_texts_and_numbers_as_they_stand(tmp_path):
    days = ["02-03-2020", "14-03-2020"]
    rows = [
        {"user_id": 7, "item_id": "10-11-12", "text": "9:5:1", "day": days[0], "n": 12345678901234567, "m": {"t": "1"}},
        {"user_id": "8", "item_id": "11-11-12", "text": "x", "day": days[1], "n": 1.5, "m": {"t": 2, "DATE": days[0]}},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    given = {"columns": {"occurred_at": "day", "text": "text", "n": "n", "t": "m.t", "d": "m.DATE"},
             "time": {"format": "%d-%m-%Y"}}  # fmt: skip
    found, rejects = read(path, query="select * from source", **given)
    assert found and rejects == {}
    told = [(row["user_id"], row["item_id"], row["at"].strftime("%Y-%m-%d"), row["text"], row["n"]) for row in found]
    assert told == [("7", "10-11-12", "2020-03-02", "9:5:1", "12345678901234567"),
                    ("8", "11-11-12", "2020-03-14", "x", "1.5")]  # fmt: skip
    assert [row["t"] for row in found] == ["1", "2"] and found[1]["d"] == days[0]


def test_numbers_with_and_without_fractions_stay_numbers_for_a_query(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0] | {"rating": rating} for rating in (4, 4.5)])
    (row,), _ = read(path, query="select 'u' as user_id, 1 as item_id, avg(rating) as text from source")
    assert row["text"] == "4.25"


def test_a_place_of_json_keeps_what_a_query_can_take_apart(tmp_path):
    """Objects beside texts stay JSON, and a large id makes no text of the fractions at another place."""
    rows = [
        {"meta": {"score": "3"}, "m": {"id": 2**53 + 1, "score": 0.5}, "list": [{"n": 1}, {"n": 2**60 + 1}]},
        {"meta": "plain words", "m": {"id": 7, "score": 4.5}, "list": [{"n": 0.25}]},
    ]
    rows = [{"user_id": f"u{n}", "item_id": str(n)} | row for n, row in enumerate(rows)]
    path = jsonl(tmp_path / "a.jsonl", rows)
    asked = {
        "meta->>'score'": ["3", None], "m.id": [str(2**53 + 1), "7"], "avg(m.score) over ()": ["2.5", "2.5"],
        "list[1].n": ["1", "0.25"], "list[2].n": [str(2**60 + 1), None],
    }  # fmt: skip
    for what, wanted in asked.items():
        query = f"select user_id, item_id, coalesce(({what})::varchar, '-') as text from source order by 1"
        found, rejects = read(path, query=query)
        texts = [row["text"] for row in sorted(plain(found), key=lambda row: row["user_id"])]
        assert (texts, rejects) == ([value or "-" for value in wanted], {}), what
    (one,), _ = read(path, query="select user_id, item_id, meta::varchar as text from source where m.score > 1")
    assert plain([one])[0]["user_id"] == "u1"


def test_a_refused_query_shows_no_text_of_a_file_without_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("user_ib,I was diagnosed with diabetes,sad\nann,I am well,glad\n")
    for asked in ("select user_id from source", "select nothing from source", "select * from nothing"):
        with pytest.raises(InputError, match="(?s)query: .*has the columns") as caught:
            read(tmp_path / "a.csv", query=asked)
        assert "diabetes" not in str(caught.value) and caught.value.__cause__ is None


def test_a_type_that_duckdb_lacks_is_refused_with_a_word_of_ours(tmp_path):
    half = pa.array([1.5], pa.float16())
    pq.write_table(pa.table({"user_id": ["u"], "item_id": ["1"], "text": ["x"], "half": half}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="query: DuckDB cannot make one view of these files"):
        read(tmp_path / "a.parquet", query="select * from source")
