"""Adapters from histories: from which items, the same as alone, made again or not; and the base they stand on.

Most tests call the stages themselves; two run the job, with its workers.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from infra import lease
from infra.errors import ConcurrentRunError, InputError
from infra.shards import bucket_of, user_key
from infra.storage import Storage
from pipelines import __main__ as cli
from pipelines import tables
from pipelines.adapt import job as adapt
from pipelines.adapt.base import BaseExamples
from pipelines.adapt.unchanged import TakeUnchanged
from pipelines.adapt.users import EXAMPLES, FitAdapters, ReadExamples, tokenised
from pipelines.pending_users import PendingUsers
from pipelines.run import CpuShare
from pipelines.upkeep import erase
from pplug.adapter import AdapterShape, ExampleRule, LoraConfig, StackConfig, base_shapes, from_bytes, to_bytes
from pplug.history import history_hash
from pplug.llm import FrozenLLM, LLMConfig, ParallelConfig, llm_id
from pplug.lora import StackedTrainer, UserExamples
from pplug.splice import PromptBuilder, PromptLayout
from tests.pipelines import small
from tests.pipelines.population import NOTES
from tests.pplug.families import make
from tests.pplug.models import tiny_llama, word_tokenizer

LORA = LoraConfig(learning_rate=1e-2, storage_dtype="float32", batch_size=4)
STRANGE = ("../../x", "ü" * 300, "a=b%2Fc", "'; --", "plain")
BUCKETS = 4


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm"))))


@pytest.fixture(scope="module", autouse=True)
def ray(ray_session):
    """One local Ray for the file."""


def item(user, number, mood="good", text=None):
    fields = {"mood": mood, "text": text or f"the cat sat on mat {number}"}
    return {"user_id": user, "item_id": f"{number}", "fields": fields}


def fill(population, rows, task=NOTES, **more):
    path = population.folder / f"items-{population.runs}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(path), task=population.task(task), **more) == 0


# --- the stages by themselves --------------------------------------------------------------------------------------


def owing(population, before=None, fit_id="fit", cut=True, users=None):
    names = {
        name: tables.open_table(population.tables, name).snapshot(complete=True) for name in ("histories", "requests")
    }
    requests = names["requests"] if cut else None
    without = frozenset({"weights"})
    return PendingUsers(names["histories"], requests, before, fit_id, 1000, users, BUCKETS, without=without)


def examples(population, llm, rule=None, **how):
    owed = owing(population, **how)
    stage = ReadExamples(owed, tables.task_entry(None, owed.histories), llm, rule or ExampleRule())
    return pa.concat_tables(stage(pa.table({"bucket": list(range(BUCKETS))})))


def trained(population, llm, batch_users=1000, **how):
    """Rows of adapters and rejects, trained here in batches of so many users."""
    rows = examples(population, llm, **how)
    fit = FitAdapters(llm, LORA, StackConfig(), llm_id(llm), how.get("fit_id", "fit"), cpu=CpuShare(1, 1))
    made = [part for i in range(0, len(rows), batch_users) for part in fit(rows.slice(i, batch_users))]
    if (before := how.get("before")) is not None:
        assert all(row["weights"] is None for row in rows.to_pylist())  # no training actor gets any
        made = [part for block in made for part in TakeUnchanged(before)(block)]
    return pa.concat_tables(made)


def alone(llm, user, pairs):
    """The adapter of a user's (input, answer), put together by hand and trained with nobody else."""
    frozen = FrozenLLM.load(llm)

    def ids(text):
        return frozen.tokenizer(text, add_special_tokens=False)["input_ids"]

    torch.set_num_threads(1)
    made = [([1, *(ids(f"{words}\n") if words else [])], [*ids(answer), 2]) for words, answer in pairs]
    (fitted,) = StackedTrainer(frozen.model, LORA).fit([UserExamples(user, made)])
    return fitted


def feelings(rows):
    return [(f"How do I feel? {row['fields']['text']}", row["fields"]["mood"]) for row in rows]


