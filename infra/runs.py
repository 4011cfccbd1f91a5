"""The record of a run's input, written down beside the tables: a run_id stands for one piece of work.

A rerun under the same run_id goes on where that run stopped. The same run_id with other input would find the first
input's commits and take its own rows for written, so it is refused, and both inputs are named. The record is there
before the run's first commit and outlives a kill: `_runs/<run_id>/<job>-<digest of the input>.json`, one per job.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from infra.errors import InputError
from infra.storage import Storage

FOLDER = "_runs"
_SHOWN = 3
"""Number of differences that an error lists."""


def begin(
    root: str, run_id: str, job: str, given: Mapping[str, str], named: Sequence[str], kept: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes down the input that a run begins with, or finds that it began with the same.

    Args:
        root: folder of the tables.
        given: everything that decides the run's rows, in words, by key. Two runs with the same words do the same.
        named: addresses of the input, for the error; the same content at another address is the same input.
        kept: facts of the first start that a rerun needs; not compared.

    Returns:
        `kept` of the first start.

    Raises:
        InputError: a run of this job and run_id began with other input.
    """
    storage, folder = Storage(root), f"{FOLDER}/{run_id}"
    words = json.dumps(sorted(given.items()))
    mine = f"{folder}/{job}-{hashlib.blake2b(words.encode(), digest_size=8).hexdigest()}.json"
    # Lists of pairs: an erase takes out entries of lists, and a file may be called after a user.
    record = {"job": job, "run_id": run_id, "named": list(named), "given": sorted(given.items()), "kept": dict(kept)}
    found = _records(storage, folder, job)
    wrote = not found
    if wrote:  # put down first, then looked for others': of two that begin at once at least one sees the other
        storage.write_bytes(mine, json.dumps(record, indent=1).encode())
        found = _records(storage, folder, job)
    others = [said for name, said in found.items() if name != mine]
    if others:
        if wrote:
            storage.delete(mine)
        raise InputError(_refusal(storage.uri, record, others[0]))
    return found.get(mine, record)["kept"]


def _records(storage: Storage, folder: str, job: str) -> dict[str, dict[str, Any]]:
    found = {}
    for name in storage.list(folder, recursive=False):
        if name.startswith(f"{folder}/{job}-") and name.endswith(".json"):
            try:
                found[name] = json.loads(storage.read_bytes(name))
            except FileNotFoundError:  # taken back while we looked
                continue
    return found


def _refusal(root: str, new: dict[str, Any], old: dict[str, Any]) -> str:
    before, now = dict(old["given"]), dict(new["given"])
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    shown = "; ".join(
        f"{key}: {before.get(key, 'not there')}, now {now.get(key, 'not there')}" for key in keys[:_SHOWN]
    )
    more = f"; and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return (
        f"{root}: run {new['run_id']} of {new['job']} began with {', '.join(old['named'])}, and this one with the same "
        f"run_id would read {', '.join(new['named'])} ({shown}{more}): rows of the one would be taken for rows of the "
        "other; go on with what the run began with, or give another run_id"
    )
