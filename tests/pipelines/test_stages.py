"""Actors that die, refuse or fail at their start: the job ends with the cause, or goes on, as each deserves."""

import os
import warnings
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import torch
from ray.data import DataContext

from infra import session
from infra.errors import InputError
from pipelines import failures, stages, waves
from pipelines.adapt import base
from pipelines.adapt.base import BaseShard, fit_base
from pipelines.generate.parts.base import Worker
from pipelines.generate.parts.plug import Plug
from pipelines.generate.parts.retrieval import Retrieval
from pipelines.refresh.embed import EmbedTexts
from pipelines.refresh.increment import Since
from pipelines.refresh.persona import BuildPersonas
from pipelines.run import CpuShare
from pipelines.train.config import Config as TrainConfig
from pipelines.train.job import fit_worker
from pplug.adapter import LoraConfig
from pplug.encoder import EncoderConfig, encoder_id
from pplug.llm import LLMConfig, llm_id, tokenizer_of
from pplug.plug import PersonaPlug, PlugConfig, plug_id
from pplug.retrieval import RetrievalConfig
from pplug.splice import PromptBuilder
from pplug.tasks import TaskSpec
from tests.pplug.models import tiny_bert, tiny_llama

CPU, RULE = CpuShare(1, 1), "{text}"


class Noted:
    """Stage: passes its batches on; each start is a line in a file."""

    def __init__(self, path, at_start="", at_batch=""):
        self.path, self.at_batch = path, at_batch
        with open(path, "a") as file:
            file.write("start\n")
        self.starts = len(open(path).readlines())
        if at_start == "refuse":
            raise InputError("the config wants what this engine does not have")
        if at_start == "fail once" and self.starts == 1:
            raise RuntimeError("the memory is not free yet")

    def __call__(self, batch: pa.Table) -> pa.Table:
        if self.at_batch == "die" or (self.at_batch == "die once" and self.starts == 1):
            os._exit(1)
        return batch


def through(tmp_path, **how):
    """Buckets that came out of one actor, the number of its starts, and the error that ended the job."""
    path, options = tmp_path / "starts", {name: how.pop(name) for name in ("restarts",) if name in how}
    step = waves.actors(Noted, str(path), how.get("at_start", ""), how.get("at_batch", ""), size=1, **options)
    rows, error = [], None
    try:
        rows = [row["bucket"] for row in waves.stream([1, 2], [step]).iter_rows()]
    except Exception as ended:
        error = ended
    return sorted(rows), len(path.read_text().split()), error


@pytest.fixture(autouse=True)
def data_context(ray_session):
    assert DataContext.get_current().max_consecutive_actor_init_deaths == session.INIT_DEATHS > 0


def test_an_actor_that_dies_again_and_again_ends_the_job_with_the_number(tmp_path):
    rows, starts, error = through(tmp_path, at_batch="die", restarts=1)
    assert (rows, starts) == ([], 2)
    said = failures.own_words(error)
    assert "Noted died 2 times on nodes that are alive, and may start again 1 times" in said
    assert "(an engine: max_engine_restarts)" in said


def test_every_actor_may_start_again_a_limited_number_of_times(tmp_path):
    """Without a limit a row that kills its actor would be tried for as long as the cluster lives."""
    step = waves.actors(Noted, str(tmp_path / "starts"), size=1)
    assert step.restarts == 10


def test_the_stages_of_a_session_share_one_counter(ray_session):
    name = stages.counter()
    assert stages.counter() == name and ray.get(ray.get_actor(name).started.remote("actor", "node")) == 0


def test_an_actor_that_dies_once_goes_on(tmp_path):
    assert through(tmp_path, at_batch="die once", restarts=1) == ([1, 2], 2, None)


def test_a_constructor_that_refuses_is_asked_once_and_its_words_are_the_jobs(tmp_path):
    rows, starts, error = through(tmp_path, at_start="refuse")
    assert (rows, starts) == ([], 1)
    assert str(failures.input_error(error)) == "the config wants what this engine does not have"


def test_a_constructor_that_fails_for_a_moment_is_tried_in_another_process(tmp_path):
    assert through(tmp_path, at_start="fail once") == ([1, 2], 2, None)


