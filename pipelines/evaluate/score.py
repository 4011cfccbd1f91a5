"""Stage: the replies of some buckets scored against their targets, as sums that add up over buckets.

References that need no LLM are scored by the same resamples as the methods, so that differences to them are paired, and
are kept apart from the methods.
"""

import dataclasses
import functools
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from infra.snapshot import Snapshot
from pipelines.evaluate import cohorts
from pipelines.evaluate.figures import BASELINE
from pipelines.evaluate.references import References
from pipelines.evaluate.replies import COSTS, Answers, Key, Replies, join_bucket, key, shown
from pipelines.owners import Persons
from pplug import intervals, metrics
from pplug.tasks import TaskSpec

MAX_EXAMPLES = 100
MAX_UNCLEAR_SHOWN = 3
"""Replies that were not understood, shown per method."""
UNCLEAR_CHARACTERS = 60
"""Characters shown of each of them."""


@dataclass(frozen=True)
class DrawnReply:
    """A reply that was not understood, with its place in a random order that is the same in every run."""

    draw: bytes
    user_id: str
    text: str
    """The first characters, on one line."""


@dataclass(frozen=True)
class DrawnExample:
    """A request with its replies, with its place in a random order that is the same in every run."""

    draw: bytes
    input: str
    target: str
    replies: dict[str, str]
    """Text by method."""


Drawn = TypeVar("Drawn", DrawnReply, DrawnExample)


@dataclass(frozen=True)
class Columns:
    """Places of a tally's columns: those of the scores first, then those of the breakdowns, W in all."""

    scores: int
    """Number of columns of `metrics.item_sums`."""

    def third(self, kind: str, third: int) -> slice:
        """Two columns: the requests of a third, and the sum of their first metric."""
        start = self.scores + 2 * (3 * cohorts.KINDS.index(kind) + third)
        return slice(start, start + 2)

    @property
    def users(self) -> slice:
        """Four columns: users, and users better, worse and as well off as with the baseline."""
        start = self.scores + 6 * len(cohorts.KINDS)
        return slice(start, start + 4)

    @property
    def costs(self) -> slice:
        """Columns of COSTS, summed over requests."""
        return slice(self.users.stop, self.users.stop + len(COSTS))


@dataclass
class Tally:
    """Sums over a method's replies, plain and of every resample; the driver adds them up."""

    sums: np.ndarray
    """Sums (W,) of the columns that `Columns` tells."""
    resampled: np.ndarray
    """The same sums (R, W) in each of R resamples."""
    errors: int = 0
    """Replies that are errors."""
    missing: list[str] = field(default_factory=list)
    """Names, for messages, of some requests that other methods answered and this one did not."""
    cut: int = 0
    """Replies that ended at the limit of tokens."""
    n_unclear: int = 0
    """Replies without an error that are no label or no number."""
    unclear: tuple[DrawnReply, ...] = ()
    """A few of these replies, drawn at random."""


@dataclass
class Scored:
    """Sums over some buckets; the size grows with methods and resamples, not with users (but for split owners)."""

    methods: dict[str, Tally] = field(default_factory=dict)
    references: dict[str, Tally] = field(default_factory=dict)
    """References that need no LLM."""
    labelled: int = 0
    """Requests with a target."""
    answered: int = 0
    """Requests with a target that were answered and are scored."""
    users: int = 0
    """People who are themselves their one user."""
    split_owners: frozenset[bytes] = frozenset()
    """Digests of people with several histories, such as one per question."""
    seen: frozenset[str] = frozenset()
    """Methods that the runs have, asked for or not."""
    examples: tuple[DrawnExample, ...] = ()
    """Requests with their replies, drawn at random: the ones with the smallest `draw`."""
    left_out: int = 0
    """Requests that the runs beside have not answered."""
    fingerprint: int = 0
    """Order-independent fingerprint of the answered requests; equal when two runs answered the same ones."""
    unknown: tuple[str, ...] = ()
    """Names, for messages, of some requests that were answered and are not in the table requests."""
    n_unknown: int = 0
    """Number of such requests."""
    outdated: tuple[str, ...] = ()
    """Names, for messages, of some requests whose input or cut-off has changed since they were answered."""
    n_outdated: int = 0
    """Number of such requests."""
    made_by: frozenset[tuple[str, str, str]] = frozenset()
    """Method, kind of identity and identity, as in `Replies`."""
    samples: dict[tuple[str, str], int] = field(default_factory=dict)
    """Number of samples by run and method."""
    n_undated: int = 0
    """Number of scored requests without a cut-off, which see all items that there are."""
    n_unread: int = 0
    """Number of targets that are mostly of letters that the task's ROUGE does not read."""
    problem: str | None = None
    """Message on a bucket that cannot be scored."""

    @property
    def n_people(self) -> int:
        """Number of people, each once, whatever the number of their histories."""
        return self.users + len(self.split_owners)

    def owed(self, method: str) -> int:
        """Number of replies that a method must have: each of a run's methods answers as often as any of them."""
        runs = {run for run, name in self.samples if name == method}
        return self.answered * max((n for (run, _), n in self.samples.items() if run in runs), default=1)


