"""Stage: prompts -> replies, through one engine an actor that never waits for a batch to end.

vLLM runs in a loop thread of our own; the stage is plain and is called by several threads at once, so many small
batches are in flight (Ray's own async path blocks the event loop it would share with the engine). Every persona row is
checked before it reaches the engine: a wrong width kills it, and one NaN spoils the next request's reply.
An adapter is fetched, checked and added to the engine before its first request is handed over: one that cannot be used
is that row's error, where inside the engine it would be the engine's end.
A dead engine ends the actor, so that Ray starts another and repeats the batch; a row that cannot be answered becomes a
row with `error`.
Shapes: L prompt positions, R persona rows, H LLM width.
"""

import asyncio
import gc
import json
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from infra.errors import InputError
from pipelines.engines.adapters import AdapterName, Adapters, AdapterShelf
from pplug.identity import model_folder, short_id
from pplug.llm import LLMConfig

log = logging.getLogger(__name__)

PROBE = "The quick brown fox jumps over the lazy dog, and then it rests in the sun."


class Decoding(BaseModel):
    """How a reply is chosen; makes up `decoding_id`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    max_tokens: int = Field(32, gt=0)
    """Of the reply."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    beams: int = Field(1, gt=0)
    """transformers engine only; the paper uses 4."""
    stop: tuple[str, ...] = ()
    """A reply ends before the first of these."""
    seed: int = 0
    """Seed of sampling. Each reply draws by its own user, request and method, whatever batch it is in."""

    @property
    def decoding_id(self) -> str:
        return short_id(self.model_dump(mode="json"))


class EngineConfig(BaseModel):
    """Which engine, and how much of the machine it may take. No value of a reply depends on it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    kind: Literal["vllm", "transformers"] = "vllm"
    """transformers: for encoder-decoder models such as FLAN-T5, which vLLM does not have, and for beams."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 on a GPU and on a CPU with AMX, float32 elsewhere."""
    context: int | None = Field(None, gt=0)
    """Tokens of prompt and reply; default: the model's own limit."""
    max_num_seqs: int = Field(256, gt=0)
    """Requests the engine works on at once."""
    memory_fraction: float = Field(0.85, gt=0, le=1)
    """Of the GPU's memory."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """On a CPU."""
    eager: bool | None = None
    """No compilation; default: true on a CPU, where it starts a minute faster."""
    batch_rows: int = Field(64, gt=0)
    """Requests handed over at a time."""
    in_flight: int = Field(8, gt=0)
    """Batches in flight an engine: batch_rows * in_flight should exceed max_num_seqs."""
    adapters_at_once: int = Field(32, gt=0)
    """Adapters in one step of the engine; each takes room in its memory."""
    adapters_ready: int = Field(512, gt=0)
    """Adapters held in the machine's memory, the least recently used leave first."""


@dataclass(frozen=True)
class EnginePrompt:
    """Token ids around persona rows (R, H) float32 (R may be 0)."""

    key: str
    """What a sampled reply draws by: no two prompts of a run share it."""
    before: list[int]
    rows: np.ndarray
    after: list[int]
    adapter: AdapterName | None = None

    def __len__(self) -> int:
        return len(self.before) + len(self.rows) + len(self.after)


@dataclass(frozen=True)
class EngineReply:
    text: str
    finish_reason: str
    output_tokens: int
    error: str | None = None


class Engine(Protocol):
    """What the stage needs of an engine."""

    context: int
    dim: int
    max_row_norm: float

    def replies(self, prompts: Sequence[EnginePrompt]) -> list[EngineReply]: ...

    def shutdown(self) -> None: ...


REPLIES = pa.schema(
    {
        "bucket": pa.int32(),
        "user_key": pa.string(),
        "run_id": pa.string(),
        "request_id": pa.string(),
        "method": pa.string(),
        "user_id": pa.string(),
        "text": pa.string(),
        "finish_reason": pa.string(),
        "prompt_tokens": pa.int32(),
        "output_tokens": pa.int32(),
        "persona": pa.string(),
        "llm_id": pa.string(),
        "plug_id": pa.string(),
        "adapter_id": pa.string(),
        "encoder_id": pa.string(),
        "decoding_id": pa.string(),
        "error": pa.string(),
        "notes": pa.list_(pa.string()),  # counted in the report, not stored
    }
)
_CARRIED = ("bucket", "user_key", "request_id", "method", "user_id", "persona", "plug_id", "adapter_id", "encoder_id",
            "notes")  # fmt: skip


