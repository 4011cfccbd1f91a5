"""Requests and methods that a run still has to answer: the plan and the work take them from the same place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from pipelines.asked import answers_now, is_reply, narrowed
from pipelines.cut import is_one_of_several
from pipelines.job_config import RequestChoice
from pipelines.learned import last_items
from pipelines.methods import Group, known_parts, parse
from pplug.adapter import IMPORTED

ReplyKey = tuple[str, str, str, int]
"""User, request, method and sample of a reply."""


@dataclass(frozen=True)
class MadeAlike:
    """Identities that make a reply of another run as good as this run's."""

    llm_id: str
    decoding_id: str
    plug_id: str
    fit_id: str = ""
    """Settings of the adapters; empty where nobody knows them."""

    def holds(self, row: Mapping[str, Any]) -> bool:
        """True for such a reply; plug and adapter count where the method has one."""
        ids = row["llm_id"], row["decoding_id"]
        with_plug = any(part.group == "plug" for part in known_parts(row["method"]))
        by_plug = not with_plug or row["plug_id"] == self.plug_id
        return ids == (self.llm_id, self.decoding_id) and by_plug and self._fits(row["adapter_id"])

    def _fits(self, adapter_id: str | None) -> bool:
        """True without an adapter, and for one from elsewhere, which stands beside those of any settings."""
        if adapter_id is None or not self.fit_id:
            return True
        return adapter_id.partition("-")[0] in (self.fit_id, IMPORTED)


