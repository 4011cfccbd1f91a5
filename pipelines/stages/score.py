"""Stage: the replies of some buckets scored against their targets, as sums that add up over buckets.

Generations and requests of a user lie in the same bucket: the join needs no shuffle.
"""

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.shards import of_bucket
from infra.snapshot import Snapshot
from pipelines.stages import groups
from pplug import intervals, metrics
from pplug.tasks import TaskEntry


@dataclass(frozen=True)
class Replies:
    """One bucket's requests that have a target and were answered by any of the runs, and the answers."""

    rows: list[dict[str, Any]]
    """The requests: request_id, user_id, owner_id, target, as_of, as_of_position, and input where it is asked for."""
    texts: dict[str, dict[str, str]]
    """By method, by id; empty for a row with an error."""
    costs: dict[str, dict[str, tuple[int, ...]]]
    """By method, by id: prompt tokens, output tokens, whether each kind of thing kept for a user was read (COSTS)."""
    errors: dict[str, int]
    labelled: int
    """Requests with a target, answered or not."""
    strangers: list[str]
    """Ids of replies to no request that there is."""
    made_by: frozenset[tuple[str, str, str]]
    """Method, kind of identity (IDENTITIES), identity: of all replies there are."""

    @property
    def users(self) -> int:
        """Distinct people who are themselves a user."""
        return len({row["owner_id"] for row in self.rows if row["owner_id"] == row["user_id"]})

    @property
    def split_owners(self) -> set[str]:
        """Distinct people with one history a question: their questions lie in many buckets."""
        return {row["owner_id"] for row in self.rows if row["owner_id"] != row["user_id"]}


def read_bucket(
    requests: Snapshot,
    generations: Snapshot,
    bucket: int,
    runs: Sequence[str],
    with_input: bool = False,
    users: Mapping[int, list[str]] | None = None,
) -> Replies:
    """Joins a bucket, of these users where they are given (`shards.keys_by_bucket`).

    Raises:
        ValueError: a request was answered twice by one method, or ids are not unique.
    """
    columns = ["request_id", "user_id", "owner_id", "target", "as_of", "as_of_position"] + ["input"] * with_input
    keys = of_bucket(users, bucket)
    everything = requests.read(columns, buckets=[bucket], user_keys=keys)
    asked = everything.filter(pc.is_valid(everything["target"]))
    wanted = pc.field("run_id").isin(list(runs))
    names = ["request_id", "user_id", "method", "text", "error", "prompt_tokens", "output_tokens", "persona",
             "adapter_id"]  # fmt: skip
    rows = generations.read([*names, *IDENTITIES], buckets=[bucket], filter=wanted, user_keys=keys)
    if pc.count_distinct(everything["request_id"]).as_py() < len(everything):
        raise ValueError("two users have a request of the same request_id; ids must be unique to be scored")
    known, there = set(asked["request_id"].to_pylist()), set(everything["request_id"].to_pylist())
    texts: dict[str, dict[str, str]] = {}
    costs: dict[str, dict[str, tuple[int, ...]]] = {}
    errors: dict[str, int] = {}
    for row in rows.to_pylist():
        if row["request_id"] not in known:
            continue
        of_method = texts.setdefault(row["method"], {})
        if row["request_id"] in of_method:
            raise ValueError(
                f"request {row['request_id']!r} has two replies of method {row['method']} in runs {', '.join(runs)}; "
                "name one run a method, or give --pool when the runs repeat the same methods"
            )
        of_method[row["request_id"]] = row["text"] or "" if row["error"] is None else ""
        parts = row["method"].split("+")
        costs.setdefault(row["method"], {})[row["request_id"]] = (
            row["prompt_tokens"] or 0,
            row["output_tokens"] or 0,
            int(row["persona"] == "attention" or "dense" in parts),
            int(row["persona"] == "mean"),
            int(row["adapter_id"] is not None),
            int("profile" in parts),
        )
        errors[row["method"]] = errors.get(row["method"], 0) + (row["error"] is not None)
    answered = set().union(*texts.values()) if texts else set()
    kept = [row for row in asked.to_pylist() if row["request_id"] in answered]
    return Replies(
        rows=kept,
        texts=texts,
        costs=costs,
        errors=errors,
        labelled=len(asked),
        strangers=sorted({i for i in rows["request_id"].to_pylist() if i not in there}),
        made_by=frozenset(
            (row["method"], name, row[name])
            for row in rows.group_by(["method", *IDENTITIES]).aggregate([]).to_pylist()
            for name in IDENTITIES
            if row[name]
        ),
    )


