"""Several replies to one request: rows of their own, taken up again one by one, and scored as a mean."""

import hashlib
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from infra.errors import InputError
from infra.snapshot import read_file
from pipelines import shown, tables
from pipelines.asked import Answered
from pipelines.engines.base import Decoding
from pipelines.evaluate import job as evaluate
from pipelines.generate.judge import ASKED, Judge, Unjudged
from pipelines.generate.pending import MadeAlike, PendingReplies
from pipelines.generate.remade import WithoutRemade
from pipelines.upkeep import drop_run
from pipelines.waves import files_of
from pplug.schemas import GENERATIONS
from tests.pipelines.population import Population
from tests.pipelines.test_profiles import PEOPLE, item, put, run, talkative

HOT = {"max_tokens": 8, "temperature": 1.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    population = Population(tmp_path_factory.mktemp("samples"))
    rows = [item(user, day, ("good", "bad")[day % 2]) for user in PEOPLE for day in range(5)]
    requests = [
        {"request_id": f"{user}/{at}", "user_id": user, "input": "How do I feel? the music", "target": "good",
         "as_of": item(user, at)["occurred_at"]}
        for user in PEOPLE for at in (3, 4)
    ]  # fmt: skip
    put(population, rows, requests, buckets=1)
    population.llm = talkative(population.folder / "llm")
    return population


def replies(population, name):
    """Rows of a run by request, method and sample, each there once."""
    rows = [row for row in population.rows("generations") if row["run_id"] == name]
    found = {(row["request_id"], row["method"], row["sample"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_a_run_writes_each_sample_and_a_rerun_those_that_are_missing(made):
    asked = {"llm": made.llm, "methods": ("none", "recency")}
    some = made.folder / "some"
    some.write_text("ann\nbob\n")
    several = {"decoding": Decoding(**HOT, n=3)}
    assert run(made, "three", users=str(some), **asked, **several) == 0
    assert made.report["planned"] == made.report["written"] == 2 * 2 * 2 * 3
    assert run(made, "three", **asked, **several) == 0
    assert made.report["already_there"] == made.report["written"] == 2 * 2 * 2 * 3
    assert run(made, "three", **asked, **several) == 0 and made.report["written"] == 0
    assert run(made, "one", **asked, decoding=Decoding(**HOT)) == 0
    three, one = replies(made, "three"), replies(made, "one")
    keys = {key[:2] for key in one}
    assert three.keys() == {(*key, sample) for key in keys for sample in range(3)}
    assert {key[2] for key in one} == {None}
    for key in keys:
        assert three[*key, 0]["text"] == one[*key, None]["text"]
    assert len({row["text"] for row in three.values()}) > len(one)
    (first,), (second,) = ({row["decoding_id"] for row in rows.values()} for rows in (three, one))
    assert first != second
    snapshot = tables.open_table(made.tables, "generations").snapshot()
    requests = tables.open_table(made.tables, "requests").snapshot()
    (text, *_) = shown.replies(snapshot, requests, "three", 1)
    assert all(f"{method} #{sample}" in text for method in asked["methods"] for sample in range(3))


def test_other_numbers_of_samples_are_another_run(made):
    asked = {"llm": made.llm, "methods": ("none",)}
    assert run(made, "fixed", **asked, decoding=Decoding(**HOT, n=2)) == 0
    with pytest.raises(InputError, match="decoding_id"):
        run(made, "fixed", **asked, decoding=Decoding(**HOT, n=3))


def test_samples_without_sampling_and_of_a_profile_are_refused(made):
    with pytest.raises(ValueError, match="all replies to a request are the same; set temperature above 0"):
        Decoding(n=2)
    with pytest.raises(InputError, match="a user has one profile"):
        run(made, "p", llm=made.llm, write_profiles=True, decoding=Decoding(**HOT, n=2))


def write(population, name, rows, **more):
    """Puts replies into `generations` as a finished run: (request_id, method, sample, text, error); `more` of each."""
    users = {row["request_id"]: (row["user_id"], row["user_key"], row["bucket"]) for row in population.rows("requests")}
    data = []
    for request, method, sample, text, error in rows:
        user, key, bucket = users[request]
        data.append({"run_id": name, "request_id": request, "method": method, "sample": sample, "text": text,
                     "error": error, "user_id": user, "user_key": key, "bucket": bucket, "prompt_tokens": 5,
                     "output_tokens": 2, "persona": "none"} | more)  # fmt: skip
    put_rows(population, name, data)
    return data


def put_rows(population, name, data):
    table = tables.open_or_create(population.tables, "generations", 1)
    files = table.write(pa.Table.from_pylist(data, schema=table.spec.schema), name)
    table.commit(files, run_id=name, group=0, mode="append", planned_on=table.snapshot().version, complete=True)


def test_a_sample_that_is_missing_or_an_error_is_still_owed(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    rows = [(name, "none", sample, "good", None) for name in names for sample in range(3)]
    rows[4] = (*rows[4][:4], "too long")
    del rows[2]
    write(made, "gaps", rows)
    done = tables.open_table(made.tables, "generations").snapshot()
    requests = tables.open_table(made.tables, "requests").snapshot()
    pending = PendingReplies(requests, done, "gaps", ("none", "bm25"), "all", None, {}, 3)
    asked = pending.read(0)
    by_name = {row["request_id"]: row for row in asked.requests.to_pylist()}
    owed = {name: asked.missing(by_name[name], "none") for name in names}
    assert owed == {name: [] for name in names} | {names[0]: [2], names[1]: [1]}
    assert [row["request_id"] for row in asked.unanswered(list(by_name.values()), {"none"})] == names[:2]
    (counts,) = pending.count(pa.table({"bucket": [0]}))
    (row,) = counts.to_pylist()
    assert (row["pending"], row["existing"], row["again"]) == (len(names) * 3 + 2, len(names) * 3 - 2, 1)
    unjudged = Unjudged(requests, done, "gaps", "judge", None)
    assert sorted((row["request_id"], row["sample"]) for row, _ in unjudged.read(0).pending) == sorted(
        r[:3:2] for r in rows
    )


def test_a_narrower_rerun_leaves_the_errors_that_it_does_not_make_anew(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    rows = [(name, method, None, "", "oom") for name in names[:4] for method in ("none", "bm25")]
    rows[0] = (*rows[0][:3], "good", None)
    write(made, "narrow", rows)
    table = tables.open_table(made.tables, "generations")
    before, requests = table.snapshot(), tables.open_table(made.tables, "requests").snapshot()
    (key,) = {row["user_key"] for row in made.rows("requests") if row["request_id"] == names[1]}
    pending = PendingReplies(requests, before, "narrow", ("none",), "all", {0: [key]})
    theirs = [row["request_id"] for row in made.rows("requests") if row["user_key"] == key]
    again = {(name, "none") for name, method, _, _, error in rows if error and method == "none" and name in theirs}
    assert {(name, method) for _, name, method, _ in pending.owed(0)} == again != set()
    (row,) = pa.concat_tables(pending.count(pa.table({"bucket": [0]}))).to_pylist()
    assert (row["again"], row["changed"]) == (len(again), 0)
    stage = WithoutRemade(table, before, "narrow", pending)
    written = pa.concat_tables(stage(pa.table({"bucket": [0]}))).to_pylist()
    kept = [row for part in written for file in files_of(part["new"]) for row in read_file(file.uri).to_pylist()]
    assert list(stage(pa.table({"bucket": [10**6]}))) == []  # another job has emptied it meanwhile
    left = {(row["request_id"], row["method"]) for row in kept if row["run_id"] == "narrow"}
    assert left == {(name, method) for name, method, *_ in rows} - again


def test_a_judged_reply_answers_nothing_whether_the_reply_is_an_error_or_has_been_dropped(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    by_models = {"llm_id": "judged-llm", "decoding_id": "d"}
    rows = [(name, "recency", None, "" if at == 2 else "good", "oom" if at == 2 else None)
            for at, name in enumerate(names)]  # fmt: skip
    replies = write(made, "to-judge", rows, **by_models)
    stage = object.__new__(Judge)
    stage.reply = SimpleNamespace(run_id="the-judge", engine=SimpleNamespace(about="float32"))
    asked = pa.Table.from_pylist([row | {"before": [], "after": [], "target": "{}"} for row in replies], schema=ASKED)
    judged = stage(asked).select(GENERATIONS.names).to_pylist()
    assert [(row["error"], row["text"] == "") for row in judged] == [(row[4], row[4] == "oom") for row in rows]
    assert [row["finish_reason"] == "error" for row in judged] == [row[4] == "oom" for row in rows]
    put_rows(made, "the-judge", judged)
    requests = tables.open_table(made.tables, "requests").snapshot()
    asked_for = requests.read(["user_id", "request_id", "input", "as_of", "as_of_position"])
    alike = MadeAlike(plug_id="", **by_models)
    dropped = drop_run.Config(tables=made.tables, runs=("to-judge",), run_id="drop", run_dir=str(made.folder / "drop"))
    for there in (names[:2] + names[3:], []):
        done = tables.open_table(made.tables, "generations").snapshot()
        pending = PendingReplies(requests, done, "night", ("recency",), "new", None, {}, alike=alike).read(0)
        of_nobody = [
            row["request_id"] for row in pending.requests.to_pylist() if pending.missing(row, "recency") == [0]
        ]
        assert sorted(of_nobody) == [name for name in names if name not in there]
        mine = done.read(filter=pc.field("run_id").isin(["to-judge", "the-judge"]))
        only = SimpleNamespace(read=lambda columns, filter, mine=mine, **_: mine.filter(filter).select(columns))
        assert {name for _, name in Answered(only, "retrieval").keys(0, None, asked_for)} == set(there)
        if there:
            assert drop_run.run(dropped) == 0


def test_a_reply_to_an_earlier_input_of_its_request_is_made_anew(tmp_path, ray_session):
    population = Population(tmp_path)
    items = [item(user, day) for user in PEOPLE for day in range(3)]
    requests = {user: {"request_id": "mood", "user_id": user, "input": f"How is {user} ? a film"} for user in PEOPLE}
    put(population, items, requests.values())
    asked = {"llm": talkative(tmp_path / "llm"), "methods": ("none", "recency")}
    assert run(population, "night", **asked) == 0 and population.report["written"] == 8
    before = {(row["user_id"], row["method"]): row for row in population.rows("generations")}
    stored = {row["user_id"]: row["input_hash"] for row in population.rows("generations")}
    words = {user: requests[user]["input"].encode() for user in PEOPLE}
    assert stored == {
        user: hashlib.blake2b(words[user], digest_size=8, key=b"None,None").hexdigest() for user in PEOPLE
    }
    requests["ann"] |= {"input": "How is the music ? a red tree"}
    put(population, requests=requests.values())
    assert run(population, "next", requests="new", **asked) == 0 and population.report["written"] == 2
    assert {row["user_id"] for row in population.rows("generations") if row["run_id"] == "next"} == {"ann"}
    assert run(population, "night", **asked) == 0
    assert (population.report["written"], population.report["changed_requests"]) == (2, 2)
    assert population.report["already_there"] == 6 and "errors_tried_again" not in population.report
    rows = [row for row in population.rows("generations") if row["run_id"] == "night"]
    after = {(row["user_id"], row["method"]): row for row in rows}
    assert len(rows) == len(after) == 8
    assert {key for key in after if after[key] != before[key]} == {("ann", "none"), ("ann", "recency")}
    assert run(population, "night", **asked) == 0 and population.report["written"] == 0


def scores(population, *runs):
    run_dir = population.folder / f"evaluate-{runs[0]}"
    config = evaluate.Config(tables=population.tables, run_dir=str(run_dir), run=runs)
    assert evaluate.run(config) == 0
    return json.loads((run_dir / "report.json").read_text())


def test_a_score_is_the_mean_over_the_samples(made):
    rng, names = np.random.default_rng(0), sorted(row["request_id"] for row in made.rows("requests"))
    hits = {"none": rng.random((len(names), 3)) < 0.3, "recency": rng.random((len(names), 3)) < 0.8}
    rows = [
        (name, method, sample, "good" if found[i, sample] else "bad", None)
        for method, found in hits.items() for i, name in enumerate(names) for sample in range(3)
    ]  # fmt: skip
    write(made, "scored", rows)
    report = scores(made, "scored")
    assert report["n_requests"] == len(names) and report["n_users"] == len(PEOPLE)
    for method, found in hits.items():
        assert report["methods"][method]["n"] == found.size
        assert report["methods"][method]["scores"]["accuracy"] == pytest.approx(found.mean())
        assert report["methods"][method]["cost"]["prompt_tokens"] == 5
    gain = hits["recency"].mean() - hits["none"].mean()
    assert report["methods"]["recency"]["vs_none"]["accuracy"]["difference"] == pytest.approx(gain)
    person, gains = {row["request_id"]: row["user_id"] for row in made.rows("requests")}, Counter()
    for i, name in enumerate(names):
        gains[person[name]] += sum(map(int, hits["recency"][i])) - sum(map(int, hits["none"][i]))
    users = report["methods"]["recency"]["users_vs_none"]
    assert users["n"] == len(gains) == len(PEOPLE)
    better, worse = (sum(turn * gain > 0 for gain in gains.values()) / len(gains) for turn in (1, -1))
    assert (users["better"]["share"], users["worse"]["share"]) == (better, worse)
    # the first sample is the one that has room in LaMP's shape
    with open(report["predictions"]["none"]) as file:
        found = {row["id"]: row["output"] for row in json.load(file)["golds"]}
    assert found == {name: ("bad", "good")[int(hits["none"][i, 0])] for i, name in enumerate(names)}


def test_two_methods_that_are_right_as_often_leave_everybody_as_well_off(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    right = {"none": (0, 1), "recency": (2, 3)}
    rows = [
        (name, method, sample, "good" if sample in right[method] else "bad", None)
        for method in right for name in names for sample in range(4)
    ]  # fmt: skip
    write(made, "as-well", rows)
    users = scores(made, "as-well")["methods"]["recency"]["users_vs_none"]
    assert [users[name]["share"] for name in ("better", "worse", "equal")] == [0, 0, 1]


def test_a_method_that_lacks_a_sample_is_refused(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    rows = [(name, "none", sample, "good", None) for name in names for sample in range(2)]
    write(made, "short", rows[:-1])
    with pytest.raises(InputError, match="method none has no reply to 1 of"):
        scores(made, "short")


def test_a_method_that_lacks_a_sample_of_every_request_is_refused(made):
    names = sorted(row["request_id"] for row in made.rows("requests"))
    rows = [
        (name, method, sample, "good", None)
        for name in names for method in ("none", "recency") for sample in range(3)
        if (method, sample) != ("recency", 2)
    ]  # fmt: skip
    write(made, "no-third", rows)
    said = f"recency has no reply to {len(names)} of {3 * len(names)} samples of the requests that were answered;"
    with pytest.raises(InputError, match=said):
        scores(made, "no-third")
    # a run of one sample may stand beside one of three
    write(made, "only-three", [row for row in rows if row[1] == "none"])
    write(made, "only-one", [(*row[:2], None, *row[3:]) for row in rows if row[1:3] == ("recency", 0)])
    report = scores(made, "only-three", "only-one")
    assert {name: row["n"] for name, row in report["methods"].items()} == {
        "none": 3 * len(names), "recency": len(names)}  # fmt: skip
