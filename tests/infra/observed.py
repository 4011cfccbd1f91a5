"""The driver that test_observability.py submits: what a cluster goes through in bad nights, on tiny tables.

python -m tests.infra.observed FOLDER
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import ray
import yaml
from ray.util.state import list_actors

from infra import metrics, session
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.refresh import job as refresh
from tests.pipelines import small
from tests.pipelines.test_night import ITEMS, USERS, Night, note

KILLED = 3
"""One more than the alert lets pass."""


def bad_nights(folder: Path) -> None:
    """Too many rejects; personas made anew again and again; personas that move far."""
    night = Night(folder)
    night.ingest_items(ITEMS, run_id="first")  # a submission's id would stand for one ingest alone
    for items in (3, 2, 1, 2, 1, 3):
        assert night.refresh(f"night-{items}-{time.monotonic()}", max_history_items=items) == 0
    before = night.table("personas").version
    night.ingest_items([note(user, "9", text=USERS[0] * 3, day=25) for user in USERS], run_id="second")
    assert night.refresh("moved", max_history_items=1) == 0
    versions = (before, night.table("personas").version)
    config = evaluate.Config(tables=night.tables, drift=versions, drift_threshold=1e-6, run_dir=str(folder / "drift"))
    assert evaluate.run(config) == 0
    again = refresh.Config(tables=night.tables, task=night.notes, encoder=night.encoder, max_history_items=1)
    (folder / "again.yaml").write_text(yaml.safe_dump(again.model_dump(mode="json", exclude_none=True)))
    rows = [note("user-1", f"bad-{i}") | {"user_id": ""} for i in range(5)]
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert night.ingest(source=str(path), task=night.notes, run_id="bad") == 3
    time.sleep(metrics.FLUSH_S)  # the next job of this driver would overwrite what nobody has seen yet


def replies(folder: Path) -> None:
    """Replies by vLLM, for a while."""
    made = small.make(folder, train_users=2, test_users=30, test_requests=10)
    made.ingest("test", buckets=2)
    engine = EngineConfig(kind="vllm", dtype="float32", batch_rows=8, max_num_seqs=16, kv_cache_gib=1)
    config = {"tables": made.tables, "llm": made.llm, "engine": engine, "decoding": Decoding(max_tokens=64)}
    assert made.run(generate, "replies", methods=("none",), **config) == 0


def restarts(folder: Path) -> None:
    """Three engines of one job that are killed at work, once each. The job answers everything all the same."""
    made = small.make(folder, train_users=2, test_users=60, test_requests=20)
    made.ingest("test", buckets=2)
    killer = threading.Thread(target=kill_engines)
    killer.start()
    engine = EngineConfig(kind="transformers", dtype="float32", batch_rows=4)
    config = {"tables": made.tables, "llm": made.llm, "engine": engine, "decoding": Decoding(max_tokens=64)}
    assert made.run(generate, "restarts", methods=("none",), workers=KILLED, wave_rows=100, **config) == 0
    killer.join()


def kill_engines() -> None:
    """Kills each engine of this job, once all are there."""
    mine = [("job_id", "=", ray.get_runtime_context().get_job_id()), ("state", "=", "ALIVE")]
    until = time.monotonic() + 300
    while time.monotonic() < until:
        engines = [one for one in list_actors(filters=mine) if "Replies" in one.class_name]
        if len(engines) == KILLED:
            break
        time.sleep(0.5)
    time.sleep(5)
    for engine in engines:
        os.kill(engine.pid, signal.SIGKILL)
    print("killed", [engine.pid for engine in engines], flush=True)


def main(folder: Path) -> None:
    session.start()
    for part in (bad_nights, replies, restarts):
        (folder / part.__name__).mkdir(parents=True)
        part(folder / part.__name__)
        print(f"observed: {part.__name__}", flush=True)
    time.sleep(metrics.FLUSH_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
