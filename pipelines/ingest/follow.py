"""A Delta table as live source: what has come to it since the last ingest of it, and what has gone.

The version that an ingest has read stands in the metadata of the histories' commit, by the table's own id, so that a
restored table of histories is followed from the version that it holds. Where requests are committed after them, it
counts only once it stands in the requests' commit too. Between that version and the newest one:
- Files were only added: these files are read, and nothing has gone.
- Files were removed too, and the table keeps a change data feed: the rows of the feed are read.
- Files were removed without a feed, or the table has deletion vectors or mapped columns, so that its files do not lie
  there as its rows: the table is read as a whole; rows that are there already count as such.
Gone are the keys (user_id, item_id) of the old version that the new one no longer has, worked out from both versions
whatever the feed says: a row that was moved or written again has not gone. Where a night does not remove what has gone,
the old version is noted, so that a later night that removes compares with it too.
Beside the version stands the part of the users that was read. Rows of other users are not read again, so that tables
follow a table for one part alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeAlias
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from infra import addresses
from infra.errors import InputError
from infra.lines import is_line
from infra.shards import shard_columns, user_key
from infra.snapshot import Snapshot
from infra.storage import Storage, retrying
from pipelines.ingest.gone import KEYS, Comparison, comparison, keys_of, no_keys, only_moved, refuse_missing
from pipelines.ingest.sources.base import Kind, is_access_error
from pipelines.ingest.sources.delta import files_of, in_order, rows_of
from pipelines.ingest.sources.discover import File, Source
from pipelines.ingest.users import UserChoice, user_hashes
from pipelines.ingest.values import text_of

if TYPE_CHECKING:
    from deltalake import DeltaTable

FOLLOWED = "followed"
"""Key in the metadata of a commit: version that was read of each followed table, by the table's id."""
FOLLOWED_BEFORE = "followed_before"
"""Key of histories beside it: versions read before (null: none), which count until the requests' commit is there."""
FOLLOWED_GONE = "followed_gone"
"""Key beside them: by the table's id, versions that were read and some of whose rows have gone from it since, without
`apply_deletes`. Where requests are committed after histories, the list counts that stands in the requests' commit."""
FOLLOWED_PART = "followed_part"
"""Key beside them: by the table's id, the `Part` of the users who were read. Earlier releases noted none."""
NOTED = (FOLLOWED, FOLLOWED_BEFORE, FOLLOWED_GONE, FOLLOWED_PART)
"""Keys that each later commit takes over."""
CHANGED_ROWS = "changed-rows.parquet"
GONE_ITEMS, GONE_USERS = "gone-items.jsonl", "gone-users.txt"
"""Files in the run folder with the keys of items that have gone, and with the users who have no item left, neither in
the followed table nor from elsewhere in the histories."""
Compared: TypeAlias = Callable[[], AbstractContextManager[Comparison]]
"""Opens a comparison with the newest version's keys."""


class Part(NamedTuple):
    """Users of whom a table is followed: those with a hash in [low, high), as `UserChoice` keeps them."""

    name: str = ""
    low: int = 0
    high: int = UserChoice().high

    @classmethod
    def of(cls, parts: Mapping[str, float], part: str | None) -> Self:
        """Returns the part of a config; without one, all users."""
        choice = UserChoice.of(parts, part, None) or UserChoice()
        return cls(part or "", choice.low, choice.high)

    @property
    def shares(self) -> tuple[float, float]:
        """Begin and end among all users, without what shares that are added in another order differ by."""
        return round(self.low / ALL_USERS.high, 9), round(self.high / ALL_USERS.high, 9)

    def among(self, keys: pa.Table) -> pa.Table:
        """Returns the keys (user_id, item_id) of these users."""
        hashes, _ = user_hashes(pa.table({"user_key": shard_columns(keys["user_id"], 1)[1]}))
        return keys.filter(pa.array(UserChoice(self.low, self.high).within(hashes)))

    def __str__(self) -> str:
        if self.shares == (0, 1):
            return "all users"
        return f"part {self.name}, the shares from {self.shares[0]:g} to {self.shares[1]:g} of the users"


ALL_USERS = Part()


