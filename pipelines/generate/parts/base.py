"""A part of a method's name, such as `plug:mean` or `bm25`: what every group of parts answers for itself.

One class per group of parts (`methods.PartInfo.group`). It is made on the driver by `open`, travels to the actors that
build prompts, loads there what it needs, looks at each bucket, and adds its share to each block of prompts.
To add a part to a group: a `PartInfo` in methods.py and a branch in the group's class. To add a group: a file beside
this one with its class, and a line in `parts/__init__.py`.
Shapes: R persona rows, H LLM width.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa

from infra.errors import InputError
from infra.report import RunReport
from infra.snapshot import Snapshot
from pipelines.engines.adapters import AdapterName
from pipelines.generate.config import Config
from pipelines.generate.visible import VisibleItems
from pipelines.methods import Group, Method, PartInfo
from pipelines.owners import Owners
from pipelines.run import CpuShare
from pplug.items import KnownAnswers
from pplug.llm import LLMConfig
from pplug.splice import PromptBuilder
from pplug.stand_in import stands_for
from pplug.tasks import TaskSpec


@dataclass
class GenerateRun:
    """The run for which a part is opened, on the driver."""

    config: Config
    methods: Sequence[Method]
    llm_id: str
    task: TaskSpec
    report: RunReport
    buckets: int
    """Number of buckets of the tables."""
    embeddings: Snapshot | None = None
    """The vectors that the parts read."""

    def accept(self, what: str, made_for: str | None, sample: str | None, remedy: str) -> None:
        """Notes why this LLM may use what was made for another identity (`stands_for`).

        Args:
            what: words before `LLM x`, such as "the plug was trained for".
            made_for, sample: as in `stands_for`.
            remedy: what to do where it may not.

        Raises:
            InputError: it may not.
        """
        try:
            note = stands_for(self.config.llm, self.llm_id, made_for, sample)
        except ValueError as error:
            raise InputError(f"{what} LLM {made_for}, but {error}; {remedy}") from error
        if note is not None:
            self.report.warn(f"{what} LLM {made_for}, {note}")

    def methods_with(self, group: Group) -> list[str]:
        """Names of the methods with a part of this group."""
        return [method.name for method in self.methods if method.part(group)]

    def kinds(self, group: Group) -> frozenset[str]:
        """Names of this group's parts in any of the methods."""
        return frozenset(part.name for method in self.methods if (part := method.part(group)))

    def read_vectors(self, snapshot: Snapshot) -> None:
        """Notes which vectors a part reads.

        Raises:
            InputError: another part reads other ones.
        """
        if self.embeddings is not None and self.embeddings.table != snapshot.table:
            raise InputError(
                f"the plug was trained on the vectors of {self.embeddings.table}, retrieval.encoder makes those of "
                f"{snapshot.table}; give the plug's encoder, or run the dense methods by themselves"
            )
        self.report.table_read(snapshot.spec.name, snapshot.version)
        self.embeddings = snapshot


@dataclass(frozen=True)
class Worker:
    """The surroundings of a part in an actor that builds prompts."""

    llm: LLMConfig
    task: TaskSpec
    prompt_builder: PromptBuilder
    cpu: CpuShare


@dataclass(frozen=True)
class Needs:
    """The share of a bucket's histories that a group of parts reads."""

    items: bool = False
    """True if a part reads the items that a request may see, with vectors where the run has any."""
    fields: bool = False
    """True if it reads their texts too."""
    others: bool = False
    """True if it reads the items of other users too."""
    labels: KnownAnswers | None = None
    """Labels that it reads the items for; None: none."""


@dataclass(frozen=True)
class BucketView:
    """The rows that a bucket's requests may look at."""

    bucket: int
    requests: pa.Table
    """Sorted by user_key and request_id."""
    user_keys: Sequence[str]
    """Keys of the requests' users."""
    items: VisibleItems | None
    """None where no part needs them, or where there is no request."""
    encoder_id: str | None
    """Encoder of the vectors beside the items."""
    owners: Owners
    """Persons behind the users of any bucket."""


@dataclass
class Drafts:
    """The prompts of one block in the making, one place per request in every list."""

    method: Method
    requests: list[dict[str, Any]]
    inputs: list[str]
    """Text behind the persona rows, by prompt."""
    prefixes: list[str] = field(default_factory=list)
    """Text before the persona rows, by prompt."""
    soft_prompts: list[np.ndarray] = field(default_factory=list)
    """Persona rows, (R*H,) float32; R is 0 without a plug."""
    personas: list[str] = field(default_factory=list)
    """Kind of weighing behind the persona: none, attention, mean."""
    adapters: list[AdapterName | None] = field(default_factory=list)
    errors: list[str | None] = field(default_factory=list)
    """The first reason for which a prompt cannot be answered."""
    notes: list[list[str]] = field(default_factory=list)
    """Events that the report has to count (`prompts.NOTES`)."""
    plug_id: str | None = None
    encoder_id: str | None = None

    def __post_init__(self) -> None:
        n = len(self.requests)
        self.prefixes, self.personas, self.adapters = [""] * n, ["none"] * n, [None] * n
        self.soft_prompts = [np.zeros(0, np.float32)] * n
        self.errors, self.notes = [None] * n, [[] for _ in range(n)]

    def fail(self, place: int, error: str | None) -> None:
        """Notes why a prompt cannot be answered; the first reason stays."""
        self.errors[place] = self.errors[place] or error


class Part(ABC):
    """One group of parts: what it reads and refuses, and what it adds to a prompt."""

    group: ClassVar[Group]
    remedy: ClassVar[str] = ""
    """Remedy where a row of `made_from_items` knows too much."""
    rows: int = 0
    """Greatest number of persona rows that it puts into a prompt."""

    @classmethod
    @abstractmethod
    def open(cls, run: GenerateRun) -> Self:
        """Opens what the run's methods need of this group, on the driver, before anything starts.

        Raises:
            InputError: it is missing, or does not fit the LLM, the task or the engine.
        """

    def start(self) -> None:  # noqa: B027  most groups have nothing to do here
        """Reads what takes a running Ray session; called once, on the driver."""

    def identities(self) -> Mapping[str, str]:
        """Identities that decide the replies; they stand in the metadata of `generations`."""
        return {}

    def made_from_items(self) -> Snapshot | None:
        """A table of what was made from the users' own items, so that its rows may know answers that are scored."""
        return None

    def needs(self) -> Needs:
        """Returns which part of the histories it reads."""
        return Needs()

    def load(self, worker: Worker) -> None:  # noqa: B027  most groups have nothing to do here
        """Loads models and tables in the actor; called once there."""

    def look_ahead(self, requests: Sequence[Mapping[str, Any]]) -> None:  # noqa: B027  most groups have nothing to do here
        """Gets ready for requests to come, of several blocks at once."""

    def look(self, view: BucketView) -> None:  # noqa: B027  most groups have nothing to do here
        """Reads what it needs of a bucket before the bucket's first block."""

    @abstractmethod
    def contribute(self, part: PartInfo, drafts: Drafts) -> None:
        """Adds to the prompts of a block, whose method has this part."""
