"""ingest from sources of many kinds, through the whole job: report, exit codes, tables."""

import json
import shutil

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.data

from infra.errors import InputError
from infra.storage import Storage
from pipelines import tables
from pipelines.ingest.frame import ingest_frame
from tests.pipelines.population import NOTES

pytestmark = pytest.mark.usefixtures("ray_session")


def note(user, item, **more) -> dict:
    return {"user_id": user, "item_id": item, "text": f"text {item}", "mood": "good", **more}


def lines(path, rows) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_several_sources_of_several_forms_and_a_mapping_of_the_requests_own(population, tmp_path, capsys):
    first = lines(tmp_path / "in" / "a.JSON", [note("u", "1"), note("u", "2")])
    lines(tmp_path / "in" / "_temporary" / "a.jsonl", [note("gone", "1")])
    (tmp_path / "in" / "notes.docx").write_bytes(b"PK\x03\x04")
    csv = tmp_path / "b.csv"
    csv.write_text('user_id;item_id;text;mood\nv;1;"a; b";bad\nv;2;x\n')
    asked = lines(tmp_path / "asked.jsonl", [{"request_id": "r", "who": "u", "ask": "How?", "target": "good"}])
    code = population.ingest(
        source=[str(tmp_path / "in"), str(csv)], requests_source=asked, task=population.task(NOTES),
        requests_columns={"user_id": "who", "input": "ask"}, max_reject_fraction=0.5,
    )  # fmt: skip
    assert code == 0
    assert {user: [row["item_id"] for row in rows] for user, rows in population.items().items()} == {
        "u": ["1", "2"], "v": ["1"]}  # fmt: skip
    assert population.items()["v"][0]["fields"]["text"] == "a; b"
    assert population.requests()["r"]["user_id"] == "u" and population.rejects() == {"wrong_columns": 1}
    read = {entry["file"].rpartition("/")[2]: entry for entry in population.report["files_read"]}
    assert {name: (entry["format"], entry["rows"]) for name, entry in read.items()} == {
        "a.JSON": ("json", 2), "b.csv": ("csv", 2), "asked.jsonl": ("jsonl", 1)}  # fmt: skip
    assert first in {entry["file"] for entry in population.report["files_read"]}
    left = {entry["file"].rpartition("/")[2]: entry["why"] for entry in population.report["files_left_out"]}
    assert left == {"a.jsonl": "hidden or temporary", "notes.docx": "another kind of file"}
    said, steps = capsys.readouterr()
    assert "2 files are left out" in said and "delimiter ;" in said and "encoding utf-8" in said
    assert "parse and merge: 4 of 4 buckets in " in steps, "two users are in two buckets; the others are done too"


def test_a_mapping_of_requests_in_columns_rejects_no_item(population, tmp_path):
    items = lines(tmp_path / "i.jsonl", [note("u", "1")])
    asked = lines(tmp_path / "r.jsonl", [{"request_id": "r", "user_id": "u", "ask": "How?"}])
    code = population.ingest(
        source=items, requests_source=asked, columns={"input": "ask"}, task=population.task(NOTES)
    )  # fmt: skip
    assert code == 0 and population.report["rejected"] == {}
    assert population.items()["u"][0]["fields"] == {"text": "text 1", "mood": "good"}
    assert population.requests()["r"]["input"] == "How?"


def test_a_source_without_rows_is_an_error_unless_it_is_allowed(population, tmp_path):
    task = population.task(NOTES)
    (tmp_path / "empty.csv").write_text("user_id,item_id,text,mood\n")
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in note("u", "1")}), tmp_path / "empty.parquet")
    for name in ("empty.csv", "empty.parquet"):
        with pytest.raises(InputError, match=f"{name}: no row in the 1 files of the items.*--allow-empty"):
            population.ingest(source=str(tmp_path / name), task=task)
    assert population.ingest(source=str(tmp_path / "empty.csv"), task=task, allow_empty=True) == 0
    assert population.rows("histories") == []


def test_frames_of_all_libraries_go_in_as_files_do(population, tmp_path):
    rows = [note(f"u{n}", str(n)) for n in range(3)]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    indexed = pd.DataFrame(columns).set_index("user_id", drop=False)
    indexed.index.name = None
    arrow = pa.table(columns)
    frames = {
        "pandas": indexed, "polars": pl.DataFrame(columns), "arrow": arrow, "reader": arrow.to_reader(),
        "ray": ray.data.from_arrow(arrow),
    }  # fmt: skip
    want = {(f"u{n}", str(n), f"text {n}") for n in range(3)}
    for name, frame in frames.items():
        place = str(tmp_path / name)
        code = ingest_frame(frame, place, population.task(NOTES), buckets=2, run_dir=str(tmp_path / f"{name}-run"))
        assert code == 0, name
        found = tables.open_table(place, "histories").snapshot(complete=True).read().to_pylist()
        assert {(row["user_id"], row["item_id"], dict(row["fields"])["text"]) for row in found} == want, name
        assert {len(row["fields"]) for row in found} == {2}, name  # text and mood, and no index
        assert not Storage(place).list("_frames"), name
    place, again = str(tmp_path / "again"), {"run_id": "night", "buckets": 2, "run_dir": str(tmp_path / "night")}
    for attempt in range(2):  # one run, begun again, beside what a killed try has left
        (tmp_path / "again/_frames/night/source").mkdir(parents=True)
        (tmp_path / "again/_frames/night/source/old.parquet").write_bytes(b"no table")
        assert ingest_frame(ray.data.from_arrow(arrow), place, population.task(NOTES), **again) == 0, attempt
        assert tables.open_table(place, "histories").snapshot(complete=True).rows == 3
        assert not Storage(place).list("_frames")
        shutil.rmtree(tmp_path / "again/_frames", ignore_errors=True)
    (tmp_path / "again/_frames/other").mkdir(parents=True)
    (tmp_path / "again/_frames/other/rows.parquet").write_bytes(b"of another run")
    with pytest.raises(InputError, match="run_id"):
        ingest_frame(arrow, place, population.task(NOTES), run_id=".")
    assert Storage(place).list("_frames") == ["_frames/other/rows.parquet"]
    with pytest.raises(InputError, match="list is no table"):
        ingest_frame([1], str(tmp_path / "x"))


def test_what_a_worker_refuses_of_a_frame_is_an_input_error_too(population, tmp_path):
    asked = pa.table({"request_id": ["r"], "user_id": ["u1"], "input": ["How?"], "owner_id": ["another"]})
    with pytest.raises(InputError, match="^[^\n]*: parts: requests name an owner_id [^\n]* divide the files yourself$"):
        ingest_frame(
            pa.Table.from_pylist([note(f"u{n}", str(n)) for n in range(20)]), str(tmp_path / "t"),
            population.task(NOTES), requests=asked, parts={"a": 0.5, "b": 0.5}, part="a", buckets=2,
            run_dir=str(tmp_path / "run"),
        )  # fmt: skip


def test_a_run_id_stands_for_the_form_and_the_query_too(population, tmp_path):
    source, task = lines(tmp_path / "a.jsonl", [note("u", "1"), note("v", "2")]), population.task(NOTES)
    query = "select * from source where user_id = 'u'"
    assert population.ingest(source=source, task=task, query=query, run_id="one") == 0
    assert population.ingest(source=source, task=task, query=query, run_id="one") == 0
    assert set(population.items()) == {"u"} and population.report["already_there"] == 1
    with pytest.raises(InputError, match="query: .*now not there"):
        population.ingest(source=source, task=task, run_id="one")