@dataclass(frozen=True)
class Changes:
    """Changes of a followed table: the files to read, and the keys that have gone."""

    table_id: str
    version: int
    """Version that is read; the next run goes on from it."""
    since: int | None
    """Version of the last ingest; None where there was none."""
    files: tuple[File, ...] | None
    """Files that are read; None for the table as a whole."""
    gone: pa.Table
    """Keys that have gone, as ids of the histories."""
    gone_users: tuple[str, ...]
    """Users among them of whom the table has no item any more; the job `erase` is for them."""
    words: str
    """Sentence on what is read."""
    unapplied: tuple[int, ...] = ()
    """Versions of earlier ingests whose rows have gone and were not removed."""
    applied: bool = False
    """True if this ingest removes what has gone, of those versions too."""
    part: Part = ALL_USERS
    """Users who are read."""

    @property
    def figures(self) -> dict[str, Any]:
        """Figures for the run's report."""
        span = {"version": self.version, "since": self.since, "words": self.words}
        return {"followed": span | {"items_gone": len(self.gone), "users_gone": len(self.gone_users)}}

    def sources(self, run_dir: str, apply_deletes: bool) -> dict[Kind, Source]:
        """Sources that take the table's place: none where it is read as a whole."""
        found: dict[Kind, Source] = {} if self.files is None else {"items": Source(self.files)}
        if apply_deletes and len(self.gone):
            storage = Storage(run_dir)
            found["gone"] = Source((File(storage.uri, GONE_ITEMS, "jsonl", storage.size(GONE_ITEMS)),))
        return found

    def followed(self, before: Mapping[str, str], requests_follow: bool = False) -> dict[str, str]:
        """Metadata of a commit, with the versions of other tables kept; `requests_follow` says that this is the commit
        of histories and that of requests comes next."""
        known, earlier = _versions(before), _versions(before, FOLLOWED_BEFORE)
        earlier.pop(self.table_id, None)
        found = {FOLLOWED: known | {self.table_id: self.version}}
        if requests_follow or earlier:
            found[FOLLOWED_BEFORE] = earlier | ({self.table_id: self.since} if requests_follow else {})
        left = list(self.unapplied)
        if not requests_follow:  # else the commit that comes next says so
            left = [] if self.applied else [*left, self.since] if self.since is not None and len(self.gone) else left
        gone = _versions(before, FOLLOWED_GONE) | {self.table_id: left}
        if gone := {table_id: versions for table_id, versions in gone.items() if versions}:
            found[FOLLOWED_GONE] = gone
        found[FOLLOWED_PART] = _versions(before, FOLLOWED_PART) | {self.table_id: self.part}
        return {key: json.dumps(versions, sort_keys=True) for key, versions in found.items()}


def _versions(metadata: Mapping[str, str], key: str = FOLLOWED) -> dict[str, Any]:
    return json.loads(metadata.get(key, "{}"))


def _last_read(histories: Mapping[str, str], requests: Mapping[str, str], table_id: str) -> int | None:
    known, earlier = _versions(histories).get(table_id), _versions(histories, FOLLOWED_BEFORE)
    if table_id in earlier and _versions(requests).get(table_id) != known:  # stopped between the two commits
        return earlier[table_id]
    return known


def _unapplied(histories: Mapping[str, str], requests: Mapping[str, str], table_id: str) -> tuple[int, ...]:
    known, later = _versions(histories).get(table_id), table_id in _versions(histories, FOLLOWED_BEFORE)
    newest = requests if later and _versions(requests).get(table_id) == known else histories
    return tuple(_versions(newest, FOLLOWED_GONE).get(table_id, ()))


def find_changes(
    address: str, before: Mapping[str, str], columns: Mapping[str, str], run_dir: str,
    requests_before: Mapping[str, str] | None = None, apply_deletes: bool = False, part: Part = ALL_USERS,
) -> Changes:  # fmt: skip
    """Compares a Delta table with the version of its last ingest.

    Args:
        before, requests_before: metadata of the newest commits of histories and of requests.
        columns: column of the table for each of our names.
        run_dir: folder for `CHANGED_ROWS`.
        apply_deletes: what has gone will be removed, and with it what went in earlier nights and was not.
        part: users who are read; what has gone is told of them alone.

    Raises:
        InputError: no Delta table with such columns is there, it is followed for others, or the disk has no room.
        OSError: the files cannot be reached; only files that are no longer there count as vacuumed.
    """
    table = _opened(address)
    table_id, version = _checked_id(address, table, before, part), table.version()
    since = _last_read(before, requests_before or {}, table_id)
    unapplied = _unapplied(before, requests_before or {}, table_id)
    late = unapplied if apply_deletes else ()
    names = [columns.get(name, name) for name in KEYS]

    def changes(files: Sequence[File] | None, words: str, gone: pa.Table | None = None, left: Any = ()) -> Changes:
        gone, kept = no_keys() if gone is None else gone, None if files is None else tuple(files)
        return Changes(table_id, version, since, kept, gone, tuple(left), words, unapplied, apply_deletes, part)

    if since is None:
        return changes(None, f"version {version} of the table is read as a whole: no earlier ingest has followed it")
    if since == version and not late:
        return changes((), f"the table is still at version {version}: nothing is read")
    try:
        old = _opened(address, since)
        before_files, now_files = files_of(old), files_of(table)
    except InputError:
        lost = f"version {since}, the last that was read, is no longer in the table's log"
        return changes(None, f"version {version} is read as a whole ({lost}): rows that have gone cannot be told")
    plain = isinstance(rows := rows_of(table, Storage(address)), pads.Dataset)
    added = [_file(address, now_files[path]) for path in in_order(now_files) if path not in before_files]
    only_added = plain and before_files.keys() <= now_files.keys()
    what_is_new = f"{_span(since, version)} only added rows: {len(added)} new files are read"
    if only_added and not late:
        return changes(added, what_is_new)
    refuse_missing(rows.schema, names, address)
    compared = partial(comparison, table, names, address, now_files.keys() & before_files.keys())
    moved = only_moved(address, since, version)
    try:
        gone, left, lost = (no_keys(), [], "") if moved and not late else _what_went(compared, old, late, address, part)
    except OSError as error:  # a vacuum has removed the old files
        if is_access_error(error):
            raise
        return changes(None, f"version {version} is read as a whole: the files of version {since} are no longer there, "
                             "so that rows that have gone cannot be told")  # fmt: skip
    if since == version:
        return changes((), f"the table is still at version {version}: no row is read{lost}", gone, left)
    if only_added:
        return changes(added, what_is_new + lost, gone, left)
    feed, words = _changed(table, since, names, plain, None if moved else compared, run_dir)
    return changes(None if feed is None else (feed,), words + lost, gone, left)


