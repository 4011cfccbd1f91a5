"""Record of the begin of a training: its config and the tables' versions. A later start of the run goes on with them.

`<run_dir>/<run_id>.begun.json` is written before the first worker starts. `erase` reads it too: a killed training
leaves checkpoints and no report, but has learned from the users of these tables.
"""

import json
from collections.abc import Mapping
from typing import Any

from infra.errors import InputError
from infra.snapshot import Snapshot
from infra.storage import Storage

TASK = "task_entry"
"""Key of the entry of the task that is learned, which records of earlier releases lack."""
QUERY_ENCODER = "query_encoder_id"
"""Key of the encoder that a plug without vectors learns queries from, which records of earlier releases lack."""


def versions(run_dir: str, run_id: str) -> dict[str, int]:
    """Versions of the tables that a run of this name began with, whatever it was; empty where there is none."""
    storage, name = Storage(run_dir), f"{run_id}.begun.json"
    known = json.loads(storage.read_bytes(name)) if storage.exists(name) else {}
    found: dict[str, int] = known.get("tables", {})
    return found


def read(run_dir: str, job: str, run_id: str, decisive: Mapping[str, Any]) -> dict[str, int]:
    """Versions of the tables that this run began with; empty when it begins now.

    Args:
        decisive: all that decides what comes out of the run, as JSON.

    Raises:
        InputError: it began as another job or with another config, whose checkpoint would not fit or would mix two
            trainings.
    """
    storage, name = Storage(run_dir), f"{run_id}.begun.json"
    if not storage.exists(name):
        return {}
    known = json.loads(storage.read_bytes(name))
    if known.get("job") != job:
        raise InputError(f"run {run_id} in {run_dir} began as job {known.get('job')}, not {job}; give another --run-id")
    before, now = known["config"], json.loads(json.dumps(dict(decisive)))
    unknown = {TASK, QUERY_ENCODER} - before.keys()
    changed = [key for key in {**now, **before} if key not in unknown and before.get(key) != now.get(key)]
    if changed or "tables" not in known:
        key = (changed or ["version"])[0]
        raise InputError(
            f"run {run_id} in {run_dir} began with another {key}: {json.dumps(before.get(key))}, now "
            f"{json.dumps(now.get(key))}; go on with the config it began with, or give another --run-id"
        )
    versions: dict[str, int] = known["tables"]
    return versions


def write(run_dir: str, job: str, run_id: str, decisive: Mapping[str, Any], snapshots: Mapping[str, Snapshot]) -> None:
    """Records what a later start of this run goes on with; a record that is there stays."""
    storage, name = Storage(run_dir), f"{run_id}.begun.json"
    if not storage.exists(name):
        versions = {table: snapshot.version for table, snapshot in snapshots.items()}
        content = {"job": job, "run_id": run_id, "config": dict(decisive), "tables": versions}
        storage.write_bytes(name, json.dumps(content, indent=2).encode())
