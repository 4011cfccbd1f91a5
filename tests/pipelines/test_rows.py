"""Rows of a source as its formats read them, without a cluster: nothing is lost, and one bad row costs itself."""

import csv
import gzip
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import InputError
from pipelines.ingest import summary
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.figures import EXAMPLES, Figures
from pipelines.ingest.labels import LabelRule, with_labels
from pipelines.ingest.parse import ParsePieces
from pipelines.ingest.resolve import WORK, fill_times, half_timed
from pipelines.ingest.source_rows import COUNT, ITEM, REJECT, REQUEST, RowRules, RowWriter, by_kind
from pipelines.ingest.sources import records
from pipelines.ingest.sources.base import FORMATS, Options, find
from pipelines.ingest.times import TimeRule
from pplug import history
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES

TASK = TaskSpec.model_validate(NOTES)
FREE = TaskSpec(name="free", item="{text}", item_without_label="{text}", metric="text")


def note(user="u", item="1", **more) -> dict:
    return {"user_id": user, "item_id": item, "text": f"text {item}", "mood": "good", **more}


class Read:
    """A source as `ParsePieces` gives it: items, requests and rejects as Python values, and the figures."""

    def __init__(self, path: Path, kind="items", task=TASK, columns=None, **rules) -> None:
        options = Options(columns or {}, "train", "auto", True, RowRules(**rules))
        files = find(str(path), "auto", options).files
        format = FORMATS[files[0].format]
        pieces = tuple(format.pieces(files, kind, options))
        parse = ParsePieces(task, 4, pieces, options, None)
        rows = pa.concat_tables([table for at in range(len(pieces)) for table in parse(pa.table({"piece": [at]}))])
        kinds = by_kind(rows)
        self.pieces = pieces
        self.items = kinds[ITEM].to_pylist()
        self.fields = [dict(row["fields"]) for row in self.items]
        self.requests = kinds[REQUEST].to_pylist()
        self.rejects = {row["place"]: row["reason"] for row in kinds[REJECT].to_pylist()}
        self.figures = Figures.of(kinds, task).numbered()
        planned = sum(row["seq"] for row in kinds[COUNT].to_pylist())
        assert planned == len(self.items) + len(self.requests) + len(kinds[REJECT]) == self.figures.rows
        for row, fields in zip(self.items, self.fields, strict=True):
            assert row["text_hash"] == history.text_hash(fields)


def jsonl(path: Path, rows: list) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return path


def parquet(path: Path, columns: dict, **options) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- values ---------------------------------------------------------------------------------------------------------


def test_decimal_bool_list_and_json_bool_fields_do_not_vanish(tmp_path):
    found = Read(jsonl(tmp_path / "a.jsonl", [note(seen=True, tags=["x", "y"], stars=4.0, price=0.1, none=None)]))
    assert found.fields == [
        {"text": "text 1", "mood": "good", "seen": "true", "tags": "x, y", "stars": "4", "price": "0.1"}
    ]
    columns = {name: [value] for name, value in note().items()} | {
        "price": pa.array([Decimal("4.50")]), "seen": [False], "tags": [["x", "y"]], "when": [date(2024, 1, 2)],
        "weight": pa.array([0.1], pa.float32()), "stars": [4.0],
    }  # fmt: skip
    found = Read(parquet(tmp_path / "a.parquet", columns))
    assert found.fields == [{"text": "text 1", "mood": "good", "price": "4.50", "seen": "false", "tags": "x, y",
                             "when": "2024-01-02", "weight": "0.1", "stars": "4"}]  # fmt: skip


def test_a_nullable_id_of_pandas_is_the_same_user_and_its_index_is_no_field(tmp_path):
    columns = {"user_id": [101.0, None, 7.0], "item_id": ["a", "b", "c"], "text": ["x"] * 3, "mood": ["good"] * 3}
    found = Read(parquet(tmp_path / "a.parquet", columns | {"__index_level_0__": [5, 6, 7]}))
    assert [row["user_id"] for row in found.items] == ["101", "7"] and found.rejects == {
        "a.parquet row 1": "missing_id"
    }
    assert all(set(fields) == {"text", "mood"} for fields in found.fields)


