"""evaluate against the official scores and a bootstrap worked out here, on replies written by hand."""

import json
import random
from collections import Counter
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra import shards
from infra.errors import InputError
from pipelines import tables
from pipelines.__main__ import main
from pipelines.evaluate import job as evaluate
from pipelines.evaluate.figures import Evaluation, Report
from pplug import metrics, tasks
from tests.pipelines.population import NOTES, Population

pytestmark = pytest.mark.usefixtures("ray_session")
USERS, EACH = 40, 3


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Population:
    """40 people with 3 requests each, one owner of them split into a history a question, and open requests."""
    population = Population(tmp_path_factory.mktemp("evaluate"))
    rng = random.Random(0)
    asked = [
        {
            "request_id": f"r{user}-{n}",
            "user_id": f"u{user}" if user else f"q{n}",
            "owner_id": f"u{user}",
            "input": "How?",
            "target": rng.choice(["good", "bad"]),
        }
        for user in range(USERS)
        for n in range(EACH)
    ]
    asked += [{"request_id": f"open{n}", "user_id": f"u{n}", "input": "How?"} for n in range(5)]
    source = population.folder / "requests.jsonl"
    source.write_text("\n".join(map(json.dumps, asked)))
    items = population.folder / "items.jsonl"
    items.write_text(json.dumps({"user_id": "u1", "item_id": "1", "text": "x", "mood": "good"}))
    assert population.ingest(source=str(items), requests_source=str(source), task=population.task(NOTES)) == 0
    return population


def replies(population: Population, right: float, seed: int, skip=()) -> dict[str, str]:
    """A reply to each request; this share of people is always right, others now and then or no label at all."""
    rng = random.Random(seed)
    found = {}
    for i, row in sorted(population.requests().items()):
        wrong = rng.choice(["good", "bad", "nonsense", ""])
        always = random.Random(f"{seed}/{row['owner_id']}").random() < right
        if i not in skip:
            found[i] = (row["target"] or "good") if always else wrong
    return found


def write_generations(
    population, run_id: str, by_method: dict[str, dict[str, str]], errors=(), complete=True, inputs=None
) -> None:
    asked = population.requests()
    table = tables.open_or_create(population.tables, "generations", 4)
    rows = [
        {"run_id": run_id, "request_id": i, "method": method, "user_id": asked[i]["user_id"] if i in asked else "gone",
         "text": text, "error": "too long" if i in errors else None, "output_tokens": 3,
         "prompt_tokens": 13 if "plug" in method else 11, "persona": "mean" if "plug" in method else "none",
         "adapter_id": "fit-hash" if "adapter" in method else None, "llm_id": f"llm-{'adapter' in method}",
         "input_hash": blake2b(inputs[i].encode(), digest_size=8).hexdigest() if inputs else None}
        for method, texts in by_method.items() for i, text in texts.items()
    ]  # fmt: skip
    users = pa.array([row["user_id"] for row in rows], pa.string())
    bucket, user_key = shards.shard_columns(users, 4)
    schema = table.spec.schema
    data = pa.Table.from_pylist(rows, schema=schema)
    for name, column in (("bucket", bucket), ("user_key", user_key)):
        at = schema.get_field_index(name)
        data = data.set_column(at, schema.field(at), column)
    before = table.snapshot()
    files = table.write(data, run_id)
    table.commit(files, run_id=run_id, group=0, mode="append", planned_on=before.version, complete=complete)


def run(population, capsys=None, **config) -> tuple[int, dict, str]:
    run_dir = population.folder / f"evaluate-{random.random()}"
    code = evaluate.run(evaluate.Config(tables=population.tables, run_dir=str(run_dir), **config))
    return code, json.loads((run_dir / "report.json").read_text()), capsys.readouterr().out if capsys else ""


@pytest.fixture(scope="module")
def generated(answered) -> Population:
    by_method = {
        "none": replies(answered, 0.2, 1),
        "plug": replies(answered, 0.8, 2),
        "plug:mean": replies(answered, 0.2, 1),
    }
    write_generations(answered, "night-1", by_method, errors=("r3-1",))
    return answered


def labelled(population, texts: dict[str, str], errors=("r3-1",)) -> tuple[dict, dict]:
    golds = {i: row["target"] for i, row in population.requests().items() if row["target"] is not None}
    return golds, {i: "" if i in errors else texts[i] for i in golds}