def test_every_user_gets_the_adapter_of_training_alone(population, llm):
    people = {name: [item(name, i, ("good", "bad")[i % 2]) for i in range(n)] for n, name in enumerate(STRANGE, 1)}
    fill(population, [row for rows in people.values() for row in rows])
    found = {row["user_id"]: row for row in trained(population, llm, batch_users=3).to_pylist()}
    assert found.keys() == people.keys()
    shapes = base_shapes(Path(llm.model), LORA.shape.targets)
    for user, items in people.items():
        row, want = found[user], alone(llm, user, feelings(items))
        assert row["bucket"] == bucket_of(user, BUCKETS) and row["user_key"] == user_key(user)
        assert row["weights"] == to_bytes(want.weights, llm_id(llm)) and row["reject_reason"] is None
        assert (row["n_examples"], row["rank"], row["alpha"]) == (len(items), 8, 8.0)
        assert row["targets"] == ["q_proj", "v_proj"] and row["adapter_id"].startswith("fit-")
        assert row["loss"] == pytest.approx(want.loss) and row["llm_id"] == llm_id(llm)
        assert from_bytes(row["weights"], LORA.shape, shapes, llm_id(llm)).keys() == shapes.keys()
    assert len({row["adapter_id"] for row in found.values()}) == len(people)


def test_what_a_request_may_not_see_is_not_trained_on(population, llm):
    """Two derived requests: the adapter knows what came before the first of them, whatever comes later."""
    people = {name: [item(name, i, text=f"{name} dog {i}") for i in range(5)] for name in ("ann", "bob")}
    fill(population, [row for rows in people.values() for row in rows], derive_requests=2)
    cut, whole = (examples(population, llm, cut=how).to_pylist() for how in (True, False))
    assert {row["user_id"]: len(row["prompts"]) for row in cut} == {"ann": 3, "bob": 3}
    assert {row["user_id"]: len(row["prompts"]) for row in whole} == {"ann": 5, "bob": 5}
    ann = next(row for row in cut if row["user_id"] == "ann")
    assert ann["history_hash"] == history_hash(row["text_hash"] for row in population.items()["ann"][:3])
    longer = [item("ann", i, text="a later film") for i in range(5, 9)]
    fill(population, longer)
    (again,) = [row for row in examples(population, llm).to_pylist() if row["user_id"] == "ann"]
    assert (again["prompts"], again["history_hash"]) == (ann["prompts"], ann["history_hash"])


@pytest.mark.parametrize("retrieve", ["recency", "bm25"])
def test_an_example_sees_only_items_before_it_and_later_ones_change_nothing(population, llm, retrieve):
    task = NOTES | {"retrieval": {"pattern": '"{text}" is {mood} '}}
    words = ["cat sat", "dog ran", "red tree", "dog film", "big cat"]
    rows = [item("ann", i, text=text) for i, text in enumerate(words)]
    fill(population, rows[:4], task)
    rule = ExampleRule(retrieve=retrieve, retrieval={"k": 2})
    (found,) = (row["prompts"] for row in examples(population, llm, rule).to_pylist())
    nearest = {  # newest first; of bm25 those that share a word with the request, then the newest
        "recency": [[], [0], [1, 0], [2, 1]],
        "bm25": [[], [0], [1, 0], [1, 2]],
    }[retrieve]
    tokenizer = FrozenLLM.load(llm).tokenizer
    for i, (ids, before) in enumerate(zip(found, nearest, strict=True)):
        shown = ", and ".join(f'"{words[j]}" is good ' for j in before) + ". " if before else ""
        text = f"{shown}How do I feel? {words[i]}\n"
        assert ids == [1, *tokenizer(text, add_special_tokens=False)["input_ids"]], i
    fill(population, rows, task)
    (later,) = (row["prompts"] for row in examples(population, llm, rule).to_pylist())
    assert later[:4] == found and len(later) == 5
    (plain,) = (row["prompts"] for row in examples(population, llm).to_pylist())
    assert plain[0] == found[0] and plain[1] != found[1]


def test_an_item_that_retrieval_looked_at_decides_an_adapter_too(population, llm):
    """One item counts, and two stand before it; the oldest of these is corrected."""
    fill(population, [item("ann", i, text=text) for i, text in enumerate(("a cat", "a dog", "a tree"))])

    def digests():
        owed = replace(owing(population), max_items=1)
        found = {}
        for before in (0, 1, 2):
            (bucket,) = owed.histories.filled(None)
            ((_, found[before]),) = replace(owed, items_before=before).read(bucket).users.values()
        return found

    first = digests()
    hashes = [row["text_hash"] for row in population.items()["ann"]]
    assert first == {before: history_hash(hashes[2 - before :]) for before in (0, 1, 2)}
    fill(population, [item("ann", 0, text="another cat")])
    assert [before for before, digest in digests().items() if digest != first[before]] == [2]


