"""The embedded world: what it promises about its truth is counted here another way than it is computed."""

import itertools
import json
import random
import re

import numpy as np
import pytest
from pydantic import ValidationError

from pplug import history, retrieval, tasks, world
from pplug.plain_text import TextTokenizer
from tests.pplug.models import word_tokenizer

SMALL = world.WorldConfig(train_users=6, test_users=8, corpus_users=10, corpus_items=6, items=(3, 5))


def test_one_config_gives_the_same_bytes_and_another_seed_others(tmp_path):
    again = world.write(SMALL, tmp_path / "again")
    other = world.write(SMALL.model_copy(update={"seed": 1}), tmp_path / "other")
    for name, path in world.write(SMALL, tmp_path / "first").items():
        assert path.read_bytes() == again[name].read_bytes(), name
        assert name == "task" or path.read_bytes() != other[name].read_bytes(), name


def test_the_files_hold_every_item_and_request_once_and_refer_to_known_users(tmp_path):
    files = world.write(SMALL, tmp_path)
    rows = {name: [json.loads(line) for line in path.open()] for name, path in files.items() if path.suffix == ".jsonl"}
    assert len(rows["corpus/histories"]) == 60
    assert len(rows["train/requests"]) == 6 * SMALL.train_requests and len(rows["test/requests"]) == 8 * 5
    users = {split: {row["user_id"] for row in rows[f"{split}/histories"]} for split in ("corpus", "train", "test")}
    assert {split: len(found) for split, found in users.items()} == {"corpus": 10, "train": 6, "test": 8}
    assert not any(users[a] & users[b] for a, b in itertools.combinations(users, 2))
    for split in ("train", "test"):
        assert {row["user_id"] for row in rows[f"{split}/requests"]} <= users[split]
        ids = [row["item_id"] for row in rows[f"{split}/histories"]]
        assert len(ids) == len(set(ids))
    for row in rows["train/requests"]:  # every request comes after its user's items
        seen = [item["occurred_at"] for item in rows["train/histories"] if item["user_id"] == row["user_id"]]
        assert max(seen) < row["as_of"]


def test_the_task_entry_reads_its_own_files(tmp_path):
    files = world.write(SMALL, tmp_path)
    entry = tasks.load(files["task"])
    assert entry == world.task_entry(SMALL)
    item = json.loads(files["test/histories"].open().readline())["fields"]
    request = json.loads(files["test/requests"].open().readline())
    assert history.item_text(item, entry) == f"{item['tag']} is my tag for {item['description']}"
    assert request["target"] in entry.labels
    assert request["input"].endswith(tasks.query(request["input"], entry))
    assert tasks.query(request["input"], entry)[0] != " "


def test_the_oracle_says_each_test_persons_order_in_words(tmp_path):
    files = world.write(SMALL, tmp_path)
    said = {row["user_id"]: row["text"] for row in map(json.loads, files["oracle"].open())}
    orders = {person.user_id: person.order for person in world.population(SMALL, "test")}
    assert set(said) == set(orders)
    for user, text in said.items():
        themes = [world.THEMES[theme] for theme in orders[user]]
        places = [text.index(theme) for theme in themes]
        assert places == sorted(places) and text.endswith(". ")


def test_people_pick_by_their_order_except_when_they_slip():
    config = world.WorldConfig(test_users=500, slip=0.3, offered=3)
    followed = [
        choice.picked == min(choice.offered, key=person.order.index)
        for person in world.population(config, "test")
        for choice in (*person.items, *person.requests)
    ]
    assert np.mean(followed) == pytest.approx(1 - 0.3 + 0.3 / 3, abs=0.01)


def test_orders_follow_plackett_luce_and_systematic_sampling_hits_the_law_closely():
    config = world.WorldConfig(themes=4, test_users=2000, evenness=0.7)
    law = world.weights(config)
    first_two = [person.order[:2] for person in world.population(config, "test")]
    for a, b in itertools.permutations(range(4), 2):
        share = sum(pair == (a, b) for pair in first_two) / 2000
        assert share == pytest.approx(law[a] * law[b] / (1 - law[a]), abs=2 / 2000)