def test_scores_are_the_official_ones_and_errors_count_as_empty(generated, capsys):
    code, report, printed = run(generated, capsys)
    assert code == 0
    assert (report["task"], report["n_users"], report["n_requests"]) == ("notes", USERS, USERS * EACH)
    entry = tasks.TaskSpec.model_validate(NOTES)
    for method, seed, right in (("none", 1, 0.2), ("plug", 2, 0.8), ("plug:mean", 1, 0.2)):
        golds, texts = labelled(generated, replies(generated, right, seed))
        assert report["methods"][method]["scores"] == pytest.approx(metrics.score(entry, golds, texts), abs=1e-12)
        assert report["methods"][method]["n"] == USERS * EACH and report["methods"][method]["errors"] == 1
    assert report["planned"] == report["written"] == 3 * USERS * EACH
    assert "plug: 1 replies were errors" in printed and "120 requests of 40 users" in printed
    assert list(report["methods"]) == ["none", "plug", "plug:mean"]
    read = {name: generated.report["tables_written"][name] for name in ("histories", "requests")}
    assert read.items() <= report["tables_read"].items() and "generations" in report["tables_read"]


def test_report_json_is_the_dump_of_figures_that_can_be_read_again(generated, tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"best_without_history": 0.34, "best_with_history": 0.97, "of": "a key of its own"}))
    _, report, _ = run(generated, run=("night-1",), reference=str(path), examples=2)
    absent = {"by_run"}  # nothing was pooled
    assert set(Evaluation.model_fields) - absent == set(Evaluation.model_fields) & set(report)
    dumped = json.loads(json.dumps(Report.model_validate(report).dump(), default=str))
    for name in set(Evaluation.model_fields) - absent:
        assert dumped[name] == report[name], name
    assert report["reference"]["of"] == "a key of its own"
    baseline, plug = report["methods"]["none"], report["methods"]["plug"]
    assert plug.keys() - baseline.keys() == {"vs_none", "users_vs_none"}
    assert set(plug["vs_none"]["f1"]) == {"difference", "ci95", "p_value", "ci95_corrected"}
    assert set(report["groups"]["length"]["thirds"][0]) == {"from", "to", "n", "methods"}
    report["methods"]["plug"]["cost"]["tokens"] = 1
    with pytest.raises(ValueError, match="methods.plug.cost.tokens"):
        Report.model_validate(report)


def test_the_table_on_the_screen_says_how_many_users_do_better_and_worse(generated, capsys):
    _, _, printed = run(generated, capsys)
    golds, none = labelled(generated, replies(generated, 0.2, 1))
    plug = labelled(generated, replies(generated, 0.8, 2))[1]
    gain = Counter()
    for i, row in generated.requests().items():
        gain[row["user_id"]] += (plug[i] == golds[i]) - (none[i] == golds[i]) if i in golds else 0
    asked = {row["user_id"] for i, row in generated.requests().items() if i in golds}
    better, worse = (sum(sign * gain[user] > 0 for user in asked) / len(asked) for sign in (1, -1))
    lines = {line.split()[0]: line for line in printed.splitlines() if line.split()}
    assert lines["plug"].endswith(f"  {100 * better:.0f}% / {100 * worse:.0f}%") and better > worse > 0
    assert "%" not in lines["none"].split("]")[-1] and lines["method"].endswith("users better / worse")


def test_only_the_users_of_a_list_are_scored(generated, tmp_path, capsys):
    some = {f"u{number}" for number in range(1, 31)}
    (tmp_path / "users").write_text("".join(f"{user}\n" for user in sorted(some)))
    _, report, printed = run(generated, capsys, users=str(tmp_path / "users"), predictions_dir=str(tmp_path / "p"))
    assert f"notes: 90 requests of 30 users, those of {tmp_path / 'users'} alone" in printed.splitlines()
    asked = {i for i, row in generated.requests().items() if row["user_id"] in some and row["target"]}
    assert (report["n_users"], report["n_requests"], report["not_generated"]) == (30, 90, 0) and len(asked) == 90
    entry = tasks.TaskSpec.model_validate(NOTES)
    golds, texts = labelled(generated, replies(generated, 0.8, 2))
    want = metrics.score(entry, {i: golds[i] for i in asked}, {i: texts[i] for i in asked})
    assert report["methods"]["plug"]["scores"] == pytest.approx(want, abs=1e-12)
    written = json.loads((tmp_path / "p" / "plug.json").read_text())["golds"]
    assert {row["id"] for row in written} == asked
    with pytest.raises(InputError, match="users=no/such/file: cannot be read .* one user id per line"):
        run(generated, users="no/such/file")