def test_ray_warns_of_nothing_that_it_will_drop(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*deprecated.*", module="ray.*|pipelines.*")
        step = waves.actors(
            Noted, str(tmp_path / "starts"), size=1, restarts=3, pool={"max_concurrent_calls_per_actor": 2}
        )
        waves.stream([1], [step])


def test_deaths_with_a_lost_node_do_not_count(ray_session, monkeypatch):
    monkeypatch.setattr(stages.ray, "nodes", lambda: [{"NodeID": "a", "Alive": True}, {"NodeID": "b", "Alive": False}])
    deaths = stages.Deaths()
    assert [deaths.started("actor", node) for node in ("b", "a", "a")] == [0, 0, 1]
    assert deaths.started("another", "a") == 0


def by_task(batch: pa.Table):
    for bucket in batch["bucket"].to_pylist():
        yield pa.table({"bucket": [bucket], "task": [ray.get_runtime_context().get_task_id()]})


@pytest.mark.parametrize(("count", "most"), [(1, 1), (15, 1), (40, 5), (400, 8)])
def test_a_task_takes_several_buckets_where_there_are_many(count, most):
    cpus = int(ray.cluster_resources()["CPU"])
    rows = list(waves.each_bucket(list(range(count * cpus)), by_task))
    assert sorted(row["bucket"] for row in rows) == list(range(count * cpus))
    assert max(Counter(row["task"] for row in rows).values()) == most


def embedding(encoder, llm, known):
    EmbedTexts(encoder, RULE, known["encoder"], CPU)


def dense(encoder, llm, known):
    part = Retrieval(RetrievalConfig(encoder=encoder), frozenset({"dense"}), known["encoder"])
    task = TaskSpec(name="t", item=RULE, item_without_label=RULE, metric="text")
    part.load(Worker(llm, task, PromptBuilder(tokenizer_of(llm), llm.layout, False), CPU))


def plug_training(encoder, llm, known):
    config = TrainConfig(tables="t", encoder=encoder, llm=llm)
    identities = {"encoder_id": known["encoder"], "llm_id": known["llm"]}
    given = {"config": config.model_dump(), "identities": identities, "made_for": (RULE, known["encoder"])}
    fit_worker(given | {"width": None, "answers": (None, []), "cpu": CPU, "started_in": os.getcwd()})


def base_training(encoder, llm, known):
    given = {"llm": llm.model_dump(), "llm_id": known["llm"], "lora": LoraConfig().model_dump()}
    fit_base(given | {"cpu": CPU, "started_in": os.getcwd()})


def begun_base(tmp_path, monkeypatch, **lora):
    """The checkpoints of a base training at its first step, with the loop and the model that it would train."""
    llm, begun = LLMConfig(model=str(tiny_llama(tmp_path / "llm"))), []
    pq.write_table(pa.table({"prompt": [[3, 4]], "answer": [[5, 2]]}), tmp_path / BaseShard(0, 1).file)
    monkeypatch.setattr(ray.train, "get_context", OneWorker)
    monkeypatch.setattr(base, "train", lambda checkpoints, **given: begun.append(checkpoints))
    for name in ("tracker", "Orders"):
        monkeypatch.setattr(base, name, lambda *given: None)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    given = dict.fromkeys(("ending", "checkpoint_minutes", "run_dir")) | {
        "left": [],
        "track": (),
        "checkpointing": "auto",
    }
    given |= {"llm": llm.model_dump(), "llm_id": llm_id(llm), "examples": str(tmp_path)}
    given["lora"] = LoraConfig(**lora).model_dump()
    base.fit_base(given | {"shards": [BaseShard(0, 1)], "cpu": CPU, "started_in": os.getcwd()})
    (checkpoints,) = begun
    return checkpoints


@pytest.mark.parametrize(("asked", "taken"), [(16_384, 1024), (300, 300)])
def test_a_base_training_on_a_cpu_takes_short_passes(asked, taken, tmp_path, monkeypatch):
    """Longer ones are slower there, and take the memory of a machine."""
    assert begun_base(tmp_path, monkeypatch, max_tokens_per_microbatch=asked).loop.budget == taken


class OneWorker:
    """Stands for Ray Train's context."""

    def get_world_rank(self):
        return 0

    def get_world_size(self):
        return 1


@pytest.mark.parametrize(
    ("stage", "kind"),
    [(embedding, "encoder"), (dense, "encoder"), (plug_training, "encoder"), (base_training, "llm")],
)
def test_a_worker_that_has_another_model_under_the_same_name_refuses(stage, kind, tmp_path, monkeypatch):
    """Two machines with models of one shape, so that names and sizes of the files are alike."""
    monkeypatch.setattr(ray.train, "get_context", OneWorker)
    here, there = tmp_path / "here", tmp_path / "there"
    folders = [tiny_bert(place / "b", seed=n) for n, place in enumerate((here, there))]
    encoders = [EncoderConfig(model=str(folder), max_tokens=64) for folder in folders]
    llms = [LLMConfig(model=str(tiny_llama(place / "l", seed=n))) for n, place in enumerate((here, there))]
    sizes = [sorted((p.name, p.stat().st_size) for p in place.rglob("*") if p.is_file()) for place in (here, there)]
    assert sizes[0] == sizes[1]
    own, known = ({"encoder": encoder_id(encoders[n], RULE), "llm": llm_id(llms[n])} for n in (0, 1))
    known = own | {kind: known[kind]}
    name = {"encoder": "encoder", "llm": "LLM"}[kind]
    said = f"is {name} {own[kind]} on this machine, and {known[kind]} where the job was started"
    with pytest.raises((InputError, ValueError), match=said):
        stage(encoders[0], llms[0], known)


def refreshing(folder, identity):
    BuildPersonas(None, None, None, None, Since(), folder, {"plug_id": identity}, 9, "r", CPU)


def generating(folder, identity):
    task = TaskSpec(name="t", item=RULE, item_without_label=RULE, metric="text")
    Plug(folder, identity, frozenset({"plug:mean"}), None)._of(PlugConfig(encoder_dim=8, llm_dim=8)).load(
        Worker(None, task, None, CPU)
    )


@pytest.mark.parametrize("stage", [refreshing, generating])
def test_a_plug_that_takes_anothers_place_while_a_worker_loads_it_is_refused(stage, tmp_path, monkeypatch):
    folder = str(tmp_path / "plug")
    ids = []
    for seed in (1, 0):
        torch.manual_seed(seed)
        PersonaPlug(PlugConfig(encoder_dim=8, llm_dim=8)).save_pretrained(folder)
        ids.append(plug_id(folder))
    stage(folder, ids[1])
    load = PersonaPlug.from_pretrained

    def late(place, queries=True):
        torch.manual_seed(1)
        PersonaPlug(PlugConfig(encoder_dim=8, llm_dim=8)).save_pretrained(folder)
        return load(place, queries)

    monkeypatch.setattr(PersonaPlug, "from_pretrained", late)
    with pytest.raises(InputError, match=f"{ids[0]} on this machine, and {ids[1]} where the job was started"):
        stage(folder, ids[1])
