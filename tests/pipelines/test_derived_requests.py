"""Requests made of items: whose they are stays known, a new answer reaches them, and dev never teaches train."""

import pyarrow as pa
import pytest
import yaml

from infra.errors import InputError
from infra.shards import user_key
from pipelines import tables
from pipelines.generate.prompts import NOTES as KNOWN_NOTES
from pipelines.upkeep import erase
from pplug.llm import LLMConfig
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES
from tests.pipelines.test_ingest import news, question, write_lamp
from tests.pipelines.test_ingest_keeps import ask, ingest, note
from tests.pplug.models import tiny_llama
from tests.prompt_stage import prompt_stage

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.mark.parametrize("scope", ["auto", "question"])
def test_histories_of_one_question_each_are_refused_where_requests_are_made_of_them(population, tmp_path, scope):
    """Nothing in an item says that two such histories are one person's, whose answers they may hold for each other."""
    apart = [
        question("1", [news("a")], user_id="u"),
        question("2", [news("b")], user_id="u"),
        question("3", [news("c")]),
    ]
    source = write_lamp(tmp_path / "lamp", apart)
    given = {"source": source, "split": "dev", "task": "LaMP_4", "history_scope": scope}
    with pytest.raises(InputError, match="derive_requests: 1 users have several questions with a history each"):
        population.ingest(**given, derive_requests=1)
    assert population.ingest(**given) == 0
    assert {row["owner_id"] for row in population.requests().values()} == {"u", "3"}


def test_histories_that_are_one_by_their_dates_are_asked_about_as_one(population, tmp_path):
    days = [news(str(day), date=f"2024-01-0{day}") for day in range(1, 6)]
    asked = [question("late", days, user_id="u"), question("early", days[:2], user_id="u")]
    source = write_lamp(tmp_path / "lamp", asked)
    assert population.ingest(source=source, split="dev", task="LaMP_4", questions="skip", derive_requests=2) == 0
    assert [row["owner_id"] for row in population.requests().values()] == ["u", "u"]


def test_an_answer_that_changes_later_is_that_of_its_request_too(population):
    first = [note("a", str(i)) for i in range(3)] + [note("b", "0")]
    assert ingest(population, items=first, derive_requests=1) == 0
    before = population.requests()
    again = [note("a", "2") | {"mood": "bad"}, note("a", "3"), note("a", "0") | {"mood": "bad"}]
    assert ingest(population, items=again, derive_requests=1) == 0
    after = population.requests()
    assert before.keys() < after.keys() and len(after) == 3  # the oldest item had no request, and gets none
    told = {row["input"]: row["target"] for row in after.values()}
    assert told == {
        "How do I feel? text 2 of a": "bad",
        "How do I feel? text 3 of a": "good",
        "How do I feel? text 0 of b": "good",
    }


@pytest.mark.parametrize(("answer", "rejects"), [("", 0), ("neither", 1)])
def test_an_answer_that_is_taken_back_goes_with_its_request(population, answer, rejects):
    assert ingest(population, items=[note("a", str(i)) for i in range(3)], derive_requests=2) == 0
    assert {row["input"] for row in population.requests().values()} == {
        "How do I feel? text 1 of a", "How do I feel? text 2 of a",
    }  # fmt: skip
    again = [note("a", "2") | {"mood": answer}]
    assert ingest(population, items=again, derive_requests=1, max_reject_fraction=1) == 0
    assert {row["input"]: row["target"] for row in population.requests().values()} == {
        "How do I feel? text 1 of a": "good",
    }  # fmt: skip
    assert sum(population.report["rejected"].values()) == rejects and population.report["requests_removed"] == 1


def test_a_task_that_lacks_a_label_takes_no_request_whose_item_is_as_it_was(population):
    items = [note("a", str(i)) for i in range(3)]
    assert ingest(population, items=items, derive_requests=2) == 0
    before = population.requests()
    other = population.folder / "other.yaml"
    other.write_text(yaml.safe_dump(NOTES | {"labels": ["fine", "bad"]}))
    assert ingest(population, items=items, derive_requests=2, task=str(other), max_reject_fraction=1) == 0
    assert population.requests() == before and "requests_removed" not in population.report


def test_a_time_that_changes_later_is_that_of_its_request_too(population):
    def at(item, day):
        return note("a", item) | {"occurred_at": f"2024-01-{day}"}

    assert ingest(population, items=[at("x", "10")], derive_requests=1) == 0
    assert ingest(population, items=[at("x", "05"), at("y", "08")], derive_requests=1) == 0
    days = {row["input"]: (row["as_of"].day, row["as_of_position"]) for row in population.rows("requests")}
    # with the 10th as its time, the request about x would see x, whose time is the 5th, and y
    assert days == {"How do I feel? text x of a": (5, 0), "How do I feel? text y of a": (8, 1)}


def test_a_reject_of_an_earlier_nights_item_goes_with_its_user(population):
    strange = note("a", "0") | {"mood": "none of the labels"}
    assert ingest(population, items=[strange]) == 0
    assert ingest(population, items=[note("a", "1")], derive_requests=2, max_reject_fraction=1) == 0
    (reject,) = population.rows("rejects")
    assert (reject["reason"], reject["key"]) == ("target_outside_labels", user_key("a"))
    config = erase.Config(tables=population.tables, user_id="a", run_dir=str(population.folder / "erase"), folders=())
    assert erase.run(config) == 0 and population.rows("rejects") == []


def test_a_request_with_a_time_over_items_without_any_is_said(population, tmp_path):
    asked = [
        ask("a", "dated") | {"as_of": "2026-01-01"},
        ask("a", "plain"),
        ask("nobody", "new") | {"as_of": "2026-01-01"},
    ]
    assert ingest(population, items=[note("a", "0"), note("a", "1")], asked=asked) == 0
    requests, histories = (tables.open_table(population.tables, name).snapshot() for name in ("requests", "histories"))
    stage = prompt_stage(
        requests=requests, histories=histories, methods=["none", "recency"], task=TaskSpec.model_validate(NOTES),
        llm=LLMConfig(model=str(tiny_llama(tmp_path / "llm"))),
    )  # fmt: skip
    rows = [row for table in stage(pa.table({"bucket": sorted(requests.by_bucket())})) for row in table.to_pylist()]
    notes = {(row["request_id"], row["method"]): row["notes"] for row in rows}
    assert notes.pop(("dated", "recency")) == ["history_without_time"] and len(notes) == 5
    assert not any(notes.values()) and "history_without_time" in KNOWN_NOTES
