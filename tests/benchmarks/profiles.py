"""Where the seconds of a path go, in per cent: by part of the job, and by kind of torch operator.

The parts run one after another in this process, so that each is seen by itself; in the jobs they run beside each other.
`floor` is what the matrix products' FLOPs alone would take at the matrix rate measured in the same run.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.run import CpuShare
from pplug.bert import bf16_is_quicker
from tests.benchmarks import prepare
from tests.benchmarks.measure import Given, matmul_rate, seconds
from tests.prompt_stage import prompt_stage

KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "mkldnn_linear", "linear_pointwise", "mkl_linear", "onednn"),
    "attention and softmax": ("scaled_dot_product", "_flash_attention", "softmax"),
    "loss": ("log_softmax", "nll_loss", "cross_entropy"),
    "optimiser and clipping": ("Optimizer", "_foreach", "adamw", "lerp", "addcdiv", "addcmul", "linalg_vector_norm"),
    "norms and activations": ("layer_norm", "gelu", "silu", "rsqrt", "sigmoid", "mean", "pow", "native_norm"),
    "sums and products by element": ("add", "mul", "sub", "div", "neg", "masked_fill", "where", "bernoulli", "sum"),
    "moving data": ("copy_", "cat", "index", "gather", "scatter", "embedding", "clone", "contiguous", "fill_", "zero_",
                    "pad", "empty", "split", "slice", "_to_copy"),
}  # fmt: skip


def operators(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds by kind of operator, the rest being Python and all outside torch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = seconds(work)
    kinds = dict.fromkeys([*KINDS, "other operators"], 0.0)
    for event in profiled.key_averages():
        # a softmax of a loss is one of a log
        order = ("loss", *(name for name in KINDS if name != "loss"))
        kind = next((name for name in order if any(part in event.key for part in KINDS[name])), "other operators")
        kinds[kind] += event.self_cpu_time_total / 1e6
    kinds["Python, and all outside torch"] = max(0.0, whole - sum(kinds.values()))
    return kinds


class Timer:
    """Seconds by part: what a `timed` function calls that is timed too counts for its own part alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open: list[float] = []

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._open.append(0.0)
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took, inside = time.perf_counter() - start, self._open.pop()
                self.spent[part] = self.spent.get(part, 0.0) + took - inside
                if self._open:
                    self._open[-1] += took

        return wrapped

    def __call__(self, work: Callable[[], Any]) -> dict[str, float]:
        """Runs the work; seconds by part, and of what is in none of them."""
        self.spent = {}
        whole = seconds(work)
        return self.spent | {"the rest": whole - sum(self.spent.values())}


def shares(title: str, parts: dict[str, float], floor_s: float | None = None) -> dict[str, Any]:
    """A table: parts of one whole, in per cent, the largest first."""
    whole = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    found = {name: round(100 * took / whole, 1) for name, took in ordered}
    if floor_s is not None:
        found["floor: the matrix products alone, at the matrix rate"] = round(100 * floor_s / whole, 1)
    return {"title": f"{title} ({whole:.1f} s)", "shares": found}


def encode(given: Given) -> list[dict[str, Any]]:
    import torch

    from pipelines import tables
    from pipelines.refresh.embed import EmbedTexts, ReadPending
    from pipelines.refresh.increment import Since
    from pipelines.waves import WriteFiles
    from pplug.encoder import EncoderConfig
    from tests.benchmarks.encoder import flops

    population = prepare.ingested(given.folder, given.size(20, 4))
    histories = population.snapshot("histories")
    place = str(given.folder / "profile-encode")
    shutil.rmtree(place, ignore_errors=True)
    made = tables.open_or_create(place, tables.embeddings_name(population.encoder_id), 8)
    timer = Timer()
    rule = population.entry.item_template(EncoderConfig().with_label)
    stage = EmbedTexts(EncoderConfig(), rule, population.encoder_id, CpuShare(1, given.threads))
    stage.encoder.encode(population.texts()[:100])
    stage.encoder.tokenize = timer.timed("tokenising", stage.encoder.tokenize)  # type: ignore[method-assign]
    reading = ReadPending(histories, made.snapshot(), Since(), frozenset(), population.entry, True)
    read = timer.timed("reading histories", lambda buckets: pa.concat_tables(list(reading(buckets))))
    embed = timer.timed("encoder", stage)
    write = timer.timed("writing Parquet", WriteFiles(made, None, "refresh", "bench"))
    buckets = pa.table({"bucket": sorted(histories.by_bucket())})
    spent = timer(lambda: write(embed(read(buckets))))
    texts = read(buckets)
    lengths = np.array([len(ids) for ids in stage.encoder.tokenize(texts["text"].to_pylist())])
    work = flops(stage.encoder.model.config, lengths)
    parts = shares("refresh by part", spent, work / matmul_rate(stage.encoder.dtype))
    torch.set_num_threads(1)  # then batches are worked on in this thread, the only one that the profiler sees
    by_kind = operators(lambda: stage(texts))
    floor = work / matmul_rate(stage.encoder.dtype)
    return [parts, shares("its encoder by operator, on one core", by_kind, floor)]


