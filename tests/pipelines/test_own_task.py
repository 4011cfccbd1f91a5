"""Tasks that the code has never seen, by a YAML file each: from histories to a report, by the commands of the README.

Scores are worked out here from the replies as they stand in the table.
"""

import json
import re
from types import SimpleNamespace

import pytest
import yaml

from pipelines.__main__ import main
from tests.pipelines import small

DISHES = {
    "name": "dishes",
    "marker": "dish: ",
    "item": "{taste} is the taste of {dish}",
    "item_without_label": "{dish}",
    "input": "What is it? dish: {dish}",
    "target": "taste",
    "metric": "classification",
    "labels": ["salty", "sweet", "sour"],
    "retrieval": {"pattern": '"{dish}" is {taste} ', "wrap": "{items}. {input}"},
}
NAMES = DISHES | {
    "name": "names",
    "item": "{title}: {dish}",
    "target": "title",
    "metric": "text",
    "labels": [],
    "retrieval": {"pattern": '"{title}" is "{dish}" ', "joiner": "and ", "wrap": "Like these: {items}. {input}"},
}
METHODS = ("none", "bm25")
USERS, NEWEST = 12, 3


def histories() -> list[dict]:
    """Nine items a user. Older stews say `odd`, which is no label; the newest one, which is asked for, says `sour`."""
    taste = {"soup": "salty", "cake": "sweet", "stew": "odd"}
    kinds = ["soup", "cake", "stew"] * 3
    found = []
    for user in range(USERS):
        for n, kind in enumerate(kinds):
            dish = f"{('hot', 'cold', 'small', 'big')[(user + n) % 4]} {kind}"
            says = "sour" if n >= 6 and kind == "stew" else taste[kind]
            found.append({"user_id": f"u{user}", "item_id": f"{n}", "dish": dish, "taste": says,
                          "title": f"a {says} dish, a {kind}"})  # fmt: skip
    return found


pytestmark = pytest.mark.slow  # two tiny LMs


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Both tasks through the whole line, with one tiny LM that has read the first task's items."""
    root = tmp_path_factory.mktemp("own")
    (root / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in histories()))
    lm = {"vocab_size": 400, "width": 64, "heads": 2, "layers": 2, "ffn_width": 128, "steps": 160, "lr": 0.01}
    engine = [
        "engine.kind=transformers",
        "engine.dtype=float32",
        "decoding.max_tokens=6",
        "decoding.constrain=none",
        "retrieval.k=2",
    ]
    model = ["--llm.model", f"{root}/lm", "--methods", ",".join(METHODS)]

    def run(job: str, *words: str) -> int:
        return main([job, *words, "--run-dir", f"{root}/{job}-{words[1].rpartition('/')[2]}"])

    for entry in (DISHES, NAMES):
        (root / f"{entry['name']}.yaml").write_text(yaml.safe_dump(entry))
        tables = ["--tables", f"{root}/{entry['name']}"]
        source = ["--source", f"{root}/items.jsonl", "--task", f"{root}/{entry['name']}.yaml"]
        assert run("ingest", *tables, *source, "--derive-requests", str(NEWEST), "--buckets", "2") == 0
        if entry is DISHES:
            assert (
                run("base-lm", *tables, "--output", f"{root}/lm", "--set", *(f"lm.{k}={v}" for k, v in lm.items())) == 0
            )
        assert run("generate", *tables, *model, "--set", *engine) == 0
        assert run("evaluate", *tables) == 0
    return SimpleNamespace(root=root)


def replies(made, task: str, method: str) -> list[tuple[str, str]]:
    """(right answer, reply) of every request."""
    place = f"{made.root}/{task}"
    golds = {row["request_id"]: row["target"] for row in small.rows(place, "requests")}
    found = {r["request_id"]: r["text"] for r in small.rows(place, "generations") if r["method"] == method}
    assert set(found) == set(golds) and len(golds) == USERS * NEWEST
    return [(golds[i], found[i].strip()) for i in golds]


def report(made, task: str) -> dict:
    return json.loads((made.root / f"evaluate-{task}" / "report.json").read_text())


def test_a_task_with_labels_is_scored_by_them_and_what_is_no_label_is_wrong(made):
    found = report(made, "dishes")
    assert found["task"] == "dishes" and list(found["methods"]) == list(METHODS)
    for method in METHODS:
        pairs = replies(made, "dishes", method)
        f1 = []
        for label in DISHES["labels"]:
            hits = sum(gold == reply == label for gold, reply in pairs)
            f1.append(2 * hits / (sum(gold == label for gold, _ in pairs) + sum(reply == label for _, reply in pairs)))
        want = {"accuracy": sum(gold == reply for gold, reply in pairs) / len(pairs), "f1": sum(f1) / len(f1)}
        assert found["methods"][method]["scores"] == pytest.approx(want)
    pairs = replies(made, "dishes", "none")
    odd = [gold for gold, reply in pairs if reply == "odd"]  # as the model has read it most of the time
    assert odd and set(odd) == {"sour"} and found["methods"]["none"]["errors"] == 0
    assert 0.5 < found["methods"]["none"]["scores"]["accuracy"] <= 1 - len(odd) / len(pairs)


def test_a_task_with_free_text_is_scored_by_rouge(made):
    found = report(made, "names")
    assert found["task"] == "names" and list(found["methods"]) == list(METHODS)
    for method in METHODS:
        rows = [
            tuple(re.findall("[a-z0-9]+", text.lower()) for text in pair) for pair in replies(made, "names", method)
        ]
        want = {"rouge1": 0.0, "rougeL": 0.0}
        for gold, words in rows:
            shared = sum(min(gold.count(word), words.count(word)) for word in set(words))
            for name, hits in (("rouge1", shared), ("rougeL", longest_common(gold, words))):
                want[name] += 2 * hits / (len(gold) + len(words)) / len(rows)  # F of precision and recall
        assert found["methods"][method]["scores"] == pytest.approx(want)
    assert found["methods"]["none"]["scores"]["rouge1"] > 0.1  # the tastes stand in the titles


def longest_common(one: list[str], other: list[str]) -> int:
    if not one or not other:
        return 0
    if one[-1] == other[-1]:
        return 1 + longest_common(one[:-1], other[:-1])
    return max(longest_common(one[:-1], other), longest_common(one, other[:-1]))


@pytest.mark.parametrize("task", ["dishes", "names"])
def test_retrieval_and_predictions_go_by_the_tasks_own_words(made, task):
    found = report(made, task)
    costs = {method: found["methods"][method]["cost"]["prompt_tokens"] for method in METHODS}
    assert costs["bm25"] > costs["none"] + 10
    for method, path in found["predictions"].items():
        with open(path, encoding="utf-8") as stream:
            written = json.load(stream)
        assert written["task"] == task
        assert sorted(row["output"].strip() for row in written["golds"]) == sorted(
            reply for _, reply in replies(made, task, method)
        )
    assert (made.root / f"evaluate-{task}" / "report.html").is_file()


def test_a_list_without_one_of_the_golds_is_refused(made, capsys):
    other = made.root / "fewer.yaml"
    other.write_text(yaml.safe_dump(DISHES | {"labels": ["salty", "sweet"]}))
    words = ["--tables", f"{made.root}/dishes", "--task", str(other), "--run-dir", str(made.root / "refused")]
    assert main(["evaluate", *words]) == 2
    assert "golds are outside its 2 labels" in capsys.readouterr().err
