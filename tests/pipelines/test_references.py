"""References of whole tables: what each request may see, what the fit may learn, users without items."""

import json
import pickle

import numpy as np
import pytest

from infra.shards import bucket_of
from pipelines import tables
from pipelines.evaluate import references
from pipelines.owners import Persons
from pplug.tasks import TaskSpec
from tests.pipelines.population import NOTES, Population

pytestmark = pytest.mark.usefixtures("ray_session")
SUNNY, RAINY = (
    ["sun and warm beach", "warm sun today", "sun sun beach"],
    ["cold rain again", "rain and mud", "grey mud"],
)


def made(folder, items: list[dict], asked: list[dict], task: dict = NOTES) -> Population:
    folder.mkdir(exist_ok=True)
    population = Population(folder)
    for name, rows in (("items", items), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sources = {"source": str(folder / "items.jsonl"), "requests_source": str(folder / "asked.jsonl")}
    assert population.ingest(**sources, task=population.task(task)) == 0
    return population


def item(user: str, at: int, text: str, mood: str) -> dict:
    return {"user_id": user, "item_id": f"{user}-{at}", "text": text, "mood": mood, "occurred_at": day(at)}


def ask(user: str, at: int | None, text: str, target: str = "good", name: str = "r") -> dict:
    when = {} if at is None else {"as_of": day(at)}
    return {"request_id": f"{user}-{name}", "user_id": user, "input": f"How do I feel? {text}", "target": target} | when


def day(number: int) -> str:
    return f"2026-01-{number:02d}T00:00:00Z"


def fitted(population: Population, task: dict = NOTES, **more) -> references.References:
    histories, requests = (
        tables.open_table(population.tables, name).snapshot(complete=True) for name in ("histories", "requests")
    )
    found = references.fit(TaskSpec.model_validate(task), histories, requests, None, **more)
    return pickle.loads(pickle.dumps(found))


def predicted(population: Population, fit: references.References) -> dict[str, dict[str, str]]:
    """By request, by reference; the columns that are read and no others."""
    requests, found = tables.open_table(population.tables, "requests").snapshot(complete=True), {}
    for bucket in requests.filled():
        ids = requests.read(["request_id"], buckets=[bucket])["request_id"].to_pylist()
        texts = fit.predict(bucket, requests.read(list(references.NEEDS), buckets=[bucket]).to_pylist())
        assert tuple(texts) == fit.names == tuple(fit.about) and all(
            len(column) == len(ids) for column in texts.values()
        )
        found |= {name: {kind: texts[kind][at] for kind in texts} for at, name in enumerate(ids)}
    return found


def crowd() -> list[dict]:
    """Twelve people without a request: warm words are good, cold ones bad, and good is more frequent."""
    rows = []
    for person in range(12):
        rows += [item(f"c{person}", at, text, "good") for at, text in enumerate(SUNNY, start=1)]
        rows += [item(f"c{person}", at, text, "bad") for at, text in enumerate(RAINY[: 1 + person % 2], start=11)]
    return rows


def test_labels_by_hand(tmp_path):
    items = crowd()
    items += [item("anna", at, f"thing {at}", mood) for at, mood in enumerate(["bad", "bad", "bad", "good"], start=1)]
    asked = [ask("anna", 9, "warm beach"), ask("anna", 4, "no word known", name="early"), ask("nobody", 9, "mud, rain")]
    population = made(tmp_path, items, asked)
    found = predicted(population, fitted(population))
    # anna: three of four are bad. Everybody: 36 good of the crowd and none of anna's against 18 and 3 (visible to all).
    assert found["anna-r"]["user-label"] == "bad" and found["anna-r"]["overall-label"] == "good"
    assert found["anna-r"]["classifier"] == "good" and found["nobody-r"]["classifier"] == "bad"
    nobody = found["nobody-r"]
    assert nobody["user-label"] == nobody["overall-label"] == "good"  # without items: as everybody
    assert nobody["classifier+user"] == nobody["classifier"]
    assert found["anna-early"]["user-label"] == "bad" == found["anna-early"]["classifier+user"]


def test_users_frequencies_turn_what_the_words_leave_open(tmp_path):
    items = crowd() + [item("gloom", at, "neither", "bad") for at in range(1, 20)]
    population = made(tmp_path, items, [ask("gloom", 25, "nothing known"), ask("other", 25, "nothing known")])
    fit = fitted(population)
    found = predicted(population, fit)
    # Words that nobody used: the bias alone speaks, and the user's 19 bad items turn it.
    shares = fit.classifier.shares
    p = fit.classifier.probabilities(["nothing known"])[0]
    own = (np.array([0, 19]) + 10 * shares) / 29
    assert found["gloom-r"]["classifier+user"] == ("good", "bad")[int((p * own / shares).argmax())] == "bad"
    assert found["other-r"]["classifier+user"] == found["other-r"]["classifier"]


def test_later_items_change_nothing(tmp_path):
    """Items after the request's time, with its own words and its answer, as an export of the next month has them."""
    early = crowd() + [item("anna", 1, "rain", "bad"), item("anna", 2, "sun", "good"), item("anna", 3, "mud", "bad")]
    asked = [ask("anna", 4, "zebra"), ask("anna", 3, "zebra", name="first")]
    late = [item("anna", at, "zebra", "good") for at in range(4, 28)]
    before, after = made(tmp_path / "before", early, asked), made(tmp_path / "after", early + late, asked)
    fits = [fitted(population) for population in (before, after)]
    assert predicted(before, fits[0]) == predicted(after, fits[1])
    assert fits[0].n_training == fits[1].n_training == len(crowd()) + 2  # anna's third is later than her first request
    np.testing.assert_array_equal(fits[0].overall, fits[1].overall)
    # The same as requests that come later may see them, and then they count.
    now = made(tmp_path / "now", early + late, [ask("anna", 29, "zebra")])
    assert predicted(now, fitted(now))["anna-r"]["user-label"] == "good"


def test_nothing_is_said_of_everybody_where_no_item_may_be_learned(tmp_path):
    population = made(tmp_path, [item("anna", at, "sun", "good") for at in (5, 6)], [ask("anna", 3, "sun", "bad")])
    found = fitted(population)
    assert found.names == ("user-label",) and list(predicted(population, found)["anna-r"]) == ["user-label"]


def test_a_persons_other_histories_teach_nothing(tmp_path):
    """Where one history is kept per question, another history of the person may hold the answer."""
    asked = [ask("q1", 9, "zebra") | {"owner_id": "anna"}, ask("q2", 20, "sun") | {"owner_id": "anna"}]
    population = made(tmp_path, crowd() + [item("q2", 10, "zebra", "good")], asked)
    assert fitted(population).n_training == len(crowd())


def test_a_history_under_the_persons_own_id_teaches_nothing_where_there_is_another(tmp_path):
    """Nobody asks about `anna` under this id; the request of `anna-q1` lies in another bucket."""
    assert bucket_of("anna", 4) != bucket_of("anna-q1", 4)
    asked = [ask("anna-q1", 9, "zebra") | {"owner_id": "anna"}]
    population = made(tmp_path, crowd() + [item("anna", at, "zebra", "bad") for at in (1, 2, 3)], asked)
    found = fitted(population)
    assert found.n_training == 54 and found.overall.tolist() == [36, 18]  # as the crowd's alone


def test_other_populations_teach_the_classifier_but_not_their_users_who_are_asked_here(tmp_path):
    here = made(tmp_path / "here", [item("anna", 1, "a note", "good")], [ask("anna", 9, "mud")])
    alone = fitted(here)
    assert alone.names == ("user-label", "overall-label")  # one label is nothing to learn from
    assert alone.classifier is None and alone.n_training == 0
    train = made(tmp_path / "train", [*crowd(), item("anna", 9, "mud", "good")], [ask("c0", 11, "mud")])
    others = tuple(tables.open_table(train.tables, name).snapshot(complete=True) for name in ("histories", "requests"))
    fit = fitted(here, others=[others])
    # of the crowd's 54 items c0's rainy one is later than its own request; anna, who is asked here, is left out there
    assert fit.n_training == 54 - 1 + 1 and fit.overall.tolist() == [1, 0]
    assert predicted(here, fit)["anna-r"]["classifier"] == "bad"
    assert fitted(here, others=[(others[0], None)]).n_training == 54 + 1


def test_the_sample_is_bounded_and_the_same_each_time(tmp_path, monkeypatch):
    population = made(tmp_path, crowd(), [ask("anna", 9, "mud")])
    histories = tables.open_table(population.tables, "histories").snapshot(complete=True)
    first = references.learn(histories.filled(), TaskSpec.model_validate(NOTES), histories, None, 0.5, Persons())
    again = references.learn(histories.filled()[::-1], TaskSpec.model_validate(NOTES), histories, None, 0.5, Persons())
    assert sorted(first.drawn) == sorted(again.drawn) and 15 < len(first.drawn) < 40
    assert first.counts.tolist() == [36, 18]
    monkeypatch.setattr(references, "MAX_TRAINING_ITEMS", 10)
    assert 0 < fitted(population).n_training <= 25 and fitted(population).overall.sum() < 54  # not all buckets are read


STARS = NOTES | {"name": "stars", "metric": "rating", "labels": [1, 2, 3, 4, 5], "target": "mood"}


def test_ratings_by_hand(tmp_path):
    items = [item("anna", at, "x", mood) for at, mood in enumerate(["1", "2", "2", "5", "nonsense"], start=1)]
    items += [item("bert", 1, "x", "4"), item("bert", 2, "x", "4")]
    asked = [ask("anna", 4, "x", "3"), ask("anna", 9, "x", "3", name="late"), ask("nobody", 9, "x", "3")]
    population = made(tmp_path, items, asked, STARS)
    found = predicted(population, fitted(population, STARS))
    assert found["anna-r"]["user-mean"] == "1.66667"  # (1 + 2 + 2) / 3
    assert found["anna-late"]["user-mean"] == "2.5"  # (1 + 2 + 2 + 5) / 4; no number is no rating
    # everybody's, of what all of a user's requests may see: (1 + 2 + 2 + 4 + 4) / 5
    assert {row["overall-mean"] for row in found.values()} == {"2.6"} == {found["nobody-r"]["user-mean"]}


TITLES = NOTES | {"name": "titles", "metric": "text", "labels": [], "marker": "feel? "}


def test_texts_by_hand(tmp_path):
    items = [item("anna", 1, "red fox runs", "first"), item("anna", 2, "blue sea shines", "second")]
    items += [item("anna", 3, "green hill", "third"), item("anna", 6, "red fox runs fast", "late")]
    asked = [ask("anna", 5, "the red fox"), ask("anna", 9, "fox runs fast", name="late"), ask("nobody", 9, "red fox")]
    population = made(tmp_path, items, asked, TITLES)
    fit = fitted(population, TITLES)
    assert fit.names == ("similar-item",) and fit.about["similar-item"]
    found = {name: row["similar-item"] for name, row in predicted(population, fit).items()}
    assert found == {"anna-r": "first", "anna-late": "late", "nobody-r": ""}


def test_items_without_an_answer_of_their_own_give_no_reference(tmp_path):
    task = {name: value for name, value in NOTES.items() if name not in ("input", "target")}
    population = made(tmp_path, [item("anna", 1, "x", "good")], [ask("anna", 5, "x")], task)
    fit = fitted(population, task)
    assert fit.names == () and predicted(population, fit) == {"anna-r": {}}
