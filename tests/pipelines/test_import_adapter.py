"""Job `import-adapter`: a LoRA from PEFT becomes a user's row beside the others, and leaves as it came."""

import json

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from infra.errors import InputError
from infra.shards import user_key
from pipelines import __main__ as cli
from pipelines import tables
from pipelines.engines.adapters import AdapterIndex
from pipelines.learned import last_items
from pipelines.pending_users import with_nulls
from pipelines.upkeep import import_adapter
from pipelines.upkeep.export_adapter import export_adapter
from pplug.llm import LLMConfig, llm_id
from pplug.splice import PromptLayout
from pplug.stand_in import llm_sample
from tests.pipelines.population import NOTES
from tests.pplug.models import tiny_llama
from tests.pplug.test_peft_folder import logits, saved

PEOPLE = ("ann", "bob", "cai", "dan", "eve")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def filled(population, ray_session):
    items = [
        {"user_id": name, "item_id": f"{i}", "fields": {"mood": "good", "text": f"mat {i}"}}
        for name in PEOPLE
        for i in range(3)
    ]
    path = population.folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in items))
    assert population.ingest(source=str(path), task=population.task(NOTES), buckets=2) == 0
    return population


def take(population, base, folder, user, name, **more):
    values = {"tables": population.tables, "llm": LLMConfig(model=str(base)), "run_id": name} | more
    run_dir = population.folder / name
    config = import_adapter.Config(folder=str(folder), user_id=user, run_dir=str(run_dir), **values)
    code = import_adapter.run(config)
    return code, (run_dir / "report.json").read_text()


def test_an_adapter_of_peft_becomes_a_users_row_and_leaves_as_it_came(filled, base, tmp_path, capsys):
    for number, user in enumerate(PEOPLE):
        saved(base, tmp_path / f"{number}", r=2 + number, use_rslora=bool(number % 2))
        code, report = take(filled, base, tmp_path / f"{number}", user, f"take-{number}")
        assert code == 0 and json.loads(report)["written"] == 1
        assert "user_id" not in report
    rows = {row["user_id"]: row for row in filled.rows("adapters")}
    assert rows.keys() == set(PEOPLE) and {row["rank"] for row in rows.values()} == {2, 3, 4, 5, 6}
    snapshot = tables.open_table(filled.tables, "adapters").snapshot(complete=True)
    assert snapshot.metadata["llm_id"] == llm_id(LLMConfig(model=str(base)))
    for file in snapshot.files:  # a user's weights are read alone
        assert pq.read_metadata(file.uri).num_row_groups == file.rows
    want = logits(saved(base, tmp_path / "1", r=3, use_rslora=True))
    table = tables.open_table(filled.tables, "adapters")
    export_adapter(table, "bob", tmp_path / "out", base, llm_id(LLMConfig(model=str(base))))
    assert load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    from transformers import LlamaForCausalLM

    model = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)

    # what `--llm.serves` compares a copy of the LLM with
    assert snapshot.metadata["llm_sample"] == llm_sample(LLMConfig(model=str(base))) != ""

    saved(base, tmp_path / "new", r=7)
    assert take(filled, base, tmp_path / "new", "bob", "again")[0] == 0
    after = {row["user_id"]: row for row in filled.rows("adapters")}
    assert len(filled.rows("adapters")) == 5 and after["bob"]["rank"] == 7
    assert all(after[user] == rows[user] for user in PEOPLE if user != "bob")