def _checked_id(address: str, table: "DeltaTable", before: Mapping[str, str], part: Part) -> str:
    """Returns a table's id, and refuses one whose rows before the changes were read of other users."""
    table_id = str(table.metadata().id)
    noted = _versions(before, FOLLOWED_PART).get(table_id)
    if noted is not None and (known := Part(*noted)).shares != part.shares:
        raise InputError(
            f"{address}: these tables follow it for {known}, and this ingest is for {part}: changes alone are "
            "read, so that earlier rows of the other users would be missing; give the part and the shares of before, "
            "or ingest into new tables"
        )
    return table_id


def _changed(
    table: "DeltaTable", since: int, names: Sequence[str], plain: bool, compared: Compared | None, run_dir: str
) -> tuple[File | None, str]:
    """Returns the file to read of versions that changed rows, None for the table as a whole, and words on it.

    Args:
        plain: the files of the newest version tell its rows.
        compared: opens a comparison with the newest version; None if no row has gone.
    """
    version, span = table.version(), _span(since, table.version())
    if not plain:
        return None, (
            f"version {version} is read as a whole: the table has deletion vectors or mapped columns, so that its "
            f"files do not tell the rows of {span}"
        )
    feed = _feed(table, since, version, names, compared, run_dir)
    if feed is None:
        return None, (
            f"version {version} is read as a whole: {span} changed rows, and the table has no change data feed of them"
        )
    return feed, f"{span} changed rows: those of the change data feed are read"


def _span(since: int, version: int) -> str:
    return f"versions {since + 1} to {version}" if version > since + 1 else f"version {version}"


def write_gone(
    changes: Changes, run_dir: str, tables: str, apply_deletes: bool, histories: Snapshot | None = None
) -> None:
    """Writes what has gone into the run folder, keys as JSON lines and users as `erase --users` takes them, and says
    so with counts alone. Users who have other items in `histories` are not listed: `erase` would take these too."""
    storage = Storage(run_dir)
    print(f"ingest: {changes.words}", flush=True)
    if not len(changes.gone):
        return
    items, place = len(changes.gone), storage.full(GONE_ITEMS)
    done = "they are removed" if apply_deletes else "--apply-deletes removes them"
    print(f"ingest: {items} items have gone from the table ({place}): {done}", flush=True)
    others = _with_other_items(changes, histories)
    alone = [user for user in changes.gone_users if user not in others]
    listed = [user for user in alone if is_line(user)]
    if listed:
        print(
            f"ingest: {len(listed)} users have no item there any more, and no other in the histories: erase them from "
            f"all tables with `erase --tables {tables} --users {storage.full(GONE_USERS)}`",
            flush=True,
        )
    if others:
        print(
            f"ingest: {len(others)} users have no item there any more, but others in the histories, from other sources "
            "or gone in earlier nights and not removed: they are not listed, because `erase` would take all of it",
            flush=True,
        )
    if odd := len(alone) - len(listed):
        print(
            f"ingest: {odd} users without any item have ids that no line of a list can hold (white space around them, "
            f"a line break): erase each with `erase --user-id`, by the ids in {place}",
            flush=True,
        )
    lines = BytesIO()
    for batch in changes.gone.to_batches(max_chunksize=65_536):  # an object in Python takes ten times the bytes
        lines.write("".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in batch.to_pylist()).encode())
    storage.write_bytes(GONE_ITEMS, lines.getvalue())
    storage.write_bytes(GONE_USERS, "".join(f"{user}\n" for user in listed).encode())


