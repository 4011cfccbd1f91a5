"""Parts `plug`: persona rows right before the request, from the items that the request may see, or from controls.

Shapes: P persona tokens, H LLM width.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import pyarrow.compute as pc

from infra import artifacts
from infra.errors import InputError
from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.generate.parts.base import BucketView, Drafts, GenerateRun, Needs, Part, Worker
from pipelines.generate.personas import PersonaMaker
from pipelines.generate.visible import VisibleItems
from pipelines.histories import matrix
from pipelines.methods import PartInfo, parse
from pipelines.model_folders import load_plug, note_other_history
from pplug import history
from pplug.items import UserItems
from pplug.plug import PersonaPlug, PlugConfig, plug_id
from pplug.stand_in import read_sample
from pplug.tasks import query

WEIGHED_BY_REQUEST = ("plug", "plug:attention", "plug:other-user")
"""Parts that may need the query encoder."""
OF_NOBODY = ("plug:no-history", "plug:soft-prompt")
"""Parts that read no item."""
NOT_OF_THE_USER = (*OF_NOBODY, "plug:other-user")


class Plug(Part):
    group = "plug"
    request_value = False

    def __init__(self, folder: str, plug_id: str, kinds: frozenset[str], personas: Snapshot | None) -> None:
        """`personas`: those that `refresh` stored with this plug, where a method can use them."""
        self.folder, self.plug_id, self.kinds, self.personas = folder, plug_id, kinds, personas
        self._view: BucketView | None = None
        self._stored: StoredPersonas | None = None

    @classmethod
    def open(cls, run: GenerateRun) -> Self:
        config, methods, kinds = run.config, run.methods_with("plug"), run.kinds("plug")
        if config.plug is None:
            raise InputError(f"methods {methods} need a plug; give its folder with --plug (`train` writes one)")
        try:
            folder = artifacts.fetch(config.plug)
            made_for = PersonaPlug.config_of(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"plug: {error}") from error
        remedy = "give the LLM and llm.layout it was trained with, or train a new plug"
        run.accept(f"plug {config.plug} was trained for", made_for.llm_id, read_sample(folder), remedy)
        _refuse_a_mixture(run, config.plug, made_for.trained_without_history)
        _note_other_prompts(run, config.plug, made_for.retrieve)
        if not kinds <= set(OF_NOBODY):
            note_other_history(run.report, config.plug, made_for, config.max_history_items)
        if "plug:attention" in kinds and made_for.aggregation == "mean" and not made_for.trained_without_history:
            raise InputError(
                f"plug:attention: plug {config.plug} was trained with aggregation=mean, so that it does not weigh "
                "items by requests; ask for plug or plug:mean"
            )
        weighed = made_for.aggregation == "attention" and not kinds.isdisjoint(WEIGHED_BY_REQUEST)
        if (weighed or made_for.request_value) and not (folder / "query_encoder" / "config.json").is_file():
            raise InputError(
                f"plug {config.plug}: it has no query encoder, so that it cannot read requests; load the "
                "checkpoint with its query encoder (query_encoder of PersonaPlug.from_official), or ask for plug:mean"
            )
        identity, personas = plug_id(folder), None
        if made_for.trained_without_history:
            return cls(config.plug, identity, kinds, None)._of(made_for)
        name = tables.embeddings_name(made_for.encoder_id or "")
        run.read_vectors(tables.snapshot(config.tables, name, config.as_of_version))
        wanted = "plug:mean" in kinds or made_for.aggregation == "mean"
        stored = tables.snapshot_if_any(config.tables, "personas", config.as_of_version) if wanted else None
        if stored is not None and stored.metadata.get("plug_id") == identity:
            personas = stored  # another plug's personas are made anew from the vectors
            run.report.table_read("personas", stored.version)
        return cls(config.plug, identity, kinds, personas)._of(made_for)

    def _of(self, config: PlugConfig) -> Self:
        self.rows = 1 + config.persona_tokens
        self.request_value = config.request_value
        return self

    def identities(self) -> dict[str, str]:
        return {"plug_id": self.plug_id}

    def needs(self) -> Needs:
        labels = self.maker.plug.known_answers if not self.kinds <= set(OF_NOBODY) else None
        return Needs(items=True, others="plug:other-user" in self.kinds, labels=labels)

    def load(self, worker: Worker) -> None:
        queries = self.request_value or not self.kinds.isdisjoint(WEIGHED_BY_REQUEST)
        load = partial(PersonaMaker, threads=worker.cpu.torch_threads(), queries=queries)
        self.maker = load_plug(self.folder, self.plug_id, load)
        self.task = worker.task

    def look_ahead(self, requests: Sequence[Mapping[str, Any]]) -> None:
        self.maker.read_ahead([query(request["input"], self.task) for request in requests])

    def look(self, view: BucketView) -> None:
        self._view = view
        config = self.maker.plug.config
        self._stored = (
            None if view.items is None else StoredPersonas(self.personas, view, view.items, config, self.plug_id)
        )

    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        assert self._view is not None and self._view.items is not None and self._stored is not None, "it reads items"
        aggregation = self.maker.plug.config.aggregation
        if part.name in ("plug:attention", "plug:mean"):
            aggregation = part.kind
        as_stored = aggregation == "mean" and part.name not in NOT_OF_THE_USER
        items: list[UserItems | None] = []  # behind each persona; None: the stored one will do, or there are none
        stored: list[np.ndarray | None] = []
        by_request = aggregation == self.maker.plug.config.aggregation == "attention"
        for request in drafts.requests:
            stored.append(self._stored.persona(request) if as_stored else None)
            own = None if stored[-1] is not None else self._items(part, request, self._view.items, by_request)
            items.append(own)
        drafts.soft_prompts, drafts.personas = self.maker.soft_prompts(
            [query(request["input"], self.task) for request in drafts.requests], items, stored, aggregation
        )
        drafts.plug_id = self.plug_id
        drafts.encoder_id = drafts.encoder_id or self.maker.plug.config.encoder_id
        if part.name not in NOT_OF_THE_USER:
            for i, request in enumerate(drafts.requests):
                drafts.notes[i] += self._stored.notes(request, wanted=drafts.personas[i] == "mean")

    def _items(
        self, part: PartInfo, request: Mapping[str, Any], items: VisibleItems, by_request: bool
    ) -> UserItems | None:
        """The items that the persona is made from."""
        if part.name in OF_NOBODY:
            return None
        if part.name == "plug:other-user":
            return items.of_another(request, by_request)
        return items.items(request, by_request)


class StoredPersonas:
    """A bucket's personas as `refresh` stored them, each usable where it was made from just what a request may see."""

    def __init__(
        self, personas: Snapshot | None, view: BucketView, items: VisibleItems, config: PlugConfig, plug_id: str
    ) -> None:
        self._items, self._config = items, config
        self._personas: dict[str, np.ndarray] = {}
        self._made_from: dict[str, str] = {}
        if personas is not None:
            made = pc.field("persona").is_valid() & (pc.field("plug_id") == plug_id)
            columns = ["user_id", "persona", "history_hash"]
            rows = personas.read(columns, buckets=[view.bucket], filter=made, user_keys=view.user_keys)
            ids = rows["user_id"].to_pylist()
            self._personas = dict(zip(ids, matrix(rows["persona"]), strict=True))
            self._made_from = dict(zip(ids, rows["history_hash"].to_pylist(), strict=True))
        self._is_of: dict[tuple[str, int, int], bool] = {}
        """True if a user's persona was made from just the items from one row to another."""

    def persona(self, request: Mapping[str, Any]) -> np.ndarray | None:
        """The stored persona, (P*H,); None where there is none, or where it was made from other items."""
        own = self._personas.get(request["user_id"])
        return own if own is not None and self._is_current(request) else None

    def _is_current(self, request: Mapping[str, Any]) -> bool:
        """Says whether the user's stored persona was made from just the items that the request may see."""
        user_id, rows = request["user_id"], self._items.rows(request)
        key = (user_id, int(rows[0]), int(rows[-1])) if len(rows) else (user_id, 0, -1)
        if key not in self._is_of:
            times = self._items.times(request) if self._config.uses_times else None
            digest = history.history_hash(self._items.hashes(request), times)
            self._is_of[key] = digest == self._made_from[user_id]
        return self._is_of[key]

    def notes(self, request: Mapping[str, Any], wanted: bool) -> list[str]:
        """Events about a persona that the report has to count. `wanted`: a stored one would have done."""
        notes = ["items_without_time"] if self._config.uses_times and self._items.lacks_times(request) else []
        if wanted and self.persona(request) is not None:
            return notes
        notes += ["items_without_vector"] if self._items.lacks_vectors(request) else []
        if wanted and request["user_id"] in self._personas and _is_undated(request):
            notes.append("persona_made_anew")
        return notes


