"""The users that an ingest keeps: a share of them by a hash of their id, and of these the first ones.

Route: blocks of checked rows -> without the users outside the part, and without those that cannot be among the first
(`UserChoice`, in each task) -> the last hash that is (driver) -> without the others (`FirstUsers`) -> by bucket.
A task may leave out a user whom `limit` users of its own precede: the user is not among the first of all tasks then.
So a source is read once, and the rows of few users are held. Rows left out are no planned rows, and are counted apart.
A rejected row has no user, and stays: rejects are a share of all rows of the source, those left out included.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.ingest.source_rows import COUNT, NO_BUCKET, ROWS

_ALL = 2**64
"""Number of hashes."""


@dataclass(frozen=True)
class UserChoice:
    """Keeps users whose hash is in [low, high), and leaves out those that cannot be among the first `limit` of them."""

    low: int = 0
    high: int = _ALL
    limit: int | None = None

    @classmethod
    def of(cls, parts: Mapping[str, float], part: str | None, limit: int | None) -> "UserChoice | None":
        """Returns the choice of a config; None if all users are kept.

        Parts follow each other in the order of their names, whatever the order in which they are given.
        """
        if part is None:
            return None if limit is None else cls(limit=limit)
        before = sum(share for name, share in parts.items() if name < part)
        return cls(min(_at(before), _ALL - 1), _at(before + parts[part]), limit)

    def within(self, hashes: np.ndarray) -> np.ndarray:
        """Tells of each hash (N,) uint64 whether it is in [low, high), as (N,) bool."""
        inside: np.ndarray = (hashes >= self.low) & (hashes <= self.high - 1)  # 2**64 is no uint64
        return inside

    def __call__(self, blocks: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yields blocks of rows (`source_rows.ROWS`) of one task without those of other users, and with counts."""
        first = np.zeros(0, np.uint64)
        for rows in blocks:
            hashes, known = user_hashes(rows)
            within = ~known | self.within(hashes)
            keep = within
            if self.limit is not None:
                first = np.unique(np.concatenate([first, hashes[known & within]]))[: self.limit]
                keep = within & (~known | (hashes <= _last(first, self.limit)))
            yield _kept(rows, keep, part=~within, limit=within & ~keep)


@dataclass(frozen=True)
class FirstUsers:
    """Keeps users up to a hash."""

    last: int

    @classmethod
    def of(cls, hashes: Iterable[np.ndarray], limit: int) -> "FirstUsers":
        """Returns the choice of the first `limit` of these users."""
        first = np.zeros(0, np.uint64)
        for some in hashes:
            first = np.unique(np.concatenate([first, some]))[:limit]
        return cls(_last(first, limit))

    def __call__(self, rows: pa.Table) -> pa.Table:
        """Returns a block of rows without those of other users, and with their number."""
        hashes, known = user_hashes(rows)
        keep = ~known | (hashes <= self.last)
        return _kept(rows, keep, limit=~keep)


def user_hashes(rows: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Returns a hash per row, (N,) uint64, and whether the row has a user, (N,) bool.

    The hash is the second half of user_key; the first half decides the bucket, and says nothing about it.
    """
    keys = pc.dictionary_encode(rows["user_key"].combine_chunks())
    of_key = np.array([int(key[16:], 16) for key in keys.dictionary.to_pylist()] or [0], dtype=np.uint64)
    known = pc.is_valid(keys).to_numpy(zero_copy_only=False)
    return of_key[pc.fill_null(keys.indices, 0).to_numpy(zero_copy_only=False)], known


def _at(share: float) -> int:
    """The number of hashes before a share of all users; shares that add up to one but for rounding are all."""
    return _ALL if share > 1 - 1e-9 else round(share * _ALL)


def _last(first: np.ndarray, limit: int) -> int:
    return _ALL - 1 if len(first) < limit else int(first[limit - 1])


def _kept(rows: pa.Table, keep: np.ndarray, **left_out: np.ndarray) -> pa.Table:
    """The rows to keep, and a row per reason that takes those left out from the planned ones."""
    counts = [
        {"bucket": NO_BUCKET, "kind": COUNT, "file": 0, "seq": -int(which.sum()), "reason": reason}
        for reason, which in left_out.items()
        if which.any()
    ]
    if not counts:
        return rows
    return pa.concat_tables([rows.filter(pa.array(keep)), pa.Table.from_pylist(counts, schema=ROWS)])