def test_odd_ids_are_rejects_and_inf_is_no_user(tmp_path):
    rows = [note(7.0), note(7.5), note(True), note(["u"]), note("u", {"a": 1}), note("\ud800"), note("\0")]
    path = jsonl(tmp_path / "a.jsonl", [*rows, json.dumps(note()).replace('"u"', "Infinity").encode()])
    found = Read(path)
    assert [row["user_id"] for row in found.items] == ["7", "\0"]
    assert sorted(found.rejects.values()) == ["bad_utf8"] + ["wrong_type"] * 5


def test_a_list_or_bool_target_is_a_reject_and_not_no_target(tmp_path):
    asked = [{"request_id": str(n), "user_id": "u", "input": "?", "target": target}
             for n, target in enumerate(["good", None, ["good"], True, {"a": 1}, "GOOD ", "odd"])]  # fmt: skip
    found = Read(jsonl(tmp_path / "a.jsonl", asked), kind="requests")
    assert [(row["id"], row["target"]) for row in found.requests] == [("0", "good"), ("1", None), ("5", "good")]
    assert sorted(found.rejects.values()) == ["target_outside_labels"] + ["wrong_type"] * 3
    columns = {"request_id": ["1", "2"], "user_id": ["u"] * 2, "input": ["?"] * 2}
    for target in ([True, None], [["good"], None]):
        found = Read(parquet(tmp_path / "a.parquet", columns | {"target": target}), kind="requests", task=FREE)
        assert [row["id"] for row in found.requests] == ["2"] and list(found.rejects.values()) == ["wrong_type"]


def test_an_empty_target_is_no_answer(tmp_path):
    path = tmp_path / "asked.csv"
    path.write_text("request_id,user_id,input,target\nr1,ann,How?,good\nr2,ann,And now?,\nr3,ann,And then?, \n")
    lines = [{"request_id": f"r{n}", "user_id": "ann", "input": "?", "target": target}
             for n, target in enumerate(["good", "", " "], start=1)]  # fmt: skip
    for task in (TASK, FREE):
        for source in (path, jsonl(tmp_path / "asked.jsonl", lines)):
            found = Read(source, kind="requests", task=task)
            assert not found.rejects
            assert [(row["id"], row["target"]) for row in found.requests] == [
                ("r1", "good"),
                ("r2", None),
                ("r3", None),
            ]


def test_nested_columns_are_left_out_and_counted_and_needed_ones_are_rejects(tmp_path):
    found = Read(jsonl(tmp_path / "a.jsonl", [note(more={"a": 1}), note(item="2", more=[["x"]]), note(text={"a": 1})]))
    assert found.figures.left_out == {"more": 2} and list(found.rejects.values()) == ["wrong_type"]
    assert any("left out" in line and "more 2" in line for line in found.figures.told())


# --- one bad row never ends the run ---------------------------------------------------------------------------------


def test_fields_that_is_a_list_or_a_text_costs_its_row_alone(tmp_path):
    rows = [{"user_id": "u", "item_id": "1", "fields": fields} for fields in (["a"], "text", 7, [["text", "x"]])]
    good = {"user_id": "u", "item_id": "2", "fields": {"text": "x", "mood": "bad"}}
    found = Read(jsonl(tmp_path / "a.jsonl", [*rows, good, note(item="3")]))
    assert found.fields == [{"text": "x", "mood": "bad"}, {"text": "text 3", "mood": "good"}]
    assert list(found.rejects.values()) == ["wrong_type"] * 4


def test_duplicate_json_keys_are_refused(tmp_path):
    line = b'{"user_id": "u", "item_id": "1", "text": "x", "text": "y", "mood": "good"}'
    nested = b'{"user_id": "u", "item_id": "2", "fields": {"text": "x", "mood": "good", "mood": "bad"}}'
    found = Read(jsonl(tmp_path / "a.jsonl", [line, nested, note(item="3")]))
    assert list(found.rejects.values()) == ["duplicate_key"] * 2 and len(found.items) == 1


