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
from ray.util.state.exception import RayStateApiException

from infra import metrics, session
from pipelines.engines.base import Decoding, EngineConfig
from pipelines.evaluate import job as evaluate
from pipelines.generate import job as generate
from pipelines.refresh import job as refresh
from tests.pipelines import small
from tests.pipelines.test_night import ITEMS, USERS, Night, note

ALERTS_S = 30 + 10 + metrics.FLUSH_S
"""Seconds after which an alert has been computed on what a driver has recorded (prometheus.yaml)."""
REPLIES, MAX_TOKENS = 600, 64
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
    (folder / "again.yaml").write_text(
        yaml.safe_dump(again.model_dump(mode="json", exclude_none=True, exclude={"run_id", "run_dir"}))
    )
    rows = [note("user-1", f"bad-{i}") | {"user_id": ""} for i in range(5)]
    path = folder / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert night.ingest(source=str(path), task=night.notes, run_id="bad") == 3
    time.sleep(ALERTS_S)  # a driver has one series for all its ingests, and the next one would overwrite this one's


def replies(folder: Path) -> None:
    """Replies by vLLM, for a while."""
    made = small.make(folder, train_users=2, test_users=30, test_requests=REPLIES // 30)
    made.ingest("test", buckets=2)
    engine = EngineConfig(kind="vllm", dtype="float32", batch_rows=8, max_num_seqs=16, kv_cache_gib=1)
    config = {"tables": made.tables, "llm": made.llm, "engine": engine, "decoding": Decoding(max_tokens=MAX_TOKENS)}
    assert made.run(generate, "replies", methods=("none",), **config) == 0


def restarts(folder: Path) -> None:
    """Engines of a job that are killed at work, three times. The job is interrupted when all are there again."""
    made = small.make(folder, train_users=2, test_users=100, test_requests=60)
    made.ingest("test", buckets=2)
    threading.Thread(target=kill_engines, daemon=True).start()
    engine = EngineConfig(kind="transformers", dtype="float32", batch_rows=4)
    config = {"tables": made.tables, "llm": made.llm, "engine": engine, "decoding": Decoding(max_tokens=MAX_TOKENS)}
    try:
        made.run(generate, "restarts", methods=("none",), workers=2, wave_rows=100, **config)
        print("the job ended before its engines were killed", flush=True)
    except KeyboardInterrupt:
        pass


def kill_engines() -> None:
    """Kills each engine of this job when it has told that it lives, until three are dead; then interrupts the job."""
    mine = [("job_id", "=", ray.get_runtime_context().get_job_id()), ("state", "=", "ALIVE")]
    began, killed, until = dict[int, float](), list[int](), time.monotonic() + 600
    try:
        while time.monotonic() < until:
            now = time.monotonic()
            try:
                alive = {one.pid for one in list_actors(filters=mine) if "Reply" in one.class_name}
            except RayStateApiException:  # the head's dashboard is busy
                continue
            began = {pid: began.get(pid, now) for pid in alive}
            ready = [pid for pid, since in began.items() if now - since > metrics.FLUSH_S and pid not in killed]
            if len(killed) == KILLED and len(ready) == 2:
                break
            for pid in ready[: KILLED - len(killed)]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            time.sleep(1)
    finally:
        print(f"killed {len(killed)} engines", flush=True)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


def main(folder: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
    session.start()
    for part in (bad_nights, replies, restarts):
        (folder / part.__name__).mkdir(parents=True)
        part(folder / part.__name__)
        print(f"observed: {part.__name__}", flush=True)
    time.sleep(metrics.FLUSH_S)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
