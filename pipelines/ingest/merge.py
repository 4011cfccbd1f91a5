"""Stage: joins a bucket's new rows to those that its tables hold, and writes the bucket's new files.

A night that only brings new items or requests adds a small file to the bucket and reads no other user's rows. A row
that replaces an existing one makes the bucket's files anew.
An item is known by (user_id, item_id), a request by (user_id, request_id). The same content again counts as already
there. Other content replaces the old and keeps its place in the user's order. Within one source the last row wins; each
earlier row that differs is a reject, and one that is just the same counts as repeated. An item without a time, of a
user who has items with one, takes a neighbour's time or is a reject (`undated`).
"""

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from infra.report import peak_memory_bytes
from infra.snapshot import Snapshot
from infra.table import DataFile, Table
from pipelines.codes import flat
from pipelines.ingest.derive import derive_requests, derived_id
from pipelines.ingest.figures import Figures, answers
from pipelines.ingest.item_ids import TWIN, twins, with_ids
from pipelines.ingest.labels import LabelRule, Matching
from pipelines.ingest.own_vectors import OwnVectors
from pipelines.ingest.resolve import HELD, NEW, OLD, REPEATED, REPLACED, SAME, WORK, fill_times, half_timed, resolve
from pipelines.ingest.source_rows import COUNT, GONE, ITEM, REJECT, REQUEST, ROWS, VECTOR, by_kind
from pplug.tasks import TaskSpec

RESULT = pa.schema(
    [
        ("bucket", pa.int32()),
        ("files", pa.large_string()),
        ("anew", pa.string()),
        ("counts", pa.string()),
        ("figures", pa.binary()),  # `Figures`, pickled
    ]
)
UNDATED = "undated"
"""Reject reason of an item without a time whose user has items with one."""
BEYOND_PROFILE = "beyond_profile"
"""Count of questions whose history would be more than their profile."""
REMOVED = ("items_removed", "requests_removed")
"""Counts of rows that were taken out of the tables."""
IDS = ("ids_looked_at", "ids_twins", "ids_twins_in_time")
"""Counts of new items with automatic ids, as `item_ids.twins` gives them."""
LEFT_OUT = "left_out:"
"""Beginning of the names of counts of rows left out; the key that left them out follows."""
_CONTENT = {"histories": ("text_hash", "at"), "requests": ("input", "at", "position", "target", "owner_id")}


