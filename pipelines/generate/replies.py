"""Stage: prompts -> replies, through one engine per actor that never waits for a batch to end.

vLLM runs in a loop thread of our own; the stage is plain and is called by several threads at once, so many small
batches are in flight (Ray's own async path blocks the event loop it would share with the engine). Every persona row is
checked before it reaches the engine: a wrong width kills it, and one NaN spoils the next request's reply.
An adapter is fetched, checked and added to the engine before its first request is handed over: one that cannot be used
is that row's error, where inside the engine it would be the engine's end.
A dead engine ends the actor, so that Ray starts another and repeats the batch; a row that cannot be answered becomes a
row with `error`.
Shapes: L prompt positions, R persona rows, H LLM width.
"""

import json
from collections.abc import Sequence
from typing import Any, assert_never

import numpy as np
import pyarrow as pa

from infra import metrics
from infra.errors import InputError
from pipelines.engines.adapters import AdapterName, Adapters
from pipelines.engines.base import (
    Decoding,
    Engine,
    EngineConfig,
    EnginePrompt,
    EngineReply,
    PromptSizes,
    ResolvedDecoding,
)
from pipelines.engines.constrain import LabelLogprobs
from pipelines.engines.transformers import TransformersEngine
from pipelines.engines.vllm import VLLMEngine
from pipelines.model_folders import loading
from pipelines.run import CpuShare
from pplug.llm import LLMConfig, refuse_another
from pplug.schemas import GENERATIONS

ENGINE = "engine"
REPLIES = pa.schema([*GENERATIONS, pa.field("notes", pa.list_(pa.string())), pa.field(ENGINE, pa.string())])
"""Notes and the engine's number format are counted in the report, not stored."""
_CARRIED = ("bucket", "user_key", "request_id", "method", "user_id", "persona", "plug_id", "adapter_id", "encoder_id",
            "input_hash")  # fmt: skip


