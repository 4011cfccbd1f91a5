"""vLLM in a loop thread of our own: many small batches in flight, and no wait for a batch to end.

Ray's own asynchronous path blocks the event loop that it would share with the engine. A dead engine ends the actor, so
that Ray starts another and repeats the batch; one that dies before its first request is refused with its last words.
Shapes: L prompt positions, R persona rows, H LLM width.
"""

import asyncio
import gc
import logging
import os
import threading
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from infra import device, metrics
from infra.errors import InputError
from pipelines.engines.adapters import Adapters, AdapterShelf
from pipelines.engines.base import (
    Decoding,
    EngineConfig,
    EnginePrompt,
    EngineReply,
    NextTokens,
    PromptSizes,
    ResolvedDecoding,
    own_seed,
)
from pipelines.engines.constrain import structured, written
from pipelines.engines.ending import Ending
from pipelines.engines.last_words import LastWords
from pipelines.engines.lora_cache import LoadedAdapters
from pipelines.engines.vllm_args import engine_args, longest_of, lora_args, model_args, tokenizer_args
from pipelines.engines.vllm_stats import EngineStats
from pplug.identity import model_folder
from pplug.llm import LLMConfig, embedding_rows, load_tokenizer
from pplug.splice import PromptBuilder

log = logging.getLogger(__name__)

PROBE = "The quick brown fox jumps over the lazy dog, and then it rests in the sun."
PROBED = 20
"""Number of likeliest first tokens that the probe compares; vLLM tells no more."""
TOLERANCE = {torch.float32: 0.02, torch.float16: 0.1, torch.bfloat16: 0.3}
"""Greatest difference of a log-probability that rounding makes between ids and rows of one prompt."""

HELD = ("Free memory on device", "Error in memory profiling")
"""Words of vLLM on a GPU whose memory another process holds, or sets free at this moment."""
WAITS = (5, 15, 30)
"""Seconds until it is tried again: a killed engine's own process may outlive it by some."""

ADVICE = {
    False: "Choose another model or dtype, or engine.kind=transformers",
    True: "Lower engine.gpu_memory_utilization, or end what else holds memory of this GPU",
}


