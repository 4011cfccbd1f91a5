"""Rules of a history: what text an item has, in what order items stand, and which of them a request may see.

Route: fields of an item -> text_hash (what `embeddings` is keyed by) and item_text (what is encoded or shown).
       times + positions -> order (oldest first) -> visible_count (a prefix) -> newest (the last `cap` of it).

The cut-off, everywhere the same (training, retrieval, generation): an item counts for a request if
(occurred_at, position) < (as_of, as_of_position). A user is timed when every item has a time; otherwise position
alone decides. Times are int64 microseconds since 1970 UTC, the unit the tables store.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from pplug.tasks import TaskSpec, fill

HASH_BYTES = 16
NO_TIME = np.iinfo(np.int64).min
"""Time of an item of an untimed user, where times stand in an array."""
DAY_US = 86_400_000_000
_quoted = json.encoder.encode_basestring_ascii


def text_hash(fields: Mapping[str, str]) -> str:
    """Hash of an item's fields, whatever their order: 32 hex digits.

    It covers the fields and not a rendered text, so that another text rule (part of the encoder's identity) finds the
    same items. JSON in ASCII, because it also has a form for a lone surrogate, which UTF-8 has not.
    """
    canonical = json.dumps(sorted(fields.items()), ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode("ascii"), digest_size=HASH_BYTES).hexdigest()


def input_hash(text: str, cut_off: tuple[int | None, int | None] | None = None) -> str:
    """Hash of a request's input and of the cut-off of its history: 16 hex digits.

    Args:
        text: the input.
        cut_off: as_of in microseconds and as_of_position, each None where the request has none; None: the hash is of
            the input alone, as before it covered the cut-off.
    """
    # (None, None) has a key of its own, so that a request that gets a cut-off later has another hash
    key = b"" if cut_off is None else "{},{}".format(*cut_off).encode("ascii")
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=key).hexdigest()


def text_hashes(fields: Mapping[str, pa.Array], count: int) -> list[str]:
    """`text_hash` of many items at once, about 2 us per item.

    Args:
        fields: strings by field name, (N,) each; null: the item has no such field.
        count: N.
    """
    digest = hashlib.blake2b
    pairs = []
    for name in sorted(fields):
        head = f"[{_quoted(name)},"
        pairs.append([None if text is None else head + _quoted(text) + "]" for text in fields[name].to_pylist()])
    rows = zip(*pairs, strict=True) if pairs else [()] * count
    gaps = any(column.null_count for column in fields.values())
    return [
        digest(
            f"[{','.join([pair for pair in row if pair is not None] if gaps else row)}]".encode("ascii"),
            digest_size=HASH_BYTES,
        ).hexdigest()
        for row in rows
    ]


def item_text(fields: Mapping[str, str], task: TaskSpec, with_label: bool = True) -> str:
    """The text of an item that is encoded, by the task's template.

    Raises:
        ValueError: the item lacks a field that the template names.
    """
    return fill(task.item_template(with_label), fields, task.name).strip()


def history_hash(text_hashes: Iterable[str], times: Iterable[int] | None = None) -> str:
    """Hash of a whole history, given its text hashes oldest first: changes when an item or the order does.

    Args:
        times: microseconds of each item, or NO_TIME; given where a change of times alone makes another persona.
    """
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for line in text_hashes if times is None else map(_with_time, text_hashes, times):
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()


def _with_time(text_hash: str, time: int) -> str:
    return f"{text_hash} {time:020d}"


def history_hashes(
    text_hashes: pa.Array, starts: np.ndarray, stops: np.ndarray, times: np.ndarray | None = None
) -> list[str]:
    """`history_hash` of many users at once: items start to stop of each, over one array of text hashes.

    A line has a fixed length, so that each user's lines are one slice of one buffer: 1 us per user instead of one per
    item.

    Args:
        times: (T,) int64, or None, as for `history_hash`.
    """
    if not len(text_hashes):
        return [history_hash(()) for _ in starts]
    all_lines = text_hashes.to_pylist()
    if times is not None:
        all_lines = list(map(_with_time, all_lines, times.tolist()))
    lines = memoryview("\n".join([*all_lines, ""]).encode("ascii"))
    width = len(lines) // len(text_hashes)
    return [
        hashlib.blake2b(lines[start * width : stop * width], digest_size=HASH_BYTES).hexdigest()
        for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)
    ]


def times_us(occurred_at: pa.Array | pa.ChunkedArray) -> np.ndarray | None:
    """One user's times as int64 microseconds, or None when an item has none (the user is then untimed)."""
    if occurred_at.null_count:
        return None
    return occurred_at.cast(pa.timestamp("us", tz="UTC")).cast(pa.int64()).to_numpy()


def order(occurred_at: np.ndarray | None, position: np.ndarray) -> np.ndarray:
    """Indices that bring one user's items into order, oldest first.

    Args:
        occurred_at: (N,) int64 microseconds, or None for an untimed user (see `times_us`).
        position: (N,) int64, the order as given; decides between equal times.

    Returns:
        (N,) int64.
    """
    if occurred_at is None:
        return np.argsort(position, kind="stable")
    return np.lexsort((position, occurred_at))


def visible_count(
    occurred_at: np.ndarray | None, position: np.ndarray, as_of: int | None, as_of_position: int | None
) -> int:
    """Number of the oldest items that a request may see; the visible items are always a prefix in `order`.

    A timed user's request with `as_of` alone sees strictly earlier items; with `as_of_position` alone, the items up
    to the first one that stands at that position or later. A request with a time over an untimed history sees
    nothing: nobody can tell what came before, and a leak is worse than a gap.

    Args:
        occurred_at: (N,) int64 microseconds sorted by `order`, or None for an untimed user.
        position: (N,) int64 sorted by `order`.
        as_of: microseconds, or None.
        as_of_position: position of the request within the history, or None; both None: everything counts.
    """
    if as_of is None and as_of_position is None:
        return len(position)
    if occurred_at is not None and as_of is not None:
        start = int(np.searchsorted(occurred_at, as_of, side="left"))
        if as_of_position is None:
            return start
        end = int(np.searchsorted(occurred_at, as_of, side="right"))
        return start + int(np.searchsorted(position[start:end], as_of_position, side="left"))
    if as_of_position is None:
        return 0
    late = position >= as_of_position
    return int(late.argmax()) if late.any() else len(position)


def is_visible(occurred_at: int | None, position: int, as_of: int | None, as_of_position: int | None) -> bool:
    """True if a request may see one item; the rule is that of `visible_count`.

    Args:
        occurred_at: microseconds, or None where the item's user is untimed.
    """
    times = None if occurred_at is None else np.array([occurred_at], np.int64)
    return visible_count(times, np.array([position], np.int64), as_of, as_of_position) == 1


def age_days(times: np.ndarray, reference: np.ndarray | int) -> np.ndarray:
    """Days from each item to its reference, (T,) float32; 0 for an item that is later, or that has no time.

    Args:
        times: (T,) int64 microseconds, or NO_TIME.
        reference: microseconds, one for all items or one for each.
    """
    timed = times != NO_TIME
    known = np.where(timed, times, 0)
    return (np.where(timed, np.maximum(reference, known) - known, 0) / DAY_US).astype(np.float32)


def newest(count: int, cap: int) -> slice:
    """The newest `cap` of the first `count` items in `order`."""
    return slice(max(0, count - cap), count)


def cosine_distance(vectors: np.ndarray, other: np.ndarray) -> np.ndarray:
    """1 - cosine of each mean vector of a history to another: how far users are from each other, or have moved.

    Args:
        vectors: (U, D).
        other: (D,), or (U, D) row by row.

    Returns:
        (U,) float64 in [0, 2]; nan where either is all zeros.
    """
    vectors, other = vectors.astype(np.float64), other.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(other, axis=-1)
    products = (vectors * other).sum(axis=-1)
    return np.clip(1 - np.divide(products, norms, out=np.full(len(vectors), np.nan), where=norms > 0), 0, 2)