def test_intervals_are_over_people_and_differences_are_paired(generated):
    _, report, _ = run(generated)
    golds, none = labelled(generated, replies(generated, 0.2, 1))
    _, plug = labelled(generated, replies(generated, 0.8, 2))
    owner = {i: row["owner_id"] for i, row in generated.requests().items()}
    people = sorted(set(owner.values()))
    hits = {name: np.array([sum(texts[i] == golds[i] for i in golds if owner[i] == who) for who in people])
            for name, texts in (("none", none), ("plug", plug))}  # fmt: skip
    drawn = np.random.default_rng(0).integers(0, USERS, (4000, USERS))
    for got, values in (
        (report["methods"]["plug"]["ci95"]["accuracy"], hits["plug"][drawn].mean(1) / EACH),
        (report["methods"]["plug"]["vs_none"]["accuracy"]["ci95"], (hits["plug"] - hits["none"])[drawn].mean(1) / EACH),
    ):
        want = np.percentile(values, [2.5, 97.5])
        np.testing.assert_allclose(got, want, atol=0.12 * (want[1] - want[0]))
    gain = report["methods"]["plug"]["vs_none"]["accuracy"]
    assert gain["p_value"] < 0.01 and gain["difference"] == pytest.approx(
        hits["plug"].mean() / 3 - hits["none"].mean() / 3
    )
    same = report["methods"]["plug:mean"]["vs_none"]["f1"]  # the same replies: no difference in any resample
    assert (same["difference"], same["ci95"], same["p_value"]) == (0.0, [0.0, 0.0], 1.0)
    assert "vs_none" not in report["methods"]["none"]


def test_predictions_are_files_in_lamps_shape_that_score_the_same(generated, tmp_path):
    _, report, _ = run(generated, predictions_dir=str(tmp_path / "p"))
    assert set(report["predictions"]) == set(report["methods"])
    golds, _ = labelled(generated, replies(generated, 0.2, 1))
    for method, path in report["predictions"].items():
        with open(path, encoding="utf-8") as stream:
            found = json.load(stream)
        assert found["task"] == "notes" and set(found) == {"task", "golds"}
        texts = {row["id"]: row["output"] for row in found["golds"]}
        assert len(found["golds"]) == len(texts) and set(texts) == set(golds)
        score = metrics.score(tasks.TaskSpec.model_validate(NOTES), golds, texts)
        assert score == pytest.approx(report["methods"][method]["scores"])


def test_the_same_seed_gives_the_same_report(generated):
    reports = [run(generated, seed=seed)[1]["methods"] for seed in (0, 0, 1)]
    assert reports[0] == reports[1]
    assert reports[0]["plug"]["ci95"] != reports[2]["plug"]["ci95"]
    assert reports[0]["plug"]["scores"] == reports[2]["plug"]["scores"]


def test_a_reference_stands_in_report_and_table(generated, tmp_path, capsys):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"best_without_history": 0.34, "best_with_history": 0.97, "users": 40}))
    _, report, printed = run(generated, capsys, reference=str(path))
    assert report["reference"]["best_without_history"] == 0.34
    assert "best possible: 0.340 without history, 0.970 with it\n" in printed
    path.write_text(json.dumps({"best_without_history": 0.34, "best_with_history": 0.97, "other_user": 0.3}))
    _, _, printed = run(generated, capsys, reference=str(path))
    assert "0.970 with it, 0.300 expected with another user's\n" in printed
    path.write_text("{}")
    with pytest.raises(InputError, match="truth.json: expected a JSON file with the numbers best_without_history"):
        run(generated, reference=str(path))


def test_methods_of_several_runs_and_a_choice_of_them(generated):
    write_generations(generated, "night-2", {"oracle": replies(generated, 1.0, 3)})
    _, report, _ = run(generated, run=("night-1", "night-2"), methods=("oracle", "none"))
    assert list(report["methods"]) == ["oracle", "none"] and report["runs"] == ["night-1", "night-2"]
    assert report["methods"]["oracle"]["scores"]["accuracy"] == 1.0
    _, newest, _ = run(generated)
    assert newest["runs"] == ["night-2"]


