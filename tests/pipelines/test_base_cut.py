"""A base model learns what it may from a population; its folder says what, and `generate` heeds it."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from infra.errors import InputError
from infra.shards import bucket_of, keys_by_bucket, user_key
from pipelines import made_from, tables
from pipelines.adapt import job as adapt
from pipelines.adapt.base import BaseExamples
from pipelines.adapt.mixed import OtherSettings
from pipelines.generate.pending import PendingReplies
from pipelines.lines import base_lm
from pipelines.owners import Owners
from pipelines.upkeep import export
from pipelines.upkeep.export_adapter import export_adapter
from pplug.adapter import AdapterShape, LoraConfig, base_shapes, to_bytes
from pplug.llm import LLMConfig, llm_id
from tests.pipelines.population import NOTES
from tests.pipelines.test_base_lm import TINY
from tests.pplug.models import tiny_llama

BUCKETS = 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm"))))


def item(user, number):
    return {"user_id": user, "item_id": f"{number}", "fields": {"mood": "good", "text": f"the cat {user} {number}"}}


def fill(population, rows, **more):
    path = population.folder / f"items-{population.runs}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(path), task=population.task(NOTES), **more) == 0


def dev(population, users=("ann", "bob"), items=6, derive=2):
    """Users whose newest items are the answers of their requests."""
    fill(population, [item(user, n) for user in users for n in range(items)], derive_requests=derive)


def snapshot(population, name):
    return tables.open_table(population.tables, name).snapshot(complete=True)


def counts_of(population, llm, folder, left_out=(), cut=True, examples="items"):
    histories, requests = snapshot(population, "histories"), snapshot(population, "requests")
    entry = tables.task_entry(None, histories)
    stage = BaseExamples(histories, requests, examples, cut, entry, frozenset(left_out), llm, 16, str(folder))
    rows = pa.concat_tables(stage(pa.table({"bucket": list(range(BUCKETS))})))
    return {name: sum(rows[name].to_pylist()) for name in ("examples", "items_cut_off", "users_left_out")}


def test_a_base_learns_nothing_of_a_person_who_has_a_history_per_question(population, llm, tmp_path):
    """The answer to the first question stands in the history of the second, whose request may see all of it."""
    questions = [
        {"request_id": f"q{n}", "user_id": f"ann-{n}", "owner_id": "ann", "input": "How do I feel? the cat x",
         "target": "good"} for n in (1, 2)
    ]  # fmt: skip
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    answer = {"user_id": "ann-2", "item_id": "x", "fields": {"mood": "good", "text": "the cat x"}}
    fill(population, [item("ann-1", 0), item("ann-2", 0), answer, item("bob", 0)], requests_source=str(path))
    assert counts_of(population, llm, tmp_path)["examples"] == 1  # that of bob, whom nobody asks about
    pending = PendingReplies(snapshot(population, "requests"), None, "r", ("none",), "all", None)
    counts = pa.concat_tables(pending.count(pa.table({"bucket": list(range(BUCKETS))})))
    assert sum(counts["dated"].to_pylist()) == 2  # so a base without a cut is refused for them


def test_a_base_learns_nothing_of_a_history_under_the_own_id_of_a_person_who_has_another(population, llm, tmp_path):
    """`ann` has items, and nobody asks about her under this id: the question of `ann-q2`, whose person she is, lies in
    another bucket, and its answer stands in her items."""
    question = {"request_id": "q1", "user_id": "ann-q2", "owner_id": "ann", "input": "How do I feel? the cat ann 0",
                "target": "good"}  # fmt: skip
    assert bucket_of("ann", BUCKETS) != bucket_of("ann-q2", BUCKETS)
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(question) + "\n")
    rows = [item("ann", 0), item("ann", 1), item("ann-q2", 0), *(item(f"u{n}", 0) for n in range(6))]
    fill(population, rows, requests_source=str(path))
    assert counts_of(population, llm, tmp_path) == {"examples": 6, "items_cut_off": 3, "users_left_out": 0}
    config = {
        "tables": population.tables,
        "output": str(tmp_path / "lm"),
        "run_id": "r",
        "run_dir": str(tmp_path / "r"),
    }
    assert base_lm.run(base_lm.Config(**config, lm=TINY, cut="requests")) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert (report["written"], report["items_cut_off"]) == (6, 3)


def test_a_base_learns_no_item_that_a_request_may_not_see(population, llm, tmp_path):
    """Six items, the newest two of them asked about: the four before are learned, without --cut all six."""
    dev(population)
    assert counts_of(population, llm, tmp_path) == {"examples": 8, "items_cut_off": 4, "users_left_out": 0}
    assert counts_of(population, llm, tmp_path, cut=False) == {"examples": 12, "items_cut_off": 0, "users_left_out": 0}
    assert counts_of(population, llm, tmp_path, {"ann"}) == {"examples": 4, "items_cut_off": 2, "users_left_out": 1}
    learned = counts_of(population, llm, tmp_path, {"ann"}, examples="requests")
    assert learned == {"examples": 2, "items_cut_off": 0, "users_left_out": 1}


def test_a_base_learns_the_newest_items_of_each_user(population, llm, tmp_path):
    """A user has six items, and the newest two are asked about: the limit takes the newest of the four before."""
    rows = [item(user, n) | {"occurred_at": f"2026-01-{10 - n:02d}"} for user in ("ann", "bob") for n in range(6)]
    fill(population, rows, derive_requests=2)  # the item with the lowest number is the newest
    histories, requests = snapshot(population, "histories"), snapshot(population, "requests")
    entry = tables.task_entry(None, histories)
    for cut, limit, kept in (
        (True, 3, {2, 3, 4}),
        (True, 9, {2, 3, 4, 5}),
        (False, 3, {0, 1, 2}),
        (True, None, {2, 3, 4, 5}),
    ):
        stage = BaseExamples(histories, requests, "items", cut, entry, frozenset(), llm, 16, str(tmp_path), limit)
        found = [row for bucket in range(BUCKETS) for row in stage._rows(bucket)[0].to_pylist()]
        assert sorted((row["user_id"], int(row["item_id"])) for row in found) == [
            (user, n) for user in ("ann", "bob") for n in sorted(kept)]  # fmt: skip


def test_a_user_is_left_out_by_the_person_too(population, llm, tmp_path):
    """One history per question: the file names the person who asks, the items name the history."""
    questions = tmp_path / "questions.jsonl"
    asked = {"request_id": "q1", "user_id": "ann-1", "owner_id": "ann", "input": "How do I feel?", "target": "good"}
    questions.write_text(json.dumps(asked) + "\n")
    fill(population, [item(user, n) for user in ("ann-1", "bob") for n in range(3)], requests_source=str(questions))
    assert counts_of(population, llm, tmp_path, {"ann"}) == {"examples": 3, "items_cut_off": 0, "users_left_out": 1}


def test_a_user_is_left_out_with_every_history_of_the_person(population, llm, tmp_path):
    """The file names one history of ann's; another may hold the answer that is asked for in the first."""
    questions = tmp_path / "questions.jsonl"
    asked = [{"request_id": f"q{n}", "user_id": f"ann-{n}", "owner_id": "ann", "input": "How?", "target": "good"}
             for n in (1, 2)]  # fmt: skip
    questions.write_text("".join(json.dumps(one) + "\n" for one in asked))
    rows = [item(user, n) for user in ("ann-1", "ann-2", "bob") for n in range(3)]
    fill(population, rows, requests_source=str(questions))
    for named in ("ann-1", "ann"):
        found = counts_of(population, llm, tmp_path, {named}, cut=False)
        assert found == {"examples": 3, "items_cut_off": 0, "users_left_out": 2}
    requests = snapshot(population, "requests")
    everybody = made_from.with_all_histories({"ann-1"}, requests)
    assert everybody == made_from.with_all_histories({"ann"}, requests) == {"ann", "ann-1", "ann-2"}
    base = write_record(tmp_path / "base", population, cut="none", left_out=made_from.users_id(everybody))
    for users in ({"ann-1", "ann-2"}, {"ann-1"}):
        assert made_from.check(base, population.tables, requests, frozenset(users), 1, 1) == []
    with pytest.raises(InputError, match="may know the answers"):
        made_from.check(base, population.tables, requests, frozenset({"ann-1", "bob"}), 1, 1)
    later = {"request_id": "q3", "user_id": "ann-3", "owner_id": "ann", "input": "How?", "target": "good"}
    questions.write_text(json.dumps(later) + "\n")
    assert population.ingest(requests_source=str(questions), task=population.task(NOTES)) == 0
    newer = snapshot(population, "requests")
    assert made_from.check(base, population.tables, newer, frozenset({"ann-1", "ann-2"}), 1, 1) == []
    with pytest.raises(InputError, match="may know the answers"):
        made_from.check(base, population.tables, newer, frozenset({"ann-1", "ann-3"}), 1, 1)
    file = tmp_path / "users.txt"
    file.write_text("ann\nnobody\n")
    histories = snapshot(population, "histories")
    assert tables.read_users(str(file), histories, persons=Owners(requests).of_several()) == {"ann", "nobody"}


