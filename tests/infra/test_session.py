"""The Ray session: enough logical CPUs on a small machine, and a plain word when something can never be scheduled."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from infra import session
from infra.errors import InputError
from infra.table import DataFile, Table

ROOT = Path(__file__).parents[2]


def test_a_local_session_has_more_cpus_than_its_train_workers():
    assert session.local_cpus(None, {}) >= 4
    assert session.local_cpus(None, {"CPU": 30}) >= 30
    assert session.local_cpus(64, {"CPU": 2.5}) >= 64


def test_a_block_may_take_twelve_hours_and_a_run_that_hangs_ends_nevertheless(monkeypatch):
    from ray.data import DataContext
    from ray.data._internal.execution.no_progress_guard import NoProgressGuard
    from ray.data.exceptions import ExecutionTimeoutError

    monkeypatch.delenv("RAY_DATA_EXECUTION_NO_PROGRESS_TIMEOUT_S", raising=False)
    before = DataContext.get_current()
    try:
        DataContext._set_current(DataContext())
        session._data_defaults()
        hours = [0, 12, 48]
        context = DataContext.get_current()
        guard = NoProgressGuard({}, context.execution_no_progress_timeout_s, clock=lambda: hours[0] * 3600.0)
        hours.pop(0)
        guard.check()
        hours.pop(0)
        with pytest.raises(ExecutionTimeoutError):
            guard.check()
        # a model of some gigabytes is no issue: Ray would say so every half minute
        assert context.issue_detectors_config.high_memory_detector_config.detection_time_interval_s == -1
    finally:
        DataContext._set_current(before)


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ({"GPU": 2}, "needs 2 GPU; the cluster has 0 GPU: it could never be scheduled"),
        ({"CPU": 8, "GPU": 1.5}, "needs 8 CPU, 1.5 GPU; the cluster has 4 CPU, 0 GPU"),
        ({"CPU": 4}, None),
        ({}, None),
    ],
)
def test_what_the_cluster_cannot_give_is_refused_with_both_numbers(need, message):
    have = {"CPU": 4.0, "memory": 1e9}
    if message is None:
        return session.check(need, have)
    with pytest.raises(InputError, match=message):
        session.check(need, have)


def test_a_cluster_that_grows_is_waited_for(monkeypatch, capsys):
    monkeypatch.setenv("PPLUG_CLUSTER_GROWS", "1")
    session.check({"GPU": 2}, {"CPU": 4})
    assert "needs 2 GPU" in capsys.readouterr().err


def test_a_cluster_that_does_not_answer_is_named():
    # in a process of its own: one that already has a Ray session keeps it
    done = subprocess.run(
        [sys.executable, "-c", "from infra import session; session.start()"],
        env=os.environ | {"RAY_ADDRESS": "127.0.0.1:1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "InputError: RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in done.stderr


def test_a_real_session_runs_what_fits_and_refuses_what_never_will(monkeypatch, tmp_path, spec, rows):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(InputError, match="needs 2 GPU; the cluster has 0 GPU"):
        session.start(need={"GPU": 2}, object_store_bytes=100 * 2**20)
    try:
        first = ray.get_runtime_context().gcs_address
        session.start(need={"CPU": 3})  # the session is there already
        assert ray.cluster_resources()["CPU"] >= 4 and ray.get_runtime_context().gcs_address == first
        session.start(need={"CPU": 99})  # a later job of this process wants more
        assert ray.cluster_resources()["CPU"] == 99
        table = Table.create(str(tmp_path / "things"), spec, 4)
        # Tables travel to workers, file metadata comes back: the shape of every job.
        write = ray.remote(lambda data: [file.to_row() for file in table.write(data, "run")])
        done = ray.get([write.remote(rows(bucket=b, n=b)) for b in range(2)])
        files = [DataFile.from_row(row) for part in done for row in part]
        table.commit(files, run_id="run", group=0, mode="append", planned_on=0, complete=True)
        assert sorted(table.snapshot(complete=True).read()["n"].to_pylist()) == [0, 0, 1, 1]
    finally:
        session.stop()
        session.stop()
    assert not ray.is_initialized()


def test_a_session_in_which_a_job_of_another_thread_may_be_at_work_is_not_ended():
    done, own = threading.Event(), threading.current_thread()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        assert session._in_use([own, other], own) and session._in_use([own], other)
        assert not session._in_use([own], own) and not session._in_use([], own)
    finally:
        done.set()
        other.join()
    assert not session._in_use([own, other], own)


def test_a_session_of_another_thread_or_of_somebody_else_is_kept_and_a_job_that_needs_more_refused(monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    done, begun = threading.Event(), threading.Event()

    def job() -> None:
        session.start(object_store_bytes=100 * 2**20)
        begun.set()
        done.wait()

    other = threading.Thread(target=job)
    other.start()
    try:
        assert begun.wait(120)
        address = ray.get_runtime_context().gcs_address
        with pytest.raises(InputError, match="needs 99 CPU"):
            session.start(need={"CPU": 99})
        done.set()
        other.join()
        monkeypatch.setattr(session, "_local", None)  # this process has not started it
        with pytest.raises(InputError, match="needs 99 CPU"):
            session.start(need={"CPU": 99})
        assert ray.get_runtime_context().gcs_address == address
    finally:
        done.set()
        other.join()
        session.stop()


def without_ray():
    """This process's environment, without what tells Ray of a cluster or of uv."""
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")}


def driver(code, env, cwd):
    """A process of its own with a Ray session: its exit code and its output."""
    return subprocess.run(
        [sys.executable, "-c", code], env=without_ray() | env, cwd=cwd, capture_output=True, text=True, timeout=240
    )


def test_the_address_of_a_job_server_is_answered_with_the_right_command():
    done = driver("from infra import session; session.start()", {"RAY_ADDRESS": "http://127.0.0.1:8265"}, ROOT)
    assert "InputError: RAY_ADDRESS=http://127.0.0.1:8265: that is the address of a cluster's job server" in done.stderr
    assert "`ray job submit --address http://127.0.0.1:8265 --working-dir . -- python -m pipelines ...`" in done.stderr


UNDER_UV = """
import subprocess, sys
code = '''
from infra import session
import ray
session.start(object_store_bytes=100 * 2**20)
print("workers of", ray.get(ray.remote(lambda: __import__("sys").executable).remote()))
session.stop()
'''
sys.exit(subprocess.run([PYTHON, "-c", code], timeout=200).returncode)
"""


def test_under_uv_run_workers_are_those_of_this_environment(tmp_path):
    """Ray looks for an ancestor called `uv run`; this one only has the name, and a worker started through it fails."""
    (tmp_path / "run").write_text(UNDER_UV.replace("PYTHON", repr(sys.executable)))
    done = subprocess.run(
        ["uv", "run", "python"], executable=sys.executable, cwd=tmp_path, env=without_ray() | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"workers of {sys.executable}" in done.stdout
