"""Erase leaves tables below its folders to their own log; token ids, pages and whole lines of its users go."""

import json
import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra import shards
from infra.errors import InputError
from infra.search import Needles
from infra.storage import Storage
from pipelines import tables
from pipelines.__main__ import main
from pipelines.upkeep import compact, erase, scrub
from pipelines.upkeep.config import CompactConfig, EraseConfig
from pplug.history import input_hash, text_hash
from tests.pipelines.test_erase import People, others, own, people  # noqa: F401 (a fixture)


def test_tables_below_a_folder_change_by_their_own_log_alone(tmp_path, ray_session, capsys):
    """The folders of `erase` are `runs` where nothing is given, and `quickstart` and `lamp` put tables there."""
    mine, sibling = People(tmp_path / "runs" / "mine").fill(), People(tmp_path / "runs" / "sibling").fill()
    before, of_sibling = mine.everything(), sibling.everything()
    both = {"tables": mine.tables, "folders": (str(tmp_path / "runs"),), "user_id": "user-1"}
    assert mine.erase(**both) == 1  # the other population still holds the user
    said = capsys.readouterr().out
    assert "erase the users from other tables" in said
    survivors = mine.report["erasure"]["survivors"]
    assert survivors and all("/sibling/tables/" in one for one in survivors)
    assert mine.everything() == others(before, ["user-1", "q9"]) and sibling.everything() == of_sibling
    dropped = mine.report["erasure"]["rows_dropped"]
    assert dropped == {name: len(before[name]) - len(rows) for name, rows in mine.everything().items()}

    assert sibling.erase(user_id="user-1", folders=(str(tmp_path / "runs" / "sibling" / "runs"),)) == 0
    assert mine.erase("again", **both, confirm_absent=True) == 0  # words that others wrote in other tables are theirs
    for population in (mine, sibling):
        config = CompactConfig(tables=population.tables, run_id="compact", run_dir=str(tmp_path / "compact"))
        assert compact.run(config) == 0  # it compares the rows of each file with the log
        assert population.everything() == others(before, ["user-1", "q9"])
        for name in tables.names(population.tables):
            keys = tables.open_table(population.tables, name).snapshot().read().to_pydict().get("user_key", [])
            assert shards.user_key("user-1") not in keys


def test_words_as_token_ids_go_and_a_file_of_that_name_with_other_columns_stays(people):  # noqa: F811
    folder = people.folder / "runs" / "base" / "examples" / "killed"
    folder.mkdir(parents=True)
    tokens = pa.array([[1, 2, 3]], pa.list_(pa.int32()))
    pq.write_table(pa.table({"prompt": tokens, "answer": tokens}), folder / "examples-0.parquet")
    pq.write_table(pa.table({"prompt": ["a dog"], "n": [1]}), folder / "examples-1.parquet")
    draft = Path(people.tables) / f".{'a' * 32}.tmp"  # of a killed job, too, which no table's vacuum finds
    draft.write_text("x")
    os.utime(draft, (time.time() - 7200,) * 2)
    assert people.erase(user_id="user-1") == 0 and not draft.exists()
    assert [path.name for path in folder.iterdir()] == ["examples-1.parquet"]


def test_words_as_token_ids_that_may_not_be_deleted_end_the_erase(s3_server, s3):
    """The proof reads texts, and would find nothing in such a file."""
    with Storage(s3).open_output("examples/examples-0.parquet") as out:
        tokens = pa.array([[1, 2]], pa.list_(pa.int32()))
        pq.write_table(pa.table({"prompt": tokens, "answer": tokens}), out)
    s3_server.fault = lambda environ: "403" if environ["REQUEST_METHOD"] == "DELETE" else None
    stage = scrub.Scrub(Needles(frozenset()), frozenset())
    with pytest.raises(RuntimeError, match=r"a file could not be deleted \(PermissionError\); let these credentials"):
        stage(pa.table({"root": [s3], "name": ["examples/examples-0.parquet"]}))