def test_base_lm_learns_no_item_that_a_request_may_not_see(population, tmp_path):
    dev(population, users=[f"u{i}" for i in range(9)])
    for cut, learned, known in (("requests", 36, "requests"), ("none", 54, "none")):
        out = tmp_path / cut
        config = {"tables": population.tables, "output": str(out), "run_id": cut, "run_dir": str(tmp_path / "run")}
        assert base_lm.run(base_lm.Config(**config, lm=TINY, cut=cut)) == 0
        report = json.loads((tmp_path / "run" / "report.json").read_text())
        assert report["written"] == learned and report["items_cut_off"] == 54 - learned
        (record,) = made_from.read(out)
        assert (record.job, record.cut, record.tables) == ("base-lm", known, population.tables)


# --- the record ---


def write_record(folder, population, **values):
    known = {"job": "adapt", "run_id": "r", "tables": population.tables, "examples": "items", "cut": "requests"}
    known["versions"] = {"histories": 1, "requests": snapshot(population, "requests").version}
    folder.mkdir(exist_ok=True)
    (folder / made_from.FILE).write_text(made_from.text(made_from.MadeFrom(**known | values)))
    return folder


def test_a_base_that_knows_the_answers_is_refused_and_another_is_not(population, tmp_path):
    dev(population)
    requests, base = snapshot(population, "requests"), tmp_path / "base"

    def check(dated=4, with_target=4, users=None, **values):
        folder = write_record(base, population, **values)
        return made_from.check(folder, population.tables, requests, users, dated, with_target)

    assert check() == []
    assert made_from.check(tmp_path / "nothing", population.tables, requests, None, 4, 4) == []
    for values in ({"cut": "none"}, {"cut": "none", "left_out": made_from.users_id({"bob"}), "users": {"ann"}}):
        with pytest.raises(
            InputError, match="without a cut, and may know the answers of 4 of the requests; give a base"
        ):
            check(**values)
    with pytest.raises(InputError, match="from requests of .* may know the answers of 3 of"):
        check(dated=0, with_target=3, cut="none", examples="requests")
    assert check(dated=0, cut="none") == []
    assert check(cut="none", tables=str(tmp_path)) == []
    assert check(cut="none", left_out=made_from.users_id({"ann"}), users=frozenset({"ann"})) == []
    (warning,) = check(versions={"requests": 0})
    assert "cut at the requests of version 0" in warning


