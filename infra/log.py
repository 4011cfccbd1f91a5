"""A table's log: the entries and the metadata of its commits, and the parts of a new one.

We read the log ourselves: `DeltaTable.history()` keeps Python's lock while it waits for S3, so that nothing else in the
process moves (a server in the same process: 180 s of time-outs), and it reads the whole log.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from infra.snapshot import DataFile
from infra.storage import Storage

_LIBRARY_KEYS = frozenset(
    "timestamp operation operationParameters operationMetrics engineInfo clientVersion version readVersion "
    "isolationLevel isBlindAppend userId userName userMetadata".split()
)
ERASED = "erased"
"""Metadata key: everything written before this commit has been deleted, except files that it names."""
OWN_ROWS = "own_rows"
"""Metadata key: this commit took away rows of its own run, and of no other."""
ERASING = "erasing"
"""Metadata key: rows of erased users have gone with this commit, and the files that held them go next."""
RESTORED = "restored"
"""Metadata key: the version whose files the table holds again from this commit on."""
RUNS = "runs"
"""Metadata key: what the log says of each run up to the rows that an erase leaves (`runs`), as JSON. What the earlier
commits say counts no more: some are taken back with it, and all are deleted."""
_NOT_ROWS = ("metaData", "protocol")
_REWRITTEN_BY = "rewritten_by"
_OWN_KEYS = frozenset({"run_id", "group", "complete", _REWRITTEN_BY, ERASED, ERASING, RESTORED, OWN_ROWS, RUNS})
OF_ONE_COMMIT = (ERASED, ERASING, RESTORED, OWN_ROWS, RUNS)
"""Metadata keys that are true of one commit only: a commit that leaves the rows as they are does not repeat them."""


def entries(storage: Storage, version: int) -> list[dict[str, Any]] | None:
    """Returns a commit's entries (add, remove, commitInfo, ...), or None when the log no longer has it.

    The library removes commits beyond the table's log retention once a checkpoint stands in for them.
    """
    try:
        raw = storage.read_bytes(f"_delta_log/{version:020d}.json")
    except FileNotFoundError:
        return None
    return [json.loads(line) for line in raw.splitlines() if line.strip()]


def commit_info(actions: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the commitInfo among a commit's entries: the library's keys and our metadata."""
    return next((entry["commitInfo"] for entry in actions if "commitInfo" in entry), {})


def back_from(storage: Storage, version: int) -> Iterator[dict[str, Any]]:
    """Yields the info of each commit, with its version, newest first, as far back as the log goes."""
    while version >= 0 and (actions := entries(storage, version)) is not None:
        yield commit_info(actions) | {"version": version}
        version -= 1


def is_rewritten(info: Mapping[str, Any]) -> bool:
    """True for a commit that put another's rows into other files, and repeats its run_id."""
    return _REWRITTEN_BY in info


def has_grown(storage: Storage, since: int, until: int) -> bool:
    """Tells whether a run may have brought rows after version `since` up to `until`.

    Commits that put rows into other files, take some away or add a column bring none. Of commits that the log has lost
    nothing is known: they may have.
    """
    left = until
    for info in back_from(storage, until):
        if info["version"] <= since:
            break
        if "group" in info and not is_rewritten(info):  # a column that is added belongs to no group
            return True
        left = info["version"] - 1
    return left > since


def metadata_of(storage: Storage, version: int) -> dict[str, str]:
    """Returns the custom metadata of one commit, without the library's own keys."""
    info = commit_info(entries(storage, version) or [])
    return {key: value for key, value in info.items() if key not in _LIBRARY_KEYS}


def added(storage: Storage, version: int | None) -> set[str]:
    """Returns the paths of the files that one commit added."""
    actions = None if version is None else entries(storage, version)
    return {entry["add"]["path"] for entry in actions or [] if "add" in entry}


def kinds(storage: Storage, since: int, until: int) -> set[str]:
    """Names the kinds of commits after `since` up to `until`.

    The kinds are "append", "same rows" (in other files), "own rows" (the run took some of its own rows away) and
    "other".
    """
    kinds: set[str] = set() if since <= until else {"other"}
    for version in range(since + 1, until + 1):
        actions = entries(storage, version)
        info = commit_info(actions or [])
        if (
            actions is None
            or any(key in info for key in (ERASED, ERASING, RESTORED))
            or any(kind in entry for entry in actions for kind in _NOT_ROWS)
        ):
            kinds.add("other")
            continue
        moved = [entry[kind] for entry in actions for kind in ("add", "remove") if kind in entry]
        if moved and not any(action.get("dataChange", True) for action in moved):
            kinds.add("same rows")
        elif OWN_ROWS in info:
            kinds.add("own rows")
        else:  # a rewrite without a file says that others have to plan again
            taken = is_rewritten(info) or any("remove" in entry for entry in actions)
            kinds.add("other" if taken else "append")
    return kinds


def written_at(actions: list[dict[str, Any]]) -> float:
    """Returns the time of a commit, in seconds since 1970."""
    return float(commit_info(actions).get("timestamp", 0)) / 1000


def partition(file: DataFile) -> dict[str, str | None]:
    """Returns a file's partition values as strings, because the log takes nothing else."""
    return {} if file.bucket is None else {"bucket": str(file.bucket)}


