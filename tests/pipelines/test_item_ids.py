"""Items of a source without ids: the same row has the same id again, wherever it stands."""

import json
import random

import pyarrow as pa
import pytest
import yaml

from infra.errors import InputError
from pipelines.ingest.item_ids import noted, read_as, read_otherwise, with_ids
from pipelines.ingest.source_rows import ITEM, ROWS
from tests.pipelines.population import NOTES


def table(rows: list[tuple], ids: list | None = None) -> pa.Table:
    """Rows of (user, text, time), in the order of the source."""
    return pa.Table.from_pylist(
        [
            {"kind": ITEM, "file": 0, "seq": n, "user_key": user, "text_hash": text, "at": at,
             "id": None if ids is None else ids[n]}
            for n, (user, text, at) in enumerate(rows)
        ],
        schema=ROWS,
    )  # fmt: skip


def test_equal_rows_of_a_user_are_counted_and_others_have_ids_of_their_own():
    rows = [("a", "x", 1), ("b", "x", 1), ("a", "x", 1), ("a", "x", 2), ("a", "y", 1), ("a", "x", None), ("a", "x", 1)]
    ids = with_ids(table(rows))["id"].to_pylist()
    assert ids[0] == ids[1] == ids[2] == ids[6]  # with the same time it is one item, given again
    assert len({(row[0], one) for row, one in zip(rows, ids, strict=True)}) == len(rows) - 2
    without = with_ids(table([("a", "x", None)] * 3))["id"].to_pylist()
    assert without == [ids[5], f"{ids[5]}-2", f"{ids[5]}-3"]


def test_the_order_of_the_source_changes_no_id():
    rows = [(f"u{n % 3}", f"t{n % 5}", n % 2) for n in range(60)]
    shuffled = random.Random(0).sample(rows, len(rows))

    def pairs(given: list[tuple]) -> list[tuple]:
        return sorted(zip(given, with_ids(table(given))["id"].to_pylist(), strict=True))

    assert pairs(rows) == pairs(shuffled)


def test_ids_that_are_there_stay():
    rows = [("a", "x", 1), ("a", "x", 1)]
    assert with_ids(table(rows, ["7", None]))["id"].to_pylist()[0] == "7"
    given = table(rows, ["7", "8"])
    assert with_ids(given) is given


def moods(population, rows: list[tuple], **config) -> int:
    """Ingests rows of (text, mood, place) without ids."""
    path = population.folder / "moods.csv"
    lines = [f"ann,2026-01-{n + 1:02},{','.join(row)}" for n, row in enumerate(rows)]
    path.write_text("\n".join(["user_id,occurred_at,text,mood,place", *lines]) + "\n")
    columns = {name: name for name in ("user_id", "occurred_at", "text", "mood")}
    given = {"source": str(path), "columns": columns, "task": population.task(NOTES), "derive_requests": 1}
    return population.ingest(**given | config)


def other_labels(population, labels: list[str]) -> str:
    path = population.folder / "other.yaml"
    path.write_text(yaml.safe_dump(NOTES | {"labels": labels}))
    return str(path)


ROWS_OF_ANN = [("first thing", "good", "Ulm"), ("second thing", "bad", "Bonn"), ("third thing", "good", "Ulm")]


@pytest.mark.parametrize("other", ["labels", "fields", "time"])
def test_rows_read_in_another_way_do_not_stand_there_twice(population, ray_session, other):
    assert moods(population, ROWS_OF_ANN) == 0
    before = population.items()
    named = {name: name for name in ("user_id", "occurred_at", "text", "mood", "place")}
    change, says = {
        "labels": ({"task": other_labels(population, ["Good", "BAD"])}, "the spelling of the labels"),
        "fields": ({"columns": named}, "fields mood, place, text, which were mood, text"),
        "time": ({"time": {"format": "%Y-%d-%m"}}, "time.unit or time.format"),
    }[other]
    with pytest.raises(InputError, match=f"are in .* already, under another id.*{says}"):
        moods(population, ROWS_OF_ANN, **change)
    assert population.items() == before
    assert moods(population, ROWS_OF_ANN, mode="replace", **change) == 0
    assert len(population.items()["ann"]) == 3


def test_what_was_read_in_two_ways_is_compared_with_both(population, ray_session):
    named = {name: name for name in ("user_id", "occurred_at", "text", "mood", "place")}
    assert moods(population, ROWS_OF_ANN) == 0
    assert moods(population, [("fourth thing", "bad", "Bonn")], columns=named) == 0  # the first with a place
    with pytest.raises(InputError, match="in .* already, under another id.*which were mood, text"):
        moods(population, ROWS_OF_ANN, columns=named)
    assert len(population.items()["ann"]) == 4


def test_each_way_that_was_noted_counts_and_of_the_times_the_last():
    plain, other = ({"unit": unit, "format": None} for unit in ("s", "ms"))
    first = read_as(["mood", "text"], ["good"], plain)
    second = read_as(["mood", "place", "text"], ["good"], other)
    third = read_as(["mood", "place", "text"], ["good"], plain)
    assert read_otherwise("", first) == ("", False) == read_otherwise(noted("", first), first)
    words, in_times = read_otherwise(noted(noted("", first), second), third)
    assert in_times and words == "the fields mood, place, text, which were mood, text and time.unit or time.format"
    switched = noted(noted("", second), third)  # the exporter writes seconds from now on
    assert read_otherwise(switched, third) == ("time.unit or time.format", False)
    assert json.loads(noted(switched, second)) == [third, second]


def test_the_same_words_at_another_time_are_no_row_that_comes_again(population, ray_session):
    """A night may bring one row alone, without a field that others have: the mapping is as it was."""
    for night, row in enumerate(({"place": "Ulm"}, {})):
        path = population.folder / "said.jsonl"
        own = {"user_id": "ann", "text": "Good morning", "mood": "good", "occurred_at": f"2026-01-0{night + 1}"}
        path.write_text(json.dumps(own | row) + "\n")
        assert population.ingest(source=str(path), task=population.task(NOTES)) == 0
    assert len(population.items()["ann"]) == 2


def test_new_rows_may_be_read_in_another_way_and_a_label_more_is_none(population, ray_session):
    assert moods(population, ROWS_OF_ANN) == 0
    wider = other_labels(population, ["neutral", "good", "bad"])
    assert moods(population, [*ROWS_OF_ANN, ("fourth thing", "neutral", "Ulm")], task=wider) == 0
    assert len(population.items()["ann"]) == 4
    named = {name: name for name in ("user_id", "occurred_at", "text", "mood", "place")}
    assert moods(population, [("fifth thing", "bad", "Bonn")], columns=named, task=wider) == 0
    assert len(population.items()["ann"]) == 5
