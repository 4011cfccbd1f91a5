"""ingest of values as people have them: nothing wrong in silence, from the files to the tables and the report."""

import gzip
import json
from datetime import UTC, datetime

import pytest
import yaml

from infra.errors import InputError
from infra.job_log import JobLog
from infra.storage import Storage
from pipelines import tables
from tests.pipelines.population import NOTES

pytestmark = pytest.mark.usefixtures("ray_session")


def note(user, item, at=None, mood="good", **more) -> dict:
    row = {"user_id": user, "item_id": item, "text": f"text {item}", "mood": mood, **more}
    return row | ({"occurred_at": at} if at is not None else {})


def write(population, rows, name="items.jsonl") -> str:
    path = population.folder / name
    path.write_bytes(b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows))
    return str(path)


def times(population, user) -> list:
    return [row["occurred_at"] and row["occurred_at"].strftime("%d") for row in population.items()[user]]


def test_a_mapped_time_column_that_no_row_has_is_an_error_and_nothing_is_committed(population):
    source, task = write(population, [note("u", "1", published="2024-01-01")]), population.task(NOTES)
    with pytest.raises(InputError, match="no row has the column 'publishd', which --columns maps to occurred_at"):
        population.ingest(source=source, task=task, columns={"occurred_at": "publishd"})
    histories = tables.open_table(population.tables, "histories")
    assert histories.snapshot().rows == 0 and "complete" not in histories.snapshot().metadata
    assert population.ingest(source=source, task=task) == 0  # without a mapping: a warning that names the column
    (warning,) = population.report["warnings"]
    assert "no item has a time" in warning and "published may be one: --columns occurred_at=published" in warning


def test_an_item_without_a_date_leaves_its_user_timed_and_the_same_file_again_is_there(population):
    rows = [note("u", "1"), note("u", "2", at="2024-01-02"), note("u", "3"), note("u", "4", at="2024-01-04")]
    rows += [note("v", "1"), note("w", "1", at=2024)]
    source, task = write(population, rows), population.task(NOTES)
    assert population.ingest(source=source, task=task, derive_requests=1) == 0
    assert times(population, "u") == ["02", "02", "04", "04"] and times(population, "v") == [None]
    assert population.report["undated_filled"] == 2
    found = population.report["source"]
    assert (found["items_timed"], found["items_untimed"], found["users"]) == (3, 3, 3)
    assert population.items()["w"][0]["occurred_at"] == datetime(2024, 1, 1, tzinfo=UTC)
    before = {file.path for file in tables.open_table(population.tables, "histories").snapshot().files}
    assert population.ingest(source=source, task=task, derive_requests=1) == 0
    assert (population.report["written"], population.report["already_there"]) == (0, 9)
    assert {file.path for file in tables.open_table(population.tables, "histories").snapshot().files} == before
    # an item of before whose user gets its first date is filled too, and its row is not called new
    assert population.ingest(source=write(population, [note("v", "2", at="2024-01-09")]), task=task) == 0
    assert times(population, "v") == ["09", "09"] and population.report["written"] == 1
    # set aside by choice: the user's other times stay
    source = write(population, [note("x", "1", at="2024-01-01"), note("x", "2"), note("y", "1")])
    assert population.ingest(source=source, task=task, undated="reject", max_reject_fraction=0.5) == 0
    assert times(population, "x") == ["01"] and times(population, "y") == [None]
    assert population.rejects() == {"undated": 1}


def test_labels_outside_the_list_and_rows_given_twice_are_said_at_ingest(population, capsys):
    rows = [note("u", "1", mood="GOOD "), note("u", "2", mood="odd"), note("v", "1"), note("v", "1")]
    rows += [b"secret nonsense", note("w", "1", more={"nested": 1})]
    source, task = write(population, rows), population.task(NOTES)
    with JobLog("ingest") as log:
        log.move_to(str(population.folder))
        code = population.ingest(source=source, task=task, derive_requests=2, max_reject_fraction=0.5, show_text=True)
    assert code == 0
    assert population.items()["u"][0]["fields"]["mood"] == "good"
    assert sorted(row["target"] for row in population.rows("requests")) == ["good"] * 3
    report, told = population.report, capsys.readouterr().out
    assert report["rejected"] == {"bad_json": 1, "target_outside_labels": 1}
    assert (report["repeated"], report["already_there"]) == (1, 1)
    assert "0 already there, 1 given twice word for word" in told and "1 rows given twice" in told
    found = report["source"]
    assert (
        found["labels"] == {"good": 4, "(no label of the task)": 1}
        and found["targets"] == {"good": 3}
        and found["files"] == 1
    )
    assert found["left_out"] == {"more": 1}
    offset = sum(len(json.dumps(row)) + 1 for row in rows[:4])
    assert found["rejects"]["bad_json"]["examples"][0]["place"] == f"items.jsonl line 5 (byte {offset})"
    assert "secret nonsense" in told and "target_outside_labels: 1" in told
    everywhere = [path.read_bytes() for path in population.folder.rglob("*.json")]
    everywhere.append((population.folder / "job.log").read_bytes())
    assert everywhere and not any(b"secret" in text for text in everywhere)
    assert not any("secret" in str(row) for row in population.rows("rejects"))


def test_labels_are_inferred_and_stored_with_the_histories_and_grow_with_later_rows(population):
    task = population.task({name: value for name, value in NOTES.items() if name != "labels"})
    source = write(population, [note("u", "1", mood="b"), note("u", "2", mood="a"), note("v", "1", mood=" c ")])
    with pytest.raises(InputError, match="task notes: metric classification needs labels.*--labels infer"):
        population.ingest(source=source, task=task)
    assert population.ingest(source=source, task=task, labels="infer", derive_requests=1) == 0
    assert sorted(row["target"] for row in population.rows("requests")) == ["a", "c"]

    def stored() -> tuple[str, ...]:
        return tables.task_entry(None, tables.open_table(population.tables, "histories").snapshot(complete=True)).labels

    assert stored() == ("a", "b", "c")
    later = write(population, [note("w", "1", mood="d")])
    assert population.ingest(source=later, task=task, labels="infer") == 0 and stored() == ("a", "b", "c", "d")


def test_published_dates_of_lamp_that_are_bare_years_go_in(population, tmp_path):
    paper = {"title": "t", "abstract": "a", "id": "1", "date": "2015"}
    old = paper | {"id": "2", "date": 1965}
    asked = [{"id": "9", "input": 'title for "x"', "profile": [paper, old]}]
    (tmp_path / "lamp").mkdir()
    with gzip.open(tmp_path / "lamp" / "dev_questions.json.gz", "wt") as file:
        json.dump(asked, file)
    entry = {
        "name": "papers",
        "item": "{title}",
        "item_without_label": "{abstract}",
        "metric": "text",
        "target": "title",
    }
    (tmp_path / "papers.yaml").write_text(yaml.safe_dump(entry))
    assert population.ingest(source=str(tmp_path / "lamp"), split="dev", task=str(tmp_path / "papers.yaml")) == 0
    assert [row["occurred_at"].year for row in population.items()["9"]] == [2015, 1965]
    assert Storage(population.tables).exists() and population.report["source"]["earliest"].startswith("1965-01-01")