@dataclass(frozen=True)
class PendingReplies:
    """Requests and methods that a run still has to answer, for the plan and for the work."""

    requests: Snapshot
    done: Snapshot | None
    """Version of `generations` when this run started; None if the table was empty."""
    run_id: str
    methods: tuple[str, ...]
    only: RequestChoice
    """all, open (without a target), labelled, or new (unanswered by any run, where `alike` says what counts)."""
    users: Mapping[int, list[str]] | None
    """Keys by bucket (`shards.keys_by_bucket`): only their requests."""
    made_from_items: Mapping[Group, Snapshot] = field(default_factory=dict)
    """Tables of what was made from users' items, by group of parts: requests of users without a row are counted, and
    those for which the user's row knows too much."""
    samples: int = 1
    """Number of replies per request and method."""
    alike: MadeAlike | None = None
    """Replies of other runs that count as this run's; None: none do."""
    since: datetime | None = None
    """Time from which requests are answered; None: all are."""

    def read(self, bucket: int) -> "BucketRequests":
        """Requests of a bucket, and which of them the run has already answered."""
        keys = of_bucket(self.users, bucket)
        everything = self.requests.read(buckets=[bucket], user_keys=keys)
        of_kind = narrowed(everything, self.only, None)
        requests = narrowed(of_kind, "all", self.since)
        undated = 0 if self.since is None else of_kind["as_of"].null_count
        answered: dict[tuple[str, str], set[tuple[str, int]]] = {}
        errors, changed = set[ReplyKey](), set[ReplyKey]()
        if self.done is not None:
            answers = answers_now(requests)
            columns = ["user_id", "request_id", "method", "sample", "error", "run_id", "input_hash"]
            counts = pc.field("run_id") == self.run_id
            if self.alike is not None:
                columns += ["llm_id", "decoding_id", "plug_id", "adapter_id"]
                counts = counts | ((pc.field("llm_id") == self.alike.llm_id) & is_reply())
            for row in self.done.read(columns, buckets=[bucket], filter=counts, user_keys=keys).to_pylist():
                mine = row["run_id"] == self.run_id
                if row["error"] is not None:
                    errors |= {reply_key(row)} if mine else set()
                elif not answers(row):
                    changed |= {reply_key(row)} if mine else set()
                elif mine or (self.alike is not None and self.alike.holds(row)):
                    answered.setdefault(request_key(row), set()).add((row["method"], row["sample"] or 0))
        requests = requests.sort_by([("user_key", "ascending"), ("request_id", "ascending")])
        asked = BucketRequests(requests, answered, frozenset(), self.samples, undated, len(of_kind) - undated)
        rows = {request_key(row): row for row in requests.select(["user_id", "request_id"]).to_pylist()}
        again = {
            key for key in errors | changed if key[:2] in rows and key[2] in self.methods
            and key[3] in asked.missing(rows[key[:2]], key[2])
        }  # fmt: skip
        return replace(asked, again=frozenset(again), changed=len(again & (changed - errors)))

    def owed(self, bucket: int) -> frozenset[ReplyKey]:
        """Replies of this run that are made anew: errors, and those to a request that asks
        something else since."""
        return self.read(bucket).again

    def count(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Stage of the plan. in: bucket. out: one row per bucket.

        pending, existing: replies, `samples` per request and method. again: replies of this run that are made anew,
        since they are errors or, so many as `changed`, the input of their request has changed since.
        undated, timed: requests that `since` leaves out because they have no time, and those that have one, too early
        or not. with_target, dated: requests to answer with a known answer, and those of them that may not see all
        items of their person. Per table in `made_from_items`, of the requests that a method with such a part has to
        answer, without_<group>: those whose user has no row; <group>_leaks: those with a known answer whose user's row
        was made from items that they may not see.
        """
        for bucket in batch["bucket"].to_pylist():
            asked = self.read(bucket)
            wanted = {(method, sample) for method in self.methods for sample in range(self.samples)}
            columns = ["user_id", "owner_id", "request_id", "as_of", "as_of_position", "target"]
            rows = asked.requests.select(columns).to_pylist()
            keys = pc.unique(asked.requests["user_key"]).to_pylist()
            existing = sum(len(asked.answered.get(request_key(row), set()) & wanted) for row in rows)
            counts = {"pending": len(rows) * len(wanted) - existing, "existing": existing}
            labelled = _labelled(asked.unanswered(rows, set(self.methods)))
            counts |= {"again": len(asked.again), "changed": asked.changed}
            counts |= {"undated": asked.undated, "timed": asked.timed}
            counts["with_target"] = len(labelled)
            counts["dated"] = sum(
                row["as_of"] is not None or row["as_of_position"] is not None or is_one_of_several(row)
                for row in labelled
            )
            for group, table in self.made_from_items.items():
                made_from = last_items(table, bucket, keys)
                due = asked.unanswered(rows, self._methods_with(group))
                counts[f"{group}_leaks"] = sum(
                    row["user_id"] in made_from and not made_from[row["user_id"]].is_visible_to(row)
                    for row in _labelled(due)
                )
                counts[f"without_{group}"] = sum(row["user_id"] not in made_from for row in due)
            yield pa.table({"bucket": [bucket]} | {name: [n] for name, n in counts.items()})

    def _methods_with(self, group: Group) -> set[str]:
        """The methods with this group's own part, not a control's."""
        parts = {name: parse(name).part(group) for name in self.methods}
        return {name for name, part in parts.items() if part is not None and part.instead is None}


def _labelled(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["target"] is not None]


@dataclass(frozen=True)
class BucketRequests:
    """The requests of one bucket that a run is asked to answer."""

    requests: pa.Table
    """Sorted by user_key and request_id."""
    answered: dict[tuple[str, str], set[tuple[str, int]]]
    """Methods and samples with a reply, by `request_key`. A reply with an error, or to another input or with another
    cut-off than the request has now, does not count: it is asked for again."""
    again: frozenset[ReplyKey]
    """Replies of this run that are asked for again; others stay as they are."""
    samples: int = 1
    undated: int = 0
    """Requests that `since` left out because they have no time."""
    timed: int = 0
    """Requests that have a time, where `since` is given those that it left out among them."""
    changed: int = 0
    """Replies among `again` that are no errors: the input of their request has changed since."""

    def unanswered(self, rows: Sequence[Mapping[str, Any]], methods: set[str]) -> list[Mapping[str, Any]]:
        """The rows that some of these methods have not answered yet."""
        return [row for row in rows if any(self.missing(row, method) for method in methods)]

    def missing(self, row: Mapping[str, Any], method: str) -> list[int]:
        """The samples that a method still owes a request."""
        there = self.answered.get(request_key(row), set())
        return [sample for sample in range(self.samples) if (method, sample) not in there]


def reply_key(row: Mapping[str, Any]) -> ReplyKey:
    """The key of a reply within a run: user, request, method and sample."""
    return *request_key(row), row["method"], row["sample"] or 0


def request_key(row: Mapping[str, Any]) -> tuple[str, str]:
    """The key of a request: two users may have requests of one request_id."""
    return row["user_id"], row["request_id"]