def test_rows_of_others_that_hold_a_word_of_the_users_stay(tmp_path):
    """A title of one word stands in texts of others: it goes as a whole value, and inside a text where it is long."""
    long = "the cat that only one user has seen"
    rows = [
        ("ann", "Sunset"), ("bob", "Walk at Sunset, by the sea"), ("bob", "Sunset Boulevard"), ("bob", "another"),
        ("bob", f"she wrote: {long}"), ("bob", "asked by user-ann, twice"),
    ]  # fmt: skip
    found = [{"user_id": user, "text": text} for user, text in rows]
    pq.write_table(pa.Table.from_pylist(found), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    golds = [{"id": f"q{at}", "output": row["text"]} for at, row in enumerate(found)]
    (tmp_path / "x.json").write_text(json.dumps({"golds": golds}))
    needles = Needles(frozenset({"Sunset", long, "user-ann"}), ids=frozenset({"ann"}), names=frozenset({"user-ann"}))
    names = ["x.parquet", "x.jsonl", "x.json"]
    scrub.Scrub(needles, frozenset())(pa.table({"root": [str(tmp_path)] * 3, "name": names}))
    assert pq.read_table(tmp_path / "x.parquet").to_pylist() == found[1:4]
    assert [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()] == found[1:4]
    assert json.loads((tmp_path / "x.json").read_text())["golds"] == golds[1:4]
    left = scrub.SearchFiles(needles)(pa.table({"root": [str(tmp_path)] * 3, "name": names})).to_pylist()
    assert [row["hits"] for row in left] == [0, 0, 0]


def test_an_id_that_is_somebodys_item_or_request_too_takes_no_row_of_others(tmp_path):
    """Items are numbered per user, as users are: user 1 goes, and the items 1 of others stay."""
    pairs = [("1", "1"), ("2", "1"), ("2", "2"), ("3", "1")]
    rows = [{"user_id": user, "user_key": shards.user_key(user), "item_id": item} for user, item in pairs]
    table = str(tmp_path / "histories.parquet")
    pq.write_table(pa.Table.from_pylist(rows), table)
    one = scrub.Someone(frozenset({"1"}), frozenset({shards.user_key("1")}))
    found = pa.concat_tables(scrub.OthersValues(one, frozenset({"1"}))(pa.table({"uri": [table]})))
    shared = set(found["value"].to_pylist())
    export = [{"user_id": user, "item_id": item, "text": "x"} for user, item in pairs]
    pq.write_table(pa.Table.from_pylist(export), tmp_path / "export.parquet")
    needles = Needles(frozenset({"1"} - shared), ids=one.ids, names=one.ids)
    scrub.Scrub(needles, frozenset())(pa.table({"root": [str(tmp_path)], "name": ["export.parquet"]}))
    assert pq.read_table(tmp_path / "export.parquet").to_pylist() == export[1:]


def test_what_killed_jobs_left_of_files_that_nobody_can_read_goes(tmp_path):
    """Predictions that end in the middle, and drafts: nobody can tell whose words they hold. A young draft may be that
    of a job at work: it is left to the proof, which fails of it."""
    whole = json.dumps({"task": "LaMP_2", "golds": [{"id": "r1", "output": "comedy"}]})
    old, young = f"samples/.{'a' * 32}.tmp", f"samples/.{'b' * 32}.tmp"
    files = {"cut.json": whole[:-9], "empty.json": whole[:30], "whole.json": whole, "other.json": '{"golds": ['}
    files |= {old: "x", young: "x"}
    (tmp_path / "samples").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    os.utime(tmp_path / old, (time.time() - 3700,) * 2)
    needles = Needles(frozenset({"thriller"}), ids=frozenset({"ann"}))
    given = pa.table({"root": [str(tmp_path)] * len(files), "name": list(files)})
    what = scrub.Scrub(needles, frozenset({"r7"}))(given)["what"].to_pylist()
    assert what == ["deleted", "deleted", "", "", "deleted", ""]
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"whole.json", "other.json", young}
    found = scrub.SearchFiles(needles)(given).to_pylist()
    assert {row["name"] for row in found if row["hits"]} == {young}


@pytest.mark.parametrize("user_id", ["", " "])
def test_an_empty_id_is_refused(user_id):
    with pytest.raises(ValueError, match="user_id is empty"):
        EraseConfig(tables="t", user_id=user_id)


def test_names_of_fields_are_nobodys_words(tmp_path):
    key = shards.user_key("ann")
    fields = pa.array([[("abstract", "x y")]], pa.map_(pa.string(), pa.string()))
    pq.write_table(pa.table({"user_key": [key], "fields": fields}), tmp_path / "items.parquet")
    stage = scrub.OwnValues(scrub.Someone(frozenset({"ann"}), frozenset({key})))
    rows = pa.concat_tables(stage(pa.table({"uri": [str(tmp_path / "items.parquet")]}))).to_pylist()
    found = {(row["kind"], row["value"]) for row in rows}
    assert found == {("text", "x y"), ("text", key), ("user", key)}


def test_hashes_of_the_users_rows_are_no_words():
    found = {
        value: erase.is_hash(value) for value in (input_hash("a cat"), text_hash({"a": "b"}), "Sunset", "deadbeef")
    }
    assert list(found.values()) == [True, True, False, False]


def test_files_from_before_a_rebucket_are_a_users_too():
    """rebucket multiplies the number of buckets: the user of bucket 5 of 8 had bucket 1 of 4, 1 of 2 and 0 of 1."""
    user = next(user for user in map(str, range(1000)) if shards.bucket_of(user, 8) == 5)
    ever = {shards.bucket_of(user, count) for count in (1, 2, 4, 8)}
    assert erase.buckets_ever(8, [shards.user_key(user)]) == ever == {0, 1, 5}