def test_only_the_file_that_holds_the_users_row_is_read_and_written_anew(filled, base, tmp_path, monkeypatch):
    """A bucket may hold 24 GB of other users' weights, and all of them in one file of an earlier release."""
    saved(base, tmp_path / "lora")
    table, identity = tables.open_or_create(filled.tables, "adapters", 2), llm_id(LLMConfig(model=str(base)))
    keys = {"first": "0" * 32, "dan": user_key("dan"), "last": "f" * 32, "eve": user_key("eve")}
    rows = {
        name: {"bucket": 0, "user_key": key, "user_id": name, "adapter_id": f"a-{name}", "llm_id": identity, "rank": 1,
               "alpha": 1.0, "targets": ["q_proj"], "weights": name.encode() * 9}
        for name, key in keys.items()
    }  # fmt: skip
    one, two = (
        table.write(with_nulls(pa.Table.from_pylist([rows[name] for name in names]), table.spec.schema), "before")[0]
        for names in (("first", "dan", "last"), ("eve",))
    )
    named = {"llm_id": identity, "fit_id": "fit", "llm_sample": ""}
    table.commit([one, two], run_id="before", group=0, mode="append", planned_on=0, metadata=named, complete=True)
    read_table, read = pq.read_table, []

    def reading(source, columns=None, **how):
        if columns is None or "weights" in columns:
            read.append(read_table(source, columns=["user_id"], **how)["user_id"].to_pylist())
        return read_table(source, columns=columns, **how)

    monkeypatch.setattr("infra.snapshot.pq.read_table", reading)
    assert take(filled, base, tmp_path / "lora", "cai", "new")[0] == 0
    after = table.snapshot(complete=True)
    paths = {file.path for file in after.files}
    assert not read and {one.path, two.path} < paths and len(paths) == 3
    assert {name: after.metadata[name] for name in ("fit_id", "cut")} == {"fit_id": "fit", "cut": "none"}

    monkeypatch.setattr(import_adapter, "TARGET_BYTES", 1)  # a file of that size holds one row
    assert take(filled, base, tmp_path / "lora", "dan", "again")[0] == 0
    assert read == [["first"], ["last"]]
    again = {file.path for file in table.snapshot(complete=True).files}
    assert paths - again == {one.path} and len(again - paths) == 3
    found = {row["user_id"]: row for row in filled.rows("adapters")}
    assert found.keys() == {"first", "dan", "last", "eve", "cai"} and found["dan"]["adapter_id"] != "a-dan"
    for name in ("first", "last", "eve"):
        assert (found[name]["weights"], found[name]["adapter_id"]) == (name.encode() * 9, f"a-{name}")


def test_the_same_weights_at_another_strength_are_another_adapter(filled, base, tmp_path):
    found = []
    for number, changed in enumerate(({"lora_alpha": 16}, {"lora_alpha": 32}, {"lora_alpha": 16})):
        saved(base, tmp_path / "a", r=4, **changed)
        assert take(filled, base, tmp_path / "a", "ann", f"take-{number}")[0] == 0
        (row,) = filled.rows("adapters")
        found.append((row["adapter_id"], row["alpha"], row["weights"]))
    assert [alpha for _, alpha, _ in found] == [16, 32, 16]
    assert found[0][2] == found[1][2]
    assert found[0] == found[2] and found[0][0] != found[1][0]
    assert all(name.startswith("imported-") for name, _, _ in found)


def test_it_answers_only_requests_that_may_see_all_of_the_users_items(filled, base, tmp_path):
    saved(base, tmp_path / "a")
    assert take(filled, base, tmp_path / "a", "ann", "take")[0] == 0
    snapshot = tables.open_table(filled.tables, "adapters").snapshot(complete=True)
    (bucket,) = snapshot.by_bucket()
    assert last_items(snapshot, bucket, None)["ann"].position == 2
    index = AdapterIndex(snapshot, bucket, None)
    request = {"user_id": "ann", "owner_id": "ann", "as_of": None}
    assert index.own(request | {"as_of_position": 2}) is None
    assert index.own(request | {"as_of_position": 3}) is not None


def test_what_does_not_fit_the_table_is_refused(filled, base, tmp_path, capsys):
    saved(base, tmp_path / "a")
    with pytest.raises(InputError, match="user_id: no item of this user"):
        take(filled, base, tmp_path / "a", "nobody", "one")
    assert take(filled, base, tmp_path / "a", "ann", "two")[0] == 0
    other = LLMConfig(model=str(base), layout=PromptLayout(suffix=" "))
    with pytest.raises(InputError, match="a table has adapters of one base"):
        take(filled, base, tmp_path / "a", "bob", "three", llm=other)
    table = tables.open_table(filled.tables, "adapters")
    version = table.version
    half = table.snapshot()
    table.commit([], run_id="half-night", group=0, mode="append", planned_on=half.version)
    with pytest.raises(InputError, match="adapters: version .* is of run half-night, which has not ended"):
        take(filled, base, tmp_path / "a", "bob", "four")
    assert table.version == version + 1
    saved(base, tmp_path / "dora", use_dora=True)
    words = ["import-adapter", str(tmp_path / "dora"), "--user-id", "bob", "--tables", filled.tables]
    assert cli.main([*words, "--llm.model", str(base), "--run-dir", str(tmp_path / "run")]) == 2
    assert "the adapter has DoRA (use_dora)" in capsys.readouterr().err
    assert len(filled.rows("adapters")) == 1
