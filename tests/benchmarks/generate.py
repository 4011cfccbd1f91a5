"""Bulk generation with a plug against the bare engine and against transformers, output tokens a second.

Ours is the job as it is: prompts built from the tables' vectors by the plug, beside the engine, and replies written and
committed. Its clock runs from the moment the engine is ready (no prompt is built before) to the last reply. The bare
engine is `vllm.LLM.generate` with the same settings, given the same prompts as token ids, with ordinary tokens in the
places of the persona rows, all in one list. Every round starts both engines anew: no prefix cache is warm.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from infra import session
from infra.shards import keys_by_bucket
from pipelines import tables
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.engines.vllm_args import engine_args
from pipelines.generate import job as generate_job
from pipelines.generate import replies as reply
from pipelines.generate.pending import PendingReplies
from pipelines.generate.prompts import BuildPrompts
from pplug.bert import bf16_is_quicker
from pplug.identity import model_folder
from pplug.llm import FrozenLLM, LLMConfig
from pplug.plug import PersonaPlug
from pplug.retrieval import RetrievalConfig
from tests.benchmarks import prepare
from tests.benchmarks.encoder import flops
from tests.benchmarks.measure import Found, Given, Line, best_rate, in_turn
from tests.prompt_stage import prompt_stage

CLOCK = "PPLUG_BENCH_CLOCK"
INPUTS = 256
RETRIEVAL_INPUTS = 512
"""Room for four whole items: the paper's 256 would cut most of them."""


class TimedReply(reply.Reply):
    """Reply that says when the engine is ready and when each batch is answered."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        _note("ready")

    def __call__(self, batch: pa.Table) -> pa.Table:
        out = super().__call__(batch)
        _note("answered")
        return out


class GatedPrompts(BuildPrompts):
    """BuildPrompts that begins when the engine is ready: no prompt is built for nothing before the clock runs."""

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        while "ready" not in Path(os.environ[CLOCK]).read_text():
            time.sleep(0.05)
        yield from super().__call__(batch)


def _note(what: str) -> None:
    with open(os.environ[CLOCK], "a") as file:
        file.write(f"{what} {time.time()!r}\n")


class Job:
    """The job with one method; a call is a run from the start. Gives output tokens a second, or replies."""

    def __init__(self, given: Given, setting: dict[str, Any], method: str, per: str = "output_tokens") -> None:
        self.given, self.setting, self.method, self.per = given, setting, method, per
        self.seconds: list[float] = []

    def __call__(self) -> float:
        clock = Path(os.environ[CLOCK])
        clock.write_text("")
        run_id = f"bench-{time.time_ns()}"
        run_dir = self.given.folder / "generate-run"
        config = generate_job.Config(methods=(self.method,), run_id=run_id, run_dir=str(run_dir), **self.setting)
        assert generate_job.run(config) == 0
        times = [line.split() for line in clock.read_text().splitlines()]
        ready = next(float(at) for what, at in times if what == "ready")
        self.seconds.append(max(float(at) for what, at in times if what == "answered") - ready)
        report = json.loads((run_dir / "report.json").read_text())
        return report["output_tokens" if self.per == "output_tokens" else "written"] / self.seconds[-1]


def setting_of(
    given: Given, inputs: int, tokens: int, llm: LLMConfig | None = None, people: int | None = None
) -> tuple[dict[str, Any], Any]:
    """The job's config but for the method, and the population.

    Args:
        llm: another than the one of random weights.
        people: another number than `prepare.people`.
    """
    population = prepare.refreshed(given.folder, people or prepare.people(given))
    # of one length on both sides: the random LLM never ends a reply, and none is limited to the task's labels
    decoding = Decoding(max_tokens=tokens, min_tokens=tokens if llm else 0, constrain="none")
    llm = llm or prepare.language_model(given.folder, "large", prepare.LARGE, population, inputs)
    return {
        "tables": population.tables,
        "llm": llm,
        "plug": prepare.new_plug(given.folder, population, llm),
        "decoding": decoding,
        "engine": EngineConfig(max_model_len=1024),
        "retrieval": RetrievalConfig(k=4),
    }, population


def prompts_of(setting: dict[str, Any], population: Any, method: str = "plug") -> list[list[int]]:
    """Each request's prompt as token ids; where a persona row stands, an ordinary token that differs by request."""
    requests = population.snapshot("requests")
    users = Path(setting["users"]).read_text().split() if "users" in setting else None
    buckets = tables.open_table(population.tables, "requests").buckets
    pending = PendingReplies(requests, None, "bench", (method,), "all", keys_by_bucket(users, buckets))
    build = prompt_stage(
        requests=requests, histories=population.snapshot("histories"),
        embeddings=population.snapshot("embeddings-" + population.encoder_id), methods=(method,),
        plug=setting["plug"], llm=setting["llm"], task=population.entry, pending=pending, threads=2,
    )  # fmt: skip
    width = PersonaPlug.from_pretrained(setting["plug"], queries=False).config.llm_dim
    rng, out = np.random.default_rng(0), []
    for block in build(pa.table({"bucket": sorted(requests.by_bucket())})):
        for row in block.to_pylist():
            rows = len(row["rows"]) // width
            out.append(row["before"] + rng.integers(300, 500, rows).tolist() + row["after"])
    return out


