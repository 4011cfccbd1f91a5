"""Facts about the users that are scored: thirds by history length, by history age, by distance from the average.

Route: census(buckets) -> histograms of bins, added up on the driver -> cuts(...) -> thirds(...) of each request.
A fact becomes a bin (a whole number) at once: histograms have a fixed size, whatever the number of users.

length    items that the request may see
age       days from the newest of them to the request (as_of); only where both have a time
distance  1 - cosine of the user's mean vector (table personas) and the average of all users scored
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow.compute as pc

from infra.shards import of_bucket, user_key
from infra.snapshot import Snapshot
from pipelines.histories import matrix, read_bucket, to_us
from pplug import history

KINDS = ("length", "age", "distance")
BINS = {"length": 10_001, "age": 601, "distance": 2_001}
UNKNOWN = -1
_DAY_US = 86_400_000_000
_ALL = 2**31


def bins(kind: str, values: np.ndarray) -> np.ndarray:
    """The bin (N,) int64 of each value (N,) float64; nan is UNKNOWN.

    The value of a bin (`middle`) is within 1% of each age in it, counted from a day before, and within .0005 of each
    distance; lengths are exact.
    """
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    scaled = {"length": filled, "age": 50 * np.log1p(filled), "distance": 1000 * filled}[kind]
    return np.where(known, np.clip(np.rint(scaled), 0, BINS[kind] - 1).astype(np.int64), UNKNOWN)


def middle(kind: str, bin: int) -> float:
    """The value that a bin stands for."""
    return {"length": float(bin), "age": float(np.expm1(bin / 50)), "distance": bin / 1000}[kind]


@dataclass
class Census:
    """Counts of the requests and users of some buckets; parts add up."""

    counts: dict[str, np.ndarray] = field(default_factory=dict)
    """Requests by kind and bin."""
    vectors: np.ndarray = field(default_factory=lambda: np.zeros(1))
    """Sum of the users' mean vectors (D,); (1,) where no vector is stored."""
    users: int = 0
    """Users in that sum."""
    items: int = 0
    """Items that the requests may see, all together."""
    requests: int = 0
    persona_values: int = 0
    """Values of a stored persona, P*H; 0 where no persona is stored."""
    row_bytes: dict[str, float] = field(default_factory=dict)
    """Bytes in storage per row of the tables `adapters` and `profiles`, where these exist."""

    def __add__(self, other: "Census") -> "Census":
        nothing = np.zeros(1, np.int64)
        return Census(
            {kind: self.counts.get(kind, nothing) + other.counts.get(kind, nothing) for kind in KINDS},
            self.vectors + other.vectors,
            self.users + other.users,
            self.items + other.items,
            self.requests + other.requests,
            max(self.persona_values, other.persona_values),
            self.row_bytes | other.row_bytes,
        )


