"""Keys of `generate`: flags, `--set` keys and lines of a YAML file. The docstrings are the text of `--help`."""

from datetime import datetime
from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, field_validator

from pipelines.engines.base import Decoding, EngineConfig
from pipelines.job_config import RequestChoice, ResumableConfig, as_moment
from pplug.llm import LLMConfig
from pplug.profile import ProfileConfig
from pplug.retrieval import RetrievalConfig
from pplug.settings import renamed


class Config(ResumableConfig):
    """Job `generate`: requests + personas or embeddings -> generations, for one or several methods, by one engine.

    Requests meet their users' vectors bucket by bucket; only persona rows and token ids reach the engine. A rerun with
    the same run_id answers only what is missing. Unit of work: a request and a method, with decoding.n as many times; a
    row with an error counts as written and failed.
    With --write-profiles: histories + requests -> profiles, a text about each user who has a request, from the newest
    items that all of these requests may see. A profile made by the same settings from the same items is kept.
    Unit of work: a user; a user whose prompt got no reply is a reject.
    """

    llm: LLMConfig
    methods: tuple[str, ...] = ("none", "plug")
    """Any of none, plug, plug:attention, plug:mean, plug:no-history, plug:other-user, plug:soft-prompt, adapter,
    adapter:other-user, adapter:none, random, recency, bm25, dense, profile, oracle; also joined by +, such as plug+bm25
    or adapter+profile. A number behind a retriever, as in bm25@2, is its number of items."""
    plug: str | None = None
    """Plug folder, for the methods with a plug."""
    retrieval: RetrievalConfig = RetrievalConfig()
    """Number of retrieved items in a prompt and of tokens they may take, for random, recency, bm25 and dense. A method
    such as bm25@2 says its number of items itself."""
    write_profiles: bool = False
    """True writes user profiles instead of replies; `methods`, `plug`, `oracle`, `retrieval`, `max_history_items` and
    `show` are then ignored. profile.items is the number of items that a profile is made from, decoding.max_tokens its
    length."""
    profile: ProfileConfig = ProfileConfig()
    """Question by which the LLM is asked for a profile, and form in which a prompt holds it."""
    oracle: str | None = None
    """JSON lines of {user_id, text}: what the method `oracle` puts before a user's request."""
    requests: RequestChoice = "all"
    """Requests to answer. open: those without a target; labelled: those with one; new: those that no run has answered
    by the method, with the same LLM, plug, settings of adapters and decoding, as a schedule wants it. Profiles are cut
    at these requests, and written for their users alone; for them, new are those that no run has answered by a method
    with a profile."""
    since: datetime | None = None
    """Time from which requests count, by their as_of: a day or a time in ISO form, UTC where it names no zone. Requests
    without a time are then left out, and counted."""
    users: str | None = None
    """File with one user id per line: only their requests are answered, only their profiles are written."""
    as_of_version: dict[
        Literal["histories", "requests", "embeddings", "personas", "adapters", "profiles"], NonNegativeInt
    ] = {}
    """Table versions to read instead of the newest complete one, for example `histories=12`. Any version works until
    `vacuum` removes it."""
    task: str | None = None
    """Task name or YAML file; default: the one that `ingest` stored."""
    decoding: Decoding = Decoding()
    engine: EngineConfig = EngineConfig()
    max_history_items: int = renamed("history_cap", 512, gt=0)
    """Number of newest items of a user that count."""
    workers: int = Field(1, gt=0)
    """Number of engines: one per GPU, or one per CPU node."""
    min_workers: int | None = Field(None, gt=0)
    """Least number of engines. The job starts with it; Ray Data adds others up to `workers` while there is work for
    them and room in the cluster, and takes them away again. Default: workers."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"] = "auto"
    """GPUs of one engine; 0 is the CPU. auto: where the cluster has GPUs when the job starts, as many as
    engine.tensor_parallel_size and engine.pipeline_parallel_size ask for, else 0. Several GPUs without these two keys
    share each layer."""
    prompt_workers: int = Field(1, gt=0)
    """Number of actors that build prompts beside the engines; those of a node share its cores."""
    min_prompt_workers: int | None = Field(None, gt=0)
    """Least number of actors that build prompts, as min_workers is of engines. Default: prompt_workers."""
    gpus_per_prompt_worker: float = Field(0.0, ge=0)
    """GPUs of one actor that builds prompts, or a fraction of one, for a plug or retrieval whose encoder is too slow on
    the CPU."""
    max_engine_restarts: int = Field(3, ge=0)
    """Number of times that a dead engine is started again before the job gives up; what is committed stays."""
    wave_rows: int = Field(50_000, gt=0)
    """Number of replies in one commit; where they take long, what is there is committed every ten minutes. Profiles are
    committed by whole buckets."""
    show: int = Field(0, ge=0)
    """Number of requests that are printed at the end with their replies, on the screen alone; `show replies` prints
    others."""

    _since = field_validator("since", mode="before")(as_moment)
