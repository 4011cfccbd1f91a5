"""Every stage with a model works on the device that Ray has assigned to it, whatever the machine has."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import torch

from infra import device
from infra.errors import InputError
from pipelines.adapt.users import EXAMPLES, FitAdapters
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.engines.transformers import TransformersEngine
from pipelines.generate.parts.base import Worker
from pipelines.generate.parts.retrieval import Retrieval
from pipelines.generate.personas import PersonaMaker
from pipelines.refresh.embed import EmbedTexts
from pipelines.refresh.increment import Since
from pipelines.refresh.persona import BuildPersonas
from pipelines.run import CpuShare
from pipelines.train.config import Config as TrainConfig
from pipelines.train.job import make_models
from pipelines.training import worker_device
from pplug.adapter import LoraConfig, StackConfig
from pplug.encoder import encoder_id
from pplug.llm import llm_id, tokenizer_of
from pplug.plug import plug_id
from pplug.retrieval import RetrievalConfig
from pplug.splice import PromptBuilder
from pplug.tasks import load
from tests.pipelines import small

CPU = CpuShare(1, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = small.make(tmp_path_factory.mktemp("world"), train_users=2, test_users=2, test_requests=1)
    made.untrained_plug()
    return made


def embed_texts(world):
    return EmbedTexts(world.encoder, "{text}", encoder_id(world.encoder, "{text}"), CPU).encoder.device


def build_personas(world):
    none: Any = None
    plug = str(world.root / "plug")
    return BuildPersonas(none, none, none, None, Since(), plug, {"plug_id": plug_id(plug)}, 9, "r", CPU).device


def persona_maker(world):
    return PersonaMaker(str(world.root / "plug"), 1, queries=False).plug.instruction().device


def dense(world):
    task = load(str(world.files["task"]))
    identity = encoder_id(world.encoder, task.item)
    part = Retrieval(RetrievalConfig(encoder=world.encoder), frozenset({"dense"}), identity)
    builder = PromptBuilder(tokenizer_of(world.llm), world.llm.layout, False)
    part.load(Worker(world.llm, task, builder, CPU))
    return part.encoder.device


def fit_adapters(world):
    stage = FitAdapters(world.llm, LoraConfig(), StackConfig(), llm_id(world.llm), "f", CPU)
    list(stage(pa.Table.from_pylist([], schema=EXAMPLES)))  # a base that cannot be used is refused here
    return stage.trainer.device


def second_engine(world):
    engine = TransformersEngine(world.llm, EngineConfig(kind="transformers"), Decoding(), 1)
    return engine.llm.embedding.weight.device


def trainer(world):
    config = TrainConfig(**world.common, llm=world.llm)
    given = {"encoder_id": "e", "llm_id": "l"}
    plug, llm, _ = make_models(config, given, device=worker_device())
    return llm.embedding.weight.device


STAGES = (embed_texts, build_personas, persona_maker, dense, fit_adapters, second_engine, trainer)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_a_gpu_takes_none_where_the_machine_has_one(stage: Callable, world, monkeypatch):
    monkeypatch.setattr(device, "_gpus_of_worker", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert stage(world).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU here")
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_with_a_gpu_that_torch_cannot_use_is_refused(stage: Callable, world, monkeypatch):
    monkeypatch.setattr(device, "_gpus_of_worker", lambda: ["0"])
    with pytest.raises(InputError, match="was given 1 GPU, but torch .* can use none"):
        stage(world)