def test_truth_agrees_with_counting_what_each_way_of_answering_scores():
    config = world.WorldConfig(themes=5, test_users=4000, test_requests=6, items=(1, 6), slip=0.1)
    people = list(world.population(config, "test"))
    truth, law = world.truth(config, people), world.weights(config)
    rng = random.Random(0)
    hits = {"without": [], "with": [], "other": []}
    for person in people:
        stranger = rng.choice([other for other in (rng.choice(people), rng.choice(people)) if other is not person])
        for request in person.requests:
            hits["without"].append(max(request.offered, key=lambda theme: law[theme]) == request.picked)
            hits["with"].append(min(request.offered, key=person.order.index) == request.picked)
            hits["other"].append(min(request.offered, key=stranger.order.index) == request.picked)
    assert np.mean(hits["without"]) == pytest.approx(truth["best_without_history"], abs=0.012)
    assert np.mean(hits["with"]) == pytest.approx(truth["best_with_history"], abs=0.012)
    assert np.mean(hits["other"]) == pytest.approx(truth["other_user"], abs=0.012)
    assert truth["users"] == 4000 and truth["requests"] == 24000


def test_best_with_items_is_the_mean_largest_posterior_summed_by_hand():
    config = world.WorldConfig(themes=3, offered=2, test_users=5, items=(0 + 1, 3), slip=0.2, evenness=0.6)
    people, law = list(world.population(config, "test")), world.weights(config)
    best = []
    for person in people:
        chance = {}
        for a, b, c in itertools.permutations(range(3)):
            chance[a, b, c] = law[a] * law[b] / (law[b] + law[c])
            for item in person.items:
                liked = min(item.offered, key=(a, b, c).index)
                chance[a, b, c] *= 0.9 if item.picked == liked else 0.1
        for request in person.requests:
            of = [sum(p for order, p in chance.items() if min(request.offered, key=order.index) == t) for t in range(3)]
            best.append(0.8 * max(of) / sum(of) + 0.1)
    assert world.truth(config, people)["best_with_items"] == pytest.approx(np.mean(best), abs=1e-9)


def test_the_scores_stand_in_the_order_the_demo_needs():
    config = world.WorldConfig(test_users=60)
    truth = world.truth(config, list(world.population(config, "test")))
    assert truth["other_user"] < truth["best_without_history"] - 0.05
    assert truth["best_without_history"] < truth["best_with_items"] < truth["best_with_history"]


def test_corpus_items_state_or_show_or_say_nothing_in_the_shares_asked_for(tmp_path):
    config = world.WorldConfig(corpus_users=200, corpus_items=10, stated=0.5, shown=0.3, train_users=2, test_users=2)
    order = {person.user_id: person.order for person in world.population(config, "corpus")}
    rows = [json.loads(line) for line in world.write(config, tmp_path)["corpus/histories"].open()]
    kinds = {"stated": 0, "shown": 0, "": 0}
    for row in rows:
        preface = row["fields"]["preface"]
        if not preface:
            kinds[""] += 1
        elif "is the tag for" in preface:
            kinds["shown"] += 1
            assert row["fields"]["description"] not in preface
        else:
            kinds["stated"] += 1
            said = [theme for theme in preface.replace(",", " ").replace(".", " ").split() if theme in world.THEMES]
            assert said == [world.THEMES[theme] for theme in order[row["user_id"]]]
    assert [n / len(rows) for n in kinds.values()] == pytest.approx([0.5, 0.3, 0.2], abs=0.04)


def test_shown_texts_are_those_that_retrieval_writes(tmp_path):
    """The base LM learns, letter by letter, from texts that a method such as bm25 puts before a request."""
    config = world.WorldConfig(corpus_users=20, corpus_items=8, stated=0, shown=1, train_users=2, test_users=2)
    files, entry = world.write(config, tmp_path), world.task_entry(config)
    tokenizer, full = TextTokenizer(word_tokenizer(tmp_path / "words")), 0
    for line in files["corpus/histories"].read_text().splitlines():
        fields = json.loads(line)["fields"]
        preface = fields.pop("preface")
        shown = [
            {"tag": tag, "description": text} for tag, text in re.findall(r'"(.+?)" is the tag for "(.+?)"', preface)
        ]
        request = world.INPUT.format(**fields)
        assert "".join(retrieval.compose(shown, request, entry, tokenizer, 1000, 0.6)[:2]) == preface + request
        full += len(shown) in (1, 2, 3, 4)
    assert full == 160


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"stated": 0.8, "shown": 0.3}, "lower one of them"),
        ({"themes": 3, "offered": 4}, "cannot mix that many"),
        ({"items": (5, 2)}, "fewest, most"),
        ({"users": 5}, "users"),
    ],
)
def test_a_world_that_cannot_be_is_refused_and_the_message_names_it(wrong, says):
    with pytest.raises(ValidationError, match=says):
        world.WorldConfig(**wrong)


def test_truth_of_nobody_is_refused():
    with pytest.raises(ValueError, match="at least two"):
        world.truth(SMALL, [])
