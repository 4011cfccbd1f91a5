"""Engines that start in a way of their own, or not at all: two devices per model, a model that vLLM cannot run."""

import asyncio
import errno
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import yaml
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM
from vllm.config import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from infra.errors import InputError
from infra.shards import user_key
from pipelines.__main__ import main
from pipelines.engines import vllm
from pipelines.engines.adapters import AdapterName, Adapters, AdapterShelf
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, NextTokens, PromptSizes, ResolvedDecoding
from pipelines.engines.lora_cache import LoadedAdapters
from pipelines.engines.vllm import VLLMEngine
from pipelines.engines.vllm_args import SPARE, cores_of, engine_args, longest_of, model_args, within_limit
from pipelines.generate import job as generate
from pplug.adapter import base_shapes, to_bytes, write_folder
from pplug.identity import weight_files
from pplug.llm import LLMConfig, llm_id, load_tokenizer
from pplug.splice import PromptBuilder, PromptLayout
from tests.pipelines import small
from tests.pipelines.test_adapters import snapshot_of
from tests.pplug.models import tiny_llama, word_tokenizer


def test_an_engine_is_made_ready_for_the_longest_prompt_of_its_job(tmp_path):
    folder = tiny_llama(tmp_path)  # 128 positions
    builder = PromptBuilder(load_tokenizer(folder), PromptLayout(suffix=" answer :", max_input_tokens=50), False)
    longest = longest_of(builder, PromptSizes(rows=3, input_tokens=50), 8)
    assert longest == 1 + 50 + 3 + 2 + 8 + SPARE  # begin, input, rows, suffix, reply
    words = " ".join(["cat"] * 60)
    assert len(builder.prompts([words])[0]) + 3 + 8 + SPARE == longest
    assert within_limit(folder, longest) == longest and within_limit(folder, 128) is None
    assert longest_of(builder, PromptSizes(rows=None, input_tokens=50), 8) is None
    made = engine_args(str(folder), EngineConfig(), 1, longest=longest)
    assert made["max_model_len"] == longest and made["enable_prompt_embeds"] and not made["trust_remote_code"]
    given = EngineConfig(max_model_len=99, args={"seed": 3, "max_num_seqs": 2}, quantization="fp8")
    made = engine_args(str(folder), given, 1, embeddings=False, longest=longest)
    assert (made["max_model_len"], made["seed"], made["max_num_seqs"], made["quantization"]) == (99, 3, 2, "fp8")
    assert not made["enable_prompt_embeds"]


def test_of_a_whole_mistral_folder_the_engine_reads_what_the_identity_covers(tmp_path):
    folder = tiny_llama(tmp_path)
    plain = engine_args(str(folder), EngineConfig(), 1)
    assert plain["load_format"] == "auto" and not {"config_format", "tokenizer_mode"} & plain.keys()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "params.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"")

    def read_by_vllm(load_format, model=folder):
        loader = DefaultModelLoader(LoadConfig(load_format=load_format))
        return [Path(file).name for file in loader._prepare_weights(str(model), None, None, True, None)[1]]

    made = engine_args(str(folder), EngineConfig(), 1)
    assert (made["config_format"], made["tokenizer_mode"]) == ("hf", "hf")
    assert read_by_vllm("auto") == ["consolidated.safetensors"], "it takes transformers' files by itself now"
    assert read_by_vllm(made["load_format"]) == [file.name for file in weight_files(folder)]
    given = EngineConfig(load_format="dummy", args={"tokenizer_mode": "mistral"})
    made = engine_args(str(folder), given, 1)
    assert (made["load_format"], made["tokenizer_mode"]) == ("dummy", "mistral")
    place = tmp_path / "place"
    assert model_args(folder, EngineConfig(), place) == {}, "the index says what to read"
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "model.safetensors")
    assert model_args(folder, EngineConfig(load_format="mistral"), place) == {}
    made = engine_args(str(folder), EngineConfig(), 1) | model_args(folder, EngineConfig(), place)
    assert read_by_vllm(made["load_format"], made["model"]) == ["model.safetensors"]
    assert (place / "config.json").read_text() == (folder / "config.json").read_text()


