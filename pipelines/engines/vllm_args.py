"""Arguments of vLLM's engine: what a job asks for, and what the machine that it runs on makes of it."""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infra import device
from infra.errors import InputError
from pipelines.engines.adapters import Adapters
from pipelines.engines.base import EngineConfig, PromptSizes
from pplug.bert import bf16_is_quicker
from pplug.identity import INDICES
from pplug.llm import misleads
from pplug.splice import PromptBuilder

log = logging.getLogger(__name__)

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM can be made ready for (vllm.config.lora)."""
SPARE = 8
"""Number of tokens beyond those counted: text may take more when it is tokenised with what stands around it."""
LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length")
"""Names under which a model's config holds the number of positions."""


def engine_args(
    folder: str,
    config: EngineConfig,
    threads: int,
    *,
    embeddings: bool = True,
    longest: int | None = None,
    penalised: bool = False,
) -> dict[str, Any]:
    """Arguments of vLLM's engine, and the environment variables that it reads, for the machine that this runs on.

    Args:
        embeddings: whether prompts hold persona rows.
        longest: tokens that a prompt and its reply take together at most; None where it is not known.
        penalised: whether tokens of the prompt are made less likely in the reply.

    Raises:
        InputError: Ray has assigned a GPU that cannot be used.
    """
    gpu = device.assigned().type == "cuda"
    dtype = resolved_dtype(config, gpu)
    parallel = config.pipeline_parallel_size
    tensor = config.tensor_parallel_size or max(1, device.assigned_gpus() // parallel)
    executor = "mp" if tensor * parallel > 1 else None
    if gpu:
        _prepare_gpu(dtype, rows_count=embeddings and penalised)
    else:
        _prepare_cpu(config, threads, dtype, tensor * parallel)
        executor = executor or "uni"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    log.info("engine: %s, dtype %s", "GPU" if gpu else f"CPU with {threads} threads", dtype)
    return {
        "model": folder,
        "dtype": dtype,
        "max_model_len": config.max_model_len or within_limit(Path(folder), longest),
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": parallel,
        "distributed_executor_backend": executor,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "quantization": config.quantization,
        "kv_cache_dtype": config.kv_cache_dtype,
        "load_format": config.load_format,
        "trust_remote_code": config.trust_remote_code,
        "enforce_eager": config.enforce_eager if config.enforce_eager is not None else not gpu,
        "enable_prompt_embeds": embeddings,
        "enable_prefix_caching": config.enable_prefix_caching,
        "disable_log_stats": True,
        "generation_config": "vllm",  # takes the end tokens of the folder's file, and nothing else
        **_transformers_form(Path(folder), config),
    } | config.args


def _transformers_form(folder: Path, config: EngineConfig) -> dict[str, str]:
    """Has vLLM read config, tokenizer and weights as transformers does, from the files that the LLM's identity covers.

    A whole Mistral folder holds them in the publisher's own form too (`consolidated*.safetensors`, params.json), which
    vLLM would take by itself.
    """
    if not any(folder.glob("consolidated*.safetensors")):
        return {}
    weights = {"load_format": "hf"} if config.load_format == "auto" else {}
    return {"config_format": "hf", "tokenizer_mode": "hf"} | weights


def model_args(folder: Path, config: EngineConfig, place: Path) -> dict[str, Any]:
    """Makes vLLM take the weights that transformers reads from a whole Mistral folder that has no index of them: it
    would read the publisher's own form as well, and stop at the names of its tensors.

    Args:
        place: folder for links to all other files, which the engine reads when it starts.
    """
    if (folder / INDICES[0]).is_file() or config.load_format == "mistral":
        return {}
    own = set(folder.glob("consolidated*"))
    if not any(path.suffix == ".safetensors" for path in own):
        return {}
    place.mkdir()
    for path in folder.iterdir():
        if path not in own:
            (place / path.name).symlink_to(path.absolute())
    return {"model": str(place)}


def tokenizer_args(folder: Path, tokenizer: Any, place: Path) -> dict[str, Any]:
    """Makes vLLM take this tokenizer where it would choose another one by the model's folder: it decodes replies and
    looks for stop texts by its own.

    Args:
        tokenizer: that of `load_tokenizer(folder)`.
        place: folder for a copy of it, which the engine reads when it starts.
    """
    if not misleads(folder):
        return {}
    tokenizer.save_pretrained(place)
    return {"tokenizer": str(place)}


def resolved_dtype(config: EngineConfig, gpu: bool) -> str:
    """The number format on this machine, on a CPU by the speed of its products.

    On a CPU with AVX512-BF16 and quick products in bfloat16 it was 1.9 times (prefill) to 4.8 times (decoding) as fast
    as float32 (SmolLM2-135M, vLLM 0.32, per second of processor time).
    """
    if config.dtype != "auto" or gpu:
        return config.dtype
    return "bfloat16" if bf16_is_quicker() else "float32"


def _prepare_gpu(dtype: str, rows_count: bool) -> None:
    # Looking for a GPU, as has been done by now, makes a forked process unable to use it, and vLLM looks for no more
    # than whether it has been used. In a Ray actor it takes spawn by itself.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if dtype == "float32":  # which attention and adapters compute in Triton, whose own choice are products in TF32
        os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    if rows_count:  # Model Runner V2 would count a persona row as the token 0; the older one takes what is given beside
        os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def _prepare_cpu(config: EngineConfig, threads: int, dtype: str, processes: int) -> None:
    # Ray gives a worker one thread; the engine's own process reads these when it starts.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.kv_cache_gib))))
    if dtype == "bfloat16" and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()  # without it the attention kernel dies with SIGILL
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"  # the permission goes to children, not beyond exec
    if processes > 1:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores_of(processes, sorted(os.sched_getaffinity(0))))
        return
    # The model runs in the engine's process, not in a third one, on which the engine would wait in a busy loop
    # that takes a core: 1,439 output tokens/s with a plug for 1,135 (two cores with AMX, one run each), 2,000
    # short replies in 17 s for 21 (AVX2), and 15 s of imports fewer at the start (vLLM 0.32). With the variable
    # unset vLLM changes the executor back.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


def cores_of(processes: int, cores: Sequence[int]) -> str:
    """The cores of each process as vLLM reads them: `0,1|2,3`. Without it vLLM asks for one NUMA node per process."""
    share = max(1, len(cores) // processes)
    parts = [[cores[(i * share + k) % len(cores)] for k in range(share)] for i in range(processes)]
    return "|".join(",".join(map(str, part)) for part in parts)


def longest_of(prompt_builder: PromptBuilder, sizes: PromptSizes, max_tokens: int) -> int | None:
    """Tokens that a prompt and its reply take together at most; None where the sizes are not known."""
    if sizes.rows is None or sizes.input_tokens is None:
        return None
    around = len(prompt_builder.prompts([""])[0])
    return around + sizes.input_tokens + sizes.rows + max_tokens + SPARE


def within_limit(folder: Path, longest: int | None) -> int | None:
    """The number of tokens to make an engine ready for; None, which is the model's own limit, where that is lower."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= config.get("text_config") or {}
    limit = next((config[name] for name in LIMITS if isinstance(config.get(name), int)), None)
    return longest if longest is not None and limit is not None and longest < limit else None


def lora_args(config: EngineConfig, adapters: Adapters | None) -> dict[str, Any]:
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
