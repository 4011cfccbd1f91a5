"""`ingest --check`: what a file holds and how it would read, in seconds, without Ray, and in no log."""

import json
import re
import shlex
from collections import Counter

import pytest
import yaml

from infra import session
from pipelines import options
from pipelines.__main__ import main
from pipelines.ingest.config import IngestConfig
from pipelines.lines.config import QuickstartConfig
from pplug import tasks
from tests.pipelines.population import Population
from tests.pipelines.reviews import reviews, write_csv


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def check(capsys, *words: str, code: int = 0) -> str:
    assert main(["ingest", "--check", *words]) == code
    found = capsys.readouterr()
    return found.out if code == 0 else found.err


def test_a_csv_is_told_in_full_and_nothing_is_written(here, capsys, monkeypatch):
    rows = reviews(20, 7)
    write_csv(here / "reviews.csv", rows)
    monkeypatch.setattr(session, "start", None)  # it would not survive a call
    text = check(capsys, "reviews.csv")
    assert [path.name for path in here.iterdir()] == ["reviews.csv"]
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0].startswith("files: 1 of format csv") and "delimiter ," in lines[0]
    assert "user_id <- user_id the name is ours" in lines
    assert "occurred_at <- timestamp 140 of 140 rows have a time there" in lines
    assert any(line.startswith("text <- title, text ") for line in lines)
    assert "target <- rating 5 values, which are numbers, a rating" in lines
    for number, count in Counter(row["rating"] for row in rows).items():
        assert any(f"{number} {count}" in line for line in lines if line.startswith("items per label"))
    assert "items per user: from 7 to 7, median 7" in lines
    assert sum(line.startswith("--- u") for line in lines) == 3
    shown = [line for line in lines if re.match(r"item \d: ", line)]
    every = {f"item {r['rating']}: {r['title']}. {r['text']}" for r in rows if r["title"]}
    every |= {f"item {r['rating']}: {r['text']}" for r in rows if not r["title"]}
    assert len(shown) == 3 and set(shown) <= every
    assert "max_output_tokens: 16" in lines, "the task as it is filled"


def test_would_be_rejects_are_told_with_their_place(here, capsys):
    rows = reviews(6, 5)
    rows[3]["user_id"], rows[7]["timestamp"], rows[9]["text"], rows[9]["title"], rows[5]["rating"] = (
        "",
        "soon",
        "",
        "",
        "",
    )
    write_csv(here / "reviews.csv", rows)
    text = check(capsys, "reviews.csv", "--columns", "occurred_at=timestamp")
    for reason, line in {"missing_id": 5, "bad_date": 9, "empty_text": 11}.items():
        after = text[text.index(f"rejected, {reason}: 1") :].splitlines()[1]
        assert reason != "bad_date" or "): occurred_at: no ISO date" in after
        assert f"line {line} " in after, after
    assert (
        "labels: [1, 2, 3, 4, 5]" in text and "items without an answer, which are told but never asked for: 1" in text
    )


def test_what_would_end_the_ingest_with_code_3_is_told(here, capsys):
    rows = [{"user": f"u{n % 5}", "id": str(n), "text": f"some words about bread {n}"} for n in range(20)]
    rows += [rows[3] | {"text": "other words about bread"}, rows[4]]  # the one replaces its item, the other repeats it
    (here / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n{\n")
    words = ["r.jsonl", "--columns", "item_id=id"]
    text = check(capsys, *words)
    assert "rejected, duplicate_item_id: 1\n" in text and "rejected, bad_json: 2\n" in text
    line = "3 of 24 rows would be rejected, more than max_reject_fraction=0.1 allows: ingest would end with code 3"
    assert line in text
    assert "would be rejected" not in check(capsys, *words, "--max-reject-fraction", "0.125")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("e.csv", "", "e.csv: the file is empty"),
        ("e.jsonl", "", "e.jsonl: the file is empty"),
        ("h.csv", "user_id,text\n", "h.csv: there are names (user_id, text) and no rows"),
    ],
)
def test_a_file_without_rows_is_told(here, capsys, name, content, says):
    (here / name).write_text(content)
    assert says in check(capsys, name, code=2)