def test_users_without_anything_to_learn_are_rejected_with_a_reason(population, llm):
    fill(population, [item("ann", 1), item("mute", 1, " "), item("not-asked", 1)])
    rows = trained(population, llm, users=frozenset({"ann", "mute", "nobody"})).to_pylist()
    assert {row["user_key"]: row["reject_reason"] for row in rows} == {
        user_key("ann"): None, user_key("mute"): "no_usable_item", user_key("nobody"): "no_history"}  # fmt: skip


def test_a_user_whose_item_lacks_what_retrieval_words_it_by_is_a_reject(population, llm):
    fill(population, [item("ann", 1), item("ann", 2), item("bob", 1)], NOTES | {"retrieval": {"pattern": "{title} "}})
    rows = {row["user_id"]: row for row in examples(population, llm, ExampleRule(retrieve="recency")).to_pylist()}
    assert rows["ann"]["reject_reason"] == "missing_field" and "'title'" in rows["ann"]["reject_detail"]
    assert rows["bob"]["reject_reason"] is None and len(rows["bob"]["prompts"]) == 1


def test_an_item_that_is_its_own_answer(population, llm):
    """A tweet: no input, the text is what is learned."""
    task = {"name": "tweets", "item": "{text}", "item_without_label": "{text}", "target": "text", "metric": "text"}
    rows = [item("ann", i) for i in range(3)]
    fill(population, rows, task)
    want = alone(llm, "ann", [(None, row["fields"]["text"]) for row in rows])
    (row,) = trained(population, llm).to_pylist()
    assert row["weights"] == to_bytes(want.weights, llm_id(llm))


def test_only_who_is_new_or_changed_or_made_otherwise_is_owed(population, llm):
    people = [f"user-{i}" for i in range(6)]
    fill(population, [item(name, i) for name in people for i in range(2)])
    table = tables.open_or_create(population.tables, "adapters", BUCKETS)
    rows = trained(population, llm).select(table.spec.schema.names)
    table.commit(table.write(rows, "r"), run_id="r", group=0, mode="append", planned_on=0, complete=True)

    def owed(**how):
        found = [owing(population, before=table.snapshot(), **how).read(bucket) for bucket in range(BUCKETS)]
        names = [one.own.user_ids[user] for one in found for user in one.users]
        assert len(names) + sum(one.existing for one in found) == len(
            {name for one in found for name in one.own.user_ids}
        )
        return set(names), sorted(key for one in found for key in one.unchanged)

    assert owed() == (set(), sorted(map(user_key, people)))
    fill(population, [item("user-2", 9, "bad"), item("new", 1)])
    assert owed() == ({"user-2", "new"}, sorted(user_key(name) for name in people if name != "user-2"))
    assert owed(fit_id="other")[0] == {*people, "new"}
    # what stays travels beside what is made anew, bit for bit
    after = trained(population, llm, before=table.snapshot())
    old = {row["user_id"]: row for row in rows.to_pylist()}
    new = {row["user_id"]: row for row in after.select(table.spec.schema.names).to_pylist()}
    assert new.keys() == {*people, "new"} and {name for name in people if old[name] != new[name]} == {"user-2"}


def test_a_row_of_the_table_takes_little_more_than_its_weights(tmp_path):
    shape = AdapterShape()
    raw = 2 * 4 * 2 * shape.rank * (512 + 512)  # bfloat16, four layers, q and v
    table = tables.open_or_create(str(tmp_path), "adapters", 1)
    rows = []
    for i in range(20):
        torch.manual_seed(i)
        pair = lambda: (torch.randn(8, 512).bfloat16(), torch.randn(512, 8).bfloat16())  # noqa: E731
        weights = {f"model.layers.{layer}.self_attn.{name}": pair() for layer in range(4) for name in shape.targets}
        known = {"rank": 8, "alpha": 8.0, "targets": list(shape.targets), "weights": to_bytes(weights, "b")}
        rows.append({"bucket": 0, "user_key": f"{i:032x}", "user_id": f"user-{i}", "adapter_id": f"f-{i}"} | known)
    (file,) = table.write(pa.Table.from_pylist(rows, schema=table.spec.schema), "r")
    assert file.size / (20 * raw) < 1.1


# --- the job -------------------------------------------------------------------------------------------------------


def run(population, llm, name, **config):
    values = {"lora": LORA, "threads": 1} | config
    run_dir = population.folder / name
    code = adapt.run(adapt.Config(tables=population.tables, llm=llm, run_id=name, run_dir=str(run_dir), **values))
    population.report = json.loads((run_dir / "report.json").read_text())
    return code