def test_gaps_doubles_and_unknown_names_are_refused_by_name(generated):
    write_generations(
        generated,
        "gaps",
        {"none": replies(generated, 0.2, 1), "plug": replies(generated, 0.8, 2, skip=("r5-0", "r9-2"))},
    )
    with pytest.raises(
        InputError, match="method plug has no reply to 2 of 120 requests.*user_key [0-9a-f]{32}.*same run_id"
    ):
        run(generated, run=("gaps",))
    code, report, _ = run(generated, run=("gaps",), methods=("none",))
    assert code == 0 and list(report["methods"]) == ["none"]
    code, report, _ = run(generated, run=("gaps",), methods=("plug",))
    assert code == 0 and report["methods"]["plug"]["n"] == 118
    with pytest.raises(InputError, match="no method bm25; it has none, plug"):
        run(generated, run=("gaps",), methods=("none", "bm25"))
    with pytest.raises(InputError, match="no request with a target was answered; give --run"):
        run(generated, run=("never",))
    with pytest.raises(InputError, match="two replies of method none in runs night-1, gaps; name .* or give --pool"):
        run(generated, run=("night-1", "gaps"))


def test_runs_that_differ_in_a_seed_are_pooled_over_all_their_replies(generated):
    seeds = {
        "night-1": {"none": replies(generated, 0.2, 1), "plug": replies(generated, 0.8, 2)},
        "seed-2": {"none": replies(generated, 0.2, 6), "plug": replies(generated, 0.6, 5)},
    }
    write_generations(generated, "seed-2", seeds["seed-2"])
    code, report, _ = run(generated, run=("night-1", "seed-2"), methods=("none", "plug"), pool=True)
    assert code == 0 and report["planned"] == 4 * USERS * EACH
    entry, found = tasks.load(generated.task(NOTES)), report["methods"]
    seeds["night-1"] = {method: labelled(generated, texts)[1] for method, texts in seeds["night-1"].items()}
    golds = labelled(generated, seeds["seed-2"]["none"])[0]
    of_run = {name: {method: metrics.score(entry, golds, {i: texts[i] for i in golds})
                     for method, texts in by_method.items()} for name, by_method in seeds.items()}  # fmt: skip
    assert report["by_run"] == of_run and found["plug"]["n"] == 2 * USERS * EACH
    mean = np.mean([of["plug"]["accuracy"] for of in of_run.values()])
    assert found["plug"]["scores"]["accuracy"] == pytest.approx(mean)
    people, (none, plug) = right_answers(generated, golds, seeds)
    drawn = np.random.default_rng(0).integers(0, len(people), (4000, len(people)))
    for got, values in (
        (found["plug"]["ci95"]["accuracy"], plug[drawn].mean(1)),
        (found["plug"]["vs_none"]["accuracy"]["ci95"], (plug - none)[drawn].mean(1)),
    ):
        want = np.percentile(values, [2.5, 97.5])
        np.testing.assert_allclose(got, want, atol=0.12 * (want[1] - want[0]))
    assert sorted(report["predictions"]) == ["night-1", "seed-2"]


def right_answers(population, golds, seeds) -> tuple[list[str], np.ndarray]:
    """People, and (none or plug, people) the share that is right of each one's replies in all runs."""
    owner = {i: row["owner_id"] for i, row in population.requests().items()}
    people = sorted({owner[i] for i in golds})
    found = np.zeros((2, len(people)))
    for by_method in seeds.values():
        for at, method in enumerate(("none", "plug")):
            for i in golds:
                found[at, people.index(owner[i])] += (by_method[method][i] == golds[i]) / (EACH * len(seeds))
    return people, found


def test_runs_that_do_not_repeat_the_same_methods_are_not_pooled(generated):
    write_generations(generated, "other-methods", {"none": replies(generated, 0.2, 1)})
    with pytest.raises(InputError, match="pool: .* night-1 has none, .*:mean on 120 .*other-methods has none"):
        run(generated, run=("night-1", "other-methods"), pool=True)


def test_runs_on_as_many_but_other_requests_are_not_pooled(generated):
    texts = replies(generated, 0.2, 1)
    for run_id, gap in (("all-but-one", "r7-0"), ("all-but-another", "r8-0")):
        write_generations(generated, run_id, {"none": {i: text for i, text in texts.items() if i != gap}})
    with pytest.raises(InputError, match="none on 119 requests, and .*none on 119 requests, not all of them the same"):
        run(generated, run=("all-but-one", "all-but-another"), pool=True)
    write_generations(generated, "once-more", {"none": {i: text for i, text in texts.items() if i != "r7-0"}})
    assert run(generated, run=("all-but-one", "once-more"), pool=True)[1]["methods"]["none"]["n"] == 2 * 119


