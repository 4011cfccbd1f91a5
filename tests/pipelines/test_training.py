"""The jobs that train: early stopping, the curve of the loss, and an LLM that two workers hold together."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import ray.train
import torch
from safetensors.torch import load, load_file, save_file
from transformers import LlamaForCausalLM

from infra import session
from infra.errors import InputError
from infra.trainer import run_training
from pipelines import tables, training
from pipelines.adapt import job as adapt
from pipelines.adapt.base import _answers_loss, _with_lora, merge
from pipelines.adapt.users import EXAMPLES, FitAdapters
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.generate.replies import Reply
from pipelines.refresh import job as refresh
from pipelines.run import CpuShare
from pipelines.train import job as train
from pipelines.train.answers import known_answers
from pipelines.train.config import Config, PlugShape
from pipelines.training import Checkpoints
from pipelines.training import train as run_worker
from pplug import objective
from pplug.adapter import LoraConfig, StackConfig
from pplug.fit_config import FitConfig
from pplug.llm import FrozenLLM, LLMConfig, ParallelConfig
from pplug.loop import Loop, Order
from pplug.parallel import Mesh
from pplug.tasks import TaskSpec, get
from tests.pipelines import small
from tests.pipelines.test_stages import begun_base
from tests.pplug.models import tiny_bert, tiny_llama
from tests.pplug.quantised import compressed, said

FIT = FitConfig(epochs=2, batch_size=8, precision="float32", learning_rate=1e-4, val_fraction=0.2)


@pytest.fixture(scope="module")
def made(tmp_path_factory, ray_session):
    made = small.make(tmp_path_factory.mktemp("train"), train_users=16, test_users=2, train_requests=2, test_requests=1)
    made.ingest("train", buckets=2)
    assert made.run(refresh, "refresh", **made.common) == 0
    return made


def fit(made, name, fit=FIT, **more):
    assert made.run(train, name, **made.common, **{"llm": made.llm, "fit": fit, "threads": 1} | more) == 0
    report = made.report(name)
    json.dumps(report, allow_nan=False)  # JSON has no word for infinity
    return report


@pytest.mark.slow
def test_two_workers_with_one_llm_train_the_plug_of_one_worker(made):
    one = fit(made, "one")
    spread = made.llm.model_copy(update={"parallel": ParallelConfig(tensor=2)})
    two = fit(made, "two", llm=spread, workers=2)
    assert two["best_val_loss"] == pytest.approx(one["best_val_loss"], rel=1e-4)
    plugs = [load_file(made.root / "runs" / name / "plug" / "model.safetensors") for name in ("one", "two")]
    one_plug, two_plug = (torch.cat([plug[name].flatten() for name in sorted(plug)]) for plug in plugs)
    assert (two_plug - one_plug).norm() <= 1e-4 * one_plug.norm()  # some tensors have no gradient but rounding
    run_dir = made.root / "runs" / "one"
    rows = list(csv.DictReader((run_dir / "losses.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(1, one["history"][-1]["step"] + 1))
    half = len(rows) // 2
    mean = sum(float(row["loss"]) for row in rows[half:]) / half
    assert mean == pytest.approx(one["history"][-1]["train_loss"], rel=1e-6)
    assert (run_dir / "loss.svg").read_text().count("<svg") == 1
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_two_workers_that_share_each_layer_make_the_base_of_one_worker(made):
    lora = LoraConfig(learning_rate=1e-3, dropout=0.0)
    values = {"tables": made.tables, "stage": "base", "lora": lora, "epochs": 1, "threads": 1}
    shared = made.llm.model_copy(update={"parallel": ParallelConfig(shard=2)})
    assert made.run(adapt, "base-1", llm=made.llm, **values) == 0
    assert made.run(adapt, "base-2", llm=shared, workers=2, **values) == 0
    first, one, two = (
        torch.cat([tensor.flatten() for _, tensor in sorted(load_file(f"{folder}/model.safetensors").items())])
        for folder in (made.llm.model, *(made.root / "runs" / name / "base" for name in ("base-1", "base-2")))
    )
    assert (two - one).norm() <= 1e-3 * (one - first).norm() > 0  # of what was learned, not of the weights
    assert made.report("base-2")["loss"] == pytest.approx(made.report("base-1")["loss"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_with_one_base_make_the_adapters_of_one(made, tmp_path):
    some = tmp_path / "some"
    users = sorted({row["user_id"] for row in small.rows(made.tables, "requests")})[:4]
    some.write_text("\n".join(users))
    found = []
    for tensor in (1, 2):
        place = str(tmp_path / f"tables-{tensor}")
        shutil.copytree(made.tables, place)
        llm = made.llm.model_copy(update={"parallel": ParallelConfig(tensor=tensor)})
        values = {"tables": place, "lora": LoraConfig(learning_rate=1e-3, storage_dtype="float32"), "epochs": 1}
        assert made.run(adapt, f"users-{tensor}", llm=llm, workers=tensor, users=str(some), threads=1, **values) == 0
        found.append({row["user_id"]: load(row["weights"]) for row in small.rows(place, "adapters")})
    one, two = found
    assert one.keys() == two.keys() and len(one) == 4
    for user, weights in one.items():
        for name, want in weights.items():
            assert (two[user][name] - want).norm() <= 1e-3 * want.norm() > 0, (user, name)


@pytest.mark.parametrize(
    ("stage", "parallel", "said"),
    [
        ("users", {"shard": 2}, "give llm.parallel.tensor"),
        ("users", {"tensor": 2}, "workers=3: llm.parallel.tensor=2"),
        ("base", {"tensor": 2}, "give llm.parallel.shard"),
        ("base", {"shard": 2}, "workers=3: .*shard=2 have 2 workers hold one LLM together"),
    ],
)
def test_a_spread_that_a_stage_does_not_have_is_refused_at_the_start(tmp_path, stage, parallel, said):
    llm = {"model": "any", "parallel": parallel}
    with pytest.raises(InputError, match=said):
        adapt.run(adapt.Config(tables=str(tmp_path), llm=llm, stage=stage, workers=3, run_dir=str(tmp_path / "run")))


@pytest.mark.slow
def test_a_training_that_gets_no_better_ends_early_and_says_so(made):
    """A learning rate at which the loss only rises: the first epoch stays the best."""
    wild = FIT.model_copy(update={"epochs": 6, "learning_rate": 3.0, "patience": 1})
    report = fit(made, "early", wild)
    losses = [entry["val_loss"] for entry in report["history"]]
    assert len(losses) < 6 and losses[-1] > min(losses)
    assert len(losses) - 1 - losses.index(min(losses)) == 1
    assert report["stages"]["fit"]["rows"] == len(losses) * report["samples"]["samples"]  # an epoch, a loss
    before = (made.root / "runs" / "early" / "plug" / "model.safetensors").read_bytes()
    again = fit(made, "early", wild)
    assert again["history"] == report["history"]  # the same run again has nothing to do
    assert again["stages"]["fit"]["rows"] == 0
    assert (made.root / "runs" / "early" / "plug" / "model.safetensors").read_bytes() == before


def test_epochs_are_counted_by_the_steps_that_were_taken():
    """Ten epochs of 40 steps are planned; fewer are taken where the loss is no number any more."""
    ends = [{"step": 40.0 * (epoch + 1), "epoch": epoch, "val_loss": 1.0} for epoch in range(10)]
    assert training.epochs_taken(ends[:3]) == 3 and training.epochs_taken(ends) == 10
    assert training.epochs_taken(ends, 360) == 1  # an earlier start took nine
    half = {"step": 100.0, "epoch": 2, "train_loss": 1.0}
    assert training.epochs_taken([{"step": 20.0, "epoch": 0, "train_loss": 1.0}, *ends[:2], half]) == 2.5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plug", "base"])
def test_a_training_that_diverges_is_not_tried_again(made, kind):
    name = f"diverged-{kind}"
    if kind == "plug":
        values = {**made.common, "llm": made.llm, "fit": FIT.model_copy(update={"learning_rate": 1e30}), "threads": 1}
    else:
        lora = LoraConfig(learning_rate=1e30)
        values = {"tables": made.tables, "llm": made.llm, "stage": "base", "lora": lora, "epochs": 4, "threads": 1}
    with pytest.raises(InputError, match=r"run_id=.*: the (validation )?loss is (nan|inf) .*lower its learning rate"):
        made.run(train if kind == "plug" else adapt, name, **values)
    assert len(list((made.root / "runs" / name / "tensorboard").glob("events.out.tfevents.*"))) == 1  # one per try
    assert not (made.root / "runs" / name / kind).exists()


@pytest.mark.parametrize("worker", ["generate", "train"])
def test_an_llm_that_lacks_weights_is_refused_by_workers_as_input(tmp_path, worker):
    folder = tiny_llama(tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llm = LLMConfig(model=str(folder))
    with pytest.raises(InputError, match=f"^llm: {folder}: 1 of the weights .* model.norm.weight"):
        if worker == "generate":
            Reply(llm, EngineConfig(kind="transformers"), Decoding(), "llm", "run", CpuShare(1, 1))
        else:
            encoder = {"model": str(tiny_bert(tmp_path / "encoder")), "max_tokens": 64}
            train.make_models(train.Config(tables=str(tmp_path), llm=llm, encoder=encoder), {})


def refuse(given):
    with open(given["starts"], "a", encoding="utf-8") as file:
        file.write("one\n")
    raise InputError("llm: not here")


def test_an_llm_that_a_worker_refuses_ends_a_training_at_once(tmp_path, ray_session):
    starts = tmp_path / "starts"
    with pytest.raises(InputError, match="^run_id=refused: llm: not here$"):
        run_training(refuse, {"starts": str(starts)}, run_id="refused", run_dir=str(tmp_path), workers=1,
                     gpus_per_worker=0, max_failures=2, checkpoints_kept=1)  # fmt: skip
    assert starts.read_text(encoding="utf-8") == "one\n"


@pytest.mark.parametrize(
    ("dtype", "value", "known_names"),
    [(torch.float32, 1e30, True), (torch.float32, 1e30, False), (torch.float16, 1e3, True)],
    ids=["by file", "loaded", "beyond the files' numbers"],
)
def test_what_the_last_step_made_of_a_base_is_looked_at_before_it_takes_a_place(tmp_path, dtype, value, known_names):
    """1e30 * 1e30 is no float32, and 8 * 1e3 * 1e3 is a float32 and no float16."""
    llm, adapter, output = (str(tmp_path / name) for name in ("llm", "adapter", "base"))
    model = LlamaForCausalLM.from_pretrained(tiny_llama(tmp_path / "llm"), dtype=dtype)
    model.save_pretrained(llm)
    if not known_names:  # as if saved from within the model: these are loaded as a whole
        file = Path(llm, "model.safetensors")
        save_file({name.removeprefix("model."): x for name, x in load_file(file).items()}, file, {"format": "pt"})
    lora = peft.get_peft_model(model, peft.LoraConfig(r=8, lora_alpha=8, target_modules=["v_proj"]))
    merge_into = (LLMConfig(model=llm), adapter, output, "{}")
    for last_step in (0.01, value):
        with torch.no_grad():
            for name, parameter in lora.named_parameters():
                if "lora_" in name:
                    parameter.fill_(last_step)
        lora.save_pretrained(adapter)
        if last_step == 0.01:
            merge(*merge_into)
            before = Path(output, "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"v_proj holds values .* not finite: .* diverged; lower lora.learning_rate"):
        merge(*merge_into)
    assert Path(output, "model.safetensors").read_bytes() == before  # the former base stays


def test_the_first_step_of_a_resumed_base_draws_the_dropout_that_it_would_have_drawn_later(tmp_path, monkeypatch):
    """With logits in pieces, the model is taken apart once: that draws nothing from a seeded step's generator."""
    monkeypatch.setattr(objective, "LOGITS", 0)
    llm = FrozenLLM.load(LLMConfig(model=str(tiny_llama(tmp_path))))
    llm.model = _with_lora(llm, LoraConfig(dropout=0.5))
    for name, module in llm.model.named_modules():
        module.train("lora_dropout" in name)
        if "lora_B" in name and hasattr(module, "weight"):  # as a checkpoint brings it
            torch.nn.init.normal_(module.weight)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(float(_answers_loss(llm, [[5, 6, 7, 8]], [[9, 2]]).detach()))
    assert losses[0] == losses[1] != losses[2]
    assert llm.parts is not None


