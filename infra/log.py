"""What stands in a table's log: a commit's own entries, what it said, and the parts of a new one.

The log is read by us and not through `DeltaTable.history()`: that keeps Python's lock while it waits for S3, so that
nothing else in the process moves (a server in the same process: 180 s of time-outs), and it reads the log whole.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from infra.snapshot import DataFile
from infra.storage import Storage

_LIBRARY_KEYS = frozenset(
    "timestamp operation operationParameters operationMetrics engineInfo clientVersion version readVersion "
    "isolationLevel isBlindAppend userId userName userMetadata".split()
)
ERASED = "erased"
"""In what a commit said: everything written before it has been deleted if no version named it."""
OWN_ROWS = "own_rows"
"""In what a commit said: it took away rows of its own run, and of no other."""
ERASING = "erasing"
"""In what a commit said: rows of erased users have gone, and the files that held them go next."""
RESTORED = "restored"
"""In what a commit said: the version whose files the table holds again from here on."""
_NOT_ROWS = ("metaData", "protocol")
_REWRITTEN_BY = "rewritten_by"
_OWN_KEYS = frozenset({"run_id", "group", "complete", _REWRITTEN_BY, ERASED, ERASING, RESTORED, OWN_ROWS})
OF_ONE_COMMIT = (ERASED, ERASING, RESTORED, OWN_ROWS)
"""What is true of one commit only, and is not said again by one that leaves the rows as they are."""


def entries(storage: Storage, version: int) -> list[dict[str, Any]] | None:
    """A commit's entries (add, remove, commitInfo, ...); None when the log no longer has it.

    The library removes commits beyond the table's log retention once a checkpoint stands in for them.
    """
    try:
        raw = storage.read_bytes(f"_delta_log/{version:020d}.json")
    except FileNotFoundError:
        return None
    return [json.loads(line) for line in raw.splitlines() if line.strip()]


def commit_info(said: list[dict[str, Any]]) -> dict[str, Any]:
    return next((entry["commitInfo"] for entry in said if "commitInfo" in entry), {})


def back_from(storage: Storage, version: int) -> Iterator[dict[str, Any]]:
    """What each commit said, with its version, newest first, as far back as the log goes."""
    while version >= 0 and (found := entries(storage, version)) is not None:
        yield commit_info(found) | {"version": version}
        version -= 1


def metadata_of(storage: Storage, version: int) -> dict[str, str]:
    """The custom metadata of one commit, without the library's own keys."""
    said = commit_info(entries(storage, version) or [])
    return {key: value for key, value in said.items() if key not in _LIBRARY_KEYS}


def added(storage: Storage, version: int | None) -> set[str]:
    """Paths of the files that one commit added."""
    found = None if version is None else entries(storage, version)
    return {entry["add"]["path"] for entry in found or [] if "add" in entry}


def kinds(storage: Storage, since: int, until: int) -> set[str]:
    """What the commits after `since` up to `until` did: "append", "same rows" in other files, "own rows" (some of the
    committing run's own rows are gone), or "other"."""
    found: set[str] = set() if since <= until else {"other"}
    for version in range(since + 1, until + 1):
        said = entries(storage, version)
        own = commit_info(said or [])
        if (
            said is None
            or any(key in own for key in OF_ONE_COMMIT)
            or any(kind in entry for entry in said for kind in _NOT_ROWS)
        ):
            found.add("other")
            continue
        actions = [entry[kind] for entry in said for kind in ("add", "remove") if kind in entry]
        if actions and not any(action.get("dataChange", True) for action in actions):
            found.add("same rows")
        elif OWN_ROWS in commit_info(said):
            found.add("own rows")
        else:
            found.add("other" if any("remove" in entry for entry in said) else "append")
    return found


def written_at(said: list[dict[str, Any]]) -> float:
    """When a commit was made, in seconds since 1970."""
    return float(commit_info(said).get("timestamp", 0)) / 1000


def partition(file: DataFile) -> dict[str, str | None]:
    """A file's partition values, as strings: the log takes nothing else."""
    return {} if file.bucket is None else {"bucket": str(file.bucket)}


def stats(file: DataFile) -> str:
    """The library takes a file without them, and its rows then cannot be counted; the only column is user_key."""
    known: dict[str, Any] = {"numRecords": file.rows}
    if file.min_key:
        known |= {"minValues": {"user_key": file.min_key}, "maxValues": {"user_key": file.max_key}}
    return json.dumps(known)


def metadata_for(given: Mapping[str, str], run_id: str, group: int, complete: bool) -> dict[str, str]:
    """A commit's custom metadata: the job's own keys beside run_id, group and complete; all values strings."""
    taken = sorted(set(given) & (_LIBRARY_KEYS | _OWN_KEYS))
    if taken:
        raise ValueError(f"commit metadata key {taken[0]!r} is taken; choose another name")
    own = {"run_id": run_id, "group": str(group), "complete": "true" if complete else "false"}
    return {key: str(value) for key, value in given.items()} | own


def rewritten(below: Mapping[str, str], by: str, group: int, more: Mapping[str, str]) -> dict[str, str]:
    """What a commit says that puts the rows of a complete version into other files: all that the run below had said."""
    kept = {key: value for key, value in below.items() if key not in OF_ONE_COMMIT}
    return kept | {"group": str(group), "complete": "true", _REWRITTEN_BY: by} | dict(more)


def is_group(said: Mapping[str, Any], run_id: str, group: int) -> bool:
    """Whether a commit is this group of this run."""
    return said.get(_REWRITTEN_BY, said.get("run_id")) == run_id and said.get("group") == str(group)


def writer(said: Mapping[str, Any]) -> str:
    """The run that made a commit; a compaction's commit also names the run whose rows it holds."""
    return str(said.get(_REWRITTEN_BY, said.get("run_id", "")))


def taken_back(storage: Storage, version: int, newest: int) -> str | None:
    """The run that has restored a version older than a commit, which then no longer counts; None if there is none."""
    until = newest
    for said in back_from(storage, newest):
        if said["version"] <= version:
            return None
        if RESTORED in said and said["version"] <= until:
            until = int(said[RESTORED])  # what counts before it is the line that led there
            if until < version:
                return writer(said)
    return None


def lost_race(error: Exception) -> bool:
    """Whether another writer took the version number first."""
    from deltalake.exceptions import CommitFailedError

    text = str(error).lower()
    return isinstance(error, CommitFailedError) or "version" in text and ("exists" in text or "conflict" in text)