@pytest.mark.slow
def test_nights_train_only_who_is_new_or_has_changed(population, llm, tmp_path, capsys):
    people = [f"user-{i}" for i in range(6)]
    fill(population, [item(name, i) for name in people for i in range(3)] + [item("mute", 1, " ")])
    asked = tmp_path / "users"
    asked.write_text("".join(f"{name}\n" for name in [*people, "mute", "nobody", "new"]))
    values = {"users": str(asked), "max_reject_fraction": 0.5, "batch_users": 2}
    assert run(population, llm, "first", **values) == 0
    assert population.report["rejected"] == {"no_usable_item": 1, "no_history": 2} and population.report["written"] == 6
    assert "2 of 9 ids have no row in histories: lines 8, 9\n" in capsys.readouterr().out
    keys = {row["key"] for row in population.rows("rejects") if row["job"] == "adapt"}
    assert keys == {user_key(name) for name in ("mute", "nobody", "new")}
    first = {row["user_id"]: row for row in population.rows("adapters")}

    fill(population, [item("user-2", 9, "bad"), item("new", 1)])
    assert run(population, llm, "night", changed_only=True, **values) == 0
    report = population.report
    assert (report["planned"], report["written"], report["already_there"]) == (9, 2, 5)
    second = {row["user_id"]: row for row in population.rows("adapters")}
    assert second.keys() == {*people, "new"} and len(population.rows("adapters")) == 7
    assert {name for name in people if first[name] != second[name]} == {"user-2"}
    items = [item("user-2", i) for i in range(3)] + [item("user-2", 9, "bad")]
    assert second["user-2"]["weights"] == to_bytes(alone(llm, "user-2", feelings(items)).weights, llm_id(llm))
    named = "".join(str(path) for path in Path(population.tables).rglob("*"))
    assert not any(user in named for user in second)  # no file is named after anybody

    other = LORA.model_copy(update={"epochs": 1})
    with pytest.raises(InputError, match="settings .*, this run would make those of base .* train everybody anew"):
        run(population, llm, "mixed", changed_only=True, lora=other, **values)


@pytest.mark.slow
def test_the_table_says_whether_its_adapters_are_cut(population, llm, tmp_path):
    """Only training everybody anew makes a table that does not know too much of one that does."""
    fill(population, [item(name, i, text=f"{name} dog {i}") for name in ("ann", "bob") for i in range(3)],
         derive_requests=1)  # fmt: skip
    (tmp_path / "users").write_text("ann\n")
    table = tables.open_or_create(population.tables, "adapters", BUCKETS)
    for name, change, cut, written in (
        ("open", {"cut": "none"}, "none", 2),
        ("one", {"users": str(tmp_path / "users")}, "none", 1),  # bob's knows his answer still
        ("all", {}, "requests", 1),
    ):
        assert run(population, llm, name, **change) == 0
        assert table.snapshot(complete=True).metadata["cut"] == cut == population.report["cut"], name
        assert population.report["written"] == written, name


def test_a_target_that_the_base_lacks_is_refused_before_anything_starts(population, llm):
    fill(population, [item("ann", 1)])
    lora = LoraConfig(shape=AdapterShape(targets=("query",)))
    with pytest.raises(InputError, match="llm: target 'query': the base has no module of this name"):
        run(population, llm, "refused", lora=lora)


def test_another_model_under_the_same_path_is_refused_by_the_worker(population, llm):
    fill(population, [item("ann", n) for n in range(3)])
    stage = FitAdapters(llm, LORA, StackConfig(), "another", "fit", cpu=CpuShare(1, 1))
    with pytest.raises(InputError, match=f"is LLM {llm_id(llm)} on this machine, and another where the job"):
        list(stage(examples(population, llm)))


def test_another_model_is_refused_where_several_processes_hold_it_too(llm, monkeypatch):
    monkeypatch.setattr("pipelines.adapt.users.TrainerGroup", lambda *given: object())  # it would start processes
    stage = FitAdapters(
        llm.model_copy(update={"parallel": ParallelConfig(tensor=2)}),
        LORA,
        StackConfig(),
        "another",
        "fit",
        CpuShare(1, 1),
    )
    with pytest.raises(InputError, match="and another where the job"):
        list(stage(EXAMPLES.empty_table()))


