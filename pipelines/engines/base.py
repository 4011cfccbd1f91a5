"""The protocol of all engines: how a reply is chosen, how much of the machine an engine takes, a prompt and a reply.

Shapes: L prompt positions, R persona rows, H LLM width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from pydantic import Field

from pipelines.engines.adapters import AdapterName
from pplug.identity import short_id
from pplug.settings import Settings, renamed


class Decoding(Settings):
    """Sets how a reply is chosen; it makes up `decoding_id`."""

    max_tokens: int = Field(32, gt=0)
    """Number of tokens that a reply may have."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of sampling. 0 takes the most probable token each time (greedy)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampling draws from the likeliest tokens whose probabilities reach this sum."""
    num_beams: int = renamed("beams", 1, gt=0)
    """Number of beams, for the transformers engine only. The paper uses 4."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which a reply ends."""
    seed: int = 0
    """Seed of sampling. Each reply draws by its own user, request and method, whatever batch it is in."""

    @property
    def decoding_id(self) -> str:
        return short_id(self.decisive())


@dataclass(frozen=True)
class Can:
    """Abilities of an engine, known before it is started."""

    adapters: bool
    """It serves many adapters in one batch."""
    encoder_decoder: bool
    """It has models such as FLAN-T5."""
    beams: bool
    """It searches with beams."""


CAN = {
    "vllm": Can(adapters=True, encoder_decoder=False, beams=False),
    "transformers": Can(adapters=False, encoder_decoder=True, beams=True),
}


class EngineConfig(Settings):
    """Names the engine that answers, and sets how much of the machine it may take."""

    kind: Literal["vllm", "transformers"] = "vllm"
    """Engine. transformers serves encoder-decoder models such as FLAN-T5, which vLLM does not have, and beams."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format. auto takes bfloat16 on a GPU and on a CPU with AMX, float32 elsewhere."""
    max_model_len: int | None = renamed("context", None, gt=0)
    """Number of tokens of prompt and reply together; default: the model's own limit."""
    max_num_seqs: int = Field(256, gt=0)
    """Number of requests that the engine works on at once."""
    gpu_memory_utilization: float = renamed("memory_fraction", 0.85, gt=0, le=1)
    """Fraction of the GPU's memory that the engine takes."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Memory in GiB for the keys and values of attention, on a CPU."""
    enforce_eager: bool | None = renamed("eager", None)
    """True runs without compilation. Default: true on a CPU, where it starts a minute faster."""
    batch_rows: int = Field(64, gt=0)
    """Number of requests that are handed over at a time."""
    in_flight: int = Field(8, gt=0)
    """Number of batches in flight per engine: batch_rows * in_flight should exceed max_num_seqs."""
    max_loras: int = renamed("adapters_at_once", 32, gt=0)
    """Number of adapters in one step of the engine; each takes room in its memory."""
    max_cpu_loras: int = renamed("adapters_ready", 512, gt=0)
    """Number of adapters held in the machine's memory; the least recently used leave first."""


@dataclass(frozen=True)
class EnginePrompt:
    """Token ids before and after the soft prompt: instruction and persona rows, (R, H) float32; R may be 0."""

    key: str
    """Name that a sampled reply draws by; no two prompts of a run share it."""
    before: list[int]
    soft_prompt: np.ndarray
    after: list[int]
    adapter: AdapterName | None = None

    def __len__(self) -> int:
        return len(self.before) + len(self.soft_prompt) + len(self.after)


@dataclass(frozen=True)
class EngineReply:
    text: str
    finish_reason: str
    output_tokens: int
    error: str | None = None


class Engine(Protocol):
    """Methods and facts that the reply stage needs from an engine."""

    context: int
    dim: int
    max_row_norm: float

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]: ...

    def shutdown(self) -> None: ...


def own_seed(seed: int, key: str) -> int:
    """A reply's own sampling seed: the same in any batch. `key`: of the `EnginePrompt`."""
    return int(short_id({"seed": seed, "reply": key})[:8], 16)
