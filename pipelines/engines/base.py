"""The protocol of all engines: how a reply is chosen, how much of the machine an engine takes, a prompt and a reply.

Shapes: L prompt positions, R persona rows, H LLM width.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from pipelines.engines.adapters import AdapterName
from pplug.identity import short_id
from pplug.settings import Settings, renamed


class Decoding(Settings):
    """Sets how replies are chosen; it makes up `decoding_id`. Both engines take the end tokens from a model folder's
    generation_config.json, and nothing else of that file."""

    max_tokens: int = Field(32, gt=0)
    """Number of tokens that a reply may have."""
    temperature: float = Field(0.0, ge=0)
    """Temperature of sampling. 0 takes the most probable token each time (greedy)."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sampling draws from the likeliest tokens whose probabilities reach this sum."""
    num_beams: int = renamed("beams", 1, gt=0)
    """Number of beams, for the transformers engine only. The paper uses 4."""
    stop: tuple[str, ...] = ()
    """Texts before the first of which a reply ends. The name of a special token ends it at that token."""
    seed: int = 0
    """Seed of sampling. Each reply draws by its own user, request, method and sample, whatever batch it is in."""
    constrain: Literal["auto", "none", "labels"] = "auto"
    """Limits a reply to the task's labels. auto does so for tasks of classification and rating whose labels the LLM's
    tokenizer can write; labels refuses a task where that is not so; none never does. `regex` and `json_schema` take its
    place."""
    regex: str | None = None
    """Regular expression that the whole reply has to match, in the syntax of xgrammar."""
    json_schema: dict[str, Any] | None = None
    """JSON schema that the reply has to follow."""
    label_logprobs: bool = False
    """True writes the logarithm of each label's probability among the labels to the column `label_logprobs`: the
    confidence beside the answer. It takes one more token per place where labels part."""
    logprobs: bool = False
    """True writes the log-probability of each token of the reply to the column `token_logprobs`: after the constraint,
    before temperature and penalties."""
    min_tokens: int = Field(0, ge=0)
    """Number of tokens before which no end token is chosen."""
    top_k: int = Field(0, ge=0)
    """Number of likeliest tokens that sampling draws from; 0 takes all."""
    min_p: float = Field(0.0, ge=0, le=1)
    """Least probability of a token that sampling may draw, relative to that of the likeliest one."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Factor by which tokens of the prompt and of the reply so far become less likely; 1 changes nothing. Persona rows
    are no tokens."""
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    """Amount by which the logit of every token of the reply so far is lowered."""
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    """Amount by which the logit of a token is lowered for each time that it stands in the reply so far."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end a reply beside the model's own end tokens."""
    n: int = Field(1, gt=0)
    """Number of replies per request and method. Each is drawn with a seed of its own and is a row of its own, told
    apart by the column `sample`; `evaluate` takes the mean over them, F1 and RMSE over all replies together."""

    @model_validator(mode="after")
    def _one_constraint(self) -> Self:
        given = [
            name
            for name, is_given in (
                ("constrain=labels", self.constrain == "labels"),
                ("regex", self.regex is not None),
                ("json_schema", self.json_schema is not None),
            )
            if is_given
        ]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other; give one of them")
        if self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; lower it, or raise max_tokens"
            )
        if "" in self.stop:
            raise ValueError("stop: an empty text ends every reply before it begins; leave it out")
        if self.num_beams > 1 and self.logprobs:
            raise ValueError("logprobs are those of one sequence of tokens; set num_beams=1, or logprobs=false")
        if self.n > 1 and not self.temperature:
            raise ValueError(
                f"n={self.n}: without sampling all replies to a request are the same; set temperature above 0, or n=1"
            )
        return self

    @property
    def decoding_id(self) -> str:
        """Identity of how a reply is chosen. A key that came later counts where it is not at its default."""
        later = list(type(self).model_fields)[_FIRST:]
        unset = {name for name in later if getattr(self, name) == type(self).model_fields[name].default}
        if self.constrain == "none":
            unset.add("constrain")  # without labels auto is none, and was the only way before
        parts = self.decisive(exclude=unset)
        schema = parts.get("json_schema")
        if schema is not None and (ordered := json.dumps(schema)) != json.dumps(schema, sort_keys=True):
            parts["json_schema"] = ordered  # a reply has its keys in the order of the schema's
        return short_id(parts)


_FIRST = list(Decoding.model_fields).index("constrain")
"""Number of keys that were in `decoding_id` from the beginning."""