def test_deep_nesting_lone_surrogates_and_nul_cost_their_row_alone(tmp_path):
    deep = b'{"user_id": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    digits = b'{"user_id": ' + b"9" * 10_000 + b"}"
    odd_name = json.dumps(note(item="3") | {"\ud800": "x"}).encode()
    rows = [deep, digits, note(text="half \ud800"), odd_name, note(item="nul\0", text="a\0b")]
    found = Read(jsonl(tmp_path / "a.jsonl", rows))
    assert [row["id"] for row in found.items] == ["3", "nul\0"] and found.fields[1]["text"] == "a\0b"
    assert sorted(found.rejects.values()) == ["bad_json", "bad_json", "bad_utf8"]
    assert found.figures.left_out == {"a name that is not Unicode": 1}


def test_an_overflowing_timestamp_costs_its_row_alone(tmp_path):
    columns = {name: [value] * 2 for name, value in note().items()} | {"item_id": ["1", "2"]}
    times = pa.array([2**62, 1_704_067_200_000], pa.timestamp("ms"))
    found = Read(parquet(tmp_path / "a.parquet", columns | {"occurred_at": times, "seen": times}))
    assert [row["at"] for row in found.items] == [datetime(2024, 1, 1, tzinfo=UTC)]
    assert found.rejects == {"a.parquet row 0": "bad_date"} and found.fields[0]["seen"] == "2024-01-01T00:00:00"


def test_a_gzip_damaged_in_the_middle_keeps_its_first_rows_and_is_named(tmp_path):
    rows = [note(item=str(n), text=f"{n * 7919} x") for n in range(20_000)]
    packed = bytearray(gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows)))
    packed[len(packed) // 2 : len(packed) // 2 + 40] = b"\xff" * 40
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    jsonl(tmp_path / "b.jsonl", [note("v")])
    found = Read(tmp_path / "a.jsonl.gz")
    assert found.rejects["a.jsonl.gz"] == "unreadable_file" and len(found.items) > 5000


def test_a_file_that_is_not_what_its_name_says_is_one_reject_unless_its_content_can_be_read(tmp_path):
    (tmp_path / "a.parquet").write_bytes(json.dumps(note()).encode() * 10)
    assert Read(tmp_path / "a.parquet").rejects == {"a.parquet": "unreadable_file"}
    jsonl(tmp_path / "a.jsonl.gz", [note()])  # not packed: the first bytes count, and not the name
    assert len(Read(tmp_path / "a.jsonl.gz").items) == 1


def test_two_columns_of_one_name_are_a_rejected_file(tmp_path):
    row = note()
    table = pa.table([[value] for value in [*row.values(), "other"]], names=[*row, "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert Read(tmp_path / "a.parquet").rejects == {"a.parquet": "unreadable_file"}


def test_a_page_whose_checksum_is_wrong_is_a_rejected_file(tmp_path):
    columns = {
        "user_id": ["u"] * 50,
        "item_id": [str(n) for n in range(50)],
        "text": ["marked text"] * 50,
        "mood": ["good"] * 50,
    }
    path = parquet(tmp_path / "a.parquet", columns, write_page_checksum=True, compression="none")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"marked text", b"forged text", 1))
    assert Read(path).rejects == {"a.parquet": "unreadable_file"}


# --- pieces, places and figures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [900, 10**9])
def test_rejects_are_told_by_line_and_byte_and_their_text_only_where_asked_for(tmp_path, monkeypatch, size):
    monkeypatch.setattr(records, "PIECE_BYTES", size)
    lines = [note(item=str(n)) for n in range(60)] + [b"", b"  "]
    lines += [b"secret nonsense", note(user=None, text="secret words")]
    path = jsonl(tmp_path / "a.jsonl", lines)
    found = Read(path, show_text=True)
    assert (len(found.pieces) > 1) == (size == 900)
    raw = path.read_bytes().split(b"\n")
    for reason, number in (("bad_json", 63), ("missing_id", 64)):
        (example,) = found.figures.examples[reason]
        assert example.line == number and example.shown() == f"a.jsonl line {number} (byte {example.seq})"
        assert path.read_bytes()[example.seq :].startswith(raw[number - 1])
    told = "\n".join(found.figures.told())
    assert "secret nonsense" in told and "secret words" in told
    assert "secret" not in json.dumps(found.figures.to_dict())
    assert "secret" not in "\n".join(Read(path).figures.told())


def test_the_pieces_of_a_parquet_file_are_the_file(tmp_path, monkeypatch):
    rows = [note(item=str(n), text=f"text {n * 7919}") for n in range(5000)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1700)
    whole = Read(tmp_path / "a.parquet")
    monkeypatch.setattr(records, "PIECE_BYTES", (tmp_path / "a.parquet").stat().st_size // 7)
    found = Read(tmp_path / "a.parquet")
    assert len(found.pieces) >= 7 and len(whole.pieces) == 1
    assert sorted(row["seq"] for row in found.items) == list(range(5000))
    key = lambda row: row["seq"]  # noqa: E731
    assert sorted(found.items, key=key) == sorted(whole.items, key=key)
    assert [row["id"] for row in sorted(found.items, key=key)] == [row["item_id"] for row in rows]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_texts_of_ten_megabytes_pass_a_few_at_a_time(tmp_path, form):
    """No more than two of them are in one block, whatever the number of rows."""
    rows = [note(item=str(n), text=f"{n}" * 10_000_000) for n in range(5)]
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        jsonl(path, rows)
    elif form == "csv":
        with open(path, "w", newline="") as out:
            csv.writer(out).writerows([rows[0], *(row.values() for row in rows)])
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=False)
    options = Options({}, "train", "auto", True, RowRules())
    pieces = tuple(FORMATS[form].pieces(find(str(path), "auto", options).files, "items", options))
    parse, found = ParsePieces(TASK, 4, pieces, options, None), {}
    for at in range(len(pieces)):
        for table in parse(pa.table({"piece": [at]})):
            items = by_kind(table)[ITEM]
            assert len(items) <= 2
            for row in items.to_pylist():
                found[row["id"]] = dict(row["fields"])["text"]
    assert found == {row["item_id"]: row["text"] for row in rows}


def test_figures_of_parts_add_up_to_the_figures_of_the_whole(tmp_path):
    days = [f"2024-01-{n % 28 + 1:02d}" if n % 5 else None for n in range(40)]
    moods = ("good", "bad", "odd")
    rows = [note(f"u{n % 7}", str(n), mood=moods[n % 3], occurred_at=day) for n, day in enumerate(days)]
    rows += [note(user=None, item=str(n)) for n in range(9)]
    found = Read(jsonl(tmp_path / "a.jsonl", rows)).figures
    told = found.to_dict()
    assert (told["rows"], told["users"], told["items"], told["items_timed"], told["items_untimed"]) == (
        49,
        7,
        40,
        32,
        8,
    )
    assert told["labels"] == {"good": 14, "bad": 13, "odd": 13}
    assert told["earliest"] == "2024-01-01T00:00:00+00:00" and told["latest"] == "2024-01-28T00:00:00+00:00"
    assert told["rejects"]["missing_id"]["rows"] == 9 and len(told["rejects"]["missing_id"]["examples"]) == EXAMPLES
    parts = Figures()
    for user in range(7):
        name = tmp_path / f"{user}.jsonl"
        parts.add(Read(jsonl(name, [row for row in rows if row["user_id"] == f"u{user}"])).figures)
    assert {**parts.to_dict(), "rejects": 0, "rows": 0} == {**told, "rejects": 0, "rows": 0}


def test_a_source_without_times_warns_with_likely_columns_and_a_mapped_one_without_values_is_an_error(tmp_path):
    rows = [note(item="1", published="2024-01-01", createdAt=1_700_000_000, number=7, updates="none")]
    found = Read(jsonl(tmp_path / "a.jsonl", rows)).figures
    config = IngestConfig(tables="t", source="a.jsonl")
    warning = summary.untimed_warning(config, found)
    assert warning and "createdAt, published may be one: --columns occurred_at=createdAt" in warning
    for columns, says in (
        ({"occurred_at": "when"}, "no row has the column 'when', which --columns maps to occurred_at; the rows have"),
        ({"occurred_at": "nothing"}, "no row has a value in 'nothing', which --columns maps to occurred_at"),
        ({"text": "bdoy"}, "no row has the column 'bdoy'"),
    ):
        found = Read(jsonl(tmp_path / "a.jsonl", [note(nothing=None)]), columns=columns).figures
        if "text" not in columns:
            summary.refuse_missing(config, found)  # fine without the mapping
            assert found.items == 1 or "occurred_at" in columns
        with pytest.raises(InputError, match=says):
            summary.refuse_missing(config.model_copy(update={"columns": columns}), found)
    timed = Read(jsonl(tmp_path / "a.jsonl", [note(occurred_at=2024)])).figures
    assert summary.untimed_warning(config, timed) is None


# --- the two doors --------------------------------------------------------------------------------------------------

value = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(),
    st.sampled_from(["", " ", "good", "Bad", "x\ud800", "7"]), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.just("a"), st.none(), max_size=1),
)  # fmt: skip
row = st.fixed_dictionaries(
    {"user_id": value, "item_id": st.one_of(st.integers(), value),
     "occurred_at": st.sampled_from([None, 2024, 0, "x", "2024-01-01"]),
     "fields": st.dictionaries(st.sampled_from(["text", "mood", "more"]), value)}
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(row, max_size=8))
def test_rows_by_columns_and_one_by_one_are_the_same_and_none_is_lost(rows):
    one_by_one, by_columns = RowWriter(TASK, 4, 0), RowWriter(TASK, 4, 0)
    for seq, each in enumerate(rows):
        one_by_one.planned()
        one_by_one.item(seq, f"row {seq}", each["user_id"], each["item_id"], each["occurred_at"], each["fields"])
    columns = {name: [each[name] for each in rows] for name in ("user_id", "item_id", "occurred_at")}
    fields = {name: [each["fields"].get(name) for each in rows] for name in ("text", "mood", "more")}
    by_columns.batch("items", columns, fields, np.arange(len(rows)), lambda seq: f"row {seq}")
    tables = [writer.take().sort_by("seq") for writer in (one_by_one, by_columns)]
    listed = [
        [
            {**one, "fields": dict(one["fields"] or ()), "detail": one["kind"] == REJECT and one["detail"]}
            for one in table.to_pylist()
        ]
        for table in tables
    ]
    assert listed[0] == listed[1]
    assert sum(one["kind"] in (ITEM, REJECT) for one in listed[0]) == len(rows)