class Reply:
    """Stage: one reply per prompt, or several where it asks for samples.

    in:  generate.prompts.PROMPTS
    out: REPLIES, in the order of the batch; a row that could not be answered has an `error` and an empty text
    """

    def __init__(
        self,
        llm: LLMConfig,
        engine: EngineConfig,
        decoding: Decoding,
        llm_id: str,
        run_id: str,
        cpu: CpuShare,
        adapters: Adapters | None = None,
        sizes: PromptSizes | None = None,
    ) -> None:
        """`sizes`: an engine is made ready for prompts of this size, and for persona rows only where there are any.

        Raises:
            InputError: the engine does not start, or has loaded another LLM than `llm_id`.
        """
        threads = cpu.torch_threads()
        self.decoding, self.llm_id, self.run_id = decoding, llm_id, run_id
        self.engine: Engine
        with loading("llm"):
            match engine.kind:
                case "vllm":
                    self.engine = VLLMEngine(llm, engine, decoding, threads, adapters, sizes)
                case "transformers":
                    self.engine = TransformersEngine(llm, engine, decoding, threads)
                case other:
                    assert_never(other)
        try:
            with loading("llm"):
                refuse_another(llm, llm_id)
                self.read_labels()
        except InputError:
            self.engine.shutdown()
            raise
        metrics.note_restart(engine.kind)

    def read_labels(self) -> None:
        """Takes the labels whose probabilities are wanted from the decoding and the engine."""
        decoding, engine = self.decoding, self.engine
        self._label_logprobs: LabelLogprobs | None = None
        if decoding.label_logprobs and isinstance(decoding, ResolvedDecoding) and decoding.labels:
            labels = dict(zip(decoding.labels, engine.label_ids, strict=True))
            self._label_logprobs = LabelLogprobs(labels, engine.end_ids)

    def __call__(self, batch: pa.Table) -> pa.Table:
        batch, samples = one_per_sample(batch)
        prompts, errors = [], batch["error"].to_pylist()
        before, after = batch["before"].to_pylist(), batch["after"].to_pylist()
        keys, adapter_ids = batch["adapter_key"].to_pylist(), batch["adapter_id"].to_pylist()
        keys_of = zip(*(batch[name].to_pylist() for name in ("user_id", "request_id", "method")), strict=True)
        for i, key in enumerate(map(_with_sample, keys_of, samples)):
            flat = batch["rows"][i].values.to_numpy()
            error = check_rows(flat, self.engine.dim, self.engine.max_row_norm)
            rows = np.zeros((0, self.engine.dim), np.float32) if error else flat.reshape(-1, self.engine.dim)
            adapter = None if adapter_ids[i] is None else AdapterName(keys[i], adapter_ids[i])
            prompt = EnginePrompt(json.dumps(key), before[i], rows, after[i], adapter)
            errors[i] = errors[i] or error or self._too_long(prompt)
            prompts.append(prompt)
        good = [i for i, error in enumerate(errors) if error is None]
        replies = dict(zip(good, self.engine.replies([prompts[i] for i in good]), strict=True))
        nothing = EngineReply("", "error", 0)
        out = [replies.get(i, nothing) for i in range(len(prompts))]
        answered = [i for i in good if out[i].error is None]
        labels = dict(zip(answered, self._of_labels([prompts[i] for i in answered]), strict=True))
        for i in [i for i in answered if labels[i] is None and self._label_logprobs is not None]:
            out[i] = EngineReply("", "error", 0, "the engine refused the question for the labels' probabilities")
        notes = zip(batch["notes"].to_pylist(), out, strict=True)
        columns: dict[str, Any] = {name: batch[name] for name in _CARRIED}
        columns |= {
            "run_id": [self.run_id] * len(out),
            "text": [reply.text for reply in out],
            "finish_reason": [reply.finish_reason for reply in out],
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "output_tokens": [reply.output_tokens for reply in out],
            "llm_id": [self.llm_id] * len(out),
            "decoding_id": [self.decoding.decoding_id] * len(out),
            "error": [errors[i] or reply.error for i, reply in enumerate(out)],
            "token_logprobs": [reply.token_logprobs for reply in out],
            "label_logprobs": [labels.get(i) for i in range(len(out))],
            "sample": samples,
            "notes": [[*(noted or ()), *reply.notes] for noted, reply in notes],
            ENGINE: [self.engine.about] * len(out),
        }
        return pa.table({name: columns[name] for name in REPLIES.names}, schema=REPLIES)

    def _of_labels(self, prompts: Sequence[EnginePrompt]) -> list[list[tuple[str, float]] | None]:
        """The log-probability of each label for each prompt; None where they are not asked for, or not to be had."""
        if self._label_logprobs is None:
            return [None] * len(prompts)
        asked = [self._label_logprobs.questions(prompt) for prompt in prompts]
        answers = iter(self.engine.next_logprobs([one for questions in asked for one in questions]))
        out: list[list[tuple[str, float]] | None] = []
        for questions in asked:
            found = [next(answers) for _ in questions]
            known = [one for one in found if one is not None]
            out.append(list(self._label_logprobs(known).items()) if len(known) == len(found) else None)
        return out

    def __del__(self) -> None:
        """Ray Data drops the stage when its actor ends: the engine's processes end with it."""
        engine = getattr(self, "engine", None)
        if engine is not None:
            engine.shutdown()

    def _too_long(self, prompt: EnginePrompt) -> str | None:
        room = self.engine.context - self.decoding.max_tokens
        if len(prompt) <= room:
            return None
        return (
            f"the prompt has {len(prompt)} tokens, but the engine's context of {self.engine.context} leaves {room} "
            f"beside max_tokens={self.decoding.max_tokens}; lower llm.layout.max_input_tokens or raise "
            "engine.max_model_len"
        )


def one_per_sample(batch: pa.Table) -> tuple[pa.Table, list[int | None]]:
    """PROMPTS with one row per reply, and the sample that each stands for; None for the only one."""
    asked = [wanted or [None] for wanted in batch["samples"].to_pylist()]
    if any(len(wanted) > 1 for wanted in asked):
        batch = batch.take(pa.array(np.repeat(np.arange(len(asked)), list(map(len, asked)))))
    return batch, [sample for wanted in asked for sample in wanted]


def _with_sample(key: tuple[str, ...], sample: int | None) -> tuple[str | int, ...]:
    """The key that a reply draws by: the first sample draws as the only one does."""
    return (*key, sample) if sample else key


def check_rows(flat: np.ndarray, dim: int, max_norm: float) -> str | None:
    """Returns why these persona rows must not reach the engine; None when they may."""
    if flat.dtype != np.float32:
        return f"persona rows have dtype {flat.dtype}, expected float32"
    if len(flat) % dim:
        return f"persona rows have {len(flat)} values, not a multiple of the LLM's width {dim}"
    if not np.isfinite(flat).all():
        return "persona rows hold values that are not finite"
    norms = np.linalg.norm(flat.reshape(-1, dim), axis=1)
    if len(norms) and norms.max() > max_norm:
        return f"a persona row has norm {norms.max():.3g}, above the limit of {max_norm:.3g}"
    if len(norms) and norms.min() == 0:
        return "a persona row is all zeros"  # the engine's prefix cache could not tell it from a token's place
    return None