def test_a_config_is_written_that_ingest_takes(here, capsys):
    rows = reviews(20, 8)
    given = [
        {"Reviewer": r["user_id"], "When": r["timestamp"], "Body Text": r["text"], "Stars": r["rating"]} for r in rows
    ]
    write_csv(here / "my reviews.csv", given)
    check(capsys, "my reviews.csv", "--write-config", "mine")
    task, config = (yaml.safe_load((here / name).read_text()) for name in ("mine-task.yaml", "mine.yaml"))
    assert task == {"name": "my reviews", "text": "body_text", "target": "Stars", "labels": [1, 2, 3, 4, 5]}
    assert config == {
        "tables": "mine-tables", "source": "my reviews.csv", "task": "mine-task.yaml", "derive_requests": 2,
        "columns": {"user_id": "Reviewer", "occurred_at": "When", "body_text": "Body Text", "Stars": "Stars"},
    }  # fmt: skip
    assert options.check(IngestConfig, options.read(["--config", "mine.yaml"], IngestConfig)).part is None
    assert tasks.load("mine-task.yaml").fields == ("Stars", "body_text")
    check(capsys, "my reviews.csv", "--write-config", "mine.yaml")
    (here / "mine-task.yaml").write_text("name: other\n")
    assert "is there already" in check(capsys, "my reviews.csv", "--write-config", "mine", code=2)


def test_a_file_without_answers_or_without_a_history_is_told_so(here, capsys):
    rows = [{"user_id": f"u{n % 20}", "words": f"some words about thing {n}", "Sterne": f"{n}*"} for n in range(60)]
    write_csv(here / "weird.csv", rows)
    assert check(capsys, "weird.csv").endswith("  python -m pipelines quickstart weird.csv --columns target=COLUMN\n")
    for each, told in ((1, 1), (2, 0)):
        write_csv(here / "r.csv", reviews(20, each))
        assert check(capsys, "r.csv").count("a request that sees no history") == told


def test_what_is_given_is_kept(here, capsys):
    write_csv(here / "r.csv", reviews(5, 6))
    (here / "t.yaml").write_text("name: titles\ntext: text\ntarget: title\n")
    text = check(capsys, "r.csv", "--task", "t.yaml", "--columns", "user_id=item_id", "--write-config", "n")
    assert "user_id      <- item_id" in text and "Write the title of this text" in text
    config = yaml.safe_load((here / "n.yaml").read_text())
    assert config["task"] == "t.yaml" and config["columns"]["user_id"] == "item_id"
    assert not (here / "n-task.yaml").exists()


def test_what_is_given_as_nothing_is_kept_too(here, capsys):
    write_csv(here / "r.csv", reviews(5, 6))
    check(capsys, "r.csv", "--max-reject-fraction", "0", "--derive-requests", "0", "--write-config", "n")
    config = yaml.safe_load((here / "n.yaml").read_text())
    assert config["max_reject_fraction"] == 0 and config["derive_requests"] == 0


def test_the_commands_that_are_shown_are_taken(here, capsys):
    write_csv(here / "r.csv", reviews(20, 8))
    (here / "bare.csv").write_text("".join((here / "r.csv").read_text().splitlines(keepends=True)[1:]))
    given = ["--csv.header", "false", "--columns", "user_id=column0,occurred_at=column2"]
    [shown] = [line for line in check(capsys, "bare.csv", *given).splitlines() if " quickstart " in line]
    words = shlex.split(shown)[4:]
    assert options.check(QuickstartConfig, options.read(words, QuickstartConfig)).csv == {"header": "false"}
    words = ["--source", *words, "--tables", "t"]
    assert options.check(IngestConfig, options.read(words, IngestConfig)).csv.header is False


def test_a_text_that_is_no_finite_number_is_no_rating(here, capsys):
    rows = [{"user": f"u{n % 9}", "words": f"some words about {n}", "rating": "nan" if n % 7 == 0 else f"{n % 5}.0"}
            for n in range(180)]  # fmt: skip
    write_csv(here / "r.csv", rows)
    check(capsys, "r.csv", "--write-config", "n")
    task = tasks.load("n-task.yaml")
    assert task.metric != "rating" or "nan" not in task.labels


def test_labels_beyond_the_first_rows_are_found_by_the_ingest(here, capsys, monkeypatch):
    monkeypatch.setattr("pipelines.ingest.check.SAMPLE_ROWS", 1)
    write_csv(here / "r.csv", reviews(5, 6))
    with (here / "more.csv").open("w") as file:
        file.write((here / "r.csv").read_text())
    check(capsys, "r.csv", "--check", "more.csv", "--write-config", "two")
    config = yaml.safe_load((here / "two.yaml").read_text())
    assert config["labels"] == "infer" and config["source"] == ["r.csv", "more.csv"]


