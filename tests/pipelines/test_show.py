"""Rows of tables as text on the screen: those that were asked for, in no log."""

import json

import pyarrow as pa
import pytest

from infra import job_log
from infra.job_log import JobLog
from infra.shards import shard_columns
from pipelines import tables
from pipelines.__main__ import main

BUCKETS = 4


def put(root: str, name: str, rows: list[dict], run_id: str = "r", complete: bool = True) -> None:
    """Writes rows into a table of a population, with nulls in the columns that they leave out."""
    spec = tables.spec_of(name)
    table = tables.open_or_create(root, name, BUCKETS if spec.bucketed else 1)
    if spec.bucketed:
        users = pa.array([row["user_id"] for row in rows])
        places = zip(rows, *(column.to_pylist() for column in shard_columns(users, BUCKETS)), strict=True)
        rows = [row | {"bucket": bucket, "user_key": key} for row, bucket, key in places]
    files = []
    for at in {row.get("bucket") for row in rows}:
        mine = [row for row in rows if row.get("bucket") == at]
        files += table.write(pa.Table.from_pylist(mine, schema=spec.schema), run_id)
    group = table.snapshot().version
    table.commit(files, run_id=run_id, group=group, mode="append", planned_on=group, complete=complete)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    root = str(tmp_path_factory.mktemp("population"))
    users = [f"user {n}" for n in range(12)]
    put(root, "histories", [
        {"user_id": user, "item_id": f"i{n}", "position": n,
         "fields": [("title", f"{user} title {n}"), ("bell", "\x1b[2Jx")]}
        for user in users for n in range(3)
    ])  # fmt: skip
    put(root, "requests", [
        {"user_id": user, "owner_id": user, "request_id": "q", "input": f"ask {user}?", "target": f"gold {user}"}
        for user in users
    ])  # fmt: skip
    for run in ("one", "two"):
        put(root, "generations", [
            {"user_id": user, "request_id": "q", "run_id": run, "method": method,
             "text": f"{run} {method} says {user}", "error": "too_long" if user == users[0] else None}
            for user in users for method in ("none", "plug")
        ], run_id=run)  # fmt: skip
    put(root, "rejects", [{"job": "ingest", "run_id": "r", "key": "a.csv@7", "reason": "bad_date", "detail": "d"}])
    put(root, "personas", [{"user_id": users[0], "n_items": 3, "mean_vector": [3.0, 4.0], "persona": None}])
    return root


def said(capsys, *words: str) -> str:
    assert main(["show", *words]) == 0
    return capsys.readouterr().out


def test_without_a_name_the_tables_are_listed(root, capsys):
    lines = said(capsys, "--tables", root).splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["generations", "48", "rows"], ["histories", "36", "rows"], ["personas", "1", "rows"],
        ["rejects", "1", "rows"], ["requests", "12", "rows"],
    ]  # fmt: skip


def test_a_users_rows_are_shown_and_no_others(root, capsys):
    text = said(capsys, "histories", "--tables", root, "--user-id", "user 7")
    assert [f"user 7 title {n}" in text for n in range(3)] == [True] * 3
    assert "user 1 " not in text and "user 11" not in text and "histories: 3 rows of 36 rows" in text
    assert "--- user 7 / i1" in text and "user_key" not in text


def test_what_would_steer_the_terminal_is_escaped(root, capsys):
    text = said(capsys, "histories", "--tables", root, "--rows", "1")
    assert "\x1b" not in text and "bell      \\x1b[2Jx" in text


def test_a_bucket_is_shown_as_far_as_asked(root, capsys):
    here = {row["user_id"] for row in tables.snapshot(root, "requests", {}).read(buckets=[2]).to_pylist()}
    text = said(capsys, "requests", "--tables", root, "--bucket", "2", "--rows", "100")
    assert {line[4:].split(" / ")[0] for line in text.splitlines() if line.startswith("--- ")} == here
    assert said(capsys, "requests", "--tables", root, "--rows", "4").count("--- ") == 4


def test_replies_come_with_their_request_and_run(root, capsys):
    text = said(capsys, "replies", "--tables", root, "--run", "two", "--rows", "3")
    assert text.count("--- ") == 3 and "one none" not in text and "(two)" not in text
    text = said(capsys, "replies", "--tables", root, "--user-id", "user 3")
    for part in ("ask user 3?", "gold user 3", "none (one)", "one none says user 3", "two plug says user 3"):
        assert part in text
    assert "error: too_long" in said(capsys, "replies", "--tables", root, "--user-id", "user 0")


def test_the_replies_of_a_request_are_all_shown_whatever_file_they_lie_in(tmp_path, capsys):
    users = [f"u{n}" for n in range(300)]
    asked = [{"user_id": user, "owner_id": user, "request_id": "q", "input": "ask"} for user in users]
    put(str(tmp_path), "requests", asked)
    for method in ("none", "plug"):
        rows = [{"user_id": user, "request_id": "q", "run_id": "r", "method": method, "text": f"{method} says"}
                for user in users]  # fmt: skip
        put(str(tmp_path), "generations", rows)
    text = said(capsys, "replies", "--tables", str(tmp_path), "--run", "r", "--rows", "1")
    assert (text.count("--- "), text.count("none says"), text.count("plug says")) == (1, 1, 1)


def test_rejects_and_vectors_are_told_in_short(root, capsys):
    assert "--- a.csv@7" in (text := said(capsys, "rejects", "--tables", root)) and "bad_date" in text
    assert "2 values, norm 5" in said(capsys, "personas", "--tables", root)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["histries"], "there is no table histries"),
        (["rejects", "--user-id", "u"], "not to users"),
        (["requests", "--run", "r"], "run per row"),
        (["requests", "--user-id", "u", "--bucket", "1"], "user_id or bucket"),
    ],
)
def test_a_wrong_choice_is_refused(root, capsys, words, says):
    assert main(["show", *words, "--tables", root]) == 2
    assert says in capsys.readouterr().err


def test_a_place_without_tables_is_named_with_what_to_give(tmp_path, capsys):
    assert main(["show", "histories", "--tables", str(tmp_path / "nothere")]) == 2
    assert "here; give the folder or address that `ingest` was given\n" in capsys.readouterr().err


def test_texts_that_are_shown_are_in_no_log(tmp_path, capsys):
    """Neither a job's log nor that of a job that runs it, and whatever the filter thinks of the line."""
    text = "2026-11-26 00:42:38,624 WARNING x.py:7 -- words of a user\nTraceback (most recent call last):"
    with JobLog("quickstart") as line, JobLog("generate") as job:
        line.move_to(str(tmp_path), "line.log")
        job.move_to(str(tmp_path))
        print("own line")
        job_log.show(text)
    assert capsys.readouterr().out == f"own line\n{text}\n"
    for name in ("line.log", "job.log"):
        log = (tmp_path / name).read_text()
        assert "own line" in log and "words of a user" not in log and "Traceback" not in log


def test_show_starts_no_ray(root):
    import subprocess
    import sys

    probe = (
        "import sys; from pipelines.__main__ import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'ray', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe, "show", "replies", "--tables", root], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "0 []"
    assert json.dumps(done.stderr) == '""'
