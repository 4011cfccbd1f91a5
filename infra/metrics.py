"""Metrics of a job, which Ray exports on each node beside its own; Prometheus reads them there.

Route: driver and workers -> `Metric.record` -> Ray's agent of the node -> the node's metrics port, with the prefix
`ray_`. Where no Ray session runs, or one that exports nothing (a local session), recording does nothing.
Every metric of this project stands in this file. `infra/deploy/observability/` holds the alerts and the dashboard that
read them, and docs/cluster.md says how to scrape.
"""

import functools
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal

from infra import stopping

PREFIX = "ray_"
"""Ray puts it before every name."""
_ALL: dict[str, "Metric"] = {}
_collected = True
RENEW_S = 5.0
"""Ray hands over a gauge only if it was set since the last time, and its node forgets it 20 s later: one that a process
sets once, such as the number of planned units, is set again until the process ends."""


class Metric:
    """One metric; made in each process when it is first recorded.

    Args:
        kind: `Counter` (Prometheus then shows `<name>_total`) or `Gauge`.
        name: without the prefix.
        about: the text beside it in the scrape.
        tags: names of its labels, without Ray's own.
    """

    def __init__(self, kind: Literal["Counter", "Gauge"], name: str, about: str, *tags: str) -> None:
        self.kind, self.name, self.about, self.tags = kind, f"pplug_{name}", about, tags
        self._made: Any = None
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        self._lock = threading.Lock()
        _ALL[self.exported] = self

    @property
    def exported(self) -> str:
        """The name in a scrape."""
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "Counter" else "")

    def record(self, value: float, **tags: str) -> None:
        """Adds to a counter, or sets a gauge. A counter takes no notice of 0."""
        if not are_exported() or (self.kind == "Counter" and value <= 0):
            return
        from ray.util import metrics

        with self._lock:
            if self._made is None:
                self._made = getattr(metrics, self.kind)(self.name, description=self.about, tag_keys=self.tags)
            if self.kind == "Gauge":
                self._values[tuple(sorted(tags.items()))] = float(value)
        if self.kind == "Counter":
            self._made.inc(float(value), tags=tags)
            return
        self._made.set(float(value), tags=tags)
        _start_renewing()

    def renew(self) -> None:
        """Sets a gauge to its values once more."""
        with self._lock:
            values = dict(self._values)
        for tags, value in values.items():
            self._made.set(value, tags=dict(tags))


@functools.cache
def _start_renewing() -> None:
    threading.Thread(target=_renew, name="metrics", daemon=True).start()


def _renew() -> None:
    while True:
        time.sleep(RENEW_S)
        for metric in list(_ALL.values()):
            if are_exported():
                metric.renew()


def are_exported() -> bool:
    """Says whether this process belongs to a Ray session that exports metrics."""
    ray = sys.modules.get("ray")
    return _collected and ray is not None and ray.is_initialized()


def collect(collected: bool) -> None:
    """Says whether the session of this process exports metrics: a cluster does, a local session does not."""
    global _collected
    _collected = collected


def names() -> dict[str, "Metric"]:
    """Every metric of this project, by its name in a scrape."""
    return dict(_ALL)


JOB_START = Metric("Gauge", "job_start_time_seconds", "Time at which the job began, in seconds since 1970.", "job")
JOB_END = Metric(
    "Gauge", "job_end_time_seconds", "Time at which the job ended, in seconds since 1970.", "job", "exit_code"
)
UNITS = Metric(
    "Gauge",
    "job_units",
    "Units of work of the job: planned, written, already_there, rejected, failed.",
    "job",
    "kind",
)
REJECTED = Metric("Gauge", "job_rejected", "Units that the job has set aside, by reason.", "job", "reason")
REJECTED_ALLOWED = Metric(
    "Gauge", "job_rejected_allowed", "Units that the job may set aside before it ends with exit code 3.", "job"
)
WAVE = Metric("Gauge", "job_wave", "Number of waves that the job has committed.", "job", "table")
STAGE_ROWS = Metric("Gauge", "stage_rows", "Rows of a stage that has ended.", "job", "stage")
STAGE_SECONDS = Metric("Gauge", "stage_seconds", "Seconds that a stage has taken.", "job", "stage")
ROWS = Metric("Counter", "rows", "Rows that workers have written, before they are committed.", "job", "table")
TOKEN_KINDS = ("prompt_tokens", "output_tokens")
TOKENS = Metric("Counter", "tokens", "Tokens of prompts and replies, by kind.", "job", "kind")
REJECTS = Metric("Counter", "rejects", "Rows that workers have set aside, by reason.", "job", "reason")
TABLE_BYTES = Metric("Gauge", "table_bytes", "Bytes of a table's files: live, and dead ones.", "table", "kind")
TABLE_TIME = Metric(
    "Gauge", "table_time_seconds", "Time at which a table's bytes were counted, in seconds since 1970.", "table"
)
ENGINE_RESTARTS = Metric(
    "Counter", "engine_restarts", "Engines that were started again after their actor died.", "kind"
)
ENGINE_REQUESTS = Metric("Gauge", "engine_requests", "Requests in a vLLM engine: running, waiting.", "state")
ENGINE_SLOTS = Metric("Gauge", "engine_slots", "Requests that a vLLM engine may work on at once.")
ENGINE_CACHE = Metric("Gauge", "engine_cache_usage", "Share of a vLLM engine's KV cache that is in use.")
ENGINE_TOKENS = Metric(
    "Counter",
    "engine_tokens",
    "Tokens of a vLLM engine: prompt, cached (those of prompts that the prefix cache had), output.",
    "kind",
)
ENGINE_FINISHED = Metric("Counter", "engine_finished", "Requests that a vLLM engine has ended, by reason.", "reason")
ENGINE_SECONDS = Metric(
    "Counter",
    "engine_request_seconds",
    "Seconds that ended requests of a vLLM engine were queued, in prefill and in decode.",
    "phase",
)
DRIFT = Metric("Gauge", "persona_drift", "Movement of personas between two versions, by figure.", "figure")


def count_tokens(job: str, counts: Mapping[str, int]) -> None:
    """Adds the tokens among the counts of a block of rows."""
    for kind in TOKEN_KINDS:
        TOKENS.record(counts.get(kind, 0), job=job, kind=kind)


def count_rejects(job: str, reasons: Mapping[str, int]) -> None:
    """Adds rows that were set aside, by reason."""
    for reason, n in reasons.items():
        REJECTS.record(n, job=job, reason=reason)


def note_restart(kind: str) -> None:
    """Counts a restart, where the actor that calls this has died before. `kind`: the engine's name."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return
    context = ray.get_runtime_context()
    if context.get_actor_id() is not None and context.was_current_actor_reconstructed:
        ENGINE_RESTARTS.record(1, kind=kind)


FLUSH_S = 12.0
"""Ray's workers hand their metrics over every 10 s, and lose what they still hold when their process ends."""


def let_go() -> None:
    """Waits at the end of a driver until its last values have left the process, or as long as SIGTERM leaves time."""
    if are_exported():
        stopping.wait(FLUSH_S)
