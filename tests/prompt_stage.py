"""The stage `BuildPrompts` from tables alone, as the job `generate` makes it from its config."""

from collections.abc import Mapping, Sequence

from infra.snapshot import Snapshot
from pipelines.generate.parts import Part
from pipelines.generate.parts.adapter import Adapter
from pipelines.generate.parts.oracle import Oracle
from pipelines.generate.parts.plug import Plug
from pipelines.generate.parts.profile import Profile
from pipelines.generate.parts.retrieval import Retrieval
from pipelines.generate.pending import PendingReplies
from pipelines.generate.prompts import BuildPrompts
from pipelines.methods import parse_all
from pipelines.run import CpuShare
from pplug.llm import LLMConfig
from pplug.plug import plug_id
from pplug.profile import ProfileConfig
from pplug.retrieval import RetrievalConfig
from pplug.tasks import TaskSpec


def prompt_stage(
    stage: type[BuildPrompts] = BuildPrompts,
    *,
    requests: Snapshot,
    methods: Sequence[str],
    llm: LLMConfig,
    task: TaskSpec,
    histories: Snapshot | None = None,
    embeddings: Snapshot | None = None,
    plug: str | None = None,
    personas: Snapshot | None = None,
    oracle: Mapping[str, str] | None = None,
    adapters: Snapshot | None = None,
    retrieval: RetrievalConfig | None = None,
    profiles: Snapshot | None = None,
    profile: ProfileConfig | None = None,
    pending: PendingReplies | None = None,
    max_items: int = 512,
    block_rows: int = 64,
    threads: int = 1,
) -> BuildPrompts:
    """The stage for all requests, or for those of `pending`."""
    parsed, parts = parse_all(tuple(methods)), list[Part]()
    retrieval = retrieval or RetrievalConfig()
    kinds = {
        group: frozenset(part.name for method in parsed for part in method.parts if part.group == group)
        for group in ("oracle", "profile", "retrieval", "plug", "adapter")
    }
    if kinds["oracle"]:
        parts.append(Oracle(oracle or {}))
    if kinds["profile"] and profiles is not None:
        parts.append(Profile(profiles, profile or ProfileConfig(), retrieval.input_share))
    if kinds["retrieval"]:
        identity = embeddings.metadata.get("encoder_id", "") if embeddings is not None else ""
        parts.append(Retrieval(retrieval, kinds["retrieval"], identity))
    if kinds["plug"] and plug is not None:
        parts.append(Plug(plug, plug_id(plug), kinds["plug"], personas))
    if kinds["adapter"] and adapters is not None:
        parts.append(Adapter(adapters, kinds["adapter"], 1, "llm"))
    pending = pending or PendingReplies(requests, None, "x", tuple(methods), "all", None)
    return stage(
        pending, parsed, parts, histories, embeddings, llm, False, task, max_items, block_rows, CpuShare(1, threads)
    )
