"""evaluate knows a request by (user_id, request_id): populations whose users share request ids score like others."""

import json
import random
from pathlib import Path

import pyarrow as pa
import pytest

from infra import shards
from infra.errors import InputError
from infra.search import Needles
from pipelines import tables
from pipelines.evaluate.predictions import names
from pipelines.upkeep.scrub import Scrub
from pplug import metrics, tasks
from tests.pipelines.population import NOTES, Population
from tests.pipelines.test_evaluate import run

pytestmark = pytest.mark.usefixtures("ray_session")
USERS, EACH = 36, 3
METHODS = {"none": 0.3, "plug": 0.8}


def populate(folder: Path, shared: bool) -> Population:
    """The same questions and answers twice over: the requests of all users are called r0, r1, r2, or each by itself."""
    folder.mkdir()
    population, rng = Population(folder), random.Random(0)

    def name(user: int, n: int) -> str:
        return f"r{n}" if shared else f"{user}r{n}"

    asked = [
        {"request_id": name(user, n), "user_id": f"user-{user}", "input": f"How? {user}",
         "target": rng.choice(["good", "bad"])}
        for user in range(USERS) for n in range(EACH)
    ]  # fmt: skip
    items = [{"user_id": f"user-{user}", "item_id": "1", "text": "x", "mood": "good"} for user in range(0, USERS, 2)]
    for file, rows in (("requests", asked), ("items", items)):
        (folder / f"{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"source": str(folder / "items.jsonl"), "requests_source": str(folder / "requests.jsonl")}
    assert population.ingest(task=population.task(NOTES), **source) == 0
    rows = []
    for method, right in METHODS.items():
        for row in asked:
            text = row["target"] if rng.random() < right else rng.choice(["good", "bad", "neither"])
            rows.append(reply(row["user_id"], row["request_id"], method, text))
    write(population, "night", rows)
    population.asked, population.replies = asked, rows
    return population


def reply(user: str, request: str, method: str, text: str) -> dict:
    return {"run_id": "night", "request_id": request, "method": method, "user_id": user, "text": text,
            "finish_reason": "stop", "prompt_tokens": 10, "output_tokens": 2, "persona": "none"}  # fmt: skip


def write(population: Population, run_id: str, rows: list[dict]) -> None:
    table = tables.open_or_create(population.tables, "generations", 4)
    data = pa.Table.from_pylist([row | {"run_id": run_id} for row in rows], schema=table.spec.schema)
    columns = shards.shard_columns(data["user_id"], 4)
    for column, values in zip(("bucket", "user_key"), columns, strict=True):
        at = data.schema.get_field_index(column)
        data = data.set_column(at, data.schema.field(at), values)
    files = table.write(data, run_id)
    table.commit(files, run_id=run_id, group=0, mode="append", planned_on=table.version, complete=True)


@pytest.fixture(scope="module")
def alike(tmp_path_factory, ray_session) -> Population:
    return populate(tmp_path_factory.mktemp("ids") / "shared", True)


def test_users_who_share_request_ids_score_as_those_whose_ids_are_their_own(alike, tmp_path):
    apart = populate(tmp_path / "apart", False)
    found = [run(population, n_bootstrap=200)[1] for population in (alike, apart)]
    golds = {(row["user_id"], row["request_id"]): row["target"] for row in alike.asked}
    for method in METHODS:
        texts = {(row["user_id"], row["request_id"]): row["text"] for row in alike.replies if row["method"] == method}
        want = metrics.score(tasks.load(alike.task(NOTES)), golds, texts)
        assert found[0]["methods"][method]["scores"] == pytest.approx(want)
    for method in METHODS:  # which of the users' replies are shown is drawn by the ids
        shown = [report["methods"][method]["not_understood"].pop("replies") for report in found]
        assert [[row["text"] for row in rows] for rows in shown] == [["neither"]] * 2
    for key in ("methods", "references", "groups", "n_users", "n_requests", "not_generated", "warnings"):
        assert found[0][key] == found[1][key], key
    assert found[0]["n_requests"] == USERS * EACH and found[0]["groups"]["length"]["unknown"] == 0


def test_predictions_name_a_shared_id_by_its_user_and_an_own_one_plainly(alike, tmp_path):
    _, report, _ = run(alike, n_bootstrap=100, predictions_dir=str(tmp_path / "all"))
    for method, path in report["predictions"].items():
        rows = json.loads(Path(path).read_text())["golds"]
        texts = {row["id"]: row["output"] for row in rows}
        want = {f"{row['user_id']}/{row['request_id']}": row["text"] for row in alike.replies
                if row["method"] == method}  # fmt: skip
        assert len(rows) == len(texts) == USERS * EACH and texts == want
    (tmp_path / "users").write_text("user-7\n")
    _, report, _ = run(alike, n_bootstrap=100, users=str(tmp_path / "users"), predictions_dir=str(tmp_path / "one"))
    rows = json.loads(Path(report["predictions"]["none"]).read_text())["golds"]
    assert {row["id"] for row in rows} == {"r0", "r1", "r2"}  # nobody else is in this file


def test_names_in_predictions_differ_even_where_ids_hold_slashes(tmp_path):
    keys = [("a/b", "c"), ("a", "b/c"), ("x", "c"), ("y", "b/c"), ("z", "x/c"), ("z", "own"), ("50%", "c"), ("q", "7")]
    found = names([keys[:3], [], keys[3:]])(keys)
    assert len(set(found)) == len(keys)
    assert found[-1] == "7" and found[5] == "own" and found[2] == "x/c" and found[4] == "z/x/c"


def test_examples_of_users_who_share_request_ids_stand_beside_their_own_questions(alike):
    _, report, _ = run(alike, n_bootstrap=100, examples=20)
    asked = {(row["input"], row["target"]) for row in alike.asked}
    of = {}
    for row in alike.replies:
        of.setdefault((row["user_id"], row["request_id"]), {})[row["method"]] = row["text"]
    known = {(row["input"], row["target"], *of[row["user_id"], row["request_id"]].values()) for row in alike.asked}
    assert len(report["examples"]) == 20
    for one in report["examples"]:
        assert (one["input"], one["target"]) in asked
        assert (one["input"], one["target"], *(said["text"] for said in one["replies"])) in known


def test_a_reply_of_another_user_is_no_reply_and_is_named_with_its_user(alike):
    own = [row for row in alike.replies if row["method"] == "none"]
    gap = [row for row in own if (row["user_id"], row["request_id"]) != ("user-5", "r1")]
    write(alike, "gap", gap + [row | {"method": "bm25"} for row in own])
    with pytest.raises(
        InputError, match=f"method none has no reply to 1 of 108 .*user_key {shards.user_key('user-5')}"
    ):
        run(alike, run=("gap",), n_bootstrap=100)
    write(alike, "stray", [*own, reply("user-5", "r9", "none", "x"), reply("gone", "r1", "none", "x")])
    with pytest.raises(
        InputError, match=f"replies to 2 requests .*{shards.user_key('gone')}, .*{shards.user_key('user-5')}"
    ) as said:
        run(alike, run=("stray",), n_bootstrap=100)
    assert "user-5" not in str(said.value) and "r9" not in str(said.value)  # messages are logged
    write(alike, "twice", [*own, own[7]])
    with pytest.raises(InputError, match=f"user_key {shards.user_key(own[7]['user_id'])} has two replies"):
        run(alike, run=("twice",), n_bootstrap=100)


def test_thirds_are_of_the_users_who_were_answered_though_others_have_requests_of_the_same_ids(alike):
    some = [row for row in alike.replies if int(row["user_id"][5:]) % 2 == 0]  # those with an item
    write(alike, "some", some)
    _, report, _ = run(alike, run=("some",), n_bootstrap=100)
    found = report["groups"]["length"]
    assert report["n_requests"] == sum(third["n"] for third in found["thirds"]) == USERS * EACH // 2
    assert [third["from"] for third in found["thirds"]] == [1] and found["unknown"] == 0


def test_two_runs_are_compared_by_user_and_request(alike):
    own = [row for row in alike.replies if row["method"] == "plug"]
    write(alike, "early", [row for row in own if (row["user_id"], row["request_id"]) != ("user-3", "r0")])
    write(alike, "late", [row for row in own if (row["user_id"], row["request_id"]) != ("user-4", "r0")])
    _, report, _ = run(alike, compare=("early", "late"), n_bootstrap=100)
    assert report["compare"]["n_requests"] == USERS * EACH - 2
    assert report["compare"]["left_out"] == {"early": 1, "late": 1}
    assert report["compare"]["methods"]["plug"]["accuracy"]["difference"] == 0


def test_replies_cut_at_the_limit_of_tokens_are_counted_and_many_of_them_said(alike):
    own = [row for row in alike.replies if row["method"] == "none"]
    cut = [row | {"method": "bm25", "finish_reason": "length" if at % 3 == 0 else "stop"} for at, row in enumerate(own)]
    few = [row | {"method": "dense", "finish_reason": "length" if at < 5 else "stop"} for at, row in enumerate(own)]
    write(alike, "cut", own + cut + few)
    _, report, _ = run(alike, run=("cut",), n_bootstrap=100)
    got = {method: row["cut_at_the_limit"] for method, row in report["methods"].items()}
    assert got == {"none": 0, "bm25": USERS, "dense": 5}
    said = [warning for warning in report["warnings"] if "limit of tokens" in warning]
    assert said == ["bm25: 33% of the replies were cut at the limit of tokens"]


def test_an_erased_users_reply_that_was_not_understood_leaves_the_report(tmp_path):
    replies = [{"user_id": user, "text": "I like what"} for user in ("u1", "u2")]
    (tmp_path / "report.json").write_text(json.dumps({"methods": {"none": {"not_understood": {"replies": replies}}}}))
    scrub = Scrub(Needles(frozenset(), ids=frozenset({"u1"})), frozenset())
    scrub(pa.table({"root": [str(tmp_path)], "name": ["report.json"]}))
    left = json.loads((tmp_path / "report.json").read_text())["methods"]["none"]["not_understood"]["replies"]
    assert left == replies[1:]


def test_an_erased_user_is_taken_out_of_predictions_under_a_name_with_the_user(tmp_path):
    rows = [{"id": "u1/next", "output": "good"}, {"id": "u2/next", "output": "bad"}, {"id": "u%2F1/x", "output": "o"}]
    (tmp_path / "plug.json").write_text(json.dumps({"task": "notes", "golds": rows}))
    for user, left in (("u1", ["u2/next", "u%2F1/x"]), ("u/1", ["u2/next"])):
        scrub = Scrub(Needles(frozenset(), ids=frozenset({user})), frozenset({"next", "x"}))
        scrub(pa.table({"root": [str(tmp_path)], "name": ["plug.json"]}))
        golds = json.loads((tmp_path / "plug.json").read_text())["golds"]
        assert [row["id"] for row in golds] == left


def test_a_line_of_a_jobs_log_that_quotes_an_erased_user_goes_and_the_others_stay(tmp_path):
    text = "the cat that only one user has seen"
    (tmp_path / "job.log").write_text(f"01:00:00 refresh, plan\n01:00:01 ValueError: {text}\n01:00:02 done\n")
    Scrub(Needles(frozenset({text})), frozenset())(pa.table({"root": [str(tmp_path)], "name": ["job.log"]}))
    assert (tmp_path / "job.log").read_text() == "01:00:00 refresh, plan\n01:00:02 done\n"
