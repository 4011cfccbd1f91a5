"""Requests that a job works for: all, those with or without a target, from a time on, or not answered by any run.

`generate` answers them. `adapt` and `generate --write-profiles` cut a user's items at them, so that nothing is made
from an item that a request which is still to be answered may not see.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot
from pipelines import tables
from pipelines.histories import to_us
from pipelines.job_config import RequestChoice
from pipelines.methods import Group, known_parts
from pplug import rubric
from pplug.history import input_hash


def narrowed(requests: pa.Table, only: RequestChoice, since: datetime | None) -> pa.Table:
    """The requests that a choice by target and by time leaves. A request without a time (as_of) is not `since` any.

    Args:
        requests: with the columns target and as_of. `new` leaves all of them here, since it goes by the replies.
    """
    if only in ("open", "labelled"):
        has = pc.is_valid(requests["target"])
        requests = requests.filter(has if only == "labelled" else pc.invert(has))
    if since is not None:
        requests = requests.filter(pc.greater_equal(requests["as_of"], pa.scalar(since, requests["as_of"].type)))
    return requests


def is_reply() -> pc.Expression:
    """True for a row of `generations` that is a reply. One of the job `judge` has the reply's method and models, but
    its text is a judgement."""
    judged = pc.starts_with(pc.field("text"), rubric.JUDGEMENT)
    return ~pc.coalesce(judged, pc.scalar(False))  # a row may have no text


COMPARED = ("user_id", "request_id", "input", "as_of", "as_of_position")
"""Columns of `requests` that `answers_now` compares a reply by."""


def request_hash(request: Mapping[str, Any]) -> str:
    """`input_hash` of a request (input, as_of, as_of_position)."""
    return input_hash(request["input"], (to_us(request["as_of"]), request["as_of_position"]))


def answers_now(requests: pa.Table) -> Callable[[Mapping[str, Any]], bool]:
    """Says of a reply (user_id, request_id, input_hash) whether it answers the input that its request has now, and has
    seen the history up to the cut-off that the request has now.

    One without a hash is older than that column and counts as such, and so does one whose request is not here. One
    whose hash is of the input alone is from an earlier release: it does not tell the cut-off, and counts whatever that
    is.

    Args:
        requests: with the columns COMPARED.
    """
    ids = zip(requests["user_id"].to_pylist(), requests["request_id"].to_pylist(), strict=True)
    asked = dict(zip(ids, zip(*(requests[name] for name in COMPARED[2:]), strict=True), strict=True))

    def answers(row: Mapping[str, Any]) -> bool:
        request, known = asked.get((row["user_id"], row["request_id"])), row["input_hash"]
        if known is None or request is None:
            return True
        now = {name: value.as_py() for name, value in zip(COMPARED[2:], request, strict=True)}
        return known in (request_hash(now), input_hash(now["input"]))

    return answers


@dataclass(frozen=True)
class Answered:
    """Replies of any run by a method with a part of this group, such as `adapter`.

    Those by a control do not count, and neither do errors and judgements.
    """

    generations: Snapshot
    group: Group

    def keys(self, bucket: int, user_keys: list[str] | None, requests: pa.Table) -> set[tuple[str, str]]:
        """The requests (COMPARED) of a bucket that have such a reply to what they ask now: user_id and request_id."""
        columns, answers = ["user_id", "request_id", "method", "input_hash"], answers_now(requests)
        counts = pc.field("error").is_null() & is_reply()
        rows = self.generations.read(columns, buckets=[bucket], filter=counts, user_keys=user_keys)
        methods = [name for name in pc.unique(rows["method"]).to_pylist() if self._counts(name)]
        rows = rows.filter(pc.is_in(rows["method"], value_set=pa.array(methods, pa.string())))
        return {(row["user_id"], row["request_id"]) for row in rows.to_pylist() if answers(row)}

    def _counts(self, method: str) -> bool:
        return any(part.group == self.group and part.instead is None for part in known_parts(method))


@dataclass(frozen=True)
class Chosen:
    """The requests at which what is made of a user's items is cut."""

    only: RequestChoice = "all"
    since: datetime | None = None
    answered: Answered | None = None
    """Replies that there are; requests with one of them are not chosen by `new`. None: there are none."""

    @classmethod
    def of(cls, place: str, only: RequestChoice, since: datetime | None, group: Group) -> "Chosen":
        """The choice for what is made for methods with a part of this group, in the tables at `place`."""
        replies = tables.newest(place, "generations") if only == "new" else None
        return cls(only, since, Answered(replies, group) if replies is not None and replies.files else None)

    @property
    def is_some(self) -> bool:
        """True if requests may be left out: then only users who have a chosen one are worked for."""
        return self.only != "all" or self.since is not None

    def among(self, requests: Snapshot, bucket: int, user_keys: list[str] | None, columns: list[str]) -> pa.Table:
        """These columns of the chosen requests of a bucket."""
        more = ["user_id", "request_id", "target", "as_of", *(COMPARED if self.answered is not None else ())]
        names = list(dict.fromkeys([*columns, *more]))
        rows = narrowed(requests.read(names, buckets=[bucket], user_keys=user_keys), self.only, self.since)
        if self.answered is not None:
            done = self.answered.keys(bucket, user_keys, rows)
            keys = zip(rows["user_id"].to_pylist(), rows["request_id"].to_pylist(), strict=True)
            rows = rows.filter(pa.array([key not in done for key in keys], pa.bool_()))
        return rows.select(columns)