class Reply:
    """Stage: one reply a prompt.

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
        threads: int,
        adapters: Adapters | None = None,
    ) -> None:
        self.decoding, self.llm_id, self.run_id = decoding, llm_id, run_id
        self.engine: Engine
        if engine.kind == "vllm":
            self.engine = VLLMEngine(llm, engine, decoding, threads, adapters)
        else:
            from pipelines.engines.transformers import TransformersEngine

            self.engine = TransformersEngine(llm, engine, decoding, threads)

    def __call__(self, batch: pa.Table) -> pa.Table:
        prompts, errors = [], batch["error"].to_pylist()
        before, after = batch["before"].to_pylist(), batch["after"].to_pylist()
        keys, adapter_ids = batch["adapter_key"].to_pylist(), batch["adapter_id"].to_pylist()
        keys_of = zip(*(batch[name].to_pylist() for name in ("user_id", "request_id", "method")), strict=True)
        for i, key in enumerate(keys_of):
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
        }
        return pa.table({name: columns[name] for name in REPLIES.names}, schema=REPLIES)

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
            f"beside max_tokens={self.decoding.max_tokens}; lower llm.layout.max_input_tokens or raise engine.context"
        )


def check_rows(flat: np.ndarray, dim: int, max_norm: float) -> str | None:
    """Why these persona rows must not reach the engine; None when they may."""
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
        import torch

        if decoding.beams > 1:
            raise InputError("decoding.beams needs engine.kind=transformers; the vllm engine samples or is greedy")
        folder = model_folder(llm.model, llm.revision)
        args = self._engine_args(str(folder), config, threads) | _lora_args(config, adapters)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm-loop", daemon=True)
        self._thread.start()
        self._engine = self._wait(self._start(args))
        model = self._engine.vllm_config.model_config
        self.context, self.dim, self._dtype = model.max_model_len, model.get_hidden_size(), model.dtype
        self.decoding = decoding
        self._numbers = 0
        self._adapters: LoadedAdapters | None = None
        self._none: Any = None
        if adapters is not None:
            shelf = AdapterShelf(adapters, folder)
            self._adapters = LoadedAdapters(self._engine, shelf, args["max_cpu_loras"] - 1)
            if not torch.cuda.is_available():
                self._none = self._wait(self._adapters.none())
        self._probe(folder)

    def _engine_args(self, folder: str, config: EngineConfig, threads: int) -> dict[str, Any]:
        import torch

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
            "max_model_len": config.context,
            "max_num_seqs": config.max_num_seqs,
            "distributed_executor_backend": executor,
            "gpu_memory_utilization": config.memory_fraction,
            "enforce_eager": config.eager if config.eager is not None else not gpu,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "disable_log_stats": True,
            "generation_config": "vllm",
        }

    async def _start(self, args: dict[str, Any]) -> Any:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(AsyncEngineArgs(**args))

    def _wait(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _probe(self, folder: Any) -> None:
        """Replies to the same tokens as ids and as embeddings must be equal.

        Raises:
            InputError: they differ: the model treats embeddings in a way of its own (Gemma scales them inside).
        """
        from pplug.llm import embedding_rows, load_tokenizer

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
        """One reply a prompt, in order."""
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
        """Mixed mode: token ids with zero rows beside the persona rows; plain ids without a persona."""
        import torch

        if not len(prompt.rows):
            return {"prompt_token_ids": prompt.before + prompt.after}
        start, stop = len(prompt.before), len(prompt.before) + len(prompt.rows)
        embeddings = torch.zeros(len(prompt), self.dim, dtype=self._dtype)
        embeddings[start:stop] = torch.from_numpy(np.array(prompt.rows))
        is_token = [True] * len(prompt)
        is_token[start:stop] = [False] * len(prompt.rows)
        return {
            "prompt_embeds": embeddings,
            "prompt_token_ids": prompt.before + [0] * len(prompt.rows) + prompt.after,
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


@dataclass
class _Loaded:
    request: "asyncio.Task[Any]"
    """Of the LoRARequest under which the engine knows it."""
    users: int = 0
    """Requests that hold it."""


class LoadedAdapters:
    """The adapters in an engine: added before use, held while requests use them, the least recently used leave first.

    Lives in the engine's loop; none of its methods is for another thread.
    """

    def __init__(self, engine: Any, shelf: AdapterShelf, room: int) -> None:
        self.engine, self.shelf, self.room = engine, shelf, room
        self._loaded: OrderedDict[AdapterName, _Loaded] = OrderedDict()
        self._changed = asyncio.Condition()
        self._numbers = 0

    async def none(self) -> Any:
        """The engine's request for an adapter that adds nothing, which stays.

        vLLM's CPU kernels index the slots of adapters with -1 for a row that has none: once all slots are taken, such a
        row gets the adapter of the last one, which is somebody else's (seen with vLLM 0.32). So no row is without.
        """
        from vllm.lora.request import LoRARequest

        self._numbers += 1
        request = LoRARequest("none", self._numbers, str(self.shelf.put_nothing()))
        await self.engine.add_lora(request)
        return request

    async def hold(self, name: AdapterName) -> Any:
        """The engine's request for this adapter, which stays until `let_go`.

        Raises:
            ValueError: it is not in the table, not what it has to be, cannot be fetched or laid out, or the engine
                does not take it.
        """
        while name not in self._loaded and len(self._loaded) >= self.room:
            idle = next((other for other, loaded in self._loaded.items() if not loaded.users), None)
            if idle is not None:
                await self._remove(idle)
                continue
            async with self._changed:
                await self._changed.wait()
        if name not in self._loaded:
            self._loaded[name] = _Loaded(asyncio.ensure_future(self._load(name)))
        loaded = self._loaded[name]
        loaded.users += 1
        self._loaded.move_to_end(name)
        try:
            return await asyncio.shield(loaded.request)
        except Exception:
            loaded.users -= 1
            if self._loaded.get(name) is loaded:  # the first to see it; the others hold the same object
                del self._loaded[name]
                await self._tell()
            raise

    async def let_go(self, name: AdapterName) -> None:
        self._loaded[name].users -= 1
        await self._tell()

    async def _load(self, name: AdapterName) -> Any:
        path = await self._laid_out(name)
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.exceptions import EngineDeadError

        self._numbers += 1
        request = LoRARequest(str(name), self._numbers, str(path))
        try:
            await self.engine.add_lora(request)
        except EngineDeadError:
            raise
        except Exception as error:  # the engine hands over whatever its loader raised
            self.shelf.drop(name)
            what = f"adapter {name.adapter_id}: the engine does not take it ({type(error).__name__})"
            raise ValueError(what) from error
        return request

    async def _laid_out(self, name: AdapterName) -> Any:
        """The adapter's folder. Raises ValueError, whatever the table's storage or the memory's disk raised."""
        try:
            return await asyncio.get_running_loop().run_in_executor(None, self.shelf.put, name)
        except ValueError:
            raise
        except Exception as error:
            self.shelf.drop(name)  # half a folder takes room, too
            said = getattr(error, "strerror", None)  # without the path, which is of this machine
            what = type(error).__name__ + (f": {said}" if said else "")
            problem = f"adapter {name.adapter_id}: it cannot be fetched or laid out in memory ({what})"
            raise ValueError(problem) from error

    async def _remove(self, name: AdapterName) -> None:
        request = self._loaded.pop(name).request.result()
        self.shelf.drop(name)  # at once: when the engine has answered, somebody may have laid it out anew
        await self.engine.remove_lora(request.lora_int_id)
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be made ready for (vllm.config.lora)."""


def _lora_args(config: EngineConfig, adapters: Adapters | None) -> dict[str, Any]:
    """Makes the engine ready for just these adapters: their rank, their modules, as many as there are."""
    if adapters is None:
        return {}
    rank = next((rank for rank in LORA_RANKS if rank >= adapters.rank), None)
    if rank is None:
        raise InputError(f"adapters have rank {adapters.rank}; the vllm engine takes at most {LORA_RANKS[-1]}")
    ready = min(adapters.snapshot.rows, config.adapters_ready)
    return {
        "enable_lora": True,
        "max_lora_rank": rank,
        "max_loras": min(ready, config.adapters_at_once) + 1,  # and one that adds nothing
        "max_cpu_loras": ready + 1,
        "lora_target_modules": list(adapters.targets),
    }


def own_seed(seed: int, key: str) -> int:
    """A reply's own sampling seed: the same in any batch. `key`: of the `EnginePrompt`."""
    return int(short_id({"seed": seed, "reply": key})[:8], 16)