@dataclass(frozen=True)
class FactReader:
    """Reads the facts of requests as bins."""

    histories: Snapshot
    personas: Snapshot | None
    average: np.ndarray | None = None
    """Mean vector (D,) of all users scored; None before it is known, or where there are no personas."""

    def read_bins(self, bucket: int, requests: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Bins (N,) of each kind for a bucket's requests (user_id, as_of, as_of_position)."""
        keys = sorted({user_key(request["user_id"]) for request in requests})
        users = read_bucket(self.histories, None, bucket, user_keys=keys)
        length, age = np.zeros(len(requests)), np.full(len(requests), np.nan)
        for i, request in enumerate(requests):
            user = users.user(request["user_id"])
            if user is None:
                continue
            as_of = to_us(request["as_of"])
            seen = users.visible(user, as_of, request["as_of_position"], _ALL)
            length[i] = len(seen)
            times = users.occurred_at[user]
            if len(seen) and as_of is not None and times is not None:
                age[i] = (as_of - times[seen[-1] - users.starts[user]]) / _DAY_US
        distance = np.full(len(requests), np.nan)
        if self.personas is not None and self.average is not None:
            names, vectors = self.vectors(bucket, requests)
            far = dict(zip(names, history.cosine_distance(vectors, self.average), strict=True)) if names else {}
            distance = np.array([far.get(request["user_id"], np.nan) for request in requests])
        facts = {"length": length, "age": age, "distance": distance}
        return {kind: bins(kind, values) for kind, values in facts.items()}

    def vectors(self, bucket: int, requests: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
        """Ids and mean vectors (U, D) of the requests' users; a user without a vector is left out."""
        assert self.personas is not None
        keys = {user_key(request["user_id"]) for request in requests}
        wanted = pc.field("n_items") > 0
        rows = self.personas.read(["user_id", "mean_vector"], buckets=[bucket], filter=wanted, user_keys=sorted(keys))
        return rows["user_id"].to_pylist(), matrix(rows["mean_vector"])


def census(
    buckets: Sequence[int],
    requests: Snapshot,
    generations: Snapshot,
    runs: Sequence[str],
    facts: FactReader,
    users: Mapping[int, list[str]] | None = None,
    methods: Sequence[str] = (),
) -> Census:
    """Counts the requests that any of the runs answered; with no average yet, also sums the vectors it is made from.

    Args:
        users: keys by bucket (`shards.keys_by_bucket`); all users when None.
        methods: where given, only requests that one of them answered are counted.
    """
    total = Census()
    for bucket in buckets:
        asked = _answered(requests, generations, bucket, runs, users, methods)
        if not asked:
            continue
        places = facts.read_bins(bucket, asked)
        counts = {kind: np.bincount(at[at >= 0], minlength=BINS[kind]) for kind, at in places.items()}
        part = Census(counts, items=int(places["length"].sum()), requests=len(asked))
        if facts.personas is not None and facts.average is None:
            names, vectors = facts.vectors(bucket, asked)
            if names:
                part.users, part.vectors = len(names), vectors.sum(axis=0, dtype=np.float64)
                part.persona_values = total.persona_values or _persona_values(facts.personas, bucket, names[0])
        total += part
    return total


def _answered(
    requests: Snapshot,
    generations: Snapshot,
    bucket: int,
    runs: Sequence[str],
    users: Mapping[int, list[str]] | None,
    methods: Sequence[str],
) -> list[dict[str, Any]]:
    columns, keys = ["request_id", "user_id", "as_of", "as_of_position"], of_bucket(users, bucket)
    asked = requests.read(columns, buckets=[bucket], filter=pc.field("target").is_valid(), user_keys=keys)
    wanted = pc.field("run_id").isin(list(runs))
    if methods:
        wanted &= pc.field("method").isin(list(methods))
    rows = generations.read(["user_id", "request_id"], buckets=[bucket], filter=wanted, user_keys=keys)
    replied = set(zip(rows["user_id"].to_pylist(), rows["request_id"].to_pylist(), strict=True))
    return [row for row in asked.to_pylist() if (row["user_id"], row["request_id"]) in replied]


def _persona_values(personas: Snapshot, bucket: int, user_id: str) -> int:
    stored = personas.read(["persona"], buckets=[bucket], filter=pc.field("user_id") == user_id)["persona"]
    return pc.sum(pc.list_value_length(stored)).as_py() or 0


def cuts(counts: np.ndarray) -> tuple[int, int]:
    """Highest bin of the lowest third and of the middle one. Equal values stay together: thirds may differ in size."""
    shares = np.cumsum(counts) / max(1, counts.sum())
    low, middle = (int(np.searchsorted(shares, share - 1e-9)) for share in (1 / 3, 2 / 3))
    return low, middle


def thirds(bins: np.ndarray, cut: tuple[int, int]) -> np.ndarray:
    """The third (N,) int64 of each bin: 0, 1, 2 or UNKNOWN."""
    return np.where(bins < 0, UNKNOWN, (bins > cut[0]).astype(np.int64) + (bins > cut[1]))


def ranges(kind: str, counts: np.ndarray, cut: tuple[int, int]) -> list[tuple[float, float] | None]:
    """Smallest and greatest value in each third, to the width of a bin; None for an empty third."""
    filled = np.flatnonzero(counts)
    place = thirds(filled, cut)
    own = [filled[place == third] for third in range(3)]
    return [(middle(kind, int(at[0])), middle(kind, int(at[-1]))) if len(at) else None for at in own]