IDENTITIES = ("llm_id", "plug_id", "decoding_id")
COSTS = ("prompt_tokens", "output_tokens", "vectors", "stored_persona", "adapters", "profiles")
BASELINE = "none"
MOST_EXAMPLES = 100


@dataclass(frozen=True)
class Columns:
    """Where the columns of a tally stand: those of the scores first, then what is broken down, W in all."""

    scores: int
    """K of metrics.item_sums."""

    def third(self, kind: str, third: int) -> slice:
        """Two columns: requests of this third, and the sum of their first metric."""
        start = self.scores + 2 * (3 * groups.KINDS.index(kind) + third)
        return slice(start, start + 2)

    @property
    def users(self) -> slice:
        """Four columns: users, those better, worse and as well off as with the baseline."""
        start = self.scores + 6 * len(groups.KINDS)
        return slice(start, start + 4)

    @property
    def costs(self) -> slice:
        """As COSTS, summed over requests."""
        return slice(self.users.stop, self.users.stop + len(COSTS))


@dataclass
class Tally:
    """What the driver adds up: sums of a method's items, plain and of every resample."""

    sums: np.ndarray
    """(W,) by `Columns`."""
    resampled: np.ndarray
    """(R, W)."""
    errors: int
    missing: list[str]
    """Some ids that other methods answered and this one did not."""
    n_missing: int