def test_spellings_of_a_label_are_one(here, capsys):
    rows = [{"user": f"u{n % 3}", "text": f"some words {n}", "mood": mood}
            for n, mood in enumerate(["good", "Good ", "good", "bad", "BAD", "bad"] * 3)]  # fmt: skip
    write_csv(here / "r.csv", rows)
    text = check(capsys, "r.csv")
    assert "labels: [bad, good]" in text
    assert "items per label: good 9, bad 9\n" in text


@pytest.mark.parametrize(
    ("rows", "words", "says"),
    [
        ([{"a": 1.5, "b": "x y z"}], [], "no column looks like a user"),
        ([{"user": "u", "n": 3}, {"user": "u", "n": 4}], [], "no column tells about an item in words"),
        (
            [{"user": "u", "text": "some words of a user"}],
            ["--columns", "user_id=uzer"],
            "no column 'uzer' for user_id",
        ),
        ([{"user": "u", "text": "some words of a user"}], ["--source", "x"], "leave source out"),
    ],
)
def test_what_cannot_be_told_is_said(here, capsys, rows, words, says):
    write_csv(here / "r.csv", rows)
    assert says in check(capsys, "r.csv", *words, code=2)


def test_write_config_needs_a_check(capsys):
    assert main(["ingest", "--tables", "t", "--source", "s", "--write-config", "n"]) == 2
    assert "--check SOURCE" in capsys.readouterr().err


def test_lists_of_structs_are_pointed_at(here, capsys):
    row = {"user": "u", "profile": [{"id": "1", "text": "words", "mood": "good"}]}
    (here / "p.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"user": "v"}) + "\n")
    assert "--explode profile" in check(capsys, "p.jsonl", code=2)


def test_a_layout_that_names_all_itself_needs_no_mapping(here, capsys):
    profile = [{"id": "1", "text": "x", "title": "y"}]
    question = [{"id": "q", "input": "i", "profile": profile}]
    (here / "train_questions.json").write_text(json.dumps(question))
    text = check(capsys, ".")
    assert "no mapping is needed" in text
    size = (here / "train_questions.json").stat().st_size
    assert f"files: 1 of format lamp, {size} bytes\n  {here}/train_questions.json\n" in text
    assert "  python -m pipelines ingest --tables NAME --source . --split train\n" in text
    assert "no mapping to write; for a report run `lamp --config" in check(capsys, ".", "--write-config", "own", code=2)
    assert [path.name for path in here.iterdir()] == ["train_questions.json"]
    assert main(["quickstart", ".", "--run-dir", "q"]) == 2
    assert "run `lamp --config CONFIG --source FOLDER`" in capsys.readouterr().err


def texts(population: Population) -> dict[tuple[str, str], str]:
    items = population.rows("histories")
    return {(row["user_id"], row["item_id"]): dict(row["fields"])["text"] for row in items}


def test_rows_without_item_ids_are_the_same_in_every_ingest(here, capsys, ray_session):
    """The proposal is ingested as it is written, twice, and then with rows put before the others."""
    rows = [{name: row[name] for name in ("user_id", "timestamp", "text", "rating")} for row in reviews(8, 6)]
    twice = rows + rows[:3]
    write_csv(here / "r.csv", twice)
    assert "ids are made of each row's content" in check(capsys, "r.csv", "--write-config", "r")
    given = yaml.safe_load((here / "r.yaml").read_text())
    given.pop("tables")
    population = Population(here)
    given |= {"source": str(here / "r.csv"), "task": str(here / "r-task.yaml")}
    assert population.ingest(**given) == 0
    first = texts(population)
    assert Counter(first.values()) == Counter(row["text"] for row in rows) and len(first) == len(rows)
    assert population.report["planned"] == len(twice) + 8 * 2 and population.report["repeated"] == 3
    assert population.ingest(**given) == 0 and population.report["written"] == 0
    write_csv(here / "r.csv", [rows[0] | {"text": "another one, the newest", "timestamp": 1_760_000_000}, *twice])
    assert population.ingest(**given | {"derive_requests": 0}) == 0
    again = texts(population)
    assert population.report["written"] == 1 and first.items() <= again.items() and len(again) == len(first) + 1