class VLLMEngine:
    """vLLM behind a loop thread: `replies` may be called by many threads at once."""

    def __init__(
        self,
        llm: LLMConfig,
        config: EngineConfig,
        decoding: Decoding,
        threads: int,
        adapters: Adapters | None = None,
        sizes: PromptSizes | None = None,
    ) -> None:
        if decoding.num_beams > 1:
            raise InputError("decoding.num_beams needs engine.kind=transformers; the vllm engine samples or is greedy")
        folder = model_folder(llm.model, llm.revision)
        sizes = sizes or PromptSizes()
        self._folder, self._ready, self._numbers = folder, False, 0
        self.tokenizer = load_tokenizer(folder)
        self._prompt_builder = PromptBuilder(self.tokenizer, llm.layout, encoder_decoder=False)
        self.use(decoding)
        embeddings = sizes.rows != 0
        longest = longest_of(self._prompt_builder, sizes, decoding.max_tokens)
        penalised = decoding.repetition_penalty != 1
        args = engine_args(str(folder), config, threads, embeddings=embeddings, longest=longest, penalised=penalised)
        args |= lora_args(config, adapters)
        self._words = TemporaryDirectory(prefix="pplug-engine-")
        args |= tokenizer_args(folder, self.tokenizer, Path(self._words.name))
        args |= model_args(folder, config, Path(self._words.name) / "model")
        self._engine: Any = None
        self._adapters: LoadedAdapters | None = None
        self._none: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True)
        self._thread.start()
        try:
            self._begin_with_room(folder, args, adapters, embeddings)
        except InputError:
            self.shutdown()
            raise
        self._ready = True

    def use(self, decoding: Decoding) -> None:
        """Answers by this decoding from now on."""
        self.decoding = decoding
        self.ending = Ending(self._folder, self._prompt_builder, decoding)
        self.end_ids = self.ending.stop_ids
        labels = decoding.labels if isinstance(decoding, ResolvedDecoding) else ()
        self.label_ids = written(labels, self._prompt_builder.words)
        self._structured = structured(decoding, self.label_ids)

    def _begin_with_room(self, folder: Path, args: dict[str, Any], adapters: Adapters | None, embeddings: bool) -> None:
        """Starts the engine, again where another process was just about to set memory of the GPU free.

        Raises:
            InputError: it does not start.
        """
        with LastWords() as words:
            for wait in (*WAITS, 0):
                try:
                    return self._begin(folder, args, adapters, embeddings)
                except InputError:
                    raise
                except Exception as error:  # vLLM has many kinds of its own, and the cause is in another process
                    cause = words.error() or f"{type(error).__name__}: {error}"
                    held = any(words_of_vllm in cause for words_of_vllm in HELD)
                    if not (held and wait):
                        raise InputError(
                            f"llm {folder}: vLLM does not start with this model and these engine settings ({cause}); "
                            f"the lines above say more. {ADVICE[held]}"
                        ) from error
                log.warning("engine: too little of the GPU's memory is free yet; tries again in %d s", wait)
                time.sleep(wait)

    def _begin(self, folder: Path, args: dict[str, Any], adapters: Adapters | None, embeddings: bool) -> None:
        """Starts the engine and asks it for a first token, so that one that cannot answer is known before a request."""
        self._engine = self._wait(self._start(args))
        model = self._engine.vllm_config.model_config
        self.context, self.dim, self.dtype = model.max_model_len, model.get_hidden_size(), model.dtype
        self.about = f"vllm, {str(self.dtype).removeprefix('torch.')}"
        self.max_row_norm = 0.0
        if adapters is not None:
            shelf = AdapterShelf(adapters, folder)
            self._adapters = LoadedAdapters(self._engine, shelf, args["max_cpu_loras"] - 1)
            if device.assigned().type == "cpu":
                self._none = self._wait(self._adapters.none())
        if embeddings:
            self.probe(folder)
        self._try_decoding()

    def _try_decoding(self) -> None:
        """Asks for a first token by the decoding, which vLLM would otherwise refuse for each request by itself.

        Raises:
            InputError: it refuses the decoding; the message has its words.
        """
        from vllm.exceptions import VLLMClientError

        prompt = self._probe_prompt()
        try:
            sampling = self._sampling(prompt)
            sampling.max_tokens, sampling.min_tokens = 1, 0
            self._wait(self._generate(prompt, sampling))
        except (ValueError, VLLMClientError) as error:
            raise InputError(f"decoding: vLLM does not take it ({error}); correct the key") from error

    async def _start(self, args: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        if device.assigned().type == "cpu" and not current_platform.is_cpu():
            raise InputError(
                "engine: no GPU was assigned to this engine, and the installed vLLM is built for GPUs; set "
                "gpus_per_worker=1, or install the extra `cpu`"
            )
        if not metrics.are_exported():
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))
        counted = AsyncEngineArgs(**args | {"disable_log_stats": False})
        return AsyncLLM.from_engine_args(counted, stat_loggers=[EngineStats])

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _probe_prompt(self) -> EnginePrompt:
        room = min(24, self.context - 1)
        return EnginePrompt("probe", self.tokenizer(PROBE)["input_ids"][:room], np.zeros((0, self.dim), np.float32), [])

    def probe(self, folder: Path) -> None:
        """The first token's log-probabilities must be the same for the same tokens given as ids and as embeddings.

        The two prompts go one after the other: some models' replies depend on what is in the batch.

        Raises:
            InputError: they differ: the model treats embeddings in a way of its own.
        """
        by_ids = self._probe_prompt()
        ids = by_ids.before
        rows = embedding_rows(folder, ids).numpy()
        self.max_row_norm = 1000.0 * float(np.linalg.norm(rows, axis=1).max())
        middle = len(ids) // 2
        by_rows = EnginePrompt("probe-rows", ids[:1], rows[1:middle], ids[middle:])
        first, second = (
            {token: found.logprob for token, found in self._first(prompt).items()} for prompt in (by_ids, by_rows)
        )
        least = min(second.values())  # a token that is not among the likeliest is no likelier than these
        apart = max(
            abs(value - second[token]) if token in second else max(0.0, value - least) for token, value in first.items()
        )
        if not apart <= TOLERANCE[self.dtype]:
            raise InputError(
                f"llm {folder}: the engine replies otherwise to the same tokens given as embeddings (log-probabilities "
                f"of the first token differ by {apart:.3g}); a plug cannot work with this model, choose one that takes "
                "embeddings as they are. Methods without a plug work with it"
            )

    def _first(self, prompt: EnginePrompt) -> Any:
        """Log-probabilities of the likeliest first tokens."""
        return self._wait(self._generate(prompt, self._first_tokens())).logprobs[0]

    def _first_tokens(self) -> Any:
        return self._params(temperature=0.0, max_tokens=1, logprobs=PROBED)

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        """One reply per prompt, in order."""
        return self._wait(self._all([self._reply(prompt) for prompt in prompts])) if prompts else []

    def next_logprobs(self, asked: Sequence[NextTokens]) -> list[list[float] | None]:
        """Log-probabilities of the asked tokens, in order; see `Engine`."""
        return self._wait(self._all([self._next(one) for one in asked])) if asked else []

    async def _all(self, questions: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
        return await asyncio.gather(*questions)

    async def _next(self, asked: NextTokens) -> list[float] | None:
        prompt = asked.prompt
        going_on = EnginePrompt(
            prompt.key, prompt.before, prompt.soft_prompt, [*prompt.after, *asked.begun], prompt.adapter
        )
        sampling = self._params(temperature=0.0, max_tokens=1, logprob_token_ids=list(asked.ids))
        try:
            (found,) = (await self._generate(going_on, sampling)).logprobs
        except Exception:  # as in `_reply`: the row becomes an error
            return None
        return [found[token].logprob for token in asked.ids]

    async def _reply(self, prompt: EnginePrompt) -> EngineReply:
        try:
            reply = await self._generate(prompt, self._sampling(prompt))
        except Exception as error:  # vLLM's own errors have no base but Exception
            said = str(error) if isinstance(error, _AdapterError) else ""
            return EngineReply("", "error", 0, said or f"the engine refused the prompt ({type(error).__name__})")
        ids = list(reply.token_ids)
        if reply.finish_reason not in ("stop", "length"):
            return EngineReply("", "error", 0, f"the engine gave the prompt up ({reply.finish_reason})")
        text, notes = reply.text, tuple[str, ...]()
        if self._structured is None:
            answer, notes = self.ending.answer(ids, prompt.after or prompt.before)
            text = text if answer is None else answer
        logprobs = None
        if self.decoding.logprobs:
            logprobs = [step[token].logprob for step, token in zip(reply.logprobs, ids, strict=True)]
        return EngineReply(text, reply.finish_reason, len(ids), None, logprobs, notes)

    async def _generate(self, prompt: EnginePrompt, sampling: Any) -> Any:
        """The engine's own output for a prompt."""
        from vllm.v1.engine.exceptions import EngineDeadError

        self._numbers += 1
        number, final, lora = f"{self._numbers}", None, self._none
        try:
            if prompt.adapter is not None:
                assert self._adapters is not None, "prompts with adapters come with the table of adapters"
                try:
                    lora = await self._adapters.hold(prompt.adapter)
                except ValueError as error:
                    raise _AdapterError(str(error)) from error
            try:
                inputs = self._inputs(prompt)
                async for output in self._engine.generate(inputs, sampling, number, lora_request=lora):
                    final = output
            finally:
                if prompt.adapter is not None and self._adapters is not None:
                    await self._adapters.let_go(prompt.adapter)
        except EngineDeadError:
            if not self._ready:
                raise
            # exit_actor is not retried and raising would leave a dead actor to be called again (ray#59522)
            log.error("pipelines.engines.vllm: the engine died; this actor ends, so that Ray starts another")
            os._exit(1)
        assert final is not None, "the engine's stream ends with an output"
        return final.outputs[0]

    def _inputs(self, prompt: EnginePrompt) -> dict[str, Any]:
        """Inputs of vLLM: token ids with zeros beside the soft prompt (mixed mode), or plain ids without one.

        vLLM takes no fewer rows than there are positions (0.32: their numbers have to be equal).
        """
        if not len(prompt.soft_prompt):
            return {"prompt_token_ids": prompt.before + prompt.after}
        start, stop = len(prompt.before), len(prompt.before) + len(prompt.soft_prompt)
        embeddings = torch.zeros(len(prompt), self.dim, dtype=self.dtype)
        embeddings[start:stop] = torch.from_numpy(np.array(prompt.soft_prompt))
        is_token = [True] * len(prompt)
        is_token[start:stop] = [False] * len(prompt.soft_prompt)
        # The ids beside rows are read by the repetition penalty alone: one that stands in the prompt anyway adds none.
        beside = (prompt.before or prompt.after)[0] if self.decoding.repetition_penalty != 1 else 0
        return {
            "prompt_embeds": embeddings,
            "prompt_token_ids": prompt.before + [beside] * len(prompt.soft_prompt) + prompt.after,
            "prompt_is_token_ids": is_token,
        }

    def _sampling(self, prompt: EnginePrompt) -> Any:
        from vllm.sampling_params import StructuredOutputsParams

        decoding = self.decoding
        return self._params(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            top_k=decoding.top_k,
            min_p=decoding.min_p,
            repetition_penalty=decoding.repetition_penalty,
            presence_penalty=decoding.presence_penalty,
            frequency_penalty=decoding.frequency_penalty,
            max_tokens=decoding.max_tokens,
            min_tokens=decoding.min_tokens,
            stop=self.ending.stop_texts or None,
            stop_token_ids=list(self.ending.stop_ids),
            seed=own_seed(decoding.seed, prompt.key) if decoding.temperature else None,
            logprobs=0 if decoding.logprobs else None,
            structured_outputs=StructuredOutputsParams(**self._structured) if self._structured else None,
        )

    def _params(self, **values: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **values)

    def shutdown(self) -> None:
        """Ends the engine's processes; without it they would outlive the actor."""
        if self._engine is not None:
            self._loop.call_soon_threadsafe(self._engine.shutdown)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
        if self._adapters is not None:
            self._adapters.shelf.close()
        self._engine = self._adapters = None
        self._words.cleanup()
        gc.collect()  # left to the interpreter's end, the engine's own __del__ fails and prints a traceback


class _AdapterError(ValueError):
    """The words of `LoadedAdapters.hold`, which name the adapter and quote no text of a user."""
