"""Files as strangers have them: what is proposed for them, and what a first ingest makes of them."""

import json
from collections import Counter

import pyarrow as pa
import pytest
import yaml

from infra.errors import InputError
from pipelines import options, tables
from pipelines.__main__ import main
from pipelines.ingest.config import IngestConfig as JOB
from pipelines.lines import quickstart
from pplug.llm import LLMConfig
from pplug.splice import PromptLayout
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES, Population
from tests.pipelines.reviews import reviews, write_csv
from tests.pipelines.test_check import check, here  # noqa: F401 (a fixture)
from tests.pplug.models import tiny_llama
from tests.prompt_stage import prompt_stage


def proposed(capsys, *words: str) -> tuple[dict, dict]:
    """The config and the task that a check writes."""
    check(capsys, *words, "--write-config", "made")
    return yaml.safe_load(open("made.yaml")), yaml.safe_load(open("made-task.yaml"))


def test_pandas_row_numbers_under_no_name_are_no_field_and_no_value(here, capsys, ray_session):  # noqa: F811
    rows = [{"": n, "author": r["user_id"], "date": r["timestamp"], "review": r["text"], "stars": r["rating"]}
            for n, r in enumerate(reviews(8, 6))]  # fmt: skip
    write_csv(here / "r.csv", rows)
    config, task = proposed(capsys, "r.csv")
    assert config["columns"]["user_id"] == "author" and (task["text"], task["target"]) == ("review", "stars")
    population = Population(here)
    given = config | {"source": str(here / "r.csv"), "task": str(here / "made-task.yaml")}
    del given["tables"]
    assert population.ingest(**given) == 0
    assert {name for row in population.rows("histories") for name, _ in row["fields"]} == {"review", "stars"}
    moved = [row | {"": n + 1} for n, row in enumerate(rows)]  # tomorrow's file has another row before them
    write_csv(here / "r.csv", [rows[0] | {"": 0, "review": "the newest one of all", "date": 1_790_000_000}, *moved])
    assert population.ingest(**given | {"derive_requests": 0}) == 0 and population.report["written"] == 1


def test_empty_columns_behind_the_others_are_left_out(here, capsys):  # noqa: F811
    lines = ["user_id;text;rating;;", *(f"{r['user_id']};{r['text']};{r['rating']};;" for r in reviews(8, 6))]
    (here / "r.csv").write_text("\n".join(lines) + "\n")
    assert proposed(capsys, "r.csv")[1] == {"name": "r", "text": "text", "target": "rating", "labels": [1, 2, 3, 4, 5]}


@pytest.mark.usefixtures("ray_session")
def test_equal_rows_with_a_time_are_one_item_and_without_one_they_are_told(population):
    """A request that is made of the second would find its own answer in the first."""
    row = {"user_id": "a", "text": "bad lid", "mood": "bad", "occurred_at": "2026-01-12"}
    other = {"user_id": "a", "text": "good pan", "mood": "good", "occurred_at": "2026-01-05"}
    path = population.folder / "items.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (other, row, row)))
    assert population.ingest(source=str(path), task=population.task(NOTES), derive_requests=1) == 0
    assert len(population.items()["a"]) == 2 and population.report["repeated"] == 1
    assert not population.report.get("untimed_twins")
    without = [{**one, "user_id": "b"} for one in (other, row, row)]
    path.write_text("".join(json.dumps({k: v for k, v in one.items() if k != "occurred_at"}) + "\n" for one in without))
    assert population.ingest(source=str(path), task=population.task(NOTES)) == 0
    assert len(population.items()["b"]) == 3 and population.report["untimed_twins"] == 1


def test_a_stray_answer_among_ratings_is_no_label(here, capsys, ray_session):  # noqa: F811
    rows = reviews(20, 6)
    rows[7]["rating"] = "N/A"
    write_csv(here / "r.csv", rows)
    config, task = proposed(capsys, "r.csv")
    assert task["labels"] == [1, 2, 3, 4, 5]
    given = config | {"source": str(here / "r.csv"), "task": str(here / "made-task.yaml"), "labels": "infer"}
    del given["tables"]
    population = Population(here)
    assert population.ingest(**given) == 0  # a label that was found beyond the rows looked at ended it with a traceback
    entry = tables.open_table(population.tables, "histories").snapshot().metadata["task_entry"]
    assert TaskSpec.from_json(entry).labels == ("1", "2", "3", "4", "5")


@pytest.mark.parametrize(("name", "task"), [("sentiment", {"metric": "classification", "labels": ["0", "4"]}),
                                            ("stars", {"labels": [0, 1, 2, 3, 4]})])  # fmt: skip
def test_codes_are_labels_and_only_what_is_called_a_rating_is_one(here, capsys, name, task):  # noqa: F811
    rows = [{"user_id": r["user_id"], "text": r["text"], name: 4 * (n % 2)} for n, r in enumerate(reviews(8, 6))]
    write_csv(here / "r.csv", rows)
    assert proposed(capsys, "r.csv")[1] == {"name": "r", "text": "text", "target": name} | task


def test_a_named_answer_is_the_answer_and_what_is_shown_next_says_so_too(here, capsys):  # noqa: F811
    rows = [{"taster": r["user_id"], "body": r["text"], "points": 80 + n % 21} for n, r in enumerate(reviews(20, 6))]
    write_csv(here / "wine.csv", rows)
    words = ("wine.csv", "--columns", "user_id=taster,target=points")
    said = check(capsys, *words)
    columns = """--set 'columns={"user_id": "taster", "target": "points"}'"""
    assert said.count(columns) == 2 and f"pipelines quickstart wine.csv {columns}" in said
    config, task = proposed(capsys, *words)
    assert task["target"] == "target" and len(task["labels"]) == 21 and config["columns"]["target"] == "points"
    assert task["text"] == "body"


