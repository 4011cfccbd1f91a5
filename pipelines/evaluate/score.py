"""Stage: the replies of some buckets scored against their targets, as sums that add up over buckets.

References that need no LLM are scored by the same resamples as the methods, so that differences to them are paired, and
are kept apart from the methods.
"""

import dataclasses
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from infra.snapshot import Snapshot
from pipelines.evaluate import cohorts as groups
from pipelines.evaluate.references import References
from pipelines.evaluate.replies import COSTS, Key, Replies, key, read_bucket, shown
from pplug import intervals, metrics
from pplug.tasks import TaskEntry

BASELINE = "none"
MOST_EXAMPLES = 100
MOST_UNCLEAR = 3
"""Replies that were not understood, shown per method."""
UNCLEAR_CHARACTERS = 60
"""Characters shown of each of them."""


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
    errors: int = 0
    missing: list[str] = field(default_factory=list)
    """Some requests, as messages name them, that other methods answered and this one did not."""
    n_missing: int = 0
    cut: int = 0
    """Replies that ended at the limit of tokens."""
    n_unclear: int = 0
    """Replies without an error that are no label or no number."""
    unclear: tuple[dict[str, Any], ...] = ()
    """Some of them, drawn at random: draw, user_id and cut text."""


@dataclass
class Scored:
    """The part of some buckets; grows with methods and resamples, not with users (but for split owners)."""

    methods: dict[str, Tally] = field(default_factory=dict)
    references: dict[str, Tally] = field(default_factory=dict)
    """References that need no LLM."""
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
    """Sum of digests of the users and ids of the requests answered: equal for runs that answered the same ones."""
    strangers: tuple[str, ...] = ()
    """Some replies, as messages name them, to no request that there is."""
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
    """Where the thirds of each kind of group end; kinds that are not known here are left out."""
    examples: int = 0
    """Requests to show side by side."""
    beside: tuple[str, ...] = ()
    """Where given, only requests that one of these runs has answered too are scored: for a comparison of runs."""
    users: Mapping[int, list[str]] | None = None
    """Keys by bucket; where given, only their requests."""
    references: "References | None" = None
    """Where given, its texts are scored beside the replies."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        total = Scored()
        for bucket in batch["buckets"].to_pylist()[0]:
            try:
                total = merged(total, self.score(bucket))
            except ValueError as error:  # of the metrics and the join: they name ids and what to do
                total.problem = str(error)
        return pa.table({"scored": pa.array([pickle.dumps(total)], pa.large_binary())})

    def score(self, bucket: int) -> Scored:
        """One bucket."""
        tables, with_input = (self.requests, self.generations), self.examples > 0 or self.references is not None
        found = read_bucket(*tables, bucket, self.runs, with_input=with_input, users=self.users)
        left = len(found.rows)
        if self.beside:
            others = read_bucket(*tables, bucket, self.beside)
            shared = {key(row) for row in others.rows}
            found = dataclasses.replace(found, rows=[row for row in found.rows if key(row) in shared])
        left -= len(found.rows)
        golds = {key(row): row["target"] for row in found.rows}
        base = self._first_metric(golds, found.texts.get(BASELINE, {}))
        known = self.facts.read(bucket, found.rows) if found.rows and self.cuts else {}
        thirds = {kind: groups.thirds(known[kind], cut) for kind, cut in self.cuts.items() if kind in known}
        tallies = {}
        for method in found.texts if self.methods is None else self.methods:
            texts = found.texts.get(method, {})
            tally = self._tally(found.rows, texts, found.costs.get(method, {}), base, thirds)
            missing = [one for one in golds if one not in texts]
            tally.missing, tally.n_missing = [shown(one) for one in missing[:3]], len(missing)
            tally.errors, tally.cut = (len(of.get(method, set()) & golds.keys()) for of in (found.errors, found.cut))
            said = {one: texts[one] for one in golds if one in texts and one not in found.errors.get(method, ())}
            tally.n_unclear, tally.unclear = self._unclear(said)
            tallies[method] = tally
        return Scored(
            methods=tallies,
            references={
                name: self._tally(found.rows, texts, {}, {}, {}) for name, texts in self._referred(bucket, found)
            },
            labelled=found.labelled,
            answered=len(golds),
            users=found.users,
            split_owners=frozenset(intervals.digest(owner, self.seed) for owner in found.split_owners),
            seen=frozenset(found.texts),
            examples=self._examples(found, list(tallies)),
            left_out=left,
            which=sum(int.from_bytes(intervals.digest("\0".join(one), self.seed), "big") for one in golds),
            strangers=tuple(map(shown, found.strangers[:3])),
            n_strangers=len(found.strangers),
            made_by=found.made_by,
        )

    def _tally(
        self,
        rows: list[dict[str, Any]],
        texts: Mapping[Key, str],
        costs: Mapping[Key, tuple[int, ...]],
        base: Mapping[Key, float],
        thirds: Mapping[str, np.ndarray],
    ) -> Tally:
        """Sums over the requests that have a text; thirds (N,) are of all rows."""
        answered = {key(row): row["target"] for row in rows if key(row) in texts}
        if not answered:
            return Tally(np.zeros(1), np.zeros((self.resamples, 1)))
        ids, sums = metrics.item_sums(self.entry, answered, {one: texts[one] for one in answered})
        place = {key(row): at for at, row in enumerate(rows)}
        at = np.array([place[one] for one in ids])
        of_thirds = [
            sums[:, :2] * (thirds[kind][at] == third)[:, None] if kind in thirds else np.zeros((len(ids), 2))
            for kind in groups.KINDS
            for third in range(3)
        ]
        users = self._users([user for user, _ in ids], sums[:, 1], [base.get(one) for one in ids])
        spent = np.array([costs.get(one, (0,) * len(COSTS)) for one in ids], dtype=np.float64)
        wide = np.hstack([sums, *of_thirds, users, spent])
        owners = [rows[row]["owner_id"] for row in at]
        return Tally(wide.sum(axis=0), intervals.resampled_sums(owners, wide, self.resamples, self.seed))

    def _referred(self, bucket: int, found: Replies) -> list[tuple[str, dict[Key, str]]]:
        """The references' texts by name; they are made without a look at the targets."""
        if self.references is None or not found.rows:
            return []
        asked = [row | {"target": None} for row in found.rows]
        texts = self.references.predict(bucket, asked)
        ids = [key(row) for row in asked]
        return [(name, dict(zip(ids, of_name, strict=True))) for name, of_name in texts.items()]

    def _unclear(self, texts: Mapping[Key, str]) -> tuple[int, tuple[dict[str, Any], ...]]:
        """How many replies are no answer at all, and some of them, different ones, first in a random order."""
        found = [(one, text) for one, text in texts.items() if not metrics.understood(self.entry, text)]
        rows = [
            {"draw": self._draw("unclear", one), "user_id": one[0], "text": " ".join(text.split())[:UNCLEAR_CHARACTERS]}
            for one, text in found
        ]
        return len(found), _different(rows)

    def _draw(self, what: str, one: Key) -> bytes:
        return intervals.digest("\0".join((what, *one)), self.seed)

    def _examples(self, found: Replies, methods: list[str]) -> tuple[dict[str, Any], ...]:
        """Requests that the methods answer differently, the first of a random order that is the same in every run."""
        rows = []
        for row in found.rows if self.examples else []:
            replies = {name: found.texts.get(name, {}).get(key(row), "") for name in methods}
            if len(set(replies.values())) > 1:
                rows.append(
                    {
                        "draw": self._draw("example", key(row)),
                        "input": row["input"],
                        "target": row["target"],
                        "replies": replies,
                    }
                )
        return first(rows, self.examples)

    def _first_metric(self, golds: dict[Key, str], texts: dict[Key, str]) -> dict[Key, float]:
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


