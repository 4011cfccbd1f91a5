"""The arithmetic of a plan: units, floating point operations and bytes -> seconds, GPUs, money, with the formula.

Route: PlanConfig (+ measured rates) -> one `Line` per job -> text.
Letters in the formulas: N parameters, T tokens, D and H widths of encoder and LLM, P persona rows.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines.plan.config import PlanConfig
from pipelines.plan.rates import DECODE_BATCH, GPUS, SHARES, Measured, parameters, usual
from pplug.adapter import LoraConfig

TERA, GIB = 1e12, 2**30
VALUE_BYTES = 1.81
"""Bytes of a vector's value in a table, as measured with random vectors (infra/rows.py)."""
KEY_BYTES = 40
"""Bytes of a row beside its vectors: key, hash, identity, after compression."""
TEXT_BYTES = 2.0
"""Bytes of an item's text per token: about 4 characters, which zstd halves."""


@dataclass(frozen=True)
class Line:
    """One job of a plan."""

    job: str
    units: float
    unit: str
    gpu_seconds: float
    start_s: float
    formula: str
    source: str
    at_least: int = 1
    """GPUs that the job's model needs together."""

    def gpus(self, hours: float) -> int:
        """The number of GPUs with which the job ends within these hours; a multiple of `at_least`."""
        left = hours * 3600 - self.start_s
        wanted = math.ceil(self.gpu_seconds / left) if left > 0 else math.inf
        if wanted == math.inf:
            return 0
        return max(1, math.ceil(wanted / self.at_least)) * self.at_least

    def seconds(self, gpus: int) -> float:
        """Seconds from begin to end on this number of GPUs."""
        return self.start_s + self.gpu_seconds / gpus


@dataclass(frozen=True)
class Stored:
    """One table of a plan."""

    table: str
    bytes: float
    formula: str
    source: str


def lines_of(config: PlanConfig, measured: Mapping[str, Measured]) -> list[Line]:
    """The jobs of the plan, in the order in which they run."""
    gpu, llm = GPUS[config.gpu], parameters(config.llm)
    encoder, texts = parameters(config.encoder), config.users * config.items
    for_llm = least_gpus(config)
    per_text = 2 * encoder * config.item_tokens / (gpu.tflops * TERA * SHARES["encode"])
    encode = f"T 2 N / ({gpu.tflops:g} TFLOP/s {SHARES['encode']:g}), T={config.item_tokens}, N={config.encoder}"
    sample = config.prompt_tokens + config.output_tokens
    per_sample = 6 * llm * sample / (gpu.tflops * TERA * SHARES["train"])
    passes = LoraConfig().epochs
    per_user = passes * 6 * llm * config.items * config.item_tokens / (gpu.tflops * TERA * SHARES["adapt"])
    answers = config.users * config.requests * config.methods
    planned = [
        Line("refresh, everything", texts, "texts", texts * per_text, 0, encode, ""),
        Line("refresh, a night", texts * config.changed, "texts", texts * config.changed * per_text, 0, encode, ""),
        Line(
            "train", config.train_samples * config.epochs, "samples", config.train_samples * config.epochs * per_sample,
            0, f"T 6 N / ({gpu.tflops:g} TFLOP/s {SHARES['train']:g}), T={sample}, N={config.llm}: forward, "
            "recomputed, backward", "", for_llm,
        ),
        Line(
            "adapt", config.users * config.adapters, "users", config.users * config.adapters * per_user, 0,
            f"{passes} T 6 N / ({gpu.tflops:g} TFLOP/s {SHARES['adapt']:g}), T={config.items:g} x "
            f"{config.item_tokens}, N={config.llm}: {passes} epochs of forward, recomputed, backward", "", for_llm,
        ),
        Line("generate", answers, "replies", answers * _per_reply(config), 0, _reply_formula(config), "", for_llm),
    ]  # fmt: skip
    return [_by_measure(line, measured) for line in planned]