def test_a_base_in_training_draws_the_dropout_of_the_adapter_alone(tmp_path, monkeypatch):
    """The base is frozen, and computes as it will when it answers."""
    (model,) = begun_base(tmp_path, monkeypatch, dropout=0.5).write.args
    training = {name: module for name, module in model.named_modules() if module.training}
    places = [f"layers.{layer}.self_attn.{target}" for layer in (0, 1) for target in ("q_proj", "v_proj")]
    ends = ("lora_dropout", "lora_dropout.default")
    assert training.keys() == {f"base_model.model.model.{place}.{end}" for place in places for end in ends}
    drawn = [module.p for module in training.values() if isinstance(module, torch.nn.Dropout)]
    assert drawn == [0.5] * len(places)


def test_workers_that_cannot_be_grouped_are_refused_at_the_start(tmp_path):
    spread = {"model": "any", "parallel": {"tensor": 2}}
    config = train.Config(tables=str(tmp_path), llm=spread, workers=3, run_dir=str(tmp_path / "run"))
    with pytest.raises(InputError, match="workers=3: llm.parallel.tensor=2 .* 2 workers hold one LLM together"):
        train.run(config)


def test_workers_that_would_share_a_gpu_are_refused_at_the_start(tmp_path):
    given = {"tables": str(tmp_path), "llm": {"model": "any"}, "gpus_per_worker": 0.5, "run_dir": str(tmp_path / "run")}
    for job, more in ((train, {}), (adapt, {"stage": "base"}), (adapt, {"stage": "users"})):
        with pytest.raises(InputError, match="gpus_per_worker=0.5: 2 workers of a training cannot share a GPU"):
            job.run(job.Config(**given, **more, workers=2))


