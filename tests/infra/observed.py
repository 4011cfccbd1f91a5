"""The driver that test_observability.py submits: what a cluster goes through in bad nights, on tiny tables.

python -m tests.infra.observed FOLDER
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import ray

from infra import metrics, session
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from tests.pipelines import small
from tests.pipelines.test_night import ITEMS, USERS, Night, note


class Engine:
    """Stands for an actor with an engine: it says at its start whether it died before."""

    def __init__(self) -> None:
        metrics.note_restart("vllm")

    def pid(self) -> int:
        return os.getpid()


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
    rows = [note("user-1", f"bad-{i}") | {"user_id": ""} for i in range(5)]
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert night.ingest(source=str(path), task=night.notes, run_id="bad") == 3
    time.sleep(metrics.FLUSH_S)  # the next ingest of this driver would overwrite what nobody has seen yet


def replies(folder: Path) -> None:
    """Replies by vLLM."""
    made = small.make(folder, train_users=2, test_users=4, test_requests=3)
    made.ingest("test", buckets=2)
    engine = EngineConfig(kind="vllm", dtype="float32", batch_rows=4, kv_cache_gib=1)
    config = {"tables": made.tables, "llm": made.llm, "engine": engine, "decoding": Decoding(max_tokens=16)}
    assert made.run(generate, "replies", methods=("none",), **config) == 0


def restarts() -> None:
    """Three engines that die once each."""
    actor = ray.remote(num_cpus=0, max_restarts=1, max_task_retries=1)(Engine)
    engines = [actor.remote() for _ in range(3)]
    for pid in ray.get([engine.pid.remote() for engine in engines]):
        os.kill(pid, signal.SIGKILL)
    ray.get([engine.pid.remote() for engine in engines])
    time.sleep(metrics.FLUSH_S)


def main(folder: Path) -> None:
    session.start()
    for part in ("nights", "replies"):
        (folder / part).mkdir(parents=True)
    bad_nights(folder / "nights")
    replies(folder / "replies")
    restarts()
    print("observed", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
