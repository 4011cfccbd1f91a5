"""vLLM in a loop thread of our own: many small batches in flight, and no wait for a batch to end.

Ray's own asynchronous path blocks the event loop that it would share with the engine. A dead engine ends the actor, so
that Ray starts another and repeats the batch.
Shapes: L prompt positions, R persona rows, H LLM width.
"""

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from infra.errors import InputError
from pipelines.engines.adapters import Adapters, AdapterShelf
from pipelines.engines.base import Decoding, EngineConfig, EnginePrompt, EngineReply, own_seed
from pipelines.engines.lora_cache import LoadedAdapters
from pplug.identity import model_folder
from pplug.llm import LLMConfig, embedding_rows, load_tokenizer

log = logging.getLogger(__name__)

PROBE = "The quick brown fox jumps over the lazy dog, and then it rests in the sun."


class VLLMEngine:
    """vLLM behind a loop thread: `replies` may be called by many threads at once."""

    def __init__(
        self,
        llm: LLMConfig,
        config: EngineConfig,
        decoding: Decoding,
        threads: int,
        adapters: Adapters | None = None,
    ) -> None:
        if decoding.num_beams > 1:
            raise InputError("decoding.num_beams needs engine.kind=transformers; the vllm engine samples or is greedy")
        folder = model_folder(llm.model, llm.revision)
        args = engine_args(str(folder), config, threads) | _lora_args(config, adapters)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True)
        self._thread.start()
        self._engine = self._wait(self._start(args))
        model = self._engine.vllm_config.model_config
        self.context, self.dim, self.dtype = model.max_model_len, model.get_hidden_size(), model.dtype
        self.decoding = decoding
        self._numbers = 0
        self._adapters: LoadedAdapters | None = None
        self._none: Any = None
        if adapters is not None:
            shelf = AdapterShelf(adapters, folder)
            self._adapters = LoadedAdapters(self._engine, shelf, args["max_cpu_loras"] - 1)
            if not torch.cuda.is_available():
                self._none = self._wait(self._adapters.none())
        self.probe(folder)

    async def _start(self, args: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def probe(self, folder: Any) -> None:
        """Replies to the same tokens as ids and as embeddings must be equal.

        Raises:
            InputError: they differ: the model treats embeddings in a way of its own (Gemma scales them inside).
        """
        ids = load_tokenizer(folder)(PROBE)["input_ids"][:24]
        rows = embedding_rows(folder, ids).numpy()
        self.max_row_norm = 1000.0 * float(np.linalg.norm(rows, axis=1).max())
        middle = len(ids) // 2
        none = np.zeros((0, self.dim), np.float32)
        asked = [
            EnginePrompt("probe-ids", ids, none, []),
            EnginePrompt("probe-rows", ids[:1], rows[1:middle], ids[middle:]),
        ]
        by_ids, by_rows = self._wait(self._many(asked, greedy_tokens=8))
        if by_ids.error or by_rows.error or by_ids.text != by_rows.text:
            raise InputError(
                f"llm {folder}: the engine replies otherwise to the same tokens given as embeddings "
                f"({by_ids.error or by_rows.error or 'different replies'}); a plug cannot work with this model, choose "
                "one that takes embeddings as they are"
            )

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]:
        """One reply per prompt, in order."""
        return self._wait(self._many(prompts)) if prompts else []

    async def _many(self, prompts: Sequence[EnginePrompt], greedy_tokens: int | None = None) -> list[EngineReply]:
        return await asyncio.gather(*(self._one(prompt, greedy_tokens) for prompt in prompts))

    async def _one(self, prompt: EnginePrompt, greedy_tokens: int | None) -> EngineReply:
        from vllm.v1.engine.exceptions import EngineDeadError

        self._numbers += 1
        number, final, lora = f"{self._numbers}", None, self._none
        try:
            if prompt.adapter is not None:
                assert self._adapters is not None, "prompts with adapters come with the table of adapters"
                try:
                    lora = await self._adapters.hold(prompt.adapter)
                except ValueError as error:
                    return EngineReply("", "error", 0, str(error))
            try:
                inputs, sampling = self._inputs(prompt), self._sampling(prompt, greedy_tokens)
                async for output in self._engine.generate(inputs, sampling, number, lora_request=lora):
                    final = output
            finally:
                if prompt.adapter is not None and self._adapters is not None:
                    await self._adapters.let_go(prompt.adapter)
        except EngineDeadError:
            # exit_actor is not retried and raising would leave a dead actor to be called again (ray#59522)
            log.error("the engine died; this actor ends, so that Ray starts another")
            os._exit(1)
        except (ValueError, RuntimeError, TypeError) as error:
            return EngineReply("", "error", 0, f"the engine refused the prompt ({type(error).__name__})")
        assert final is not None, "the engine's stream ends with an output"
        reply = final.outputs[0]
        return EngineReply(reply.text, reply.finish_reason or "", len(reply.token_ids))

    def _inputs(self, prompt: EnginePrompt) -> dict[str, Any]:
        """Inputs of vLLM: token ids with zeros beside the soft prompt (mixed mode), or plain ids without one."""
        if not len(prompt.soft_prompt):
            return {"prompt_token_ids": prompt.before + prompt.after}
        start, stop = len(prompt.before), len(prompt.before) + len(prompt.soft_prompt)
        embeddings = torch.zeros(len(prompt), self.dim, dtype=self.dtype)
        embeddings[start:stop] = torch.from_numpy(np.array(prompt.soft_prompt))
        is_token = [True] * len(prompt)
        is_token[start:stop] = [False] * len(prompt.soft_prompt)
        return {
            "prompt_embeds": embeddings,
            "prompt_token_ids": prompt.before + [0] * len(prompt.soft_prompt) + prompt.after,
            "prompt_is_token_ids": is_token,
        }

    def _sampling(self, prompt: EnginePrompt, greedy_tokens: int | None) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        last_only = RequestOutputKind.FINAL_ONLY
        if greedy_tokens is not None:
            return SamplingParams(temperature=0.0, max_tokens=greedy_tokens, output_kind=last_only)
        decoding = self.decoding
        return SamplingParams(
            temperature=decoding.temperature,
            top_p=decoding.top_p,
            max_tokens=decoding.max_tokens,
            stop=list(decoding.stop) or None,
            seed=own_seed(decoding.seed, prompt.key) if decoding.temperature else None,
            output_kind=last_only,
        )

    def shutdown(self) -> None:
        """Ends the engine's processes; without it they would outlive the actor."""
        if self._engine is not None:
            self._loop.call_soon_threadsafe(self._engine.shutdown)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
        if self._adapters is not None:
            self._adapters.shelf.close()
        self._engine = self._adapters = None
        gc.collect()  # left to the interpreter's end, the engine's own __del__ fails and prints a traceback


