"""Derived requests: each user's newest items become requests with a known answer, so that histories are enough."""

import hashlib
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.codes import encode, flat
from pipelines.ingest.labels import LabelRule
from pipelines.ingest.resolve import OLD, WORK
from pipelines.ingest.source_rows import REQUEST
from pplug.tasks import TaskSpec, fill

_AFTER_ALL_FILES = 2**31 - 1


def derive_requests(
    live: pa.Table,
    users: pa.Array,
    newest: int,
    task: TaskSpec,
    labels: LabelRule,
    held: Mapping[str, tuple[str | None, str | None, datetime | None]] = MappingProxyType({}),
) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Makes requests of each user's newest items; a request does not see its own item or later ones (`history`).

    Args:
        live: working rows of a bucket's items, with positions.
        users: user_key of the users to derive requests for.
        newest: number of requests per user; items with an empty answer are skipped.
        labels: rule of the answers.
        held: input, target and time of each request that the table holds, by id: one whose item came again with
            another answer, text or time is made anew. With its old time it would see its own item.

    Returns:
        Rows of `WORK`: the id is a hash of user and item, the time is the item's (null for a user without times). Then
        the same of items whose answer is outside the task's labels: `evaluate` could not score them. Then the items of
        `held` requests that came again without an answer, or with another that is outside: the requests would keep the
        answer that was taken back.
    """
    assert task.input is not None and task.target is not None, "checked before the run"
    live = live.filter(pc.is_in(live["user_key"], value_set=flat(users)))
    answer = pc.map_lookup(flat(live["fields"]), task.target, "first")
    answered = pc.fill_null(pc.greater(pc.utf8_length(pc.utf8_trim_whitespace(answer)), 0), False)
    answered = answered.to_numpy(zero_copy_only=False)
    user = encode(live["user_key"])
    untimed = np.zeros(len(live), dtype=bool)
    untimed[user[pc.is_null(live["at"]).to_numpy()]] = True
    timed = ~untimed[user]
    time = np.where(timed, pc.fill_null(live["at"].cast(pa.int64()), 0).to_numpy(), 0)
    order = np.lexsort((live["position"].to_numpy(), time, user))  # history.order, for all users at once
    order = order[answered[order]]
    ends = np.searchsorted(user[order], user[order], side="right")
    again = np.zeros(len(live), dtype=bool)
    came = np.flatnonzero(live["file"].to_numpy() != OLD)
    names = live.select(["user_id", "id"]).take(came).to_pylist()
    again[came] = [derived_id(name["user_id"], name["id"]) in held for name in names]
    is_newest = np.zeros(len(live), dtype=bool)
    is_newest[order[ends - np.arange(len(order)) <= newest]] = True
    chosen = order[(is_newest | again)[order]]
    rows = [_ask(row, bool(timed[at]), task) for at, row in zip(chosen, live.take(chosen).to_pylist(), strict=True)]
    for seq, row in enumerate(rows):
        row["file"], row["seq"] = _AFTER_ALL_FILES, seq
    asked = pa.Table.from_pylist(rows, schema=WORK)
    target, outside = labels.column(flat(asked["target"]))
    asked = asked.set_column(asked.schema.get_field_index("target"), WORK.field("target"), target)
    said = zip(*(asked[name].to_pylist() for name in ("id", "input", "target", "at")), strict=True)
    other = np.array([held.get(name) != tuple(row) for name, *row in said], dtype=bool)
    wanted = is_newest[chosen] | other
    withdrawn = again & ~answered
    changed = chosen[outside & other]  # what a request holds already may be a label of the task that it was made for
    withdrawn[changed] |= again[changed]
    made, unusable = (asked.filter(pa.array(part)) for part in (wanted & ~outside, wanted & outside))
    return made, unusable, live.filter(pa.array(withdrawn))


def derived_id(user_id: str, item_id: str) -> str:
    """Returns the id of the request that is derived from an item."""
    name = f"{user_id}\0{item_id}".encode()
    return f"derived-{hashlib.blake2b(name, digest_size=12).hexdigest()}"


def _ask(item: dict, timed: bool, task: TaskSpec) -> dict:
    fields = dict(item["fields"])
    same = ("bucket", "place", "user_key", "user_id", "position")
    return {column: item[column] for column in same} | {
        "kind": REQUEST,
        "id": derived_id(item["user_id"], item["id"]),
        "at": item["at"] if timed else None,
        "input": fill(task.input or "", fields, task.name),
        "target": fields[task.target],
        "owner_id": item["user_id"],
    }
