"""Job adapt on small populations: whose adapter is made, from which items, again or not; and the base they stand on."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

from infra.errors import InputError
from infra.shards import bucket_of, user_key
from pipelines import adapt, tables
from pplug.adapter import AdapterShape, LoraConfig, base_shapes, from_bytes, to_bytes
from pplug.history import history_hash
from pplug.llm import FrozenLLM, LLMConfig, llm_id
from pplug.lora import StackedTrainer, UserExamples
from tests.pipelines import small
from tests.pipelines.population import NOTES
from tests.pplug.models import tiny_llama

LORA = LoraConfig(learning_rate=1e-2, stored="float32", batch_size=4)
STRANGE = ("../../x", "ü" * 300, "a=b%2Fc", "'; --", "plain")


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    return LLMConfig(model=str(tiny_llama(tmp_path_factory.mktemp("llm"))))


@pytest.fixture(scope="module", autouse=True)
def ray(ray_session):
    """One local Ray for the file."""


def item(user, number, mood="good"):
    return {"user_id": user, "item_id": f"{number}", "fields": {"mood": mood, "text": f"the cat sat on mat {number}"}}


def fill(population, rows, **more):
    path = population.folder / f"items-{population.runs}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert population.ingest(source=str(path), task=population.task(NOTES), **more) == 0


def run(population, llm, name="adapt", **config):
    config = {"lora": LORA, "threads": 1} | config
    run_dir = population.folder / name
    code = adapt.run(adapt.Config(tables=population.tables, llm=llm, run_id=name, run_dir=str(run_dir), **config))
    population.report = json.loads((run_dir / "report.json").read_text())
    return code


def adapters(population):
    return {row["user_id"]: row for row in population.rows("adapters")}


def alone(llm, user, items, lora=LORA):
    """The user's adapter from texts put together by hand, trained with nobody else."""
    frozen = FrozenLLM.load(llm)

    def ids(text):
        return frozen.tokenizer(text, add_special_tokens=False)["input_ids"]

    examples = [
        ([1, *ids(f"How do I feel? {row['fields']['text']}\n")], [*ids(row["fields"]["mood"]), 2]) for row in items
    ]
    torch.set_num_threads(1)
    (fitted,) = StackedTrainer(frozen.model, lora).fit([UserExamples(user, examples)])
    return fitted


def test_every_user_gets_the_adapter_of_training_alone(population, llm):
    people = {name: [item(name, i, ("good", "bad")[i % 2]) for i in range(n)] for n, name in enumerate(STRANGE, 1)}
    fill(population, [row for rows in people.values() for row in rows])
    assert run(population, llm, batch_users=3) == 0
    found = adapters(population)
    assert found.keys() == people.keys() and population.report["written"] == population.report["planned"] == 5
    shapes = base_shapes(Path(llm.model), LORA.shape.targets)
    for user, items in people.items():
        row, want = found[user], alone(llm, user, items)
        assert row["bucket"] == bucket_of(user, 4) and row["user_key"] == user_key(user)
        assert row["weights"] == to_bytes(want.weights, llm_id(llm))
        assert (row["n_examples"], row["rank"], row["alpha"], row["targets"]) == (
            len(items),
            8,
            8.0,
            ["q_proj", "v_proj"],
        )
        assert row["loss"] == pytest.approx(want.loss) and row["llm_id"] == llm_id(llm)
        assert from_bytes(row["weights"], LORA.shape, shapes, llm_id(llm)).keys() == shapes.keys()
    named = "".join(str(path) for path in population.folder.rglob("*"))
    assert not any(user in named for user in STRANGE[:4])  # no file is named after anybody


def test_a_rerun_trains_only_who_is_new_or_has_changed(population, llm):
    people = [f"user-{i}" for i in range(6)]
    fill(population, [item(name, i) for name in people for i in range(3)])
    assert run(population, llm) == 0
    first, version = adapters(population), tables.open_table(population.tables, "adapters").version
    assert run(population, llm) == 0
    assert (population.report["written"], population.report["already_there"]) == (0, 6)
    assert tables.open_table(population.tables, "adapters").version == version

    fill(population, [item("user-2", 9, "bad"), item("new", 1)])
    assert run(population, llm, "night", changed_only=True) == 0
    report, second = population.report, adapters(population)
    assert (report["planned"], report["written"], report["already_there"]) == (7, 2, 5)
    assert second.keys() == {*people, "new"}
    assert {name for name in people if first[name] != second[name]} == {"user-2"}
    assert second["user-2"]["adapter_id"] != first["user-2"]["adapter_id"] and second["user-2"]["n_examples"] == 4
    assert second["user-2"]["weights"] == to_bytes(
        alone(llm, "user-2", [item("user-2", i) for i in range(3)] + [item("user-2", 9, "bad")]).weights, llm_id(llm)
    )

    other = LORA.model_copy(update={"epochs": 1})
    with pytest.raises(InputError, match="settings .*, this run would make those of base .* train everybody anew"):
        run(population, llm, "mixed", changed_only=True, lora=other)
    assert run(population, llm, "anew", lora=other) == 0
    assert population.report["written"] == 7 and len(adapters(population)) == 7
    assert not {row["adapter_id"] for row in second.values()} & {
        row["adapter_id"] for row in adapters(population).values()
    }