@dataclass(frozen=True)
class MergeBucket:
    """in: all rows (`source_rows.ROWS`) of one bucket; out: one row, `RESULT`, as JSON: the files written, the tables
    whose bucket they replace instead of adding to it, and counts; and the figures of the source's rows."""

    task: TaskSpec
    histories: Table
    requests: Table
    rejects: Table
    run_id: str
    derive_requests: int
    held: Mapping[str, Snapshot]
    """Versions whose rows stay, by table; a table that the source replaces is not among them."""
    undated: Literal["neighbour", "reject", "untimed"]
    labels: Matching
    own: OwnVectors | None = None
    """The vectors that come with the items; None where an encoder makes them."""
    derived_anew: bool = False
    """True if existing derived requests are removed, because their histories are replaced."""
    owning: Snapshot | None = None
    """The table of requests, where histories stay: it alone tells whose a history of one question is."""
    automatic_ids: bool = False
    """True if the ids of items are made of their content."""
    of_profiles: bool = False
    """True if a request's history is exactly the profile that came with it, as in LaMP's layout."""

    def __call__(self, rows: pa.Table) -> pa.Table:
        bucket = rows["bucket"][0].as_py()
        counts: Counter[str] = Counter()
        files: list[DataFile] = []
        anew: list[str] = []
        kinds = by_kind(rows)
        figures = Figures.of(kinds, self.task)
        counts["planned"] = figures.rows
        counted = kinds[COUNT]
        for row in counted.filter(pc.is_valid(counted["reason"])).to_pylist():  # rows of users who are not kept
            counts[f"{LEFT_OUT}{row['reason']}"] -= row["seq"]
        items, asked = with_ids(_as_new(kinds[ITEM])), _as_new(kinds[REQUEST])
        counts["untimed_twins"] += pc.sum(pc.match_substring_regex(items["id"], TWIN)).as_py() or 0
        bad = [_as_new(kinds[REJECT])]
        live, vectors, gone = WORK.empty_table(), WORK.empty_table(), _as_new(kinds[GONE])
        if self.own is not None:
            admitted = self.own.admit(items, _as_new(kinds[VECTOR]), bucket)
            items, vectors = admitted.items, admitted.rows
            bad.append(admitted.rejects)
        if len(items) or len(gone):
            merged = self._merged("histories", bucket, items, counts) if len(items) else Merged(live, live, live, False)
            merged = self._without("histories", merged, gone, bucket, counts)
            live = merged.live
            if self.of_profiles:
                counts[BEYOND_PROFILE] += self._beyond_their_profiles(bucket, live, _keys(items), asked)
            bad.append(merged.rejects)
            files += self.histories.write(_history_rows(merged.rows), self.run_id)
            anew += ["histories"] * merged.anew
            if self.derive_requests:
                derived, outside, withdrawn = self._derived(bucket, items, gone, merged.live)
                counts["planned"] += len(derived) + len(outside)
                counts["derived"] += len(derived)
                figures.add(Figures(targets=answers(derived["target"], self.task)))
                detail = f"the answer of a derived request is none of the {len(self.task.labels)} labels of the task"
                bad.append(_as_rejects(outside, "target_outside_labels", detail))
                asked = pa.concat_tables([asked, derived])
                gone = pa.concat_tables([gone, withdrawn])  # for their requests alone
        if self.own is not None and len(vectors):
            taken = self.own.take(vectors, live, self.run_id, bucket)
            bad.append(taken.rejects)
            files += taken.files
            counts["vectors_written"] += taken.written
            if not self.own.in_items:  # a row of a file of its own is counted by itself
                counts["written"] += taken.written
                counts["already_there"] += taken.already_there
        joined = self._merged_requests(bucket, asked, gone, counts)
        if joined is not None:
            bad.append(joined.rejects)
            files += self.requests.write(_request_rows(joined.rows, self.task.name), self.run_id)
            anew += ["requests"] * joined.anew
        for more in bad[1:]:
            figures.add_rejects(more)
        files += self.rejects.write(self._reject_rows(pa.concat_tables(bad), counts), self.run_id)
        counts["peak_memory_bytes"] = peak_memory_bytes()
        listed = json.dumps([file.to_row() for file in files])
        row = {"bucket": bucket, "files": listed, "anew": json.dumps(anew), "counts": json.dumps(counts),
               "figures": pickle.dumps(figures)}  # fmt: skip
        return pa.Table.from_pylist([row], schema=RESULT)

    def _beyond_their_profiles(self, bucket: int, live: pa.Table, given: pa.Array, asked: pa.Table) -> int:
        """Counts questions that may see an item which stands in no profile of their split: those that the tables hold,
        by the split's own items, and those of the split, by items that the tables alone have.

        Args:
            live: all items of the split's users.
            given: keys of the split's items.
            asked: the split's questions.
        """
        users = pc.unique(live["user_key"]).to_pylist()
        held = pa.concat_arrays([_keys(WORK.empty_table()), *map(_keys, self._held("histories", bucket, users))])
        before = pa.concat_tables([WORK.empty_table(), *self._held("requests", bucket, users)])
        before = before.filter(pc.and_(pc.is_null(before["position"]),
                                       pc.invert(pc.is_in(_keys(before), value_set=_keys(asked)))))  # fmt: skip
        keys = _keys(live)
        came = live.filter(pc.invert(pc.is_in(keys, value_set=held)))
        were = live.filter(pc.invert(pc.is_in(keys, value_set=given)))
        if "histories" not in self.held:  # they are replaced: of the former items nothing is known here
            came = came.slice(0, 0)
        return _seeing(before, came) + _seeing(asked, were)

    def _derived(
        self, bucket: int, items: pa.Table, gone: pa.Table, live: pa.Table
    ) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Makes requests of the newest items of users whose items came or went; see `derive_requests`."""
        came, went = pc.unique(items["user_key"]), pc.unique(gone["user_key"])
        others = went.filter(pc.invert(pc.is_in(went, value_set=came)))  # their rows are not among the live ones
        for held in self._held("histories", bucket, others.to_pylist()) if len(others) else ():
            stays = pc.invert(pc.is_in(_keys(held), value_set=_keys(gone)))
            live = pa.concat_tables([live, held.filter(stays)])
        users = pa.concat_arrays([came, others])
        asked = self._asked(bucket, users.to_pylist())
        rule = LabelRule(self.task, self.labels)
        return derive_requests(live, users, self.derive_requests, self.task, rule, asked)

    def _merged_requests(self, bucket: int, asked: pa.Table, gone: pa.Table, counts: Counter[str]) -> "Merged | None":
        """Joins requests to the bucket; None if there is nothing to do. Where they replace the table, requests that
        alone tell whose a history is stay; new requests with such a history become its owner's."""
        replaced = self.owning is not None and "requests" not in self.held
        owned = self._owned(bucket, None if replaced else pc.unique(asked["user_key"]).to_pylist())
        if not (len(asked) or self.derived_anew or len(gone) or replaced and len(owned)):
            return None
        merged = self._merged("requests", bucket, _with_owners(asked, owned), counts)
        merged = self._without("requests", merged, _derived_from(gone), bucket, counts)
        if not replaced:
            return merged
        stay = owned.filter(pc.invert(pc.is_in(_keys(owned), value_set=_keys(asked))))
        counts["requests_owning"] += len(stay)
        return replace(merged, rows=pa.concat_tables([merged.rows, stay]))

    def _owned(self, bucket: int, users: list[str] | None) -> pa.Table:
        """Working rows of the table's requests whose history is kept under another id than their person's: whole rows
        of all users when None, else the ids of these users' rows."""
        parts = []
        if self.owning is not None and (users is None or users):
            columns = self.owning.spec.schema.names if users is None else ["user_key", "user_id", "owner_id"]
            for part in self.owning.of_users(columns, bucket, users):
                parts.append(_as_work(part.filter(pc.not_equal(part["owner_id"], part["user_id"])), "requests"))
        return pa.concat_tables([WORK.empty_table(), *parts])

    def _merged(self, name: str, bucket: int, new: pa.Table, counts: Counter[str]) -> "Merged":
        """Joins the new rows to the table's rows of the same users, and counts them."""
        users = pc.unique(new["user_key"])
        held = self._held(name, bucket, users.to_pylist())
        rows = pa.concat_tables([WORK.empty_table(), *held, new])
        bad = WORK.empty_table()
        if name == "histories" and self.undated == "reject":
            undated = half_timed(rows) & (rows["file"].to_numpy() != OLD)
            detail = "an item without a time, whose user has items with one; see the key undated"
            bad = _as_rejects(rows.filter(pa.array(undated)), UNDATED, detail)
            rows = rows.filter(pa.array(~undated))
        fill = name == "histories" and self.undated == "neighbour"
        live, known, state = resolve(rows, _CONTENT[name], ranked=name == "histories", keep_times=fill)
        if name == "histories" and self.automatic_ids:
            came, were = (rows.filter(pa.array(state == one)) for one in (NEW, HELD))
            counts.update(dict(zip(IDS, twins(came, were, self.task.target), strict=True)))
        filled = np.zeros(len(live), bool)
        if fill:
            live, filled = fill_times(live)
            counts["undated_filled"] += int(filled.sum())
        elif name == "histories":
            counts["undated_users"] += len(pc.unique(live.filter(pa.array(half_timed(live)))["user_key"]))
        written, same, repeated = (int((state == one).sum()) for one in (NEW, SAME, REPEATED))
        counts["written"] += written
        counts["already_there"] += same + repeated
        counts["repeated"] += repeated
        counts[f"{name}_written"] += written
        what = "item_id" if name == "histories" else "request_id"
        rejects = pa.concat_tables([bad, _replaced(rows, state, what)])
        fresh = live.filter(pa.array(~known)) if known.any() else live
        if written == len(fresh) and not (known & filled).any() and not (self.derived_anew and name == "requests"):
            return Merged(live, fresh, rejects, anew=False)
        whole = self._held(name, bucket, None)
        others = [part.filter(pc.invert(pc.is_in(part["user_key"], value_set=flat(users)))) for part in whole]
        return Merged(live, pa.concat_tables([live, *others]), rejects, anew=True)

    def _without(self, name: str, merged: "Merged", gone: pa.Table, bucket: int, counts: Counter[str]) -> "Merged":
        """Takes rows out of a bucket by their keys. An item's key counts as written where it was there."""
        if not len(gone):
            return merged
        whole = merged.rows if merged.anew else pa.concat_tables([*self._held(name, bucket, None), merged.rows])
        keys = _keys(gone)
        hit = pc.is_in(_keys(whole), value_set=keys)
        removed = pc.sum(hit).as_py() or 0
        counts["items_removed" if name == "histories" else "requests_removed"] += removed
        if name == "histories":
            counts["written"] += removed
            counts["already_there"] += len(gone) - removed
        if not removed:
            return merged
        live = merged.live.filter(pc.invert(pc.is_in(_keys(merged.live), value_set=keys)))
        return Merged(live, whole.filter(pc.invert(hit)), merged.rejects, anew=True)

    def _asked(self, bucket: int, users: list[str]) -> dict[str, tuple[str | None, str | None, datetime | None]]:
        """Input, target and time of the requests that the table holds of these users, by id."""
        rows = (row for table in self._held("requests", bucket, users) for row in table.to_pylist())
        return {row["id"]: (row["input"], row["target"], row["at"]) for row in rows}

    def _held(self, name: str, bucket: int, users: list[str] | None) -> list[pa.Table]:
        """Reads the bucket's rows of these users (all when None) as working rows."""
        if name not in self.held:
            return []
        columns = self.held[name].spec.schema.names
        parts = self.held[name].of_users(columns, bucket, users)
        if self.derived_anew and name == "requests":  # only a derived request has a place in the history
            parts = (part.filter(pc.is_null(part["as_of_position"])) for part in parts)
        return [_as_work(part, name) for part in parts]

    def _reject_rows(self, bad: pa.Table, counts: Counter[str]) -> pa.Table:
        for reason in bad["reason"].to_pylist():
            counts[f"rejected:{reason}"] += 1
        given = {"job": pa.repeat("ingest", len(bad)), "run_id": pa.repeat(self.run_id, len(bad))}
        return pa.table(given | {"key": bad["place"], "reason": bad["reason"], "detail": bad["detail"]})


