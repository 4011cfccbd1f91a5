"""A training reads only the files of its own run, and writes folders that hold nothing of a former one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from infra import nodes
from infra.errors import InputError
from infra.storage import Storage
from pipelines import begun, tables
from pipelines.adapt import job as adapt
from pipelines.adapt.base import BaseShard, _all_prompted, load_examples
from pipelines.refresh import job as refresh
from pipelines.train import job as train
from pipelines.train.samples import PrepareSamples, Shard, load_samples
from pplug import PersonaPlug
from pplug.adapter import LoraConfig
from pplug.fit import FitConfig
from pplug.fit_config import held_out
from pplug.llm import LLMConfig, llm_id
from pplug.plug import PlugConfig
from tests.pipelines import small

ROOT = Path(__file__).parents[2]
FIT = FitConfig(epochs=1, batch_size=16, precision="float32", val_fraction=0.3)
LORA = LoraConfig(learning_rate=1e-2, batch_size=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    """Users with one request each, refreshed."""
    world = small.make(tmp_path_factory.mktemp("own"), train_users=12, test_users=8, train_requests=1, test_requests=1)
    world.ingest("train", buckets=2)
    assert world.run(refresh, "refresh", **world.common) == 0
    return world


def users_of(place):
    return sorted({row["user_id"] for row in small.rows(place, "requests")})


def write_users(folder, users):
    path = folder / "users"
    path.write_text("".join(f"{user}\n" for user in users))
    return str(path)


def values(made, **more):
    return made.common | {"llm": made.llm, "fit": FIT, "threads": 1, "max_failures": 0} | more


# --- samples and examples ---


def test_a_second_training_in_the_same_run_dir_learns_from_its_own_users_alone(made, tmp_path):
    """The first leaves the samples of all users; the others have one user each, who is held out or is not: they are
    refused before anything is trained."""
    run_dir = made.root / "runs" / "shared"
    users = users_of(made.tables)
    out = [user for user in users if held_out(user, FIT.val_fraction, FIT.seed)]
    assert train.run(train.Config(run_id="all", run_dir=str(run_dir), **values(made))) == 0
    counts = json.loads((run_dir / "report.json").read_text())["samples"]
    assert (counts["samples"], counts["held_out"]) == (12, len(out)) and 0 < len(out) < 12
    trained = sorted(os.listdir(run_dir / "train"))
    for user, words in (
        (out[0], "all of the 1 samples .* nobody is left to learn from; give more users, or a smaller"),
        (next(user for user in users if user not in out), "none of the 1 samples .* nobody is left to choose by; .*gr"),
    ):
        one = write_users(tmp_path, [user])
        with pytest.raises(InputError, match=f"fit.val_fraction=0.3 is the share of people .* {words}"):
            train.run(train.Config(run_id=f"one-{user}", run_dir=str(run_dir), users=one, **values(made)))
    assert sorted(os.listdir(run_dir / "train")) == trained


def test_a_worker_that_finds_other_samples_than_were_written_names_both_counts(made, tmp_path):
    names = ("histories", small.names(made.tables, "embeddings-"), "requests")
    histories, embeddings, requests = (tables.open_table(made.tables, one).snapshot(complete=True) for one in names)
    stage = PrepareSamples(histories, embeddings, requests, tables.task_entry(None, histories), 100, str(tmp_path))
    written = [table.to_pylist()[0] for table in stage(pa.table({"bucket": [0, 1]}))]
    shards = [Shard(row["bucket"], row["samples"], row["vectors"]) for row in written]
    table, vectors, _ = load_samples(str(tmp_path), shards, "")
    assert table.num_rows == len(users_of(made.tables)) == 12
    (tmp_path / "samples-9.parquet").write_bytes((tmp_path / "samples-0.parquet").read_bytes())  # of nobody's
    assert load_samples(str(tmp_path), shards, "")[0].equals(table)
    n, path = shards[0].samples, tmp_path / "samples-0.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(
        ValueError, match=rf"samples-0.parquet: .* wrote {n} rows, this train worker finds {n - 1} rows"
    ):
        load_samples(str(tmp_path), shards, "")
    path.unlink()
    with pytest.raises(ValueError, match=rf"wrote {n} rows, .* finds no such file; give each run a run_dir that all"):
        load_samples(str(tmp_path), shards, "")
    np.save(tmp_path / "vectors-1.npy", vectors[1][1:])
    with pytest.raises(ValueError, match=rf"vectors-1.npy: .* wrote {shards[1].vectors} rows, .* finds"):
        load_samples(str(tmp_path), shards[1:], "")


# --- the base ---


def test_a_base_is_made_of_its_own_runs_data_and_settings_alone(made, tmp_path):
    """Run `one` shares the run folder of run `all` and the output folder of a former base in shards."""
    target = users_of(made.tables)[0]
    others = write_users(tmp_path, users_of(made.tables)[1:])  # left out: one user stays
    run_dir, output = made.root / "runs" / "shared-base", tmp_path / "merged"
    common = {"tables": made.tables, "llm": made.llm, "stage": "base", "lora": LORA, "epochs": 1, "threads": 1}

    def run(run_id, **more):
        return adapt.run(adapt.Config(**{**common, "run_id": run_id, "run_dir": str(run_dir)} | more))

    assert run("all", output=str(tmp_path / "all")) == 0
    in_shards(made.llm.model, output)
    assert run("one", users=others, output=str(output)) == 0
    report = json.loads((run_dir / "report.json").read_text())
    request = next(row for row in small.rows(made.tables, "requests") if row["user_id"] == target)
    mine = [row for row in small.rows(made.tables, "histories") if row["user_id"] == target]
    seen = [row for row in mine if row["occurred_at"] < request["as_of"]]
    assert 0 < len(seen) < len(small.rows(made.tables, "histories"))
    assert report["examples"] == len(seen) and report["made_from"]["items_cut_off"] == len(mine) - len(seen)
    # what loads is what the run merged, and no file of the former model is left
    files = sorted(path.name for path in output.iterdir())
    assert [name for name in files if "safetensors" in name] == ["model.safetensors"]
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    saved = load_file(output / "model.safetensors")
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    assert report["llm_id"] == llm_id(LLMConfig(model=str(output))) != llm_id(made.llm)

    with pytest.raises(InputError, match=r"run one in .* began with another lora: .*0\.01.*, now .*0\.02.*--run-id"):
        run("one", users=others, output=str(output), lora=LORA.model_copy(update={"learning_rate": 2e-2}))
    with pytest.raises(InputError, match="run one in .* began with another users: .*, now null"):
        run("one", output=str(output))
    with pytest.raises(InputError, match="output=.*: is the folder of the base itself"):
        run("two", output=made.llm.model)
    with pytest.raises(InputError, match="output: .* is the run's own folder, .*; give another folder"):
        run("two", run_dir=str(tmp_path / "both"), output=str(tmp_path / "x" / ".." / "both"))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"output: .* holds notes\.txt"):
        run("two", output=str(tmp_path / "notes"))
    assert (tmp_path / "notes" / "notes.txt").read_text() == "mine"


def in_shards(model, folder):
    """The model with other weights, as two shards with an index: what loaders prefer to model.safetensors."""
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(folder)
    weights = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    places = {}
    for number, names in enumerate((sorted(weights)[:5], sorted(weights)[5:]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_run_goes_on_with_what_it_began_with_and_nothing_else(made, tmp_path):
    snapshot = tables.open_table(made.tables, "histories").snapshot(complete=True)
    decisive, place = {"tables": "t", "lora": {"rank": 8}}, str(tmp_path)
    assert begun.read(place, "adapt", "r", decisive) == {}
    begun.write(place, "adapt", "r", decisive, {"histories": snapshot})
    assert begun.read(place, "adapt", "r", decisive) == {"histories": snapshot.version}
    begun.write(place, "adapt", "r", decisive | {"lora": 1}, {})  # the record stays
    assert begun.read(place, "adapt", "r", decisive) == {"histories": snapshot.version}
    with pytest.raises(InputError, match='began with another lora: {"rank": 8}, now {"rank": 4}'):
        begun.read(place, "adapt", "r", decisive | {"lora": {"rank": 4}})
    with pytest.raises(InputError, match="run r in .* began as job adapt, not train; give another --run-id"):
        begun.read(place, "train", "r", decisive)


def test_an_answer_without_a_prompt_begins_with_its_first_token():
    """Nothing predicts that token; an answer of one token teaches nothing."""
    found = _all_prompted([[], [1], [], []], [[5, 6, 2], [7], [8], [9, 2]])
    assert found == ([[5], [1], [9]], [[6, 2], [7], [2]])


def test_examples_are_read_by_their_names_and_counts(tmp_path):
    rows = pa.table({"prompt": [[1, 2], [3]], "answer": [[4], [5]]})
    for bucket in (0, 7):
        pq.write_table(rows, tmp_path / f"examples-{bucket}.parquet")
    assert load_examples(str(tmp_path), [BaseShard(0, 2)]) == ([[1, 2], [3]], [[4], [5]])
    with pytest.raises(ValueError, match=r"examples-7.parquet: .* wrote 3 rows, this train worker finds 2 rows"):
        load_examples(str(tmp_path), [BaseShard(0, 2), BaseShard(7, 3)])
    with pytest.raises(ValueError, match="examples-8.parquet: .* wrote 3 rows, .* finds no such file"):
        load_examples(str(tmp_path), [BaseShard(8, 3)])


# --- several nodes ---


def test_a_folder_that_a_node_does_not_see_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "seen").write_text("token")
    assert nodes.sees(str(tmp_path), "seen", "token", 0)
    assert not nodes.sees(str(tmp_path), "seen", "another", 0) and not nodes.sees(str(tmp_path), "no", "token", 0)
    nodes.refuse_unshared(str(tmp_path), "run_dir", [], 2)
    with pytest.raises(
        InputError, match="run_dir=.*: 1 of the cluster's 3 nodes do not see .* b.*folder that all nodes"
    ):
        nodes.refuse_unshared(str(tmp_path), "run_dir", ["b"], 3)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a node with a disk of its own takes root")
@pytest.mark.parametrize("job", ["train", "adapt"])
def test_on_two_nodes_a_run_dir_of_one_of_them_is_refused_before_anything_is_prepared(made, tmp_path, job):
    run_dir = tmp_path / "runs"
    run_dir.mkdir()
    config = {train: values(made), adapt: {"tables": made.tables, "llm": made.llm, "stage": "base"}}
    module = {"train": train, "adapt": adapt}[job]
    words = made.words(module, f"nodes-{job}", **config[module])[2:]
    words += ["--run-dir", str(run_dir)]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.two_nodes", str(run_dir), *words],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-4000:]
    assert "1 of the cluster's 2 nodes do not see this folder" in done.stderr and "s3://bucket/prefix" in done.stderr
    assert not list(run_dir.rglob("*.parquet"))


def test_on_one_node_any_folder_does(made, tmp_path):
    nodes.check_written(str(tmp_path), "run_dir")
    assert not list(tmp_path.iterdir()) and Storage(str(tmp_path)).list() == []


# --- a plug over another ---


def test_a_plugs_folder_that_holds_something_else_is_refused_before_training(made, tmp_path):
    (tmp_path / "plug").mkdir()
    PersonaPlug(PlugConfig(encoder_dim=16, llm_dim=8)).save_pretrained(tmp_path / "plug")
    (tmp_path / "plug" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"plug: .* holds notes\.txt .* would be lost"):
        made.run(train, "refused", **values(made, plug=str(tmp_path / "plug")))
    assert (tmp_path / "plug" / "notes.txt").read_text() == "mine"
    same = str(tmp_path / "both")
    with pytest.raises(InputError, match="plug: .* is the run's own folder, .*; give another folder"):
        train.run(train.Config(run_id="same", run_dir=f"{same}/", **values(made, plug=same)))