def test_a_base_on_a_base_that_knows_the_answers_is_refused_too(population, tmp_path):
    dev(population)
    first = write_record(tmp_path / "first", population, cut="none")
    second = tmp_path / "second"
    second.mkdir()
    newest = made_from.MadeFrom(job="adapt", run_id="s", tables="/elsewhere", versions={}, examples="items", cut="none")
    (second / made_from.FILE).write_text(made_from.text(newest, first))
    assert [one.run_id for one in made_from.read(second)] == ["s", "r"]
    with pytest.raises(InputError, match="run r"):
        made_from.check(second, population.tables, snapshot(population, "requests"), None, 4, 4)


# --- adapters of some users ---


def stored(population, users, fit_id, base):
    table = tables.open_or_create(population.tables, "adapters", BUCKETS)
    rows = [
        {"bucket": bucket_of(user, BUCKETS), "user_key": user_key(user), "user_id": user, "llm_id": base,
         "adapter_id": f"{fit_id}-0", "history_hash": "h", "weights": b""}
        for user in users
    ]  # fmt: skip
    files = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), fit_id)
    table.commit(files, run_id=fit_id, group=0, mode="append", planned_on=table.version, complete=True,
                 metadata={"llm_id": base, "fit_id": fit_id, "cut": "none"})  # fmt: skip