def test_a_base_that_mixes_users_is_refused_and_nothing_is_trained(population, tmp_path, capsys):
    make("Lfm2").save_pretrained(tmp_path / "llm")
    word_tokenizer(tmp_path / "llm")
    fill(population, [item(name, i) for name in ("ann", "bob") for i in range(3)])
    config = {"tables": population.tables, "run_dir": str(tmp_path / "run"), "threads": 1}
    (tmp_path / "adapt.yaml").write_text(json.dumps(config | {"llm": {"model": str(tmp_path / "llm")}}))
    code = cli.main(["adapt", "--config", str(tmp_path / "adapt.yaml")])
    said = capsys.readouterr().err
    assert code == 2, said[-6000:]
    assert f"adapt: llm {tmp_path / 'llm'}: Lfm2ForCausalLM mixes users in a stack" in said
    assert not tables.open_table(population.tables, "adapters").snapshot().files


def test_no_base_is_adapted_beside_an_erase(population, llm):
    fill(population, [item("ann", 1)])
    with lease.alone(population.tables, "erase"), pytest.raises(ConcurrentRunError, match="run erase is at work here"):
        run(population, llm, "base", stage="base")


@pytest.mark.slow
def test_the_base_learns_from_everybody_but_the_target_users(tmp_path):
    made = small.make(tmp_path, train_users=8, test_users=2, train_requests=1, test_requests=1)
    made.ingest("train", buckets=2)
    items, requests = (small.rows(made.tables, name) for name in ("histories", "requests"))
    target = min(row["user_id"] for row in items)
    (tmp_path / "targets").write_text(f"{target}\n")
    values = {"tables": made.tables, "stage": "base", "users": str(tmp_path / "targets")}
    # as a user types it: counted from the folder that the job is started in
    values["llm"] = made.llm.model_copy(update={"model": os.path.relpath(made.llm.model)})
    lora = LoraConfig(learning_rate=1e-2)
    assert made.run(adapt, "base", **values, lora=lora, output=str(tmp_path / "merged"), epochs=4) == 0
    report = made.report("base")
    earliest = {row["user_id"]: row["as_of"] for row in requests}  # one request each
    learned = [row for row in items if row["user_id"] != target and row["occurred_at"] < earliest[row["user_id"]]]
    assert report["planned"] == report["written"] == report["examples"] == len(learned)
    assert report["made_from"]["users_left_out"] == 1
    run_dir = Path(made.root / "runs" / "base")
    assert not list(run_dir.rglob("examples-*"))  # the words of users, as token ids
    (run_dir / "report.json").rename(run_dir / "report")  # as when it was killed
    assert [one["job"] for one in erase._trained(made.tables, [Storage(str(run_dir))])] == ["adapt"]
    merged = LLMConfig(model=str(tmp_path / "merged"))
    assert report["llm_id"] == llm_id(merged) != llm_id(made.llm)
    old, new = (AutoModelForCausalLM.from_pretrained(config.model).state_dict() for config in (made.llm, merged))
    moved = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert old.keys() == new.keys() and moved == {"q_proj", "k_proj", "v_proj", "o_proj"}
    first, second = (FrozenLLM.load(config).tokenizer("the cat")["input_ids"] for config in (made.llm, merged))
    assert first == second

    snapshot = tables.open_table(made.tables, "requests").snapshot(complete=True)
    entry = tables.task_entry(None, tables.open_table(made.tables, "histories").snapshot(complete=True))
    histories = tables.open_table(made.tables, "histories").snapshot(complete=True)
    stage = BaseExamples(
        histories, snapshot, "requests", False, entry, frozenset({target}), made.llm, 128, str(tmp_path / "requests")
    )
    counts = pa.concat_tables(stage(pa.table({"bucket": [0, 1]})))
    assert sum(counts["examples"].to_pylist()) == len([row for row in requests if row["owner_id"] != target]) == 7


@pytest.mark.parametrize("rows", ["before", "after", "last"])
@pytest.mark.parametrize("template", [None, "{% for m in messages %}big {{ m.content }} red{% endfor %} answer :"])
def test_a_text_alone_is_learned_in_the_users_place_wherever_persona_rows_stand(rows, template, tmp_path):
    tokenizer = word_tokenizer(tmp_path)
    tokenizer.chat_template = template
    builder = PromptBuilder(tokenizer, PromptLayout(rows=rows, suffix=" answer :"), encoder_decoder=False)
    prompts, answers = tokenised(builder, [("the cat", "music"), (None, "a dog ran")], 10)
    head, tail = (["<s>"], ["answer", ":"]) if template is None else (["big"], ["red", "answer", ":"])
    assert list(map(tokenizer.convert_ids_to_tokens, prompts)) == [[*head, "the", "cat", *tail], head]
    assert list(map(tokenizer.convert_ids_to_tokens, answers)) == [["music", "</s>"], ["a", "dog", "ran", "</s>"]]
