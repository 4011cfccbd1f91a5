"""Decides between rows of one key (the last one given lives), and gives each item its place in its user's order.

Working rows (`WORK`) are a table's rows and a source's new ones with the same columns. No Python code runs per row,
because a bucket may hold millions.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import encode, large
from pipelines.ingest.source_rows import ROWS, TIME

WORK = pa.schema([*ROWS, ("position", pa.int64())])
_NULL = np.iinfo(np.int64).min
OLD = -1
"""Value of `file` for a row that a table holds already: it comes before all new rows."""
HELD, NEW, SAME, REPLACED, REPEATED = range(5)


def resolve(
    rows: pa.Table, content: Sequence[str], ranked: bool, keep_times: bool = False
) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """Finds the last row of each (user_key, id), and the state of every row.

    Args:
        rows: rows of `WORK`; rows that the table holds already have file OLD.
        content: columns that make a row differ from another of the same key.
        ranked: fills in `position`: the old one, or the user's next ones in the order given.
        keep_times: a row without a time has the one of the row of its key before it.

    Returns:
        Live rows; per live row whether its key was held before, (K,) bool; per row of `rows` its state, (N,): held
        before, new, same as the one held, replaced by a later one, or repeated by a later one.
    """
    order = pc.sort_indices(rows, sort_keys=[("file", "ascending"), ("seq", "ascending")]).to_numpy()
    rows = take(rows, order)
    nothing = pa.scalar("", pa.large_string())  # user_key has a fixed length: joined keys cannot be mistaken
    codes = encode(pc.binary_join_element_wise(large(rows["user_key"]), large(rows["id"]), nothing))
    count = len(rows)
    if keep_times:
        rows = _with_times(rows, _filled(_times(rows), np.argsort(codes, kind="stable"), codes, backward=False))
    first = np.unique(codes, return_index=True)[1]  # by code, and codes count first appearances
    last = count - 1 - np.unique(codes[::-1], return_index=True)[1]
    held = rows["file"].to_numpy() == OLD
    contents = [encode(rows[column]) for column in content]
    like_last = np.logical_and.reduce([c == c[last[codes]] for c in contents])
    like_held = held[first[codes]] & np.logical_and.reduce([c == c[first[codes]] for c in contents])
    is_last = np.arange(count) == last[codes]
    state = np.select([held, is_last & like_held, is_last, like_last], [HELD, SAME, NEW, REPEATED], default=REPLACED)
    live = take(rows, last)
    if ranked:
        at = WORK.get_field_index("position")
        live = live.set_column(at, WORK.field(at), pa.array(_positions(rows, first, held[first])))
    unsorted = np.empty(count, dtype=np.int64)
    unsorted[order] = state
    return live, held[first], unsorted


def take(rows: pa.Table, at: np.ndarray) -> pa.Table:
    """Returns rows by number; all of them in their order are not copied, as texts are most of an ingest's bytes."""
    return rows if np.array_equal(at, np.arange(len(rows))) else rows.take(pa.array(at))


def fill_times(live: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Gives each item without a time the later one of its user's items before and after it by position.

    A request between these two then does not see it: which side of the request it belongs to nobody knows, and rows may
    stand newest first.

    Returns:
        The rows, and True where a row was filled, (K,) bool. Rows of users without any time stay as they are.
    """
    users, times = encode(live["user_key"]), _times(live)
    order = np.lexsort((live["position"].to_numpy(), users))
    filled = _filled(times, order, users, backward=True)
    return _with_times(live, filled), (times == _NULL) & (filled != _NULL)


def half_timed(rows: pa.Table) -> np.ndarray:
    """Returns True for rows without a time whose user has a row with one, (N,) bool."""
    users, untimed = encode(rows["user_key"]), _times(rows) == _NULL
    timed = np.zeros(users.max(initial=-1) + 1, bool)
    timed[users[~untimed]] = True
    return untimed & timed[users]


def _times(rows: pa.Table) -> np.ndarray:
    return pc.fill_null(rows["at"].cast(pa.int64()), _NULL).to_numpy()


def _with_times(rows: pa.Table, times: np.ndarray) -> pa.Table:
    at = rows.schema.get_field_index("at")
    return rows.set_column(at, rows.schema.field(at), pa.array(times, pa.int64(), mask=times == _NULL).cast(TIME))


def _filled(times: np.ndarray, order: np.ndarray, group: np.ndarray, backward: bool) -> np.ndarray:
    """Returns the times with gaps filled by the time before them in `order` and in their group; with `backward` by the
    later of that and the one after them."""
    if not len(times):
        return times
    sorted_times, sorted_group, number = times[order], group[order], np.arange(len(times))
    there = sorted_times != _NULL
    before = np.maximum.accumulate(np.where(there, number, 0))
    after = np.minimum.accumulate(np.where(there, number, len(times) - 1)[::-1])[::-1]
    known = sorted_times.copy()
    for source in (before, after) if backward else (before,):
        fits = ~there & (sorted_group[source] == sorted_group)
        known[fits] = np.maximum(known[fits], sorted_times[source][fits])
    filled = np.empty_like(times)
    filled[order] = known
    return filled


def _positions(rows: pa.Table, first: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Returns the position of each key, (K,) int64; new keys follow the user's greatest one, in order of appearance."""
    users = encode(rows["user_key"])[first]
    position = pc.fill_null(rows["position"], 0).to_numpy()[first].copy()
    following = np.zeros(users.max() + 1, dtype=np.int64)
    np.maximum.at(following, users[held], position[held] + 1)
    new = np.flatnonzero(~held)
    new = new[np.argsort(users[new], kind="stable")]
    starts = np.r_[True, users[new][1:] != users[new][:-1]] if len(new) else np.zeros(0, bool)
    rank = np.arange(len(new)) - np.maximum.accumulate(np.where(starts, np.arange(len(new)), 0))
    position[new] = following[users[new]] + rank
    return position