def test_an_engine_that_ends_takes_its_adapters_out_of_memory(tmp_path, monkeypatch):
    """At once: while its process lives, no later shelf would sweep them away."""
    monkeypatch.setattr("pipelines.engines.adapters.MEMORY", str(tmp_path))
    shelf = AdapterShelf(
        Adapters(snapshot_of(tmp_path / "t", {}), 4, "llm-x", 8, ("q_proj",)), tiny_llama(tmp_path / "llm")
    )
    shelf.put_nothing()
    assert len(list(tmp_path.glob("pplug-adapters-*/none/*"))) >= 2  # weights and their config
    engine = object.__new__(VLLMEngine)  # one that vLLM has left already
    engine._engine, engine._adapters = None, LoadedAdapters(None, shelf, room=1)
    engine._words = TemporaryDirectory(dir=tmp_path)
    engine.shutdown()
    assert not list(tmp_path.glob("pplug-adapters-*"))


class ReadsFolders:
    """Stands for vLLM's engine, which reads a folder when it is added, and not before all `at_once` have been asked."""

    def __init__(self, at_once=1):
        self.at_once, self.asked, self.places, self.waiting = at_once, 0, [], asyncio.Event()

    async def add_lora(self, request):
        self.asked += 1
        if self.asked == self.at_once:
            self.waiting.set()
        await self.waiting.wait()
        assert (Path(request.lora_path) / "adapter_model.safetensors").stat().st_size > 1000
        self.places.append(Path(request.lora_path).parents[1].name)

    async def remove_lora(self, number):
        raise AssertionError("there is room for all")


@pytest.mark.parametrize("at_once", [1, 100])
def test_a_memory_with_room_for_two_adapters_serves_a_hundred_users(tmp_path, monkeypatch, at_once):
    """One after the other they need the memory alone, as each leaves it when the engine has it; together the disk."""
    memory, disk, base = tmp_path / "memory", tmp_path / "disk", tiny_llama(tmp_path / "llm")
    for folder in (memory, disk):
        folder.mkdir()
    monkeypatch.setattr("pipelines.engines.adapters.MEMORY", str(memory))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    shapes = base_shapes(base, ("q_proj", "v_proj"))
    data = to_bytes({name: (torch.zeros(8, a), torch.zeros(b, 8)) for name, (a, b) in shapes.items()}, "llm-x")
    rows = {f"user-{i}": {"adapter_id": f"f-{i}", "weights": data} for i in range(100)}

    def on_a_small_disk(folder, data, shape, base):
        folder.mkdir()
        if memory in folder.parents and len(list(folder.parent.iterdir())) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_folder(folder, data, shape, base)

    monkeypatch.setattr("pipelines.engines.adapters.write_folder", on_a_small_disk)
    shelf = AdapterShelf(Adapters(snapshot_of(tmp_path / "t", rows), 4, "llm-x", 8, ("q_proj", "v_proj")), base)

    async def serve():
        engine, requests = ReadsFolders(at_once), []
        loaded = LoadedAdapters(engine, shelf, room=512)
        names = [AdapterName(user_key(user), row["adapter_id"]) for user, row in rows.items()]
        for first in range(0, 100, at_once):
            mine = names[first : first + at_once]
            requests += await asyncio.gather(*map(loaded.hold, mine))
            for name in mine:
                await loaded.let_go(name)
            assert not [path for place in (memory, disk) for path in place.glob("pplug-adapters-*/*")]
        return requests, engine.places

    requests, places = asyncio.run(asyncio.wait_for(serve(), 120))
    assert len({request.lora_int_id for request in requests}) == 100
    assert set(places) == ({"memory"} if at_once == 1 else {"memory", "disk"})
    shelf.close()
    assert not [*memory.iterdir(), *disk.iterdir()]


@pytest.mark.parametrize("times", [1, 9])
def test_an_engine_waits_for_memory_that_another_process_sets_free(tmp_path, monkeypatch, times):
    """The words are those of vLLM 0.32, which no CPU can be brought to say."""
    monkeypatch.setattr(vllm, "WAITS", (0.01, 0.02))
    tried = []

    class OnFullGPU(VLLMEngine):
        def _begin(self, *given):
            tried.append(given)
            if len(tried) <= times:
                raise ValueError("Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired")

    made = partial(OnFullGPU, LLMConfig(model=str(tiny_llama(tmp_path))), EngineConfig(), Decoding(max_tokens=2), 1)
    if times == 1:
        made().shutdown()
        assert len(tried) == 2
    else:
        with pytest.raises(InputError, match="Free memory on device .* Lower engine.gpu_memory_utilization"):
            made()
        assert len(tried) == 3


