"""Stage: the replies of some buckets scored against their targets, as sums that add up over buckets.

Generations and requests of a user lie in the same bucket: the join needs no shuffle.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.snapshot import Snapshot, read_files
from pplug import intervals, metrics
from pplug.tasks import TaskEntry

Repeat = tuple[str, str]
"""(method, run_id): runs that differ only in a seed repeat a method."""


@dataclass(frozen=True)
class Replies:
    """One bucket's requests that have a target and were answered by any of the runs, and the answers."""

    ids: list[str]
    owner_ids: list[str]
    targets: list[str]
    texts: dict[Repeat, dict[str, str]]
    """By method and run, by id; empty for a row with an error."""
    errors: dict[Repeat, int]
    labelled: int
    """Requests with a target, answered or not."""
    users: int
    """Distinct people who are themselves a user."""
    split_owners: list[str]
    """Distinct people with one history a question: their questions lie in many buckets."""


def read_bucket(requests: Snapshot, generations: Snapshot, bucket: int, runs: Sequence[str]) -> Replies:
    """Joins a bucket. Raises ValueError: a request was answered twice by one method, or ids are not unique."""
    columns = ["request_id", "user_id", "owner_id", "target"]
    asked = _read(requests, bucket, columns, pc.field("target").is_valid())
    wanted = pc.field("run_id").isin(list(runs))
    rows = _read(generations, bucket, ["run_id", "request_id", "method", "text", "error"], wanted)
    if pc.count_distinct(asked["request_id"]).as_py() < len(asked):
        raise ValueError("two users have a request of the same request_id; ids must be unique to be scored")
    known = set(asked["request_id"].to_pylist())
    texts: dict[Repeat, dict[str, str]] = {}
    errors: dict[Repeat, int] = {}
    for row in rows.to_pylist():
        if row["request_id"] not in known:
            continue
        repeat = (row["method"], row["run_id"])
        of_repeat = texts.setdefault(repeat, {})
        if row["request_id"] in of_repeat:
            raise ValueError(f"request {row['request_id']!r} has two replies of method {repeat[0]} in run {repeat[1]}")
        of_repeat[row["request_id"]] = row["text"] or "" if row["error"] is None else ""
        errors[repeat] = errors.get(repeat, 0) + (row["error"] is not None)
    answered = set().union(*texts.values()) if texts else set()
    kept = [row for row in asked.to_pylist() if row["request_id"] in answered]
    return Replies(
        ids=[row["request_id"] for row in kept],
        owner_ids=[row["owner_id"] for row in kept],
        targets=[row["target"] for row in kept],
        texts=texts,
        errors=errors,
        labelled=len(asked),
        users=len({row["owner_id"] for row in kept if row["owner_id"] == row["user_id"]}),
        split_owners=sorted({row["owner_id"] for row in kept if row["owner_id"] != row["user_id"]}),
    )


@dataclass
class Tally:
    """What the driver adds up: sums of a method's items, plain and of every resample."""

    sums: np.ndarray
    """(K,) of metrics.item_sums."""
    resampled: np.ndarray
    """(R, K)."""
    errors: int
    missing: list[str]
    """Some ids that other methods answered and this one did not."""
    n_missing: int


@dataclass
class Scored:
    """The part of some buckets; grows with methods and resamples, not with users (but for split owners)."""

    methods: dict[Repeat, Tally]
    labelled: int = 0
    answered: int = 0
    users: int = 0
    split_owners: frozenset[bytes] = frozenset()
    seen: frozenset[Repeat] = frozenset()
    """What the runs have, asked for or not."""
    problem: str | None = None


@dataclass(frozen=True)
class ScoreBuckets:
    """in: buckets list<int>, a task's share; out: one row, a pickled `Scored`."""

    entry: TaskEntry
    requests: Snapshot
    generations: Snapshot
    runs: tuple[str, ...]
    methods: tuple[str, ...] | None
    """Those to score; None: every one there is."""
    resamples: int
    seed: int

    def __call__(self, batch: pa.Table) -> pa.Table:
        total = Scored({})
        for bucket in batch["buckets"].to_pylist()[0]:
            try:
                total = merged(total, self.score(bucket))
            except ValueError as error:  # of the metrics and the join: they name ids and what to do
                total.problem = str(error)
        return pa.table({"scored": pa.array([pickle.dumps(total)], pa.large_binary())})

    def score(self, bucket: int) -> Scored:
        """One bucket."""
        found = read_bucket(self.requests, self.generations, bucket, self.runs)
        golds = dict(zip(found.ids, found.targets, strict=True))
        owner_of = dict(zip(found.ids, found.owner_ids, strict=True))
        tallies = {}
        for repeat, texts in found.texts.items():
            if self.methods is not None and repeat[0] not in self.methods:
                continue
            missing = [i for i in golds if i not in texts]
            answered = {i: gold for i, gold in golds.items() if i in texts}
            if answered:
                ids, sums = metrics.item_sums(self.entry, answered, texts)
                owners = [owner_of[i] for i in ids]
                resampled = intervals.resampled_sums(owners, sums, self.resamples, self.seed)
                tally = Tally(sums.sum(axis=0), resampled, found.errors.get(repeat, 0), missing[:3], len(missing))
            else:
                tally = Tally(np.zeros(1), np.zeros((self.resamples, 1)), 0, missing[:3], len(missing))
            tallies[repeat] = tally
        split = frozenset(intervals.digest(owner, self.seed) for owner in found.split_owners)
        return Scored(tallies, found.labelled, len(golds), found.users, split, frozenset(found.texts))


def merged(one: Scored, other: Scored) -> Scored:
    """Both together. A method that a part does not have misses everything that part answered."""
    methods = {}
    for repeat in one.methods | other.methods:
        parts = [part.methods[repeat] for part in (one, other) if repeat in part.methods]
        absent = sum(part.answered for part in (one, other) if repeat not in part.methods)
        tally = parts[0] if len(parts) == 1 else added(*parts)
        tally.n_missing += absent
        methods[repeat] = tally
    return Scored(
        methods,
        one.labelled + other.labelled,
        one.answered + other.answered,
        one.users + other.users,
        one.split_owners | other.split_owners,
        one.seen | other.seen,
        one.problem or other.problem,
    )


def added(one: Tally, other: Tally) -> Tally:
    """Both together; sums of repeats of a method add up like those of buckets."""
    return Tally(
        one.sums + other.sums,
        one.resampled + other.resampled,
        one.errors + other.errors,
        (one.missing + other.missing)[:3],
        one.n_missing + other.n_missing,
    )


def _read(snapshot: Snapshot, bucket: int, columns: Sequence[str], filter: pc.Expression | None = None) -> pa.Table:
    return read_files(snapshot.by_bucket().get(bucket, []), list(columns), filter, spec=snapshot.spec)