@pytest.mark.parametrize("stage", ["users", "base", None])
def test_an_llm_that_nothing_can_be_learned_through_is_refused_before_anything_starts(tmp_path, stage):
    table = tables.open_or_create(str(tmp_path / "tables"), "histories", 1)
    entry = {"task_entry": get("LaMP_2").to_json()}
    table.commit([], run_id="ingest", group=0, mode="append", planned_on=0, metadata=entry, complete=True)
    given = {"tables": str(tmp_path / "tables"), "run_dir": str(tmp_path / "run")}
    given["llm"] = {"model": str(compressed(tmp_path / "llm", activations=True))}
    encoder = {"model": str(tiny_bert(tmp_path / "encoder")), "max_tokens": 64}
    job, more = (adapt, {"stage": stage}) if stage else (train, {"encoder": encoder})
    with pytest.raises(InputError, match=r"llm.* is quantised \(compressed-tensors\), .*; train on the original"):
        job.run(job.Config(**given, **more))


def test_a_base_whose_library_is_missing_ends_the_run_and_starts_no_actor_again(tmp_path):
    folder = said(tiny_llama(tmp_path), {"quant_method": "gptq", "bits": 4})
    stage = FitAdapters(LLMConfig(model=str(folder)), LoraConfig(), StackConfig(), "llm", "fit", CpuShare(1, 1))
    with pytest.raises(InputError, match=f"llm {folder}: .*GPTQ.* requires"):
        list(stage(EXAMPLES.empty_table()))