def test_replies_to_requests_that_are_not_there_are_refused_by_name(generated, tmp_path, capsys):
    texts = replies(generated, 0.2, 1)
    write_generations(generated, "strangers", {"none": texts | {"r-gone": "good", "r-past": "bad"}})
    with pytest.raises(
        InputError, match="replies to 2 requests that the table requests does not have.*user_key [0-9a-f]{32}"
    ):
        run(generated, run=("strangers",))
    (tmp_path / "users").write_text("".join(f"u{number}\n" for number in range(1, USERS)))
    _, report, _ = run(generated, run=("strangers",), users=str(tmp_path / "users"))
    assert report["methods"]["none"]["n"] == (USERS - 1) * EACH
    # open requests are there, though nobody knows their answers
    assert any(i.startswith("open") for i in texts)
    _, compared, printed = run(generated, capsys, compare=("strangers", "night-1"))
    assert "2 requests that strangers answered are in the table requests no more" in printed
    assert compared["compare"]["n_requests"] == USERS * EACH


def test_runs_of_different_requests_are_not_compared_and_errors_are_told(generated, capsys):
    texts = replies(generated, 0.2, 1)
    for name, odd in (("odd", 1), ("even", 0)):
        write_generations(generated, name, {"none": {i: text for i, text in texts.items() if int(i[-1]) % 2 == odd}})
    with pytest.raises(InputError, match="the runs share no request with a target"):
        run(generated, compare=("odd", "even"))
    write_generations(generated, "broken", {"none": texts}, errors=("r7-0", "r8-0"))
    printed = run(generated, capsys, compare=("night-1", "broken"))[2]
    assert "run broken: none: 2 replies were errors" in printed


def test_a_task_leaves_its_labels_to_ingest_and_a_wrong_gold_is_told(generated, tmp_path):
    own = {name: value for name, value in NOTES.items() if name != "labels"}
    want = run(generated, run=("night-1",))[1]["methods"]["plug"]["scores"]
    assert run(generated, run=("night-1",), task=generated.task(own))[1]["methods"]["plug"]["scores"] == want
    with pytest.raises(InputError, match="task another: it has no labels.*leave --task out"):
        run(generated, run=("night-1",), task=generated.task(own | {"name": "another"}))
    other = generated.task(own | {"labels": ["good", "fair"]})
    with pytest.raises(InputError, match="golds are outside its 2 labels.*of the user with user_key [0-9a-f]{32}"):
        run(generated, run=("night-1",), task=other)


def test_replies_to_an_earlier_input_are_refused_by_name_and_left_out_of_a_comparison(generated, capsys):
    texts = replies(generated, 0.2, 1)
    asked = {i: row["input"] for i, row in generated.requests().items()}
    before = asked | {i: asked[i] + " as it was" for i in ("r7-0", "r8-0")}
    write_generations(generated, "as-it-is", {"none": texts}, inputs=asked)
    assert run(generated, run=("as-it-is",))[1]["methods"]["none"]["n"] == USERS * EACH
    write_generations(generated, "as-it-was", {"none": texts}, inputs=before)
    with pytest.raises(InputError, match="2 requests whose input or time has changed since.*user_key [0-9a-f]{32}"):
        run(generated, run=("as-it-was",))
    _, compared, printed = run(generated, capsys, compare=("as-it-was", "as-it-is"))
    assert "2 requests that as-it-was answered have another input or time now, and are left out" in printed
    assert compared["compare"]["n_requests"] == USERS * EACH - 2