@dataclass
class Scored:
    """The part of some buckets; grows with methods and resamples, not with users (but for split owners)."""

    methods: dict[str, Tally]
    labelled: int = 0
    answered: int = 0
    users: int = 0
    split_owners: frozenset[bytes] = frozenset()
    seen: frozenset[str] = frozenset()
    """Methods that the runs have, asked for or not."""
    examples: tuple[dict[str, Any], ...] = ()
    """Requests with their replies, drawn at random: those of the smallest `draw`."""
    left_out: int = 0
    """Requests that the runs beside have not answered."""
    which: int = 0
    """Sum of digests of the ids of the requests answered: runs that answered the same have the same."""
    strangers: tuple[str, ...] = ()
    """Some ids of replies to no request that there is."""
    n_strangers: int = 0
    made_by: frozenset[tuple[str, str, str]] = frozenset()
    """As in `Replies`."""
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
    facts: groups.Facts
    cuts: dict[str, tuple[int, int]]
    """Of each kind of group, where its thirds end; kinds that are not known here are left out."""
    examples: int = 0
    """Requests to show side by side."""
    beside: tuple[str, ...] = ()
    """Where given, only requests that one of these runs has answered too are scored: for a comparison of runs."""
    users: Mapping[int, list[str]] | None = None
    """Keys by bucket; where given, only their requests."""

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
        tables = (self.requests, self.generations)
        found = read_bucket(*tables, bucket, self.runs, with_input=self.examples > 0, users=self.users)
        left = len(found.rows)
        if self.beside:
            others = read_bucket(self.requests, self.generations, bucket, self.beside)
            shared = {row["request_id"] for row in others.rows}
            found = dataclasses.replace(found, rows=[row for row in found.rows if row["request_id"] in shared])
        left -= len(found.rows)
        golds = {row["request_id"]: row["target"] for row in found.rows}
        at = {request_id: i for i, request_id in enumerate(golds)}
        base = self._first_metric(golds, found.texts.get(BASELINE, {}))
        known = self.facts.read(bucket, found.rows) if found.rows and self.cuts else {}
        thirds = {kind: groups.thirds(known[kind], cut) for kind, cut in self.cuts.items() if kind in known}
        tallies = {}
        for method in found.texts if self.methods is None else self.methods:
            texts = found.texts.get(method, {})
            missing = [i for i in golds if i not in texts]
            answered = {i: gold for i, gold in golds.items() if i in texts}
            if answered:
                ids, sums = metrics.item_sums(self.entry, answered, {i: texts[i] for i in answered})
                rows = np.array([at[i] for i in ids])
                of_thirds = [
                    sums[:, :2] * (thirds[kind][rows] == third)[:, None] if kind in thirds else np.zeros((len(ids), 2))
                    for kind in groups.KINDS
                    for third in range(3)
                ]
                users = self._users(
                    [found.rows[row]["user_id"] for row in rows], sums[:, 1], [base.get(i) for i in ids]
                )
                costs = np.array([found.costs[method][i] for i in ids], dtype=np.float64)
                wide = np.hstack([sums, *of_thirds, users, costs])
                owners = [found.rows[row]["owner_id"] for row in rows]
                resampled = intervals.resampled_sums(owners, wide, self.resamples, self.seed)
                tally = Tally(wide.sum(axis=0), resampled, found.errors.get(method, 0), missing[:3], len(missing))
            else:
                tally = Tally(np.zeros(1), np.zeros((self.resamples, 1)), 0, missing[:3], len(missing))
            tallies[method] = tally
        split = frozenset(intervals.digest(owner, self.seed) for owner in found.split_owners)
        seen = frozenset(found.texts)
        return Scored(
            tallies,
            found.labelled,
            len(golds),
            found.users,
            split,
            seen,
            self._examples(found, list(tallies)),
            left,
            sum(int.from_bytes(intervals.digest(i, self.seed), "big") for i in golds),
            tuple(found.strangers[:3]),
            len(found.strangers),
            found.made_by,
        )

    def _examples(self, found: Replies, methods: list[str]) -> tuple[dict[str, Any], ...]:
        """Requests that the methods answer differently, the first of a random order that is the same in every run."""
        rows = []
        for row in found.rows if self.examples else []:
            replies = {name: found.texts.get(name, {}).get(row["request_id"], "") for name in methods}
            if len(set(replies.values())) > 1:
                draw = intervals.digest(f"example {row['request_id']}", self.seed)
                rows.append({"draw": draw, "input": row["input"], "target": row["target"], "replies": replies})
        return first(rows, self.examples)

    def _first_metric(self, golds: dict[str, str], texts: dict[str, str]) -> dict[str, float]:
        answered = {i: gold for i, gold in golds.items() if i in texts}
        if not answered:
            return {}
        ids, sums = metrics.item_sums(self.entry, answered, {i: texts[i] for i in answered})
        return dict(zip(ids, sums[:, 1].tolist(), strict=True))

    def _users(self, user_ids: list[str], values: np.ndarray, base: list[float | None]) -> np.ndarray:
        """(N, 4): on each user's first row a 1, and whether the user does better, worse or as well over all rows."""
        lower = metrics.NAMES[self.entry.metric][0] in metrics.LOWER_IS_BETTER
        gain: dict[str, float] = {}
        for user, value, without in zip(user_ids, values.tolist(), base, strict=True):
            gain[user] = gain.get(user, 0.0) + (np.nan if without is None else value - without) * (-1 if lower else 1)
        found, seen = np.zeros((len(user_ids), 4)), set()
        for row, user in enumerate(user_ids):
            if user not in seen and np.isfinite(gain[user]):
                better, worse = gain[user] > 1e-9, gain[user] < -1e-9
                found[row] = (1, better, worse, not better and not worse)
            seen.add(user)
        return found


def first(examples: Sequence[dict[str, Any]], count: int) -> tuple[dict[str, Any], ...]:
    """Those that come first in the random order."""
    return tuple(sorted(examples, key=lambda row: row["draw"])[:count])


def merged(one: Scored, other: Scored) -> Scored:
    """Both together. A method that a part does not have misses everything that part answered."""
    methods = {}
    for method in one.methods | other.methods:
        parts = [part.methods[method] for part in (one, other) if method in part.methods]
        absent = sum(part.answered for part in (one, other) if method not in part.methods)
        tally = parts[0] if len(parts) == 1 else added(*parts)
        tally.n_missing += absent
        methods[method] = tally
    return Scored(
        methods,
        one.labelled + other.labelled,
        one.answered + other.answered,
        one.users + other.users,
        one.split_owners | other.split_owners,
        one.seen | other.seen,
        first([*one.examples, *other.examples], MOST_EXAMPLES),
        one.left_out + other.left_out,
        one.which + other.which,
        (one.strangers + other.strangers)[:3],
        one.n_strangers + other.n_strangers,
        one.made_by | other.made_by,
        one.problem or other.problem,
    )


def added(one: Tally, other: Tally) -> Tally:
    """Both together; the sums of a method's repeats add up like those of buckets."""
    return Tally(
        one.sums + other.sums,
        one.resampled + other.resampled,
        one.errors + other.errors,
        (one.missing + other.missing)[:3],
        one.n_missing + other.n_missing,
    )