class EndAt:
    """Orders that end a training at a step; 0: at none."""

    def __init__(self, step):
        self.step, self.taken = step, 0

    def saved(self):
        """As `Orders` has it."""

    def __call__(self):
        self.taken += 1
        return Order.END if self.taken == self.step else Order.GO_ON


def test_the_loss_of_an_epoch_is_that_of_all_its_steps_wherever_the_run_was_interrupted(tmp_path, monkeypatch):
    """Two epochs of four steps: unbroken, ended behind the sixth step and continued, and started again at its end."""
    reports, numbers = [], torch.arange(1.0, 9.0)
    monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint=None: reports.append(metrics))
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)

    def start(name, end=0, left=()):
        weight = torch.nn.Parameter(torch.ones(()))
        config, two = LoraConfig(batch_size=2, epochs=2, learning_rate=0.1), np.full(8, 2)
        loop = Loop(
            [{"params": [weight]}], config, two, two, lambda part, _: (weight * numbers[part]).sum(), Mesh(0, 1)
        )

        def read(folder):
            state = torch.load(f"{folder}/weight")
            return lambda: weight.data.copy_(state)

        def write(folder, is_best):
            torch.save(weight.data, f"{folder}/weight")

        (tmp_path / name).mkdir()
        checkpoints = Checkpoints("adapt", str(tmp_path / name), loop, read, write)
        checkpoints.load(list(left))
        run_worker(checkpoints, rank=0, orders=EndAt(end), more=lambda found: found | {"loss": found["train_loss"]})
        return checkpoints

    whole = start("whole")
    losses = [loss for _, loss in whole.losses]
    assert len(losses) == 8
    first = start("first", end=6)
    assert reports[-1]["loss"] == pytest.approx((losses[4] + losses[5]) / 2)
    second = start("second", left=[first.folder])
    mean = (losses[4] + losses[5] + losses[6] + losses[7]) / 4
    assert reports[-1]["loss"] == pytest.approx(mean) and reports[-1]["step"] == 8
    start("again", left=[second.folder])
    assert reports[-1]["loss"] == pytest.approx(mean) and len(reports) == 2 + 2 + 1 + 1