def _is_undated(request: Mapping[str, Any]) -> bool:
    return request["as_of"] is None and request["as_of_position"] is None


def _note_other_prompts(run: GenerateRun, plug: str, retrieve: str | None) -> None:
    """Notes which methods show other texts in a prompt than those that a plug has learned to read beside it: other
    items, or a profile, which no training shows."""
    found, limit = [], run.config.llm.layout.max_input_tokens
    if retrieve is not None:  # a plug of before names the room that it has where none is set
        retrieve = retrieve.replace(f" budget_tokens={limit}", "")
    for name in run.methods_with("plug") if retrieve is not None else ():
        method = parse(name)
        part = method.part("retrieval")
        shown = "nothing" if part is None else run.config.retrieval.named(part.name, limit, part.items)
        if method.part("profile"):
            shown += " beside a profile"
        if shown != retrieve:
            found.append(f"{name} shows {shown}")
    if found:
        run.report.warn(f"plug {plug} was trained with {retrieve} alone in its prompts; {', '.join(found)}")


def _refuse_a_mixture(run: GenerateRun, plug: str, without_history: bool) -> None:
    """Refuses to run a soft prompt under a plug's method name, or the reverse; the report lists them separately."""
    wrong = [
        method.name
        for method in run.methods
        if (part := method.part("plug")) and (part.name == "plug:soft-prompt") != without_history
    ]
    if wrong and without_history:
        raise InputError(
            f"plug {plug} was trained without any history, so methods {wrong} say nothing of it; ask for "
            "plug:soft-prompt, or give a plug that was trained with histories"
        )
    if wrong:
        raise InputError(
            f"methods {wrong} need a plug that was trained without any history, but {plug} was trained with histories; "
            "train one with --set shape.without_history=true, or ask for plug:no-history of this one"
        )