def bare(folder: Path, setting: dict[str, Any], threads: int, adapters: dict[str, Any] | None = None) -> float:
    """vllm.LLM.generate in a process of its own, on prompts.json.

    Args:
        adapters: args, more arguments of the engine; folders, PEFT's; of, which of them each prompt is for.
    """
    asked = {"llm": setting["llm"].model_dump(), "engine": setting["engine"].model_dump(),
             "decoding": setting["decoding"].model_dump(), "prompts": str(folder / "prompts.json"),
             "threads": threads, "adapters": adapters}  # fmt: skip
    command = [sys.executable, "-m", "tests.benchmarks.generate", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(re.findall(r"^rate (\S+)$", done.stdout, re.MULTILINE)[-1])


def _bare(asked: dict[str, Any]) -> float:
    """In that process: output tokens a second, the engine ready and warm."""
    from vllm import LLM, SamplingParams

    config, llm = EngineConfig.model_validate(asked["engine"]), LLMConfig.model_validate(asked["llm"])
    args = engine_args(str(model_folder(llm.model, llm.revision)), config, asked["threads"])
    loras, adapters = None, asked["adapters"]
    if adapters:
        from vllm.lora.request import LoRARequest

        args |= adapters["args"]
        made = [LoRARequest(f"adapter-{i}", i + 1, folder) for i, folder in enumerate(adapters["folders"])]
        loras = [made[i] for i in adapters["of"]]
    engine = LLM(**args)
    decoding = Decoding.model_validate(asked["decoding"])
    engine.generate([{"prompt_token_ids": list(range(300, 324))}] * 2, SamplingParams(temperature=0, max_tokens=8),
                    use_tqdm=False)  # fmt: skip
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(Path(asked["prompts"]).read_text())]
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=decoding.max_tokens, min_tokens=decoding.min_tokens)
    out = engine.generate(prompts, params, use_tqdm=False, lora_request=loras)
    took = time.perf_counter() - start
    return sum(len(one.outputs[0].token_ids) for one in out) / took


class Transformers:
    """transformers' generate on the same prompts, padded on the left, a batch at a time."""

    def __init__(self, setting: dict[str, Any], prompts: list[list[int]], threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        kind = EngineConfig().dtype if setting["engine"].dtype == "auto" else setting["engine"].dtype
        quick = bf16_is_quicker() or torch.cuda.is_available()
        dtype = ("bfloat16" if quick else "float32") if kind == "auto" else kind
        self.llm = FrozenLLM.load(setting["llm"].model_copy(update={"dtype": dtype}))
        self.prompts, self.tokens = prompts, setting["decoding"].max_tokens

    def rate(self, size: int, batches: int = 1) -> float:
        """Output tokens a second over some batches, each of prompts of like length."""
        import torch

        count = min(size * batches, len(self.prompts))
        chosen = np.random.default_rng(0).permutation(len(self.prompts))[:count]
        chosen = sorted(chosen.tolist(), key=lambda i: len(self.prompts[i]))
        written, start = 0, time.perf_counter()
        with torch.inference_mode():
            for first in range(0, count, size):
                rows = [self.prompts[i] for i in chosen[first : first + size]]
                width = max(map(len, rows))
                ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self.llm.model.device)
                mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=ids.device)
                out = self.llm.model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0,
                                              max_new_tokens=self.tokens)  # fmt: skip
                written += out[:, width:].numel()
        return written / (time.perf_counter() - start)


