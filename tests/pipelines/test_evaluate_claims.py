"""Claims of evaluate on whole tables: the verdict, references that need no LLM, replies that nobody understood."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from infra.errors import InputError
from pipelines import tables
from pipelines.evaluate import verdict
from pplug import metrics, tasks
from tests.pipelines.population import NOTES, Population
from tests.pipelines.test_evaluate import labelled, run, write_generations

pytestmark = pytest.mark.usefixtures("ray_session")
USERS, EACH = 40, 3
SECRET = "a long reply that repeats what the user wrote, word by word, and more"


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Population:
    """40 people with 3 requests each and 5 items; two of three people have the answer `good` to everything."""
    population, rng = Population(tmp_path_factory.mktemp("claims")), random.Random(1)
    items, requests = [], []
    for user in range(USERS):
        mood = "good" if user % 3 else "bad"
        items += [{"user_id": f"user-{user}", "item_id": str(n), "text": f"x {n}", "mood": mood} for n in range(5)]
        requests += [
            {"request_id": f"r{user}-{n}", "user_id": f"user-{user}", "input": "How?", "as_of_position": 5,
             "target": mood if rng.random() < 0.9 else "bad"}
            for n in range(EACH)
        ]  # fmt: skip
    for name, rows in (("items", items), ("requests", requests)):
        (population.folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(population.folder / "items.jsonl")}
    source["requests_source"] = str(population.folder / "requests.jsonl")
    assert population.ingest(task=population.task(NOTES), **source) == 0
    return population


def right(population: Population, share: float, seed: int, wrong: tuple[str, ...] = ("good", "bad")) -> dict[str, str]:
    rng, found = random.Random(seed), {}
    for i, row in sorted(population.requests().items()):
        found[i] = row["target"] if rng.random() < share else rng.choice(wrong)
    return found


def test_another_persons_history_that_helps_as_much_is_in_the_headline_of_page_screen_and_json(asked, capsys):
    texts = {"none": right(asked, 0.0, 1), "plug": right(asked, 0.9, 2), "plug:other-user": right(asked, 0.9, 3)}
    write_generations(asked, "as-much", texts)
    _, report, printed = run(asked, capsys, run=("as-much",))
    found, html = report["verdict"], Path(report["config"]["run_dir"], "report.html").read_text()
    assert (found["best"], found["control"], found["words"]) == ("plug", "plug:other-user", verdict.OTHER)
    golds, _ = labelled(asked, texts["none"])
    score = {
        name: metrics.score(tasks.load(asked.task(NOTES)), golds, said)["accuracy"] for name, said in texts.items()
    }
    assert found["controls"]["plug:other-user"]["difference"] == pytest.approx(score["plug"] - score["plug:other-user"])
    assert found["gain"]["difference"] == pytest.approx(score["plug"] - score["none"])
    assert found["headline"] in printed
    assert f"<h1>{found['headline']}</h1>".replace("'", "&#39;") in html
    low, high = report["methods"]["plug"]["vs_none"]["accuracy"]["ci95_corrected"]
    assert found["gain"]["ci95_corrected"] == [low, high] and f"[{low:+.3f}, {high:+.3f}]*" in printed


def test_references_are_scored_as_methods_are_and_counted_as_none(asked, capsys):
    texts = {"none": right(asked, 0.0, 1), "plug": right(asked, 0.5, 2), "plug:other-user": right(asked, 0.0, 3)}
    write_generations(asked, "beside", texts)
    _, report, printed = run(asked, capsys, run=("beside",))
    golds = {i: row["target"] for i, row in asked.requests().items()}
    own = {i: "good" if int(row["user_id"][5:]) % 3 else "bad" for i, row in asked.requests().items()}
    common = Counter(row["fields"]["mood"] for rows in asked.items().values() for row in rows).most_common(1)[0][0]
    entry = tasks.load(asked.task(NOTES))
    for name, said in (("user-label", own), ("overall-label", dict.fromkeys(golds, common))):
        assert report["references"][name]["scores"] == pytest.approx(metrics.score(entry, golds, said))
        low, high = report["references"][name]["ci95"]["accuracy"]
        assert low < report["references"][name]["scores"]["accuracy"] < high and report["references"][name]["about"]
    assert not report["references"].keys() & report["methods"].keys()
    assert report["verdict"]["n_methods"] == 1 and set(report["predictions"]) == set(texts)
    assert report["planned"] == len(texts) * USERS * EACH
    # the user's own most frequent label is better than the plug, and the difference is paired
    found = report["verdict"]["reference"]
    assert found["name"] in ("user-label", "classifier+user") and not found["beaten"]
    want = metrics.score(entry, golds, texts["plug"])["accuracy"] - found["score"]
    assert found["difference"] == pytest.approx(want) and found["ci95_corrected"][1] < 0
    says = f"plug does not beat {found['name']}, which needs no LLM and reaches {100 * found['score']:.1f}%"
    html = Path(report["config"]["run_dir"], "report.html").read_text()
    assert says in report["verdict"]["headline"] and says in printed and says in html
    table = printed.partition("references, which need no LLM:\n")[2].splitlines()
    assert {line.split()[0] for line in table[1 : 1 + len(report["references"])]} == set(report["references"])
    assert "References without an LLM" in html


def test_a_gain_over_replies_of_another_llm_is_said_to_hold_that_difference_too(asked):
    texts = {"none": right(asked, 0.0, 1), "adapter": right(asked, 0.9, 2), "plug": right(asked, 0.5, 3)}
    write_generations(asked, "bases", texts)
    _, report, _ = run(asked, run=("bases",))
    says = "adapter: by another LLM than none, so that their gain over none holds this difference too; generate"
    assert [warning for warning in report["warnings"] if "another LLM" in warning] == [
        f"{says} adapter:none, which tells it"
    ]
    html = Path(report["config"]["run_dir"], "report.html").read_text()
    assert "accuracy where another model or decoding without personalisation reaches" in html
    _, report, _ = run(asked, run=("bases",), methods=("none", "plug"))
    assert not any("another LLM" in warning for warning in report["warnings"]) and not report["unlike_baseline"]
    html = Path(report["config"]["run_dir"], "report.html").read_text()
    assert "accuracy where the same model without personalisation reaches" in html


def test_a_reference_that_is_beaten_is_not_in_the_headline(asked):
    write_generations(asked, "beats", {"none": right(asked, 0.0, 1), "plug": right(asked, 1.0, 2)})
    _, report, _ = run(asked, run=("beats",))
    assert report["verdict"]["reference"]["beaten"] and "does not beat" not in report["verdict"]["headline"]


def test_a_reference_may_learn_from_the_users_of_other_tables_too(asked, tmp_path):
    other = Population(tmp_path)
    items = [{"user_id": f"other-{n}", "item_id": "1", "text": "x", "mood": "bad"} for n in range(20)]
    (tmp_path / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    assert other.ingest(source=str(tmp_path / "items.jsonl"), task=other.task(NOTES)) == 0
    write_generations(asked, "alone", {"none": right(asked, 0.0, 1)})
    found = [run(asked, run=("alone",), references_from=places)[1] for places in ((), (other.tables,))]
    assert [list(report["references"]) for report in found] == [list(found[0]["references"])] * 2
    assert found[0]["references"]["user-label"] == found[1]["references"]["user-label"]
    own = USERS * 5  # all items that the requests may see, and one of each of the others
    assert [report["classifier_items"] for report in found] == [own, own + 20]


def test_answers_that_stand_in_a_training_history_are_counted_and_said(tmp_path, capsys):
    """Co-authors share a paper: a title that dev asks for may be an item of a train author."""
    task = {"name": "titles", "item": "{title}", "item_without_label": "{text}", "input": "Title? {text}",
            "target": "title", "metric": "text", "max_output_tokens": 8}  # fmt: skip
    made = {}
    for name, titles in {
        "train": ["A  paper\nof OURS", "another one"],
        "dev": ["a Paper of ours", "a third one"],
    }.items():
        made[name] = population = Population(tmp_path / name)
        population.folder.mkdir()
        rows = [{"user_id": f"{name}-{n}", "item_id": "1", "text": "x", "title": t} for n, t in enumerate(titles)]
        (population.folder / "items.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {"source": str(population.folder / "items.jsonl"), "derive_requests": 1}
        assert population.ingest(task=population.task(task), **source) == 0
    write_generations(made["dev"], "some", {"none": dict.fromkeys(made["dev"].requests(), "a paper")})
    for places in ((), (made["dev"].tables, made["train"].tables)):
        _, report, printed = run(made["dev"], capsys, run=("some",), references_from=places)
        said = [warning for warning in report["warnings"] if "word for word" in warning]
        if places:  # the tables themselves hold all: each request is made of an item
            assert [warning.partition(" requests")[0] for warning in said] == ["2 of 2", "1 of 2"]
            assert made["train"].tables in said[1] and said[1] in printed
        else:
            assert not said


def test_answers_to_the_requests_that_a_plug_learns_from_are_counted_too(tmp_path):
    """`train` learns the answers to requests, and such an answer need not stand in any item."""
    task = {"name": "titles", "item": "{title}", "item_without_label": "{text}", "input": "Title? {text}",
            "target": "title", "metric": "text", "max_output_tokens": 8}  # fmt: skip
    made = {}
    for name, targets in {
        "train": ["A  Paper of ours", None, "One that dev does not ask for"],
        "dev": ["a paper\nof OURS", "a third one"],
    }.items():
        made[name] = population = Population(tmp_path / name)
        population.folder.mkdir()
        items = [
            {"user_id": f"{name}-{n}", "item_id": "1", "text": "x", "title": f"{name} {n}"} for n in range(len(targets))
        ]
        asked = [
            {"request_id": f"r{n}", "user_id": f"{name}-{n}", "input": "?", "target": target}
            for n, target in enumerate(targets)
        ]
        for file, rows in (("items", items), ("requests", asked)):
            (population.folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        source = {"source": str(population.folder / "items.jsonl")}
        source["requests_source"] = str(population.folder / "requests.jsonl")
        assert population.ingest(task=population.task(task), **source) == 0
    write_generations(made["dev"], "some", {"none": dict.fromkeys(made["dev"].requests(), "a paper")})
    _, report, _ = run(made["dev"], run=("some",), references_from=(made["train"].tables,))
    (said,) = [warning for warning in report["warnings"] if "word for word" in warning]
    assert said.startswith("1 of 2 requests") and f"as the answer to a request, of {made['train'].tables}:" in said


def test_histories_that_have_grown_since_the_replies_are_said_to_know_more(tmp_path, capsys):
    """A request without a cut-off sees all items, and its own answer may have become one since."""
    population = Population(tmp_path)
    task, items, asked = (str(tmp_path / name) for name in ("task.yaml", "items.jsonl", "requests.jsonl"))
    population.task(NOTES)
    Path(items).write_text(json.dumps({"user_id": "ann", "item_id": "1", "text": "x", "mood": "good"}))
    request = {"user_id": "ann", "input": "How?", "target": "bad"}
    rows = [request | {"request_id": "open"}, request | {"request_id": "cut", "as_of": "2026-01-01"}]
    Path(asked).write_text("\n".join(map(json.dumps, rows)))
    assert population.ingest(task=task, source=items, requests_source=asked) == 0
    table = tables.open_table(population.tables, "histories")
    read = table.snapshot(complete=True).version
    write_generations(population, "night", {"none": dict.fromkeys(population.requests(), "bad")})
    generations = tables.open_table(population.tables, "generations")
    generations.commit([], run_id="night", group=1, mode="append", planned_on=generations.version, complete=True,
                       metadata={"histories_version": str(read)})  # fmt: skip

    def says(**how) -> list[str]:
        _, report, _ = run(population, run=("night",), **how)
        return [warning for warning in report["warnings"] if "cut-off" in warning]

    assert says() == []
    Path(items).write_text(json.dumps({"user_id": "ann", "item_id": "2", "text": "How?", "mood": "bad"}))
    assert population.ingest(task=task, source=items) == 0
    (said,) = says()
    assert said.startswith("1 requests have no cut-off") and said.endswith(f"; give --as-of-version histories={read}")
    assert says(as_of_version={"histories": read}) == []


def test_replies_that_are_no_label_are_counted_shown_and_said(asked, capsys):
    chat = {i: f"{SECRET} {i}" for i in asked.requests()}
    few = right(asked, 0.5, 4, wrong=("good", "bad", "neither"))
    write_generations(asked, "chat", {"none": chat, "plug": chat, "bm25": few}, errors=("r3-1",))
    code, report, printed = run(asked, capsys, run=("chat",))
    golds, _ = labelled(asked, few)
    n = sum(text == "neither" for i, text in few.items() if i != "r3-1")
    assert code == 0 and n > 3
    share = n / (USERS * EACH - 1)  # an error is counted as one, and is no reply
    found = {method: row["not_understood"] for method, row in report["methods"].items()}
    assert found["none"]["n"] == USERS * EACH - 1 and found["none"]["share"] == 1.0
    assert found["bm25"] == {"n": n, "share": pytest.approx(share), "replies": found["bm25"]["replies"]}
    assert [row["text"] for row in found["bm25"]["replies"]] == ["neither"]  # three different ones, if there are
    assert len(found["plug"]["replies"]) == 1  # all of them begin alike, and each text is shown once
    for row in found["plug"]["replies"]:
        assert row["text"] == SECRET[:60] and row["user_id"].startswith("user-")
    assert "100.0% of the replies of none are no label of the task" in report["verdict"]["headline"]
    assert report["verdict"]["not_understood"] == {"method": "none", "share": 1.0}
    warning = "plug: 100% of the replies are no label of the task and count as wrong"
    assert warning in report["warnings"] and f"note: {warning}" in printed
    assert share <= 0.2 and not any(said.startswith("bm25") and "no label" in said for said in report["warnings"])
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert "100.0%" in lines["none"] and f"{100 * share:.1f}%" in lines["bm25"] and "not understood" in lines["method"]
    html = Path(report["config"]["run_dir"], "report.html").read_text()
    assert SECRET[:60] in html and SECRET not in html and SECRET[:20] not in printed


def test_three_different_replies_are_shown_and_the_same_ones_in_every_run(asked):
    chat = {i: f"number {i} is nothing" for i in asked.requests()}
    write_generations(asked, "strange", {"none": chat})
    shown = [run(asked, run=("strange",))[1]["methods"]["none"]["not_understood"]["replies"] for _ in range(2)]
    assert shown[0] == shown[1] and len({row["text"] for row in shown[0]}) == 3
    assert all(row["text"].startswith(f"number r{row['user_id'][5:]}-") for row in shown[0])


def test_a_soft_prompt_of_runs_of_its_own_is_a_control_of_pooled_runs(asked, tmp_path):
    plug, soft = (0.9, 0.8), (0.2, 0.3, 0.1)
    for seed, share in enumerate(plug):
        texts = {"none": right(asked, 0.0, seed), "plug": right(asked, share, seed + 10)}
        write_generations(asked, f"main-{seed}", texts | {"plug:other-user": right(asked, 0.0, seed + 50)})
    for seed, share in enumerate(soft):
        write_generations(asked, f"soft-{seed}", {"plug:soft-prompt": right(asked, share, seed + 20)})
    runs = ("main-0", "main-1", "soft-0", "soft-1", "soft-2")
    golds, entry = {i: row["target"] for i, row in asked.requests().items()}, tasks.load(asked.task(NOTES))

    def mean(shares, first):
        of = [right(asked, share, seed + first) for seed, share in enumerate(shares)]
        return sum(metrics.score(entry, golds, texts)["accuracy"] for texts in of) / len(of)

    _, report, _ = run(asked, run=runs, pool=True)
    found = report["methods"]
    assert list(found) == ["none", "plug", "plug:other-user", "plug:soft-prompt"]
    assert (found["plug"]["n"], found["plug:soft-prompt"]["n"]) == (2 * USERS * EACH, 3 * USERS * EACH)
    want = mean(plug, 10) - mean(soft, 20)
    assert report["verdict"]["controls"]["plug:soft-prompt"]["difference"] == pytest.approx(want)
    assert report["verdict"]["words"] == "helps, and it is the user"
    thirds = report["groups"]["length"]["thirds"]
    assert sum(third["n"] for third in thirds) == USERS * EACH
    chosen = ("none", "plug", "plug:soft-prompt")
    _, some, _ = run(asked, run=runs, pool=True, methods=chosen)
    assert tuple(some["methods"]) == chosen and some["methods"]["plug"] == found["plug"]
    with pytest.raises(InputError, match="no method bm25; it has none, plug"):
        run(asked, run=runs, pool=True, methods=(*chosen, "bm25"))
    # a run of a soft prompt that has `none` too shares some methods but not all
    write_generations(asked, "soft-3", {"plug:soft-prompt": right(asked, 0.1, 9), "none": right(asked, 0.0, 1)})
    with pytest.raises(InputError, match="pool: the runs must repeat the same methods, or share none of them"):
        run(asked, run=(*runs, "soft-3"), pool=True)