def test_a_time_that_cannot_be_read_is_named_with_what_to_give(here, capsys):  # noqa: F811
    rows = [{"user_id": r["user_id"], "date": f"{1 + n % 28}.12.2025", "text": r["text"], "rating": r["rating"]}
            for n, r in enumerate(reviews(8, 6))]  # fmt: skip
    write_csv(here / "r.csv", rows)
    assert "date is named like one: say how it is written, as in --set time.format=%d.%m.%Y" in check(capsys, "r.csv")
    assert "date " in check(capsys, "r.csv", "--set", "time.format=%d.%m.%Y").partition("occurred_at")[2]
    said = check(capsys, "r.csv", "--columns", "occurred_at=date", code=2)
    assert "none of the first rows can be used: bad_date (48)" in said


def test_quickstart_takes_the_keys_of_its_first_step_and_any_name_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked: list[list[str]] = []
    monkeypatch.setattr(quickstart, "main", lambda words: asked.append(words) or 7)
    for source in ("data/*.csv", "my reviews.csv", "Bücher.csv"):
        assert (
            main(["quickstart", source, "--set", "time.format=%d.%m.%Y", "csv.header=false", "--explode", "profile"])
            == 7
        )
    keys = options.read(["ingest", *asked[0][1:]][1:], JOB)
    assert options.check(JOB, keys).time.format == "%d.%m.%Y" and options.check(JOB, keys).explode == "profile"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {
        "quickstart-own", "quickstart-my-reviews", "quickstart-B-cher"}  # fmt: skip


def test_a_mapping_that_an_earlier_start_does_not_have_is_refused(tmp_path):
    own = {"columns": {"user_id": "author"}, "task": "own-task.yaml"}
    config = options.check(quickstart.Config, options.read(["r.csv", "--columns", "user_id=author"], quickstart.Config))
    quickstart._refuse_another_mapping(config, tmp_path / "own.yaml", own)
    for words in (["--columns", "target=stars"], ["--task", "mine.yaml"]):
        config = options.check(quickstart.Config, options.read(["r.csv", *words], quickstart.Config))
        with pytest.raises(InputError, match="is from an earlier start without it"):
            quickstart._refuse_another_mapping(config, tmp_path / "own.yaml", own)


def test_a_question_lists_its_labels_only_while_they_leave_room_for_the_text():
    short = TaskSpec.model_validate({"name": "t", "text": "text", "target": "mood", "labels": ["good", "bad"]})
    assert "one of [good, bad]" in short.input
    many = [f"some long label {n}" for n in range(20)]
    long = TaskSpec.model_validate({"name": "t", "text": "text", "target": "mood", "labels": many})
    assert "some long label" not in long.input and long.input.endswith("text: {text}") and long.labels == tuple(many)


@pytest.mark.usefixtures("ray_session")
def test_a_text_that_is_cut_is_counted(population, tmp_path):
    path = population.folder / "items.jsonl"
    texts = {"long": "the cat sat on the mat " * 4, "short": "the cat"}
    rows = [{"user_id": user, "item_id": "1", "text": text, "mood": "good"} for user, text in texts.items()]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert population.ingest(source=str(path), task=population.task(NOTES), derive_requests=1) == 0
    requests = tables.open_table(population.tables, "requests").snapshot()
    layout = PromptLayout(max_input_tokens=16)
    stage = prompt_stage(
        requests=requests, methods=["none"], task=TaskSpec.model_validate(NOTES),
        llm=LLMConfig(model=str(tiny_llama(tmp_path / "llm")), layout=layout),
    )  # fmt: skip
    made = [row for table in stage(pa.table({"bucket": sorted(requests.by_bucket())})) for row in table.to_pylist()]
    assert Counter((row["user_id"], *row["notes"]) for row in made) == Counter([("long", "input_cut"), ("short",)])


@pytest.mark.usefixtures("ray_session")
def test_a_request_that_is_cut_for_the_items_beside_it_is_counted_once(population, tmp_path):
    task = NOTES | {"retrieval": {"pattern": '"{text}" is {mood} '}}
    path = population.folder / "items.jsonl"
    texts = {"long": "the cat sat on the mat " * 9, "medium": "the cat sat on the mat " * 5, "short": "the cat"}
    rows = [
        {"user_id": user, "item_id": str(place), "text": words, "mood": "good"}
        for user, text in texts.items()
        for place, words in enumerate(("red tree", text))
    ]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert population.ingest(source=str(path), task=population.task(task), derive_requests=1) == 0
    histories, requests = (tables.open_table(population.tables, name).snapshot() for name in ("histories", "requests"))
    stage = prompt_stage(
        requests=requests, histories=histories, methods=["none", "recency"], task=TaskSpec.model_validate(task),
        llm=LLMConfig(model=str(tiny_llama(tmp_path / "llm")), layout=PromptLayout(max_input_tokens=40)),
    )  # fmt: skip
    made = [row for table in stage(pa.table({"bucket": sorted(requests.by_bucket())})) for row in table.to_pylist()]
    notes = {(row["user_id"], row["method"]): row["notes"] for row in made}
    assert notes == {
        ("long", "none"): ["input_cut"], ("medium", "none"): [], ("short", "none"): [],
        ("long", "recency"): ["input_cut"], ("medium", "recency"): ["input_cut"], ("short", "recency"): [],
    }  # fmt: skip