def test_adapters_of_some_users_are_not_made_beside_those_of_another_base(population, llm, tmp_path, ray_session):
    fill(population, [item(user, n) for user in ("ann", "bob", "eve") for n in range(2)])
    stored(population, ["ann", "bob", "gone"], "oldfit", "oldbase")
    (tmp_path / "users").write_text("ann\neve\n")
    config = {"tables": population.tables, "llm": llm, "run_id": "r", "run_dir": str(tmp_path / "r"), "threads": 1}
    with pytest.raises(
        InputError,
        match=r"2 adapters of other users would stay in .*, of base oldbase and settings oldfit .* new ones of base "
        rf"{llm_id(llm)} and settings \w+: .* name these users in the file too",
    ):
        adapt.run(adapt.Config(**config, users=str(tmp_path / "users"), lora=LoraConfig(epochs=1)))
    assert {row["llm_id"] for row in population.rows("adapters")} == {"oldbase"}


def test_rows_that_are_replaced_or_of_the_same_settings_are_no_mixture(population):
    fill(population, [item(user, 1) for user in ("ann", "bob")])
    stored(population, ["ann", "bob", "gone"], "fit", "base")

    def others(fit, users):
        stage = OtherSettings(snapshot(population, "adapters"), fit, keys_by_bucket(users, BUCKETS))
        found = [row for bucket in range(BUCKETS) for table in stage(pa.table({"bucket": [bucket]}))
                 for row in table.to_pylist()]  # fmt: skip
        assert {(row["llm_id"], row["fit_id"]) for row in found} <= {("base", "fit")}
        return sum(row["rows"] for row in found)

    assert others("fit", frozenset({"ann"})) == 0
    assert others("new", frozenset({"ann"})) == 2
    assert others("new", frozenset({"ann", "bob"})) == 1
    assert others("new", frozenset({"ann", "bob", "gone"})) == 0  # a named user's row goes without any item


# --- exports ---


def test_an_export_deletes_nothing_that_no_export_wrote(population, tmp_path, ray_session):
    fill(population, [item("ann", 1)])
    out = tmp_path / "out"
    (out / "photos").mkdir(parents=True)
    (out / "photos" / "cat.jpg").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"holds photos/cat\.jpg and 0 more files that no export has written"):
        export.run(
            export.Config(table="histories", tables=population.tables, output=str(out), run_dir=str(tmp_path / "r"))
        )
    assert (out / "photos" / "cat.jpg").read_bytes() == b"mine"


def test_a_peft_folder_takes_the_place_of_another_as_a_whole(population, llm, tmp_path):
    """A former adapter in another form lies there; afterwards only this one does."""
    import torch

    base, shape = llm_id(llm), AdapterShape()
    weights = {name: (torch.zeros(8, i), torch.zeros(o, 8))
               for name, (i, o) in base_shapes(Path(llm.model), shape.targets).items()}  # fmt: skip
    table = tables.open_or_create(population.tables, "adapters", 1)
    row = {"bucket": 0, "user_key": user_key("ann"), "user_id": "ann", "llm_id": base, "adapter_id": "f-0", "rank": 8,
           "alpha": 8.0, "targets": list(shape.targets), "weights": to_bytes(weights, base)}  # fmt: skip
    files = table.write(pa.Table.from_pylist([row], schema=table.spec.schema), "r")
    table.commit(files, run_id="r", group=0, mode="append", planned_on=0, complete=True)
    out = tmp_path / "mine"
    for _ in range(2):
        assert export_adapter(table, "ann", out, Path(llm.model), base) == "f-0"
        assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    (out / "adapter_model.bin").write_bytes(b"of another")
    with pytest.raises(InputError, match=r"output: .* holds adapter_model\.bin"):
        export_adapter(table, "ann", out, Path(llm.model), base)
