"""Figures of vLLM's own statistics as metrics of Ray: load, cache, tokens, and how long requests take.

Route: vLLM's output thread, after each step of the engine -> `EngineStats.record` -> infra/metrics.py.
vLLM's own logger for Ray is not used, because it asks for `ray[serve]`, a web server that no job here needs.
"""

from typing import Any

from infra import metrics

PHASES = ("queued", "prefill", "decode")


class EngineStats:
    """The statistics of one engine. It has the methods of vLLM's `StatLoggerBase`, whose import takes seconds."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._slots = vllm_config.scheduler_config.max_num_seqs

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Takes the figures of one step; either of the first two may be None."""
        if scheduler_stats is not None:
            waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            metrics.ENGINE_REQUESTS.record(scheduler_stats.num_running_reqs, state="running")
            metrics.ENGINE_REQUESTS.record(waiting, state="waiting")
            metrics.ENGINE_SLOTS.record(self._slots)
            metrics.ENGINE_CACHE.record(scheduler_stats.kv_cache_usage)
        if iteration_stats is None:
            return
        metrics.ENGINE_TOKENS.record(iteration_stats.num_prompt_tokens, kind="prompt")
        metrics.ENGINE_TOKENS.record(iteration_stats.prompt_token_stats.cached_tokens, kind="cached")
        metrics.ENGINE_TOKENS.record(iteration_stats.num_generation_tokens, kind="output")
        for request in iteration_stats.finished_requests:
            metrics.ENGINE_FINISHED.record(1, reason=str(request.finish_reason))
            for phase in PHASES:
                metrics.ENGINE_SECONDS.record(getattr(request, f"{phase}_time"), phase=phase)

    def log(self) -> None:
        """Does nothing: each step is recorded as it comes."""

    def log_engine_initialized(self) -> None:
        """Does nothing: the job says which engine it has."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Does nothing: engines here never sleep."""