@dataclass(frozen=True)
class Merged:
    """New rows joined to a bucket: `live` are all rows of their users, `rows` are those of the new file."""

    live: pa.Table
    rows: pa.Table
    rejects: pa.Table
    anew: bool
    """True if the new file replaces the bucket's files."""


def replaced_items(items: pa.Table, keep_times: bool) -> pa.Table:
    """Returns the items of a source (`source_rows.ROWS`) that a later row of other content replaces, as rejects.

    Args:
        keep_times: an item without a time has the one of the row of its key before it.
    """
    rows = _as_new(items.filter(items["id"].is_valid()))
    return _replaced(rows, resolve(rows, _CONTENT["histories"], ranked=False, keep_times=keep_times)[2], "item_id")


def _replaced(rows: pa.Table, state: np.ndarray, what: str) -> pa.Table:
    found = rows.filter(pa.array(state == REPLACED))
    return _as_rejects(found, f"duplicate_{what}", f"a later row of its user has this {what}")


def _seeing(asked: pa.Table, items: pa.Table) -> int:
    """Counts requests whose time lets them see one of these items of their user; no time hides none."""
    first: dict[str, datetime | None] = {}
    for user, at in zip(items["user_key"].to_pylist(), items["at"].to_pylist(), strict=True):
        earlier = first.get(user, at)
        first[user] = None if at is None or earlier is None else min(at, earlier)
    count = 0
    for user, until in zip(asked["user_key"].to_pylist(), asked["at"].to_pylist(), strict=True):
        if user in first:
            at = first[user]
            count += until is None or at is None or at < until
    return count