def train(given: Given) -> list[dict[str, Any]]:
    from tests.benchmarks import train as row

    found = []
    for name, sizes in (("large", prepare.LARGE), ("demo", prepare.DEMO)):
        setting, _ = row.made(given, name, sizes)
        fitter, timer = setting.fitter, Timer()
        step = setting.ours
        step()
        floor = row.counted(step) / matmul_rate(fitter.dtype)
        by_kind = operators(step)
        fitter.query_vectors = timer.timed("query encoder, forward", fitter.query_vectors)
        fitter.soft_prompts = timer.timed("histories and projector, forward", fitter.soft_prompts)
        fitter.loss = timer.timed("splicing, LLM and loss, forward", fitter.loss)
        fitter.optimizer.step = timer.timed("optimiser", fitter.optimizer.step)
        spent = timer(step)
        spent["backward and clipping"] = spent.pop("the rest")
        found += [shares(f"plug training, {name} LM, by part", spent, floor),
                  shares(f"plug training, {name} LM, by operator", by_kind, floor)]  # fmt: skip
    return found


def generate(given: Given) -> list[dict[str, Any]]:
    import torch

    from pipelines.generate import replies as reply
    from pplug.llm import llm_id
    from tests.benchmarks import generate as row

    setting, population = row.setting_of(given, row.INPUTS, given.size(64, 8))
    requests, llm, engine = population.snapshot("requests"), setting["llm"], setting["engine"]
    build = prompt_stage(
        requests=requests, histories=population.snapshot("histories"),
        embeddings=population.snapshot("embeddings-" + population.encoder_id), methods=("plug",),
        plug=setting["plug"], llm=llm, task=population.entry, threads=given.threads,
    )  # fmt: skip
    answer = reply.Reply(llm, engine, setting["decoding"], llm_id(llm), "bench", CpuShare(1, given.threads))
    timer = Timer()
    (plug,) = build.parts
    for name in ("contribute", "look_ahead"):
        setattr(plug, name, timer.timed("plug: query encoder and persona", getattr(plug, name)))
    build.prompt_builder.prompts = timer.timed("tokenising", build.prompt_builder.prompts)  # type: ignore[method-assign]
    answer.engine._inputs = timer.timed("engine inputs", answer.engine._inputs)  # type: ignore[attr-defined]
    answer.engine.replies = timer.timed("engine", answer.engine.replies)  # type: ignore[method-assign]
    built = timer.timed("reading and joining", lambda given: pa.concat_tables(list(build(given))))
    reply_to = timer.timed("checking rows, laying out replies", answer)
    buckets = pa.table({"bucket": sorted(requests.by_bucket())})
    out: list[pa.Table] = []
    spent = timer(lambda: out.append(reply_to(built(buckets))))
    prompt_tokens, output_tokens = (sum(out[0][name].to_pylist()) for name in ("prompt_tokens", "output_tokens"))
    dtype = torch.bfloat16 if bf16_is_quicker() or torch.cuda.is_available() else torch.float32
    floor = row.llm_flops(prompt_tokens, output_tokens) / matmul_rate(dtype)
    answer.engine.shutdown()
    return [shares("generate with plug by part", spent, floor)]


def adapters(given: Given) -> list[dict[str, Any]]:
    from infra.device import assigned
    from pplug.adapter import LoraConfig
    from pplug.encoder import best_dtype
    from pplug.lora import StackedTrainer
    from tests.benchmarks import adapters as row
    from tests.benchmarks.train import counted

    users = row.people(given.size(16, 4), row.SIZES["vocab_size"])
    trainer = StackedTrainer(row.base(best_dtype("auto", assigned())), LoraConfig())
    work = partial(lambda: list(trainer.fit(users)))
    floor = counted(work) / matmul_rate(best_dtype("auto", assigned()))
    return [shares("adapters in a stack by operator", operators(work), floor)]


PATHS = {"encode": encode, "train": train, "generate": generate, "adapters": adapters}


def run(path: str, given: Given) -> dict[str, Any]:
    import torch

    torch.set_num_threads(given.threads)
    return {"tables": PATHS[path](given)}