def test_what_a_request_may_not_see_is_not_trained_on(population, llm):
    """Two derived requests: the adapter knows what came before the first of them, whatever comes later."""
    rows = [item(name, i) for name in ("ann", "bob") for i in range(5)]
    fill(population, rows, derive_requests=2)
    assert run(population, llm) == 0
    before = adapters(population)
    assert {row["n_examples"] for row in before.values()} == {3}
    hashes = [row["text_hash"] for row in population.items()["ann"][:3]]
    assert before["ann"]["history_hash"] == history_hash(hashes)
    assert run(population, llm, "all", cut="none") == 0
    assert {row["n_examples"] for row in adapters(population).values()} == {5}


def test_users_without_anything_to_learn_are_rejected_and_the_rest_is_trained(population, llm, tmp_path):
    fill(population, [item("ann", 1), item("mute", 1, " "), item("not-asked", 1)])
    asked = tmp_path / "users"
    asked.write_text("ann\nmute\nnobody\n")
    assert run(population, llm, users=str(asked), max_reject_fraction=0.7) == 0
    assert adapters(population).keys() == {"ann"}
    assert population.report["rejected"] == {"no_usable_item": 1, "no_history": 1}
    bad = {row["reason"]: row for row in population.rows("rejects") if row["job"] == "adapt"}
    assert bad["no_usable_item"]["key"] == user_key("mute") and bad["no_history"]["key"] == user_key("nobody")


def test_an_item_that_is_its_own_answer(population, llm):
    """A tweet: no input, the text is what is learned."""
    task = {"name": "tweets", "item": "{text}", "item_without_label": "{text}", "target": "text", "metric": "text"}
    path = population.folder / "items.jsonl"
    path.write_text("".join(json.dumps(item("ann", i)) + "\n" for i in range(3)))
    assert population.ingest(source=str(path), task=population.task(task)) == 0
    assert run(population, llm) == 0
    frozen = FrozenLLM.load(llm)
    words = [
        frozen.tokenizer(item("ann", i)["fields"]["text"], add_special_tokens=False)["input_ids"] for i in range(3)
    ]
    torch.set_num_threads(1)
    (want,) = StackedTrainer(frozen.model, LORA).fit([UserExamples("ann", [([1], [*ids, 2]) for ids in words])])
    assert adapters(population)["ann"]["weights"] == to_bytes(want.weights, llm_id(llm))


def test_a_target_that_the_base_lacks_is_refused_before_anything_starts(population, llm):
    fill(population, [item("ann", 1)])
    lora = LoraConfig(shape=AdapterShape(targets=("query",)))
    with pytest.raises(InputError, match="llm: target 'query': the base has no module of this name"):
        run(population, llm, lora=lora)


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


def test_the_base_learns_from_everybody_but_the_target_users(tmp_path):
    made = small.make(tmp_path, train_users=8, test_users=2, train_requests=1, test_requests=1)
    made.ingest("train", buckets=2)
    target = sorted({row["user_id"] for row in small.rows(made.tables, "histories")})[0]
    (tmp_path / "targets").write_text(f"{target}\n")
    values = {"tables": made.tables, "llm": made.llm, "stage": "base", "users": str(tmp_path / "targets")}
    lora = LoraConfig(learning_rate=1e-2)
    assert made.run(adapt, "base", **values, lora=lora, output=str(tmp_path / "merged"), epochs=4) == 0
    report = made.report("base")
    items = small.rows(made.tables, "histories")
    assert report["planned"] == report["written"] == len([row for row in items if row["user_id"] != target])
    merged = LLMConfig(model=str(tmp_path / "merged"))
    assert report["llm_id"] == llm_id(merged) != llm_id(made.llm)
    old, new = (AutoModelForCausalLM.from_pretrained(config.model).state_dict() for config in (made.llm, merged))
    assert old.keys() == new.keys()
    moved = {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])}
    assert moved == {"q_proj", "v_proj"}
    assert (
        FrozenLLM.load(merged).tokenizer("the cat")["input_ids"]
        == FrozenLLM.load(made.llm).tokenizer("the cat")["input_ids"]
    )
    with_requests = values | {"examples": "requests", "users": None}
    assert made.run(adapt, "base-2", **with_requests, lora=lora, epochs=1) == 0
    assert made.report("base-2")["written"] == 8
