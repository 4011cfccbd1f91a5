"""Keys of `judge`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from typing import Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator

from pipelines.engines.base import Decoding, EngineConfig
from pipelines.job_config import ResumableConfig
from pplug.llm import LLMConfig

JUDGE_TOKENS = 64
"""Number of tokens of a judge's answer: a JSON object, and words before it."""


class JudgeConfig(ResumableConfig):
    """Job `judge`: replies to requests whose target is a rubric -> their scores, by an LLM that is asked aspect by
    aspect.

    The judge sees the question, the person's explanation, a reply and one aspect, and answers with a JSON object that
    holds a score of 0 to 2. A judged reply is a row of `generations` in a run of its own, which `evaluate` scores. It
    carries what the reply cost; the report names the judge and shows its prompt. A rerun with the same run_id judges
    only what is missing. Unit of work: a reply of a method.
    """

    run: str
    """run_id of the run of generate whose replies are judged."""
    llm: LLMConfig
    """The judge: any LLM that the engine serves."""
    engine: EngineConfig = EngineConfig()
    decoding: Decoding = Decoding(max_tokens=JUDGE_TOKENS)
    """Decoding of the judge's answers; the benchmark's judge is greedy too."""
    as_of_version: dict[Literal["histories", "requests"], NonNegativeInt] = {}
    """Table versions to read instead of the newest complete one, for example `requests=12`."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    workers: int = Field(1, gt=0)
    """Number of engines: one per GPU, or one per CPU node."""
    min_workers: int | None = Field(None, gt=0)
    """Least number of engines. The job starts with it; Ray Data adds others up to `workers` while there is work for
    them and room in the cluster, and takes them away again. Default: workers."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"] = "auto"
    """GPUs of one engine; 0 is the CPU. auto: where the cluster has GPUs when the job starts, as many as
    engine.tensor_parallel_size and engine.pipeline_parallel_size ask for, else 0."""
    max_engine_restarts: int = Field(3, ge=0)
    """Number of times that a dead engine is started again before the job gives up; what is committed stays."""
    wave_rows: int = Field(50_000, gt=0)
    """Number of judged replies in one commit."""

    @field_validator("decoding", mode="before")
    @classmethod
    def _as_long_as_by_default(cls, value: Any) -> Any:
        """A decoding of which another key is given keeps the length that the help names."""
        return {"max_tokens": JUDGE_TOKENS} | value if isinstance(value, dict) else value