def _with_other_items(changes: Changes, histories: Snapshot | None) -> set[str]:
    """Users of whom the table has no item any more, and of whom the histories hold items that have not gone from it."""
    if histories is None or not changes.gone_users:
        return set()
    held = histories.read(list(KEYS), user_keys=[user_key(user) for user in changes.gone_users])
    others = held.join(changes.gone, list(KEYS), join_type="left anti")
    return set(others["user_id"].to_pylist())


def forget_rows(run_dir: str) -> None:
    """Removes the rows of a change data feed, once they are in the tables."""
    storage = Storage(run_dir)
    if storage.exists(CHANGED_ROWS):
        storage.delete(CHANGED_ROWS)


def _opened(address: str, version: int | None = None) -> "DeltaTable":
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    storage = Storage(address)
    addresses.refuse_misread(storage.uri)
    try:
        return retrying(
            lambda: DeltaTable(storage.uri, version=version, storage_options=storage.delta_options()),
            f"opening the Delta table {address}",
        )
    except (DeltaError, OSError) as error:
        if version is not None and is_access_error(error):  # the version may well be there
            raise
        of = "" if version is None else f"version {version} of "
        raise InputError(
            f"{address}: {of}the table cannot be read as a Delta table ({type(error).__name__}); --follow takes the "
            "folder of one Delta table"
        ) from error


def _file(address: str, action: Mapping[str, Any]) -> File:
    partition = {name: value for name, value in action.items() if name.startswith("partition.")}
    texts = ((name.removeprefix("partition."), text_of(value)) for name, value in partition.items())
    return File(Storage(address).uri, unquote(action["path"]), "parquet", action["size_bytes"], tuple(texts))


def _what_went(
    compared: Compared, old: "DeltaTable", late: Sequence[int], address: str, part: Part
) -> tuple[pa.Table, list[str], str]:
    """Returns the part's keys that went after the old version or one of the earlier ones, its users of whom nothing is
    left, and words on those earlier versions that can no longer be read."""
    lost = list[str]()
    with compared() as asked:
        asked.ask_version(old)
        for version in late:
            try:
                asked.ask_version(_opened(address, version))
            except (InputError, OSError) as error:
                if is_access_error(error):
                    raise
                lost.append(str(version))
        gone, users = asked.missing()
    gone = part.among(gone)
    mine = set(pc.unique(gone["user_id"]).to_pylist())
    users = [user for user in users if user in mine]
    if not lost:
        return gone, users, ""
    words = f"; what went after version {', '.join(lost)} cannot be told, because it can no longer be read"
    return gone, users, words


def _feed(
    table: "DeltaTable", since: int, version: int, names: Sequence[str], compared: Compared | None, run_dir: str
) -> File | None:
    """Writes the rows that the change data feed has after a version, in the order of their commits and each as its last
    commit left it; None without a feed of all these versions."""
    if table.metadata().configuration.get("delta.enableChangeDataFeed", "").lower() != "true":
        return None
    try:
        rows = pa.table(table.load_cdf(starting_version=since + 1, ending_version=version))
    except Exception:  # the library has no one kind for a feed that began later, was vacuumed or cannot be found
        return None
    columns = pa.schema(table.schema().to_arrow())
    kind, commits = rows["_change_type"].cast(pa.string()), rows["_commit_version"]
    order = pc.sort_indices(commits)
    order = order.filter(pc.is_in(kind, value_set=pa.array(["insert", "update_postimage"])).take(order))
    rows = rows.select(columns.names).cast(columns)  # views of texts, which the feed has, cannot be sorted or written
    rows, commits = rows.take(order), commits.take(order)
    ids = keys_of(rows, names)
    keys = _joined(ids)
    newest = pa.table({"key": keys, "commit": commits}).group_by("key").aggregate([("commit", "max")])
    last = newest["commit_max"].take(pc.index_in(keys, value_set=newest["key"].combine_chunks()))
    # A row is not read as it was before a later commit, nor where it has come and gone again.
    stays = pc.equal(commits, last)
    if compared is not None:
        with compared() as asked:
            asked.ask(ids.drop_null())
            missing, _ = asked.missing()
        stays = pc.and_(stays, pc.invert(pc.is_in(keys, value_set=_joined(missing))))
    stays = pc.or_kleene(pc.is_null(keys), stays)  # a row without a key is a reject, and no silent loss
    storage = Storage(run_dir)
    with storage.open_output(CHANGED_ROWS) as out:
        pq.write_table(rows.filter(stays), out, compression="zstd")
    return File(storage.uri, CHANGED_ROWS, "parquet", storage.size(CHANGED_ROWS))


def _joined(keys: pa.Table) -> pa.Array:
    return pc.binary_join_element_wise(*(keys[name].combine_chunks() for name in KEYS), "\0")