def test_ratings_that_are_no_number_follow_the_rule_and_ten_users_are_said_to_be_few(tmp_path, capsys):
    population = Population(tmp_path)
    entry = NOTES | {"metric": "rating", "labels": [1, 2, 3, 4, 5]}
    asked = [{"request_id": f"r{n}", "user_id": f"u{n}", "input": "How?", "target": str(n % 5 + 1)} for n in range(10)]
    (tmp_path / "asked.jsonl").write_text("\n".join(map(json.dumps, asked)))
    (tmp_path / "items.jsonl").write_text(json.dumps({"user_id": "u1", "item_id": "1", "text": "x", "mood": "2"}))
    source = {"source": str(tmp_path / "items.jsonl"), "requests_source": str(tmp_path / "asked.jsonl")}
    assert population.ingest(task=population.task(entry), **source) == 0
    words = ["five stars", "", "nan", "4 of 5", "-"]
    by_method = {
        "none": {f"r{n}": words[n % 5] for n in range(10)},
        "bm25": {f"r{n}": f" {n % 5 + 1}.0 " for n in range(10)},
    }
    write_generations(population, "night", by_method)
    code, report, printed = run(population, capsys, examples=1)
    (shown,) = report["examples"]  # a number is right in whatever form it is written
    assert [(reply["method"], reply["right"]) for reply in shown["replies"]] == [("none", False), ("bm25", True)]
    # the end of the scale that is further away, the upper one for a 3: 5 5 5 1 1 for golds 1 to 5
    mae, squared = (4 + 3 + 2 + 3 + 4) / 5, (16 + 9 + 4 + 9 + 16) / 5
    assert code == 0
    assert report["methods"]["none"]["scores"] == pytest.approx({"mae": mae, "rmse": squared**0.5})
    assert report["methods"]["bm25"]["scores"] == {"mae": 0.0, "rmse": 0.0}
    # each reply of bm25 is right, none of the others is, and less is better; no times, no personas: no such thirds
    helped = report["methods"]["bm25"]["users_vs_none"]
    assert [helped[name]["share"] for name in ("better", "worse", "equal")] == [1, 0, 0]
    assert list(report["groups"]) == ["length"]
    wide = "only 10 users: the intervals are rough, narrow ones too"
    assert (
        report["warnings"] == [wide, "none: 100% of the replies are no number and count as wrong"] and wide in printed
    )
    assert report["verdict"]["headline"].endswith("100.0% of the replies of none are no number")
    page = Path(report["config"]["run_dir"], "report.html")
    assert wide in page.read_text() and f"page: {page}\n" in printed


def test_an_empty_list_of_methods_is_wrong_usage(generated, capsys):
    assert main(["evaluate", "--tables", generated.tables, "--set", "methods=[]"]) == 2
    assert "methods" in capsys.readouterr().err


def test_a_subset_of_the_requests_is_scored_and_said(generated, capsys):
    few = {i: text for i, text in replies(generated, 0.5, 4).items() if i.startswith(("r1-", "r2-", "open"))}
    write_generations(generated, "few", {"none": few})
    _, report, printed = run(generated, capsys, run=("few",))
    assert (report["n_users"], report["n_requests"], report["not_generated"]) == (2, 6, USERS * EACH - 6)
    assert "only 2 users: the intervals are rough" in printed and "114 of 120 requests with a target" in printed


def test_golds_of_another_task_are_refused(generated, tmp_path):
    other = NOTES | {"name": "other", "labels": ["yes", "no"]}
    with pytest.raises(InputError, match="task other: .* golds are outside its 2 labels"):
        run(generated, run=("night-1",), task=generated.task(other))


def test_nothing_to_score_is_said(population):
    with pytest.raises(InputError, match="no table histories.*run `ingest`"):
        run(population)
    items = population.folder / "items.jsonl"
    items.write_text(json.dumps({"user_id": "u1", "item_id": "1", "text": "x", "mood": "good"}))
    assert population.ingest(source=str(items), task=population.task(NOTES)) == 0
    with pytest.raises(InputError, match="no table generations.*run `generate`"):
        run(population)


def test_the_report_page_is_written_and_shows_texts_only_when_asked(generated):
    _, report, _ = run(generated, run=("night-1",))
    folder = Path(report["config"]["run_dir"])
    html = (folder / "report.html").read_text()
    assert "examples" not in report and "120 requests of 40 users" in html and "plug: 1 replies were errors" in html
    assert {path.suffix for path in (folder / "charts").iterdir()} == {".svg", ".png"}
    _, report, _ = run(generated, run=("night-1",), examples=10)
    golds, plug = labelled(generated, replies(generated, 0.8, 2))
    assert len(report["examples"]) == 10
    for example in report["examples"]:
        assert [reply["method"] for reply in example["replies"]] == ["none", "plug", "plug:mean"]
        assert len({reply["text"] for reply in example["replies"]}) > 1
        assert all(reply["right"] == (reply["text"] == example["target"]) for reply in example["replies"])