def least_gpus(config: PlanConfig) -> int:
    """The number of GPUs that hold the LLM in 16 bits, with a fifth more for caches: a power of two."""
    need = parameters(config.llm) * 2 * 1.2 / (GPUS[config.gpu].memory_gb * 1e9)
    return 2 ** max(0, math.ceil(math.log2(need)))


def _per_reply(config: PlanConfig) -> float:
    """GPU seconds of a reply: its prompt at the rate of the products, its tokens at that of the memory or products."""
    gpu, llm = GPUS[config.gpu], parameters(config.llm)
    flops = gpu.tflops * TERA * SHARES["prefill"]
    reading = 2 * llm / (gpu.bandwidth_gbs * 1e9 * SHARES["decode"]) / DECODE_BATCH
    return config.prompt_tokens * 2 * llm / flops + config.output_tokens * max(reading, 2 * llm / flops)


def _reply_formula(config: PlanConfig) -> str:
    gpu = GPUS[config.gpu]
    return (
        f"{config.prompt_tokens} 2 N / ({gpu.tflops:g} TFLOP/s {SHARES['prefill']:g}) + {config.output_tokens} "
        f"max(2 N / that, 2 N bytes / ({gpu.bandwidth_gbs:g} GB/s {SHARES['decode']:g}) / {DECODE_BATCH} replies at "
        f"once), N={config.llm}"
    )


def _by_measure(line: Line, measured: Mapping[str, Measured]) -> Line:
    """The same job by its measured rate, where there is one."""
    rate = measured.get(line.job.partition(",")[0])
    if rate is None:
        return line
    formula = f"{rate.start_s:.1f} s + {rate.per_unit_s:.3g} s per unit and GPU, as measured"
    return Line(
        line.job, line.units, line.unit, line.units * rate.per_unit_s, rate.start_s, formula, rate.source, line.at_least
    )


def storage_of(config: PlanConfig, measured: Mapping[str, Measured]) -> list[Stored]:
    """The tables of the plan. Measured bytes of a row come before the formula's."""
    usual_width, layers = usual(parameters(config.llm))
    width = config.llm_dim or usual_width
    texts, answers = config.users * config.items, config.users * config.requests * config.methods
    adapter = config.adapter_bytes or 2 * 2 * 8 * 2 * width * layers
    values = config.encoder_dim + config.persona_tokens * width
    rows = {
        "histories": (texts, config.item_tokens * TEXT_BYTES + KEY_BYTES,
                      f"T {TEXT_BYTES:g} + {KEY_BYTES} bytes an item, T={config.item_tokens}"),
        "embeddings": (texts, config.encoder_dim * VALUE_BYTES + KEY_BYTES,
                       f"D {VALUE_BYTES} + {KEY_BYTES} bytes an item, D={config.encoder_dim}"),
        "personas": (config.users, values * VALUE_BYTES + 2 * KEY_BYTES,
                     f"(D + P H) {VALUE_BYTES} + {2 * KEY_BYTES} bytes a user, P={config.persona_tokens}, H={width}"),
        "adapters": (config.users * config.adapters, float(adapter), f"{adapter:,} bytes a user with an adapter"),
        "generations": (answers, config.output_tokens * TEXT_BYTES + KEY_BYTES,
                        f"T {TEXT_BYTES:g} + {KEY_BYTES} bytes a reply, T={config.output_tokens}"),
    }  # fmt: skip
    known = {table: (*both, rate.source) for rate in measured.values() for table, both in rate.bytes_per_unit.items()}
    found = []
    for table, (n, per_row, formula) in rows.items():
        fixed, source = 0.0, ""
        if table in known:
            fixed, per_row, source = known[table]
            formula = f"{fixed:,.0f} + {per_row:.4g} bytes a row, as measured"
        found.append(Stored(table, fixed + n * per_row, formula, source))
    return found