def _different(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Those that come first in the random order, each text once."""
    by_text: dict[str, dict[str, Any]] = {}
    for row in first(rows, len(rows)):
        by_text.setdefault(row["text"], row)
    return tuple(by_text.values())[:MOST_UNCLEAR]


def merged(one: Scored, other: Scored) -> Scored:
    """Both together. A method that a part does not have misses everything that part answered."""
    methods = _both(one.methods, other.methods)
    for method, tally in methods.items():
        tally.n_missing += sum(part.answered for part in (one, other) if method not in part.methods)
    return Scored(
        methods=methods,
        references=_both(one.references, other.references),
        labelled=one.labelled + other.labelled,
        answered=one.answered + other.answered,
        users=one.users + other.users,
        split_owners=one.split_owners | other.split_owners,
        seen=one.seen | other.seen,
        examples=first([*one.examples, *other.examples], MOST_EXAMPLES),
        left_out=one.left_out + other.left_out,
        which=one.which + other.which,
        strangers=(one.strangers + other.strangers)[:3],
        n_strangers=one.n_strangers + other.n_strangers,
        made_by=one.made_by | other.made_by,
        problem=one.problem or other.problem,
    )


def _both(one: dict[str, Tally], other: dict[str, Tally]) -> dict[str, Tally]:
    found = {}
    for name in one | other:
        parts = [part[name] for part in (one, other) if name in part]
        found[name] = parts[0] if len(parts) == 1 else added(*parts)
    return found


def added(one: Tally, other: Tally) -> Tally:
    """Both together; the sums of a method's repeats add up like those of buckets."""
    return Tally(
        sums=one.sums + other.sums,
        resampled=one.resampled + other.resampled,
        errors=one.errors + other.errors,
        missing=(one.missing + other.missing)[:3],
        n_missing=one.n_missing + other.n_missing,
        cut=one.cut + other.cut,
        n_unclear=one.n_unclear + other.n_unclear,
        unclear=_different([*one.unclear, *other.unclear]),
    )