def test_rows_with_names_of_their_own_cost_no_more_than_their_values():
    writer = RowWriter(FREE, 4, 0)
    for seq in range(3000):
        writer.planned()
        writer.item(seq, f"row {seq}", "u", seq, None, {"text": "x", f"name {seq}": seq})
    items = by_kind(writer.take())[ITEM].to_pylist()
    assert [dict(row["fields"]) for row in items] == [{"text": "x", f"name {n}": str(n)} for n in range(3000)]


# --- labels ---------------------------------------------------------------------------------------------------------


def test_labels_match_by_case_spaces_and_numbers_and_are_stored_as_the_task_spells_them():
    task = TASK.model_copy(update={"labels": ("Good", "bad mood", "4")})
    rule = LabelRule(task, "normalise")
    answers = ["Good", "good ", "BAD  mood", "4.0", "4", "odd", ""]
    assert [rule.label(answer) for answer in answers] == ["Good", "Good", "bad mood", "4", "4", None, None]
    exact = LabelRule(task, "exact")
    assert [exact.label(answer) for answer in answers] == ["Good", None, None, None, "4", None, None]
    infer = LabelRule(task, "infer")
    assert [infer.label(answer) for answer in answers] == ["Good", "Good", "bad mood", "4", "4", "odd", None]
    both = LabelRule(TASK.model_copy(update={"labels": ("us", "US", "uk")}), "normalise")
    assert [both.label(answer) for answer in ("us", "US", "Us", "UK")] == ["us", "US", None, "uk"]