def engine_args(folder: str, config: EngineConfig, threads: int) -> dict[str, Any]:
    """Arguments of vLLM's engine, and the environment variables that it reads, for the machine that this runs on."""
    gpu = torch.cuda.is_available()
    dtype, executor = config.dtype, None
    if not gpu:
        # Ray gives a worker one thread; the engine's own process reads these when it starts.
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.kv_cache_gib))))
        amx = torch.cpu._is_amx_tile_supported()
        if dtype == "auto":
            dtype = "bfloat16" if amx else "float32"
        if dtype == "bfloat16" and amx:
            torch.cpu._init_amx()  # without it the attention kernel dies with SIGILL
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the permission goes to children, not beyond exec
        # The model runs in the engine's process, not in a third one, on which the engine would wait in a busy loop
        # that takes a core: 1,439 output tokens/s with a plug for 1,135 (two cores with AMX, one run each), 2,000
        # short replies in 17 s for 21 (AVX2), and 15 s of imports fewer at the start (vLLM 0.32). With the variable
        # unset vLLM changes the executor back.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        executor = "uni"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    log.info("engine: %s, dtype %s", "GPU" if gpu else f"CPU with {threads} threads", dtype)
    return {
        "model": folder,
        "dtype": dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "distributed_executor_backend": executor,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not gpu,
        "enable_prompt_embeds": True,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "generation_config": "vllm",
    }


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be made ready for (vllm.config.lora)."""


def _lora_args(config: EngineConfig, adapters: Adapters | None) -> dict[str, Any]:
    """Makes the engine ready for just these adapters: their rank, their modules, as many as there are."""
    if adapters is None:
        return {}
    rank = next((rank for rank in LORA_RANKS if rank >= adapters.rank), None)
    if rank is None:
        raise InputError(f"adapters have rank {adapters.rank}; the vllm engine takes at most {LORA_RANKS[-1]}")
    ready = min(adapters.snapshot.rows, config.max_cpu_loras)
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": min(ready, config.max_loras) + 1,  # and one that adds nothing
        "max_cpu_loras": ready + 1,
        "lora_target_modules": list(adapters.targets),
    }