def begin(given: Given) -> None:
    """Ray, with the timed stages in the places of the job's."""
    os.environ[CLOCK] = str(given.folder / "clock")
    # by name at the driver's start, so that Ray's workers find the one home of these classes
    generate_job.BuildPrompts, generate_job.Reply = GatedPrompts, TimedReply  # type: ignore[misc]
    session.start(cpus=4, object_store_bytes=512 * 2**20)


def run(given: Given) -> Found:
    begin(given)
    tokens = given.size(64, 8)
    setting, population = setting_of(given, INPUTS, tokens)
    prompts = prompts_of(setting, population)
    (given.folder / "prompts.json").write_text(json.dumps(prompts))
    peer = Transformers(setting, prompts, given.threads)
    size = best_rate({size: partial(peer.rate, size) for size in ((4,) if given.smoke else (8, 16, 32, 64))})
    job = Job(given, setting, "plug")
    found = in_turn({
        "plug": job,
        "bare engine": lambda: bare(given.folder, setting, given.threads),
        "transformers, one at a time": lambda: peer.rate(1, given.size(8, 2)),
        "transformers, best batch": lambda: peer.rate(size, 2),
    }, given.rounds)  # fmt: skip
    (by_mean,) = in_turn({"plug:mean": Job(given, setting, "plug:mean")}, 1).values()
    session.stop()
    ours, raw, single, batched = found.values()
    what, unit = "generate with plug", "output tokens/s"
    share = query_share(setting, population, prompts)
    note = f"beside the engine the plug's query encoder works, with {100 * share:.0f}% of the LLM's FLOPs"
    lines = [
        Line(what, "vllm.LLM.generate on token ids", unit, ours, raw, least=0.90, aim=0.98, note=note),
        Line("generate with plug:mean, no query encoder", "vllm.LLM.generate on token ids", unit, by_mean, raw[-1:]),
        Line(what, "transformers generate, batch 1", unit, ours, single, least=15.0),
        Line(what, f"transformers generate, its best batch ({size})", unit, ours, batched, least=2.0),
    ]
    return Found(lines, config_of(given, population, setting, prompts) | {"seconds a run": round(min(job.seconds), 1)})


def llm_flops(prompt_tokens: int, output_tokens: int) -> float:
    """Operations of the LLM's linear layers: all tokens pass the blocks, those of the output the vocabulary."""
    width, sizes = prepare.LARGE["width"], prepare.LARGE
    block = 4 * width**2 + 3 * width * sizes["ffn_width"]
    tokens = prompt_tokens + output_tokens
    return 2.0 * (tokens * sizes["layers"] * block + output_tokens * width * sizes["vocab_size"])


def query_share(setting: dict[str, Any], population: Any, prompts: list[list[int]]) -> float:
    """FLOPs of the plug's query encoder as a share of the LLM's: work that the bare engine does not have."""
    from pplug.encoder import EncoderConfig, TextEncoder
    from pplug.tasks import query

    inputs = population.snapshot("requests").read(["input"])["input"].to_pylist()
    encoder = TextEncoder(EncoderConfig())
    lengths = np.array([*map(len, encoder.tokenize([query(text, population.entry) for text in inputs]))])
    written = len(prompts) * setting["decoding"].max_tokens
    return flops(encoder.model.config, lengths) / llm_flops(sum(map(len, prompts)), written)


def config_of(
    given: Given, population: Any, setting: dict[str, Any], prompts: list[list[int]], llm: str = ""
) -> dict[str, Any]:
    """Facts by which a reader judges the figures; `llm`: words for another LLM than the one of random weights."""
    import torch

    engine = setting["engine"]
    dtype = "bfloat16" if bf16_is_quicker() or torch.cuda.is_available() else "float32"
    return {"data": population.data, "requests": len(prompts), "tokens a prompt": round(np.mean([*map(len, prompts)])),
            "tokens a reply": setting["decoding"].max_tokens,
            "LLM": llm or f"Llama of random weights, {prepare.LARGE}",
            "dtype": dtype if engine.dtype == "auto" else engine.dtype, "max_num_seqs": engine.max_num_seqs,
            "batch_rows": engine.batch_rows, "in_flight": engine.in_flight, "threads": given.threads}  # fmt: skip


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    print(f"\nrate {_bare(json.loads(sys.argv[1]))}", flush=True)