def stats(file: DataFile) -> str:
    """Returns a file's statistics: row count and range of user_key. Without them the rows could not be counted."""
    known: dict[str, Any] = {"numRecords": file.rows}
    if file.min_key:
        known |= {"minValues": {"user_key": file.min_key}, "maxValues": {"user_key": file.max_key}}
    return json.dumps(known)


def metadata_for(given: Mapping[str, str], run_id: str, group: int, complete: bool) -> dict[str, str]:
    """Builds a commit's custom metadata: the job's own keys beside run_id, group and complete, all as strings."""
    taken = sorted(set(given) & (_LIBRARY_KEYS | _OWN_KEYS))
    if taken:
        raise ValueError(f"commit metadata key {taken[0]!r} is taken; choose another name")
    own = {"run_id": run_id, "group": str(group), "complete": "true" if complete else "false"}
    return {key: str(value) for key, value in given.items()} | own


def rewritten(below: Mapping[str, str], by: str, group: int, more: Mapping[str, str]) -> dict[str, str]:
    """Builds the metadata of a commit that puts the rows of a complete version into other files.

    It repeats the metadata of the version below, so that readers still find the run that made the rows.
    """
    kept = {key: value for key, value in below.items() if key not in OF_ONE_COMMIT}
    return kept | {"group": str(group), "complete": "true", _REWRITTEN_BY: by} | dict(more)


def is_group(info: Mapping[str, Any], run_id: str, group: int) -> bool:
    """Says whether a commit is this group of this run."""
    return info.get(_REWRITTEN_BY, info.get("run_id")) == run_id and info.get("group") == str(group)


def writer(info: Mapping[str, Any]) -> str:
    """Returns the run that made a commit; a compaction's commit also names the run whose rows it holds."""
    return str(info.get(_REWRITTEN_BY, info.get("run_id", "")))


def taken_back(storage: Storage, version: int, newest: int) -> str | None:
    """Returns the run that has restored a version older than a commit, which then no longer counts, or None."""
    until = newest
    for info in back_from(storage, newest):
        if info["version"] <= version:
            return None
        if RESTORED in info and info["version"] <= until:
            until = int(info[RESTORED])  # before it, only the commits that led to the restored version count
            if until < version:
                return writer(info)
    return None


def newest_of(storage: Storage, version: int, runs: Iterable[str], with_rows: bool = False) -> Iterator[dict[str, Any]]:
    """Yields the info of each of these runs' newest commit up to a version, with its version, newest first.

    A run of which the log knows nothing is left out. Commits that a restore has taken back do not count, and neither do
    those that put rows into other files, nor, `with_rows`, those that add no file, such as an end by itself. Of commits
    before an erase (`RUNS`) it yields run_id, version and complete.
    """
    left, until = set(runs), version
    for info in back_from(storage, version):
        if not left:
            break
        if info["version"] > until:
            continue
        if RESTORED in info:
            until = int(info[RESTORED])
        elif info.get("run_id") in left and not is_rewritten(info):
            if with_rows and not added(storage, info["version"]):
                continue
            left.remove(info["run_id"])
            yield info
        if RUNS in info:
            kind = "rows" if with_rows else "newest"
            before = [one[kind] for run, one in told(info).items() if run in left and one[kind]]
            yield from sorted(before, key=lambda at: -at["version"])
            break


def told(info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns what a commit that begins the log anew still knows of earlier runs, as `runs` returns it."""
    known: dict[str, dict[str, Any]] = json.loads(info.get(RUNS, "{}"))
    return known


def runs(storage: Storage, version: int) -> dict[str, dict[str, Any]]:
    """Collects what the log up to a version says of each run, so that it can be deleted; it reads each commit once.

    Returns:
        Run -> "said": metadata of its commits, by key the newest value that is not empty; "newest" and "rows": run_id,
        version and complete of its newest commit and of its newest one with files, as in `newest_of`, or None.
    """
    found: dict[str, dict[str, Any]] = {}
    until = version
    while version >= 0 and (actions := entries(storage, version)) is not None:
        info = commit_info(actions)
        own = {key: value for key, value in info.items() if key not in _LIBRARY_KEYS | _OWN_KEYS}
        at = {"run_id": info.get("run_id"), "version": version, "complete": info.get("complete")}
        mark = None if is_rewritten(info) else at
        one = {"said": own, "newest": mark, "rows": mark if any("add" in entry for entry in actions) else None}
        for run, said in [*([(info["run_id"], one)] if "run_id" in info else []), *told(info).items()]:
            known = found.setdefault(run, {"said": {}, "newest": None, "rows": None})
            known["said"] |= {key: known["said"].get(key) or value for key, value in said["said"].items()}
            if version <= until:
                known |= {kind: known[kind] or said[kind] for kind in ("newest", "rows")}
        if version <= until and RUNS in info:
            break
        if version <= until and RESTORED in info:
            until = int(info[RESTORED])
        version -= 1
    return found


def lost_race(error: Exception) -> bool:
    """Says whether another writer took the version number first."""
    from deltalake.exceptions import CommitFailedError

    text = str(error).lower()
    return isinstance(error, CommitFailedError) or "version" in text and ("exists" in text or "conflict" in text)