def _keys(rows: pa.Table) -> pa.Array:
    """user_key + id; user_key has a fixed length, so that joined keys cannot be mistaken."""
    return flat(pc.binary_join_element_wise(rows["user_key"], rows["id"], ""))


def _with_owners(asked: pa.Table, owned: pa.Table) -> pa.Table:
    """Gives requests that name no person the one whom the table names for their history."""
    if not len(owned):
        return asked
    found = pc.index_in(asked["user_key"], value_set=flat(owned["user_key"]))
    known = pc.coalesce(owned["owner_id"].take(found), asked["owner_id"])
    owner = pc.if_else(pc.equal(asked["owner_id"], asked["user_id"]), known, asked["owner_id"])
    return asked.set_column(asked.schema.get_field_index("owner_id"), WORK.field("owner_id"), owner)


def _derived_from(gone: pa.Table) -> pa.Table:
    """Keys of the requests that are derived from these items."""
    users, items = gone["user_id"].to_pylist(), gone["id"].to_pylist()
    ids = [derived_id(user, item) for user, item in zip(users, items, strict=True)]
    at = WORK.get_field_index("id")
    return gone.set_column(at, WORK.field(at), pa.array(ids, pa.string()))


def _as_rejects(rows: pa.Table, reason: str, detail: str) -> pa.Table:
    for column, value in {"reason": reason, "detail": detail}.items():
        at = WORK.get_field_index(column)
        rows = rows.set_column(at, WORK.field(at), pa.repeat(value, len(rows)))
    at = WORK.get_field_index("place")
    # a row of the table has no place; an id made of its user and item could be made again after an erase, and confirmed
    rows = rows.set_column(at, WORK.field(at), pc.coalesce(rows["place"], rows["user_key"]))
    at = WORK.get_field_index("input")  # a reject has none
    return rows.set_column(at, WORK.field(at), pa.nulls(len(rows), WORK.field(at).type))