def test_a_rating_may_lie_between_the_points_of_the_scale_but_not_beyond():
    task = TaskSpec(
        name="r", item="{text}", item_without_label="{text}", metric="rating", labels=("1", "2", "3", "4", "5")
    )
    rule = LabelRule(task, "normalise")
    assert [rule.label(answer) for answer in ("4.0", "3.5", "6", "x", "1e9999999", "5")] == [
        "4",
        "3.5",
        *[None] * 3,
        "5",
    ]


def test_labels_that_are_found_become_the_tasks_up_to_a_bound():
    none = TASK.model_copy(update={"labels": ()})
    assert with_labels(none, ["b", "a", "c"]).labels == ("a", "b", "c")
    assert with_labels(none, ["10", "9", "1"]).labels == ("1", "9", "10")
    assert with_labels(TASK, ["odd", "good"]).labels == ("good", "bad", "odd")
    for found in (["a"], [str(n) for n in range(1001)]):
        with pytest.raises(InputError, match=f"its answers have {len(found)} different values"):
            with_labels(none, found)


# --- items without a time -------------------------------------------------------------------------------------------


def by_hand(times: list[int | None]) -> list[int | None]:
    """Each gap takes the time before it, or the first after it."""
    out: list[int | None] = []
    for at, time in enumerate(times):
        before = [t for t in times[:at] if t is not None]
        after = [t for t in times[at:] if t is not None]
        out.append(time if time is not None else max([*before[-1:], *after[:1]], default=None))
    return out


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.one_of(st.none(), st.integers(1, 9)))), st.randoms())
def test_an_item_without_a_time_takes_the_later_one_of_its_neighbours_and_no_other_time_changes(given, random):
    rows = [{"user_key": user, "at": at, "position": n} for n, (user, at) in enumerate(given)]
    shuffled = random.sample(rows, len(rows))
    table = pa.Table.from_pylist(shuffled, schema=WORK)
    live, filled = fill_times(table)
    got = {row["position"]: row["at"] for row in live.set_column(8, "at", live["at"].cast(pa.int64())).to_pylist()}
    for user in "abc":
        own = [row for row in rows if row["user_key"] == user]
        assert [got[row["position"]] for row in own] == by_hand([row["at"] for row in own])
    timed = {row["user_key"] for row in rows if row["at"] is not None}
    wanted = [row["at"] is None and row["user_key"] in timed for row in shuffled]
    assert filled.tolist() == wanted == half_timed(table).tolist()