def test_a_line_with_a_line_separator_in_a_text_goes_as_a_whole(people):  # noqa: F811
    path = people.folder / "export" / "lines.jsonl"
    lines = [
        {"user_id": user, "text": f'He said "go"\u2028then {what}\u0085'}
        for user, what in (("7", "left"), ("8", "stayed"))
    ]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\r\n" for line in lines), newline="")
    assert people.erase(user_id="7") == 0
    assert path.read_bytes().decode() == json.dumps(lines[1], ensure_ascii=False) + "\r\n"
    assert own("7", 0) not in path.read_text()


def test_a_page_goes_as_a_whole_and_another_stays(people):  # noqa: F811
    """The page of an evaluation has texts with entities, and replies that nobody understood with their user's id."""
    folder = people.folder / "runs" / "night"
    quoted = own("user-1", 0).replace("a", "&#97;", 1)
    (folder / "report.html").write_text(f"<p>{quoted}</p>")
    (folder / "short.html").write_text('<span data-user="7">its first words</span>')
    (folder / "other.html").write_text('<span data-user="77">its first words</span>')
    (people.folder / "gone.txt").write_text("user-1\n7\n")
    assert people.erase(users=str(people.folder / "gone.txt")) == 0
    assert [path.name for path in folder.glob("*.html")] == ["other.html"]


def test_rejects_in_files_that_are_called_after_a_user_go(people):  # noqa: F811
    places = ["in/user_id=7/part-0.parquet row 3", "in/7.jsonl line 9", "in/user_id=77/part-0.parquet row 7"]
    row = {"job": "ingest", "run_id": "later", "reason": "empty_text", "detail": "text"}
    people.put("rejects", "later", [row | {"key": place} for place in places])
    assert people.erase(user_id="7") == 0
    left = [row["key"] for row in people.everything()["rejects"] if row["job"] == "ingest"]
    assert left == places[2:]


def everything_below(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("named", ["flag", "config"])
def test_a_folder_that_is_named_and_not_there_ends_it_before_anything_is_erased(people, capsys, named):  # noqa: F811
    root = people.folder
    before = everything_below(root)
    words = ["erase", "--tables", people.tables, "--user-id", "user-1", "--run-dir", str(root / "runs" / "erase")]
    if named == "flag":
        words += ["--folders", f"{root}/runs,{root}/exports"]  # it is called export
    else:
        (root.parent / f"{root.name}.yaml").write_text(f"folders: [{root}/runs, {root}/exports]\n")
        words += ["--config", str(root.parent / f"{root.name}.yaml")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"there is no folder {root}/exports, and nothing has been erased yet" in said and "--folders ''" in said
    assert everything_below(root) == before


def test_the_default_folder_that_is_not_there_is_told_and_recorded(people, capsys, monkeypatch):  # noqa: F811
    """Whoever has tables alone has no run folder here, and erases without naming any."""
    (people.folder / "elsewhere").mkdir()
    monkeypatch.chdir(people.folder / "elsewhere")
    words = ["--tables", people.tables, "--user-id", "user-1", "--run-id", "first"]  # its own log makes `runs`
    assert main(["erase", *words]) == 0
    said, missing = capsys.readouterr().out, str(people.folder / "elsewhere" / "runs")
    assert f"erase: there is no folder {missing}, so that the tables alone are searched" in said
    report = json.loads((people.folder / "elsewhere" / "runs" / "first" / "report.json").read_text())
    assert report["erasure"]["folders_not_there"] == [missing] and report["erasure"]["folders_searched"] == []
    assert f"erase: {report['erasure']['files_searched']} files searched in {people.tables}\n" in said

    assert people.erase("second", user_id="other") == 0
    record, given = people.report["erasure"], [str(people.folder / "runs"), str(people.folder / "export")]
    assert (record["folders_searched"], record["folders_not_there"]) == (given, [])
    assert f" files searched in {people.tables}, {given[0]}, {given[1]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("folders", [None, "runs,s3://b/exports", "./runs"])
def test_a_submitted_job_refuses_folders_of_rays_copy(tmp_path, monkeypatch, folders):
    copied = tmp_path / "working_dir_files" / "_ray_pkg_0a1b"
    (copied / "runs").mkdir(parents=True)  # submitted along, and not the folder that jobs write to
    monkeypatch.chdir(copied)
    config = {} if folders is None else {"folders": tuple(folders.split(","))}
    with pytest.raises(InputError, match="runs: counts from the current folder, .* such as s3://bucket/runs"):
        erase.run(erase.Config(tables="/nowhere", user_id="user-1", run_dir="/nowhere/erase", **config))


def test_no_folder_may_be_named_in_a_submitted_job(people, monkeypatch):  # noqa: F811
    copied = people.folder / "working_dir_files" / "_ray_pkg_0a1b"
    copied.mkdir(parents=True)
    monkeypatch.chdir(copied)
    words = ["--tables", people.tables, "--user-id", "user-1", "--run-dir", str(people.folder / "runs" / "erase")]
    assert main(["erase", *words, "--folders", ""]) == 0
    report = json.loads((people.folder / "runs" / "erase" / "report.json").read_text())
    assert (report["erasure"]["folders_searched"], report["erasure"]["folders_not_there"]) == ([], [])
