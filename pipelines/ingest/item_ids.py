"""Ids of items from a source that has none: made of each row's content, so that the same row has the same id again.

A position in the file would be another one as soon as rows are put before it, and the rows of tomorrow's file would
replace those of today's. Equal rows of a user with the same time are one item, given twice: a request that is made of
the second would find its answer in the first. Without a time somebody may have said the same twice, and the second has
the id of the first with -2, and so on.

Another mapping, spelling of a label or meaning of a time makes other content of the same row, and so another id: the
history would hold the row twice. `read_as` tells what the content is made by, and `twins` finds such rows.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import encode, flat, large
from pipelines.ingest.labels import form
from pipelines.ingest.source_rows import ROWS

READ_AS = "automatic_ids"
"""Key of the metadata of histories: each `read_as` of a run that made ids (`noted`)."""
LOOKED_AT = 100
"""New items per bucket that are compared with those their users have."""
_AUTOMATIC = r"^auto-[0-9a-f]{20}(-\d+)?$"
TWIN = r"^auto-[0-9a-f]{20}-\d+$"
"""Ids of rows that equal another row of their user."""


def with_ids(items: pa.Table) -> pa.Table:
    """Returns the items of a bucket (`source_rows.ROWS`) with an id where they have none.

    Args:
        items: all new rows of their users; `file` and `seq` say which of equal rows comes first.
    """
    if not items["id"].null_count:
        return items
    missing = pc.is_null(items["id"]).to_numpy(zero_copy_only=False)
    without = items.filter(pa.array(missing))
    content = pc.binary_join_element_wise(
        large(without["text_hash"]), large(pc.fill_null(without["at"].cast(pa.int64()).cast(pa.string()), "")),
        pa.scalar(" ", pa.large_string()),
    )  # fmt: skip
    ids = [blake2b(text.encode(), digest_size=10).hexdigest() for text in content.to_pylist()]
    nothing = pa.scalar("", pa.large_string())
    same = encode(pc.binary_join_element_wise(large(without["user_key"]), large(pa.array(ids)), nothing))
    order = np.lexsort((without["seq"].to_numpy(), without["file"].to_numpy(), same))
    starts = np.flatnonzero(np.r_[True, same[order][1:] != same[order][:-1]])
    number = np.empty(len(order), np.int64)
    number[order] = np.arange(len(order)) - np.repeat(starts, np.diff(np.r_[starts, len(order)])) + 1
    number[pc.is_valid(without["at"]).to_numpy(zero_copy_only=False)] = 1
    named = [f"auto-{one}" if n == 1 else f"auto-{one}-{n}" for one, n in zip(ids, number.tolist(), strict=True)]
    made = np.array(items["id"].to_pylist(), dtype=object)
    made[missing] = named
    at = ROWS.get_field_index("id")
    return items.set_column(at, ROWS.field(at), pa.array(made.tolist(), pa.string()))


def twins(new: pa.Table, held: pa.Table, target: str | None) -> tuple[int, int, int]:
    """Number of new items with automatic ids that are looked at, of those whose text their user has already under
    another id, and of those among them whose time is the same, too.

    Args:
        new, held: working rows of a bucket, those that came and those that its table holds.
        target: the field with the answer, which is not looked at.
    """
    new = _automatic(new).slice(0, LOOKED_AT)
    if not len(new):
        return 0, 0, 0
    held = _automatic(held.filter(pc.is_in(held["user_key"], value_set=flat(pc.unique(new["user_key"])))))
    texts: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    longest: dict[tuple[str, int | None], set[str]] = defaultdict(set)
    whenever: dict[str, set[int | None]] = defaultdict(set)
    for user, at, own in _texts(held, target):
        texts[user, at] |= own
        longest[user, at].add(max(own, key=len, default=""))
        whenever[user].add(at)
    found = at_their_time = 0
    for user, at, own in _texts(new, target):
        times = {
            time for time in whenever[user] if own
            and (max(own, key=len) in texts[user, time] or not own.isdisjoint(longest[user, time]))
        }  # fmt: skip
        found, at_their_time = found + bool(times), at_their_time + (at in times)
    return len(new), found, at_their_time


def _automatic(items: pa.Table) -> pa.Table:
    return items.filter(pc.match_substring_regex(items["id"], _AUTOMATIC))


def _texts(items: pa.Table, target: str | None) -> list[tuple[str, int | None, set[str]]]:
    columns = items["user_key"], items["at"].cast(pa.int64()), items["fields"]
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return [(user, at, {text for name, text in fields if name != target and text}) for user, at, fields in rows]


def read_as(fields: Sequence[str], labels: Sequence[str], time: Mapping[str, str | None]) -> str:
    """Returns what decides the content of rows, as metadata: names of the fields that have values, labels, and meaning
    of the times."""
    return json.dumps({"fields": sorted(fields), "labels": list(labels), "time": dict(time)}, sort_keys=True)


def noted(before: str, now: str) -> str:
    """The ways in which a table's rows were read, as metadata: those noted before, "" for none, and now's, the last."""
    known: list[str] = json.loads(before) if before else []
    return json.dumps([*(one for one in known if one != now), now])


def read_otherwise(before: str, now: str) -> tuple[str, bool]:
    """Returns what a run reads otherwise than those that are `noted`, in words, and whether it reads times otherwise
    than the last of them.

    Where no words are returned, the same rows have the same ids. A label more is no difference, and another spelling of
    one is.
    """
    ways = [json.loads(one) for one in json.loads(before)] if before else []
    now_is, said = json.loads(now), list[str]()
    for was in ways:
        spelt = {form(label): label for label in was["labels"]}
        differ = [label for label in now_is["labels"] if spelt.get(form(label), label) != label]
        if was["fields"] != now_is["fields"]:
            said.append(f"the fields {', '.join(now_is['fields'])}, which were {', '.join(was['fields'])}")
        if differ:
            said.append(f"the spelling of the labels {', '.join(differ[:5])}")
        if was["time"] != now_is["time"]:
            said.append("time.unit or time.format")
    return " and ".join(dict.fromkeys(said)), bool(ways) and ways[-1]["time"] != now_is["time"]