@dataclass(frozen=True)
class ScoreBuckets:
    """Stage: scores the buckets of a task.

    in:  buckets list<int>
    out: scored binary, one row with a pickled `Scored`
    """

    task: TaskSpec
    requests: Snapshot
    generations: Snapshot
    runs: tuple[str, ...]
    methods: tuple[str, ...] | None
    """Methods to score; None means all that the runs have."""
    n_bootstrap: int
    """Resamples of people."""
    seed: int
    facts: cohorts.FactReader
    cuts: dict[str, tuple[int, int]]
    """Last bins of the lower two thirds by kind of fact; kinds that are not known here are left out."""
    examples: int = 0
    """Requests to show side by side."""
    beside: tuple[str, ...] = ()
    """Runs to compare with; where given, only requests that one of them has answered too are scored."""
    users: Mapping[int, list[str]] | None = None
    """User keys by bucket; where given, only the requests of these users are scored."""
    references: References | None = None
    """Fitted references; where given, their texts are scored beside the replies."""
    of_several: Persons = Persons()
    """Persons with a history under another id than their own (`Owners.of_several`)."""

    def __call__(self, batch: pa.Table) -> pa.Table:
        total = Scored()
        for bucket in batch["buckets"].to_pylist()[0]:
            try:
                total = merged(total, self.score(bucket))
            except metrics.GoldError as error:  # the metrics do not know how logs may name a user
                total.problem = f"{error} (the request is {shown(error.request)})"
            except ValueError as error:  # the join names requests and what to do
                total.problem = str(error)
        return pa.table({"scored": pa.array([pickle.dumps(total)], pa.large_binary())})

    def score(self, bucket: int) -> Scored:
        """Scores one bucket."""
        replies, left_out = self._replies(bucket)
        golds = {key(row): row["target"] for row in replies.rows}
        users, split = replies.people(self.of_several)
        base = self._first_metric(golds, [one.texts.get(BASELINE, {}) for one in (replies, *replies.others)])
        places = self.facts.read_bins(bucket, replies.rows) if replies.rows and self.cuts else {}
        thirds = {kind: cohorts.thirds(places[kind], cut) for kind, cut in self.cuts.items() if kind in places}
        tallies = {
            method: self._method(method, replies, golds, base, thirds)
            for method in (replies.texts if self.methods is None else self.methods)
        }
        references = {
            name: self._tally(replies.rows, texts, {}, {}, {}) for name, texts in self._referred(bucket, replies)
        }
        return Scored(
            methods=tallies,
            references=references,
            labelled=replies.labelled,
            answered=len(golds),
            users=users,
            split_owners=frozenset(intervals.digest(owner, self.seed) for owner in split),
            seen=frozenset(replies.texts),
            examples=self._examples(replies, list(tallies)),
            left_out=left_out,
            fingerprint=sum(int.from_bytes(intervals.digest("\0".join(one), self.seed), "big") for one in golds),
            unknown=tuple(map(shown, replies.unknown[:3])),
            n_unknown=len(replies.unknown),
            outdated=tuple(map(shown, replies.outdated[:3])),
            n_outdated=len(replies.outdated),
            made_by=replies.made_by,
            samples=replies.samples,
            n_undated=sum(row["as_of"] is None and row["as_of_position"] is None for row in replies.rows),
            n_unread=sum(_is_unread(self.task, gold) for gold in golds.values()),
        )

    def _replies(self, bucket: int) -> tuple[Replies, int]:
        """The bucket's replies to the requests to score, and how many requests the runs beside leave out."""
        with_input = self.examples > 0 or self.references is not None
        replies = join_bucket(
            self.requests, self.generations, bucket, self.runs, with_input=with_input, users=self.users,
            methods=self.methods or (),
        )  # fmt: skip
        if not self.beside:
            return replies, 0
        beside = join_bucket(self.requests, self.generations, bucket, self.beside, methods=self.methods or ())
        shared = {key(row) for row in beside.rows}
        rows = [row for row in replies.rows if key(row) in shared]
        return dataclasses.replace(replies, rows=rows), len(replies.rows) - len(rows)

    def _method(
        self,
        method: str,
        replies: Replies,
        golds: Mapping[Key, str],
        base: Mapping[Key, float],
        thirds: Mapping[str, np.ndarray],
    ) -> Tally:
        """The tally of a method, with counts of replies that are errors, cut or not understood."""
        samples = [replies, *(other for other in replies.others if method in other.texts)]
        own = self._first_metric(golds, [one.texts.get(method, {}) for one in samples])
        gains = {one: value - base[one] for one, value in own.items() if one in base}
        return functools.reduce(
            added,
            (  # a user counts once, by the mean of the samples
                self._sample(method, one, replies.rows, golds, gains if one is replies else {}, thirds)
                for one in samples
            ),
        )

    def _sample(
        self,
        method: str,
        replies: Answers,
        rows: list[dict[str, Any]],
        golds: Mapping[Key, str],
        gains: Mapping[Key, float],
        thirds: Mapping[str, np.ndarray],
    ) -> Tally:
        """As `_method`, over one reply per request."""
        texts, errors = replies.texts.get(method, {}), replies.errors.get(method, set())
        tally = self._tally(rows, texts, replies.costs.get(method, {}), gains, thirds)
        tally.missing = [shown(one) for one in golds if one not in texts][:3]
        tally.errors = len(errors & golds.keys())
        tally.cut = len(replies.cut.get(method, set()) & golds.keys())
        without_errors = {one: texts[one] for one in golds if one in texts and one not in errors}
        tally.n_unclear, tally.unclear = self._unclear(without_errors)
        return tally

    def _tally(
        self,
        rows: list[dict[str, Any]],
        texts: Mapping[Key, str],
        costs: Mapping[Key, tuple[int, ...]],
        gains: Mapping[Key, float],
        thirds: Mapping[str, np.ndarray],
    ) -> Tally:
        """Sums over the requests that have a text.

        Args:
            gains: the first metric less the baseline's, by request; users with a request without one are not compared.
            thirds: by kind of fact, the third of each of the rows (N,).
        """
        answered = {key(row): row["target"] for row in rows if key(row) in texts}
        if not answered:
            return Tally(np.zeros(1), np.zeros((self.n_bootstrap, 1)))
        ids, sums = metrics.item_sums(self.task, answered, {one: texts[one] for one in answered})
        place = {key(row): at for at, row in enumerate(rows)}
        at = np.array([place[one] for one in ids])
        by_third = [
            sums[:, :2] * (thirds[kind][at] == third)[:, None] if kind in thirds else np.zeros((len(ids), 2))
            for kind in cohorts.KINDS
            for third in range(3)
        ]
        users = self._users([user for user, _ in ids], [gains.get(one) for one in ids])
        spent = np.array([costs.get(one, (0,) * len(COSTS)) for one in ids], dtype=np.float64)
        wide = np.hstack([sums, *by_third, users, spent])
        owners = [rows[row]["owner_id"] for row in at]
        return Tally(wide.sum(axis=0), intervals.resampled_sums(owners, wide, self.n_bootstrap, self.seed))

    def _referred(self, bucket: int, replies: Replies) -> list[tuple[str, dict[Key, str]]]:
        """The references' texts by name; they are made without a look at the targets."""
        if self.references is None or not replies.rows:
            return []
        asked = [row | {"target": None} for row in replies.rows]
        texts = self.references.predict(bucket, asked)
        ids = [key(row) for row in asked]
        return [(name, dict(zip(ids, of_name, strict=True))) for name, of_name in texts.items()]

    def _unclear(self, texts: Mapping[Key, str]) -> tuple[int, tuple[DrawnReply, ...]]:
        """Counts the replies that are no answer at all, and shows some different ones, first in a random order."""
        unclear = [
            DrawnReply(self._draw("unclear", one), one[0], " ".join(text.split())[:UNCLEAR_CHARACTERS])
            for one, text in texts.items()
            if not metrics.understood(self.task, text)
        ]
        return len(unclear), _different(unclear)

    def _draw(self, what: str, one: Key) -> bytes:
        return intervals.digest("\0".join((what, *one)), self.seed)

    def _examples(self, replies: Replies, methods: list[str]) -> tuple[DrawnExample, ...]:
        """Requests that the methods answer differently, the first of a random order that is the same in every run."""
        examples = []
        for row in replies.rows if self.examples else []:
            texts = {name: replies.texts.get(name, {}).get(key(row), "") for name in methods}
            if len(set(texts.values())) > 1:
                draw = self._draw("example", key(row))
                examples.append(DrawnExample(draw, row["input"], row["target"], texts))
        return first(examples, self.examples)

    def _first_metric(self, golds: Mapping[Key, str], samples: Sequence[Mapping[Key, str]]) -> dict[Key, float]:
        """The first metric of each request that has a text, as a mean over its samples."""
        found: dict[Key, list[float]] = {}
        for texts in samples:
            answered = {i: gold for i, gold in golds.items() if i in texts}
            if answered:
                ids, sums = metrics.item_sums(self.task, answered, {i: texts[i] for i in answered})
                for one, value in zip(ids, sums[:, 1].tolist(), strict=True):
                    found.setdefault(one, []).append(value)
        return {one: float(np.mean(values)) for one, values in found.items()}

    def _users(self, user_ids: list[str], gains: list[float | None]) -> np.ndarray:
        """Columns (N, 4): on each user's first row a 1, and a 1 for better, worse or as well over all rows."""
        turn = metrics.sign(metrics.names(self.task)[0])
        gain: dict[str, float] = {}
        for user, own in zip(user_ids, gains, strict=True):
            gain[user] = gain.get(user, 0.0) + turn * (np.nan if own is None else own)
        columns, seen = np.zeros((len(user_ids), 4)), set()
        for row, user in enumerate(user_ids):
            if user not in seen and np.isfinite(gain[user]):
                better, worse = gain[user] > 1e-9, gain[user] < -1e-9
                columns[row] = (1, better, worse, not better and not worse)
            seen.add(user)
        return columns