def test_the_time_rule_is_the_configs():
    config = IngestConfig(tables="t", source="s", time={"unit": "excel", "latest": "2030-01-01"})
    assert config.time == TimeRule(unit="excel", latest=date(2030, 1, 1)) and config.undated == "neighbour"


def test_an_answer_that_is_no_label_is_counted_and_not_shown(tmp_path):
    """An item keeps such an answer, which may be any text of its user; the log and the report have its number."""
    told = ["good", "bad", "My wife Anna left me on Monday", "and my dog died"]
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps(note(item=f"{n}", mood=mood)) + "\n" for n, mood in enumerate(told)))
    figures = Read(path).figures.without_texts(TASK)
    assert figures.to_dict()["labels"] == {"(no label of the task)": 2, "good": 1, "bad": 1}
    assert not any(word in "".join(figures.told()) for word in ("Anna", "dog"))
    stars = TaskSpec.model_validate(NOTES | {"metric": "rating", "labels": ["1", "2", "5"], "target": "stars"})
    path.write_text(
        "".join(json.dumps(note(item=f"{n}") | {"stars": one}) + "\n" for n, one in enumerate(["4.5", "Anna"]))
    )
    assert Read(path, task=stars).figures.without_texts(stars).to_dict()["labels"] == {
        "4.5": 1, "(no label of the task)": 1}  # fmt: skip
