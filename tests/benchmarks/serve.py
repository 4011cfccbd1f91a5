"""Serving adapters: 64 users' adapters evenly mixed in one run of `generate`, against the bare engine.

Ours is the job with the method `adapter`, timed as in generate.py: adapters come from the table, are checked and
loaded within the time. The bare engine is `vllm.LLM.generate` with the same settings on the same prompts and the same
adapters, which lie ready as PEFT folders; its requests take turns between the adapters. `without adapters` is the same
bare engine on the same prompts alone. An engine a user is what is left without many adapters in one engine: start, one
user's requests, end; its seconds are the whole process's, and ours beside it the whole job's, start and end too.
"""

import json
import time
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from infra.shards import shard_columns
from pipelines import tables
from pipelines.engines.adapters import Adapters
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.engines.vllm_args import lora_args
from pplug.adapter import AdapterShape, LoraConfig, base_shapes, to_bytes, write_folder
from pplug.bert import bf16_is_quicker
from pplug.llm import LLMConfig, llm_id
from tests.benchmarks import prepare
from tests.benchmarks.generate import INPUTS, Job, bare, begin
from tests.benchmarks.measure import Found, Given, Line, in_turn, seconds
from tests.prompt_stage import prompt_stage

USERS, REQUESTS = 64, 8
BUCKETS = 8


def store(given: Given, population: prepare.Population, llm: LLMConfig) -> dict[str, str]:
    """Adapters of random weights for everybody, in the table and as PEFT folders; user_id -> folder.

    They pass as made from each user's oldest item, which every request may see.
    """
    shape, kind, name = AdapterShape(), getattr(torch, LoraConfig().storage_dtype), llm_id(llm)
    widths = base_shapes(Path(llm.model), shape.targets)
    users = sorted(set(population.snapshot("requests").read(["user_id"])["user_id"].to_pylist()))
    folders, cells = {}, []
    for number, user in enumerate(users):
        noise = torch.Generator().manual_seed(number)
        weights = {
            module: tuple(0.02 * torch.randn(size, generator=noise).to(kind)
                          for size in ((shape.rank, width_in), (width_out, shape.rank)))
            for module, (width_in, width_out) in widths.items()
        }  # fmt: skip
        cells.append(to_bytes(weights, name))
        folders[user] = str(given.folder / "adapter-folders" / f"{number}")
        write_folder(Path(folders[user]), cells[-1], shape, llm.model)
    buckets, keys = shard_columns(pa.array(users), BUCKETS)
    table = tables.open_or_create(population.tables, "adapters", BUCKETS)
    known = {"bucket": buckets, "user_key": keys, "user_id": pa.array(users), "weights": pa.array(cells, pa.binary()),
             "adapter_id": pa.array([f"bench-{number}" for number in range(len(users))]),
             "rank": pa.array([shape.rank] * len(users)), "alpha": pa.array([shape.alpha] * len(users)),
             "targets": pa.array([list(shape.targets)] * len(users)),
             "last_item_position": pa.array([0] * len(users), pa.int64())}  # fmt: skip
    rows = pa.table({
        field.name: known.get(field.name, pa.nulls(len(users), field.type)) for field in table.spec.schema
    }).cast(table.spec.schema)  # fmt: skip
    before = table.snapshot()
    table.commit(
        table.write(rows, "bench"), run_id="bench", group=before.version, planned_on=before.version, complete=True,
        mode="replace" if before.files else "append", buckets=set(before.by_bucket()) if before.files else set(),
        metadata={"llm_id": name, "fit_id": "bench", "cut": "requests"},
    )  # fmt: skip
    return folders


def prompts_of(setting: dict[str, Any], population: prepare.Population) -> list[tuple[str, list[int]]]:
    """User and prompt of every request: everybody's first one, everybody's second one, and so on."""
    requests = population.snapshot("requests")
    build = prompt_stage(
        requests=requests, histories=population.snapshot("histories"), methods=("none",), llm=setting["llm"],
        task=population.entry, threads=2,
    )  # fmt: skip
    rows = [row for block in build(pa.table({"bucket": sorted(requests.by_bucket())})) for row in block.to_pylist()]
    rows.sort(key=lambda row: (row["user_id"], row["request_id"]))
    turns = [
        (turn, user, row["before"] + row["after"])
        for user, own in groupby(rows, lambda row: row["user_id"])
        for turn, row in enumerate(own)
    ]
    return [(user, ids) for _, user, ids in sorted(turns)]


def run(given: Given) -> Found:
    from infra import session

    begin(given)
    tokens = given.size(32, 4)
    population = prepare.ingested(given.folder, given.size(USERS, 4), given.size(REQUESTS, 2))
    llm = prepare.language_model(given.folder, "large", prepare.LARGE, population, INPUTS)
    setting = {"tables": population.tables, "llm": llm, "decoding": Decoding(max_tokens=tokens, constrain="none"),
               "engine": EngineConfig(max_model_len=512)}  # fmt: skip
    folders, asked = store(given, population, llm), prompts_of(setting, population)
    users, prompts = sorted(folders), [ids for _, ids in asked]
    shape = AdapterShape()
    snapshot = population.snapshot("adapters")
    args = lora_args(setting["engine"], Adapters(snapshot, BUCKETS, llm_id(llm), shape.rank, shape.targets))

    def engine(of_user: str | None = None, with_adapters: bool = True) -> float:
        chosen = [(user, ids) for user, ids in asked if of_user in (None, user)]
        (given.folder / "prompts.json").write_text(json.dumps([ids for _, ids in chosen]))
        of = [users.index(user) for user, _ in chosen]
        adapters = {"args": args, "folders": [folders[user] for user in users], "of": of}
        return bare(given.folder, setting, given.threads, adapters if with_adapters else None)

    job = Job(given, setting, "adapter")
    whole: list[float] = []

    def ours() -> float:
        start = time.perf_counter()
        rate = job()
        whole.append((time.perf_counter() - start) / len(users))
        return rate

    mixed, raw = in_turn({"the job": ours, "bare engine": engine}, given.rounds).values()
    plain, alone = in_turn({  # once: minutes a round, and no close call
        "bare engine without adapters": lambda: engine(with_adapters=False),
        "an engine a user, seconds": lambda: seconds(lambda: engine(users[0])),
    }, 1).values()  # fmt: skip
    session.stop()
    unit, what = "output tokens/s", f"{len(users)} adapters mixed"
    lines = [
        Line(what, "vllm.LLM.generate, the same adapters", unit, mixed, raw, least=0.95),
        Line("vllm.LLM.generate with adapters", "without", unit, raw[-1:], plain,
             note="the engine's own kernels: on a CPU it has no quick ones for adapters"),
        Line(f"{what}, start and end too", "an engine a user", "seconds a user", whole[-1:], alone, most=1 / 5),
    ]  # fmt: skip
    dtype = "bfloat16" if bf16_is_quicker() or torch.cuda.is_available() else "float32"
    config = {"data": population.data, "requests": len(prompts), "tokens a reply": tokens, "rank": shape.rank,
              "tokens a prompt": round(sum(map(len, prompts)) / len(prompts)), "targets": "+".join(shape.targets),
              "LLM": f"Llama of random weights, {prepare.LARGE}", "dtype": dtype, "threads": given.threads,
              "at once": setting["engine"].max_loras}  # fmt: skip
    return Found(lines, config)