def _as_new(rows: pa.Table) -> pa.Table:
    rows = rows.select(ROWS.names)
    return rows.append_column(WORK.field("position"), pa.nulls(len(rows), pa.int64()))


def _as_work(table: pa.Table, name: str) -> pa.Table:
    """Converts rows of a table to working rows."""
    names = {"item_id": "id", "occurred_at": "at"} if name == "histories" else {
        "request_id": "id", "as_of": "at", "as_of_position": "position"}  # fmt: skip
    renamed = table.rename_columns([names.get(column, column) for column in table.column_names])
    known = {"file": pa.repeat(pa.scalar(OLD, pa.int32()), len(table)), "seq": pa.array(np.arange(len(table)))}
    columns = []
    for field in WORK:
        if field.name in known:
            columns.append(known[field.name])
        elif field.name in renamed.column_names:
            columns.append(renamed[field.name].cast(field.type))
        else:
            columns.append(pa.nulls(len(table), field.type))
    return pa.table(columns, schema=WORK)


def _history_rows(live: pa.Table) -> pa.Table:
    return live.select(["bucket", "user_key", "user_id", "id", "position", "at", "fields", "text_hash"]).rename_columns(
        ["bucket", "user_key", "user_id", "item_id", "position", "occurred_at", "fields", "text_hash"]
    )


def _request_rows(live: pa.Table, task: str) -> pa.Table:
    rows = live.select(["bucket", "user_key", "id", "user_id", "owner_id", "input", "at", "position", "target"])
    names = {"id": "request_id", "at": "as_of", "position": "as_of_position"}
    rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
    return rows.append_column("task", pa.repeat(task, len(rows)))