def test_processes_of_one_engine_share_the_cores():
    assert cores_of(2, [0, 1, 2, 3]) == "0,1|2,3"
    assert cores_of(2, [4, 7]) == "4|7"
    assert cores_of(2, [5]) == "5|5"


def dying(folder: Path) -> Path:
    """A random model with latent attention of a width that vLLM's CPU attention does not take."""
    torch.manual_seed(0)
    size = len(word_tokenizer(folder))
    config = DeepseekV2Config(
        vocab_size=size, hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=32, q_lora_rank=None, qk_rope_head_dim=32,
        qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1,
        topk_group=1, first_k_dense_replace=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    DeepseekV2ForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_model_that_vllm_cannot_run_is_refused_in_the_engines_last_words(tmp_path):
    llm = LLMConfig(model=str(dying(tmp_path)))
    with pytest.raises(InputError, match=r"does not start .*[Hh]ead.*64"):
        VLLMEngine(llm, EngineConfig(dtype="float32"), Decoding(), 1, sizes=PromptSizes(rows=0, input_tokens=20))


@pytest.mark.slow
def test_an_engine_that_does_not_start_ends_the_job_with_2_and_its_own_sentence(tmp_path, ray_session, capsys):
    world = small.make(tmp_path, train_users=2, test_users=2, test_requests=1)
    world.ingest("test")
    words = world.words(generate, "odd", tables=world.tables, llm=world.llm, methods=("none",),
                        engine={"args": {"no_such_argument": 1}})  # fmt: skip
    assert main(words[2:]) == 2
    said = capsys.readouterr().err
    assert "vLLM does not start" in said and "no_such_argument" in said and "memory" not in said


def test_an_llm_that_changes_between_plan_and_load_ends_the_job_with_2_and_its_own_sentence(
    tmp_path, ray_session, capsys, monkeypatch
):
    world = small.make(tmp_path, train_users=2, test_users=2, test_requests=1)
    world.ingest("test")
    asked = {"tables": world.tables, "llm": world.llm, "methods": ("none",), "engine": {"kind": "transformers"}}
    planned, step = llm_id(world.llm), generate.engine_step

    def changed(*given):  # the plan is made, the engine is not
        tiny_llama(tmp_path / "llm", seed=1)
        return step(*given)

    monkeypatch.setattr(generate, "engine_step", changed)
    assert main(world.words(generate, "changed", **asked)[2:]) == 2
    said = capsys.readouterr().err
    assert f"is LLM {llm_id(world.llm)} on this machine, and {planned} where the job was started" in said
    assert not small.is_complete(world.tables, "generations")


def test_a_job_limits_replies_to_the_labels_of_its_task_and_says_how_sure_they_are(tmp_path, ray_session):
    world = small.make(tmp_path, train_users=2, test_users=4, test_requests=2)
    world.ingest("test")
    task = yaml.safe_load(Path(world.files["task"]).read_text()) | {"labels": ["crime", "music", "big nature"]}
    (tmp_path / "labels.yaml").write_text(yaml.safe_dump(task))
    asked = {"tables": world.tables, "llm": world.llm, "methods": ("none",), "engine": {"kind": "transformers"}}
    decoding = {"max_tokens": 4, "label_logprobs": True, "logprobs": True}
    entry = str(tmp_path / "labels.yaml")
    assert world.run(generate, "labels", task=entry, decoding=decoding, **asked) == 0
    assert world.run(generate, "free", decoding={"max_tokens": 4}, **asked) == 0
    reports = [world.report(run_id) for run_id in ("labels", "free")]
    assert [report["constrain"] for report in reports] == ["labels", "none"]
    assert "cannot write the label" in reports[1]["warnings"][0]  # of the world's own themes
    assert [report["engines"] for report in reports] == [{"transformers, float32": 8}] * 2
    rows = small.rows(world.tables, "generations")
    labelled = [row for row in rows if row["run_id"] == "labels"]
    assert len(labelled) == 8 and len(rows) == 16
    for row in labelled:
        chances = {label: math.exp(value) for label, value in row["label_logprobs"]}
        assert row["text"] in chances and list(chances) == task["labels"]
        assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
        assert row["text"] == max(chances, key=chances.get)  # no two labels begin alike
        assert len(row["token_logprobs"]) == row["output_tokens"]
    assert all(row["label_logprobs"] is row["token_logprobs"] is None for row in rows if row["run_id"] == "free")
    assert len({row["decoding_id"] for row in rows}) == 2


@pytest.mark.slow
def test_answers_by_adapters_stay_within_labels(tmp_path):
    base, torch_rng = tiny_llama(tmp_path / "llm"), torch.Generator().manual_seed(0)
    targets = ("q_proj", "v_proj")
    weights = {
        module: (torch.randn(8, inside, generator=torch_rng), torch.randn(outside, 8, generator=torch_rng))
        for module, (inside, outside) in base_shapes(base, targets).items()
    }
    snapshot = snapshot_of(tmp_path / "t", {"user-0": {"adapter_id": "f-0", "weights": to_bytes(weights, "llm-x")}})
    labels = ("cat", "cat sat", "music", "red")
    decoding = ResolvedDecoding(constrain="labels", labels=labels, max_tokens=4, label_logprobs=True)
    config, adapters = (
        EngineConfig(dtype="float32", max_loras=2, max_cpu_loras=2),
        Adapters(snapshot, 4, "llm-x", 8, targets),
    )
    engine = VLLMEngine(LLMConfig(model=str(base)), config, decoding, 1, adapters, PromptSizes(3, 20))
    rng, asked = np.random.default_rng(0), []
    for i, text in enumerate(["the cat sat", "dog", "big red tree on mat", "film of music"] * 2):
        rows = rng.normal(size=(i % 4 % 3, engine.dim)).astype(np.float32)
        name = AdapterName(user_key("user-0"), "f-0") if i >= 4 else None
        asked.append(EnginePrompt(str(i), engine.tokenizer(text)["input_ids"], rows, [5], name))
    try:
        found = engine.replies(asked)
        first = [next(iter(ids)) for ids in engine.label_ids]
        chances = engine.next_logprobs([NextTokens(prompt, (), tuple(first)) for prompt in asked])
    finally:
        engine.shutdown()
    assert all(reply.error is None for reply in found) and {reply.text.strip() for reply in found} <= set(labels)
    for plain, adapted in zip(chances[:1], chances[4:5], strict=True):
        assert plain != pytest.approx(adapted, abs=0.05)  # the same prompt, by an adapter


HD32 = Path(__file__).resolve().parents[3] / "shared" / "models" / "stories260k_hd32"
_TWO = """
import json, sys
import numpy as np
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt
from pipelines.engines.vllm import VLLMEngine
from pplug.llm import LLMConfig

if __name__ == "__main__":
    model, devices, chunk = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = EngineConfig(dtype="float32", tensor_parallel_size=devices, max_num_batched_tokens=chunk, max_num_seqs=8)
    engine = VLLMEngine(LLMConfig(model=model), config, Decoding(max_tokens=12), threads=1)
    text = "Once upon a time there was a little girl who had a red ball and a big dog. "
    ids = engine.tokenizer(text * 3)["input_ids"]
    rng = np.random.default_rng(0)
    prompts = []
    for i, n in enumerate((0, 1, 4, 0, 2)):
        rows = 0.3 * rng.normal(size=(n, engine.dim)).astype(np.float32)
        prompts.append(EnginePrompt(str(i), ids[: 40 + 3 * i], rows, ids[40 : 44 + i]))
    twice = [[reply.text for reply in engine.replies(prompts)] for _ in range(2)]
    assert twice[0] == twice[1]
    print("REPLIES " + json.dumps(twice[0]), flush=True)
    engine.shutdown()
"""


@pytest.mark.slow
def test_two_devices_per_model_give_the_replies_of_one(tmp_path):
    """Rows, prompts read in chunks of 32 tokens, and hits in the prefix cache."""
    if not HD32.is_dir():
        pytest.skip(f"no model at {HD32}")
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    found = []
    for devices in ("1", "2"):
        cores = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if devices == "2" else {}
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | cores | {"PYTHONPATH": root}
        env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
        done = subprocess.run(
            [sys.executable, str(script), str(HD32), devices, "32"],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        lines = [line for line in done.stdout.splitlines() if line.startswith("REPLIES ")]
        assert lines, done.stderr[-3000:]
        found.append(json.loads(lines[-1].removeprefix("REPLIES ")))
    assert found[0] == found[1] and len(set(found[0])) > 1