def test_a_run_that_goes_on_keeps_the_best_epoch_of_before(tmp_path, monkeypatch):
    """Three epochs of four steps, of which the first is the best; the run ends behind the sixth step and goes on."""
    monkeypatch.setattr(ray.train, "report", lambda metrics, checkpoint=None: None)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    losses = iter([0.5, 0.9, 0.7])

    def start(name, end=0, left=()):
        weight, two, kept = torch.nn.Parameter(torch.ones(())), np.full(8, 2), []
        loop = Loop(
            [{"params": [weight]}], LoraConfig(batch_size=2, epochs=3), two, two, lambda part, _: weight, Mesh(0, 1)
        )
        loop.validate = lambda: {"val_loss": next(losses)}
        (tmp_path / name).mkdir()
        read, write = lambda folder: lambda: None, lambda folder, is_best: kept.append(is_best)
        checkpoints = Checkpoints("train", str(tmp_path / name), loop, read, write)
        checkpoints.load(list(left))
        run_worker(checkpoints, rank=0, orders=EndAt(end))
        return kept, checkpoints

    before, first = start("first", end=6)
    after, second = start("second", left=[first.folder])
    assert (before, after) == ([True, False], [False, False])
    assert [(entry["step"], entry["best_val_loss"]) for entry in second.history] == [(n, 0.5) for n in (4, 6, 8, 12)]


def test_a_soft_prompt_that_reads_queries_goes_on_with_the_encoder_that_it_began_with(
    tmp_path, ray_session, monkeypatch
):
    """The run ends behind its record, for want of processors."""
    monkeypatch.setattr(session, "_local", None)  # a cluster of somebody else, which no job replaces by a larger one
    made = small.make(tmp_path, train_users=12, test_users=2, train_requests=1, test_requests=1)
    made.ingest("train", buckets=2)

    def begin(name, request_value=True):
        shape = PlugShape(without_history=True, request_value=request_value)
        with pytest.raises(InputError) as refused:
            made.run(train, name, **made.common, llm=made.llm, shape=shape, workers=10_000, fit={"val_fraction": 0.4})
        return str(refused.value)

    def record(name):
        (path,) = (tmp_path / "runs" / name).glob("*.begun.json")
        return path, json.loads(path.read_text())

    for name, request_value in (("reads", True), ("before", True), ("blind", False)):
        assert "needs 10002 CPU" in begin(name, request_value)
    path, known = record("before")
    assert known["config"].pop("query_encoder_id") == record("reads")[1]["config"]["query_encoder_id"]
    path.write_text(json.dumps(known))  # as an earlier release wrote it
    tiny_bert(Path(made.encoder.model), dim=16, seed=1)
    assert "began with another query_encoder_id" in begin("reads")
    for name, request_value in (("before", True), ("blind", False)):
        assert "needs 10002 CPU" in begin(name, request_value)
    assert record("reads")[1]["config"]["encoder_id"] is None


def test_what_bounds_memory_is_no_part_of_a_training_that_goes_on():
    plain = {"tables": "t", "llm": {"model": "m"}}
    tight = plain | {
        "llm": {"model": "m", "parallel": {"tensor": 2, "shard": 2}},
        "fit": {"checkpointing": "on", "max_tokens_per_microbatch": 100},
    }
    known = {"encoder_id": None, "llm_id": "l"}
    one, two = (train.decisive(Config.model_validate(values), known) for values in (plain, tight))
    assert json.dumps(one) == json.dumps(two)
    patient = train.decisive(Config.model_validate(plain | {"fit": {"patience": 2}}), known)
    assert patient["fit"] == one["fit"] | {"patience": 2}


def test_the_answers_of_items_are_known_without_the_weights_of_an_llm_on_the_hub(tmp_path, monkeypatch):
    folder, asked = tiny_llama(tmp_path / "llm"), []

    def fetch(model, revision, weights):
        asked.append(weights)
        return folder

    monkeypatch.setattr("pplug.hub.fetch", fetch)
    task = TaskSpec(name="films", text="text", target="tag", labels=("crime", "nature"))
    for value in ("label_values", "answer_values"):
        shape = PlugShape(persona_tokens=2, **{value: True})
        config = train.Config(tables=str(tmp_path), llm=LLMConfig(model="who/what"), shape=shape)
        assert known_answers(config, task).field == "tag"
    assert asked == [False, False]