class ResolvedDecoding(Decoding):
    """Decoding for one task and engine: `auto` is decided, and the labels and the engine's numbers count too."""

    labels: tuple[str, ...] = ()
    """Answers that a reply is limited to."""
    engine: dict[str, Any] = {}
    """Keys of the engine that change its numbers, where they are not at their defaults."""


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
    """Names the engine that answers, and sets how much of the machine it may take. The keys from max_model_len to args
    are vLLM's own, and mean what its documentation says, but for kv_cache_gib, batch_rows and in_flight."""

    kind: Literal["vllm", "transformers"] = "vllm"
    """Engine. transformers serves encoder-decoder models such as FLAN-T5, which vLLM does not have, and beams."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format. auto leaves it to vLLM on a GPU, which takes that of the checkpoint (bfloat16 for float32). On a
    CPU it takes bfloat16 where its products are quicker, else float32; the transformers engine takes `llm.dtype`.
    Replies depend on it: given by name it is part of `decoding_id`, and the report says what auto has taken."""
    max_model_len: int | None = renamed("context", None, gt=0)
    """Number of tokens of prompt and reply together. Default: those that the longest prompt of the job and
    decoding.max_tokens can take, within the model's own limit."""
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
    tensor_parallel_size: int | None = Field(None, gt=0)
    """Number of devices that share each layer of one model. Default: the GPUs of one engine."""
    pipeline_parallel_size: int = Field(1, gt=0)
    """Number of groups of devices that hold consecutive layers of one model."""
    quantization: str | None = None
    """Quantisation of the weights, such as fp8, awq or gptq. Default: what the model's config says."""
    kv_cache_dtype: str = "auto"
    """Number format of keys and values, such as fp8; auto takes that of the model."""
    max_num_batched_tokens: int | None = Field(None, gt=0)
    """Number of tokens in one step of the engine; longer prompts are read in chunks."""
    load_format: str = "auto"
    """Form of the weights' files, such as safetensors, gguf or bitsandbytes."""
    enable_prefix_caching: bool = True
    """True keeps the keys and values of prompts' common beginnings."""
    trust_remote_code: bool = False
    """True runs Python code that lies in the model's folder, with all rights of this user. Set it only for a folder
    whose code you have read."""
    args: dict[str, Any] = {}
    """Further arguments of vLLM's engine (AsyncEngineArgs), passed on as they are. They count for `decoding_id`."""

    @model_validator(mode="after")
    def _transformers_takes_no_keys_of_vllms_numbers(self) -> Self:
        given = [name for name in self.changes_numbers() if name != "dtype"]
        if self.kind == "transformers" and given:
            raise ValueError(
                f"engine.kind=transformers does not have {' and '.join(given)}, which are vLLM's; leave them out"
            )
        return self

    @property
    def devices(self) -> int:
        """Number of devices that one engine asks for."""
        return (self.tensor_parallel_size or 1) * self.pipeline_parallel_size

    def changes_numbers(self) -> dict[str, Any]:
        """Keys that change what the engine computes, where they are not at their defaults."""
        names = ("dtype", "quantization", "kv_cache_dtype", "args")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value != type(self).model_fields[name].default}


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
    token_logprobs: list[float] | None = None
    """Log-probability of each token, where `decoding.logprobs` asks for it."""
    notes: tuple[str, ...] = ()
    """Events that the report has to count (`prompts.NOTES`)."""


@dataclass(frozen=True)
class PromptSizes:
    """The size of a job's prompts, from which an engine takes no more than it needs."""

    rows: int | None = None
    """Greatest number of persona rows in a prompt; None where it is not known. Without rows an engine takes any model
    and is not made ready for embeddings."""
    input_tokens: int | None = None
    """Greatest number of tokens of an input; None where it is not known."""


@dataclass(frozen=True)
class NextTokens:
    """A question for log-probabilities: those of some tokens, should the reply go on after its first ones."""

    prompt: EnginePrompt
    begun: tuple[int, ...]
    """First tokens of the reply."""
    ids: tuple[int, ...]
    """Tokens whose log-probabilities are wanted."""


class Engine(Protocol):
    """Methods and facts that the reply stage needs from an engine."""

    context: int
    dim: int
    max_row_norm: float
    tokenizer: Any
    end_ids: tuple[int, ...]
    """Tokens that end a reply by themselves."""
    label_ids: list[tuple[int, ...]]
    """Token ids of the labels that a reply is limited to, in the order of `ResolvedDecoding.labels`."""
    about: str
    """Number format and device, for the report."""

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        """One reply per prompt, in order."""
        ...

    def next_logprobs(self, asked: Sequence[NextTokens]) -> list[list[float] | None]:
        """Log-probabilities of the asked tokens, in order, before temperature and penalties; None where there is no
        answer."""
        ...

    def shutdown(self) -> None: ...


def own_seed(seed: int, key: str) -> int:
    """A reply's own sampling seed: the same in any batch. `key`: of the `EnginePrompt`."""
    return int(short_id({"seed": seed, "reply": key})[:8], 16)
