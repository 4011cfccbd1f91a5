"""Parts `adapter`: the user's own LoRA; as controls another's, or none. Only its name travels with the prompt."""

from functools import partial
from typing import Self

from infra.errors import InputError
from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.engines.adapters import AdapterIndex, Adapters, facts
from pipelines.engines.base import CAN
from pipelines.generate.parts.base import BucketView, Drafts, GenerateRun, Part
from pipelines.methods import NO_ADAPTER, PartInfo
from pipelines.waves import each_bucket
from pplug.stand_in import SAMPLE, stands_for


class Adapter(Part):
    group = "adapter"
    remedy = "run `adapt` again with cut=requests (the default), which cuts them at the requests that there are now"

    def __init__(self, adapters: Snapshot | None, kinds: frozenset[str], buckets: int, llm_id: str) -> None:
        """`adapters`: None where no method has one. `llm_id`: of the LLM that they were trained on, which the one at
        hand may serve for."""
        self.adapters, self.kinds, self.buckets, self.llm_id = adapters, kinds, buckets, llm_id
        self.for_engine: Adapters | None = None
        """The adapters that an engine has to be made ready for; None before the run has started."""
        self._index: AdapterIndex | None = None

    @classmethod
    def open(cls, run: GenerateRun) -> Self:
        config, kinds = run.config, run.kinds("adapter")
        if kinds == {NO_ADAPTER}:  # any engine can answer without adapters
            _warn_of_another_llm(run)
            return cls(None, kinds, run.buckets, run.llm_id)
        methods = [
            method.name for method in run.methods if (part := method.part("adapter")) and part.name != NO_ADAPTER
        ]
        if not CAN[config.engine.kind].adapters:
            others = " or ".join(kind for kind, can in CAN.items() if can.adapters)
            raise InputError(f"methods {methods} need engine.kind={others}, which serves many adapters in one batch")
        adapters = tables.snapshot(config.tables, "adapters", config.as_of_version)
        if not adapters.files:
            raise InputError(f"methods {methods}: the table adapters in {config.tables} is empty; run `adapt`")
        made_for = adapters.metadata.get("llm_id")
        remedy = "give the LLM and llm.layout they were trained with, or run `adapt` on this one"
        run.accept(f"the adapters in {config.tables} were trained on", made_for, adapters.metadata.get(SAMPLE), remedy)
        run.report.table_read("adapters", adapters.version)
        return cls(adapters, kinds, run.buckets, made_for or run.llm_id)

    def identities(self) -> dict[str, str]:
        return {"fit_id": self.adapters.metadata.get("fit_id", "") if self.adapters else ""}

    def made_from_items(self) -> Snapshot | None:
        return self.adapters if "adapter" in self.kinds else None

    def start(self) -> None:
        if self.adapters is None:
            return
        rank, targets = 0, set[str]()
        for row in each_bucket(list(self.adapters.by_bucket()), partial(facts, self.adapters)):
            rank, targets = max(rank, row["rank"]), targets | set(row["targets"])
        self.for_engine = Adapters(self.adapters, self.buckets, self.llm_id, rank, tuple(sorted(targets)))

    def look(self, view: BucketView) -> None:
        if self.adapters is None:
            return
        others = "adapter:other-user" in self.kinds
        self._index = AdapterIndex(self.adapters, view.bucket, view.owners, None if others else view.user_keys)

    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        if part.name == NO_ADAPTER:
            return
        assert self._index is not None, "the bucket was looked at"
        own = part.name == "adapter"
        choose = self._index.own if own else self._index.other
        for i, request in enumerate(drafts.requests):
            drafts.adapters[i] = choose(request)
            if own and drafts.adapters[i] is None and self._index.knows_too_much(request):
                drafts.notes[i].append("adapter_not_used")


def _warn_of_another_llm(run: GenerateRun) -> None:
    """Warns where adapters are there and stand on another LLM: without an adapter it is no control of theirs."""
    adapters = tables.snapshot_if_any(run.config.tables, "adapters", run.config.as_of_version)
    made_for = adapters.metadata.get("llm_id") if adapters is not None and adapters.files else None
    if adapters is None or made_for is None:
        return
    try:
        stands_for(run.config.llm, run.llm_id, made_for, adapters.metadata.get(SAMPLE))
    except ValueError as error:
        run.report.warn(
            f"the adapters in {run.config.tables} were trained on LLM {made_for}, but {error}; {NO_ADAPTER} by this "
            "one is no control of theirs: give the LLM and llm.layout that they were trained with"
        )