def _is_unread(task: TaskSpec, target: str) -> bool:
    """Tells whether a text is scored by ROUGE and most of its letters and digits are none of a to z and 0 to 9: the
    published tokenizer takes all others for spaces, so that a perfect reply may score 0."""
    letters = [letter for letter in target.lower() if letter.isalnum()]
    unread = sum(not letter.isascii() for letter in letters)
    return 2 * unread > len(letters) and any(name.startswith("rouge") for name in metrics.names(task))


def first(drawn: Sequence[Drawn], count: int) -> tuple[Drawn, ...]:
    """The ones that come first in the random order."""
    return tuple(sorted(drawn, key=lambda one: one.draw)[:count])


def _different(replies: Sequence[DrawnReply]) -> tuple[DrawnReply, ...]:
    """The ones that come first in the random order, each text once."""
    by_text: dict[str, DrawnReply] = {}
    for reply in first(replies, len(replies)):
        by_text.setdefault(reply.text, reply)
    return tuple(by_text.values())[:MAX_UNCLEAR_SHOWN]


def merged(one: Scored, other: Scored) -> Scored:
    """Adds up two parts."""
    return Scored(
        methods=_both(one.methods, other.methods),
        references=_both(one.references, other.references),
        labelled=one.labelled + other.labelled,
        answered=one.answered + other.answered,
        users=one.users + other.users,
        split_owners=one.split_owners | other.split_owners,
        seen=one.seen | other.seen,
        examples=first([*one.examples, *other.examples], MAX_EXAMPLES),
        left_out=one.left_out + other.left_out,
        fingerprint=one.fingerprint + other.fingerprint,
        unknown=(one.unknown + other.unknown)[:3],
        n_unknown=one.n_unknown + other.n_unknown,
        outdated=(one.outdated + other.outdated)[:3],
        n_outdated=one.n_outdated + other.n_outdated,
        made_by=one.made_by | other.made_by,
        samples={
            made: max(one.samples.get(made, 0), other.samples.get(made, 0)) for made in one.samples | other.samples
        },
        n_undated=one.n_undated + other.n_undated,
        n_unread=one.n_unread + other.n_unread,
        problem=one.problem or other.problem,
    )


def _both(one: dict[str, Tally], other: dict[str, Tally]) -> dict[str, Tally]:
    tallies = {}
    for name in one | other:
        parts = [part[name] for part in (one, other) if name in part]
        tallies[name] = parts[0] if len(parts) == 1 else added(*parts)
    return tallies


def added(one: Tally, other: Tally) -> Tally:
    """Adds up two tallies; the sums of a method's repeats and samples add up like those of buckets."""
    return Tally(
        sums=one.sums + other.sums,
        resampled=one.resampled + other.resampled,
        errors=one.errors + other.errors,
        missing=(one.missing + other.missing)[:3],
        cut=one.cut + other.cut,
        n_unclear=one.n_unclear + other.n_unclear,
        unclear=_different([*one.unclear, *other.unclear]),
    )
