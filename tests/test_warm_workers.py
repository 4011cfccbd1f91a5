"""Workers that are forked are workers of their own."""

import subprocess
import sys

FORKS = """
import os
from tests.warm_workers import import_with_ray
import_with_ray()
import ray
for _ in range(2):
    if os.fork() == 0:
        print("drew", ray.ObjectRef.from_random().hex(), ray.WorkerID.from_random().hex(), flush=True)
        os._exit(0)
    os.wait()
"""


def test_two_forked_workers_draw_ids_of_their_own():
    """Ray's generator is copied by a fork: two tasks of one id have ended a training in Ray's own actor."""
    run = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, check=True)
    drawn = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("drew")]
    assert len(drawn) == 2 and all(len(ids) == 2 for ids in drawn)
    assert not set(drawn[0]) & set(drawn[1])
