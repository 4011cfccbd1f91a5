"""evaluate: who counts as a person, which replies are asked for, and targets that a score cannot read."""

import json
from hashlib import blake2b

import numpy as np
import pytest

from infra import shards
from infra.errors import InputError
from pipelines.owners import Persons
from tests.pipelines.population import NOTES, Population
from tests.pipelines.test_evaluate import run, write_generations

pytestmark = pytest.mark.usefixtures("ray_session")


def persons(*ids: str) -> Persons:
    halves = [blake2b(one.encode()).digest()[:8] for one in ids]  # as docs/files.md says of user_key
    return Persons(np.sort(np.array([int.from_bytes(half, "big") for half in halves], np.uint64)))


def test_a_set_of_persons_holds_whom_it_was_made_of_and_nobody_else():
    some = persons("alice", "bob")
    assert some.among(["bob", "carol", "alice", "bob"]) == {"alice", "bob"}
    assert some.among([]) == Persons().among(["alice"]) == set()


def test_replies_by_methods_that_are_not_asked_for_may_be_to_an_earlier_input(tmp_path):
    population = Population(tmp_path)
    asked = [{"request_id": f"r{n}", "user_id": f"u{n}", "input": "How?", "target": "good"} for n in range(3)]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"user_id": "u1", "item_id": "1", "text": "x", "mood": "good"}))
    files = {"source": str(tmp_path / "items.jsonl"), "requests_source": str(tmp_path / "requests.jsonl")}
    assert population.ingest(**files, task=population.task(NOTES)) == 0
    texts, now = {row["request_id"]: "good" for row in asked}, {row["request_id"]: "How?" for row in asked}
    write_generations(population, "now", {"none": texts, "plug": texts}, inputs=now)
    write_generations(population, "then", {"bm25": texts}, inputs=now | {"r1": "How was it?"})
    code, report, _ = run(population, run=("now", "then"), methods=("none", "plug"))
    assert code == 0 and set(report["methods"]) == {"none", "plug"} and report["n_requests"] == 3
    with pytest.raises(InputError, match="replies to 1 requests whose input or time has changed"):
        run(population, run=("now", "then"), methods=("none", "bm25"))


def test_a_person_with_an_own_history_and_a_further_one_counts_once(tmp_path):
    """Seven user ids of six people: alice's histories lie in two buckets, bob's and that of his work are his alone."""
    assert shards.bucket_of("alice", 4) != shards.bucket_of("alice-work", 4)
    owners = {"alice": "alice", "alice-work": "alice", "bob-work": "bob", "c": "c", "d": "d", "e": "e", "f": "f"}
    population = Population(tmp_path)
    asked = [
        {"request_id": f"r-{user}", "user_id": user, "owner_id": owner, "input": "How?", "target": "good"}
        for user, owner in owners.items()
    ]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"user_id": "c", "item_id": "1", "text": "x", "mood": "good"}))
    files = {"source": str(tmp_path / "items.jsonl"), "requests_source": str(tmp_path / "requests.jsonl")}
    assert population.ingest(**files, task=population.task(NOTES)) == 0
    texts = {row["request_id"]: "good" for row in asked}
    for night in ("a", "b"):
        write_generations(population, night, {"none": dict.fromkeys(texts, "bad"), "plug": texts})
    _, report, _ = run(population, run=("a",))
    assert (report["n_users"], report["n_requests"]) == (6, 7)
    _, report, _ = run(population, compare=("a", "b"))
    assert report["compare"]["n_users"] == 6
    few = tmp_path / "few"
    few.write_text("alice\nalice-work\nc\n")
    _, report, printed = run(population, run=("a",), users=str(few))
    assert report["n_users"] == 2 and report["methods"]["plug"]["vs_none"]["accuracy"]["p_value"] is None
    few.write_text("alice\nc\n")  # her other history is not scored, and she is one person still
    assert run(population, run=("a",), users=str(few))[1]["n_users"] == 2


def test_targets_in_letters_that_rouge_does_not_read_are_counted_and_said(tmp_path, capsys):
    population = Population(tmp_path)
    targets = [
        "\u043e\u0447\u0435\u043d\u044c \u0445\u043e\u0440\u043e\u0448\u043e 10",
        "\u826f\u3044",
        "sch\u00f6n und gut",
        "fine",
        "!",
    ]
    asked = [{"request_id": f"r{n}", "user_id": f"u{n}", "input": "How?", "target": t} for n, t in enumerate(targets)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"user_id": "u1", "item_id": "1", "text": "x", "mood": "y"}))
    files = {"source": str(tmp_path / "items.jsonl"), "requests_source": str(tmp_path / "asked.jsonl")}
    entry = {name: value for name, value in NOTES.items() if name != "labels"} | {"metric": "text"}
    assert population.ingest(task=population.task(entry), **files) == 0
    write_generations(population, "night", {"none": {f"r{n}": text for n, text in enumerate(targets)}})
    said = "2 of 5 targets are mostly of letters that ROUGE does not read"
    _, report, printed = run(population, capsys)
    assert report["methods"]["none"]["scores"]["rouge1"] < 1 and said in " ".join(report["warnings"])
    assert said in " ".join(printed.split())
    _, report, _ = run(population, task=population.task(entry | {"scores": ["meteor"]}))
    assert "ROUGE" not in " ".join(report["warnings"])
