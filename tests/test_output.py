"""The output of real jobs as a person reads it, each a process without a terminal: own lines, errors, and no noise."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pipelines.population import NOTES

ROOT = Path(__file__).parents[1]


def pplug(*words: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a job with a Ray of its own, or that of an address, whose workers' output comes back."""
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PPLUG_DEBUG")}
    env |= {} if address is None else {"RAY_ADDRESS": address}
    env |= {"PPLUG_WORKER_LOGS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.run(
        [sys.executable, "-m", "pipelines", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )


@pytest.fixture(scope="module")
def ingested(tmp_path_factory):
    """The folder and the ended process of a small ingest."""
    folder = tmp_path_factory.mktemp("output")
    rows = [
        {"user_id": f"own-id-{i % 5}", "item_id": str(i), "fields": {"text": f"own text {i}", "mood": "good"}}
        for i in range(20)
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "task.yaml").write_text(yaml.safe_dump(NOTES))
    words = ("--source", str(folder / "notes.jsonl"), "--task", str(folder / "task.yaml"), "--buckets", "2")
    done = pplug(
        "ingest", "--tables", str(folder / "tables"), *words, "--run-id", "in", "--run-dir", str(folder / "in")
    )
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_small_job_says_its_steps_and_its_end_and_nothing_else(ingested):
    folder, done = ingested
    *summary, end = done.stdout.splitlines()
    assert re.fullmatch(r"ingest done: 20 written, .*; report: \S+/report.json", end)
    assert summary == [
        "ingest: files 1, rows 20, users 5, items 20, requests 0",
        "ingest: items with a time 0, without one 20",
        "ingest: items per label: good 20",
    ]
    log, *waited, step, warning = done.stderr.splitlines()  # a line every 30 s, on a machine that takes so long
    assert all(re.match(r"ingest, parse and merge: \d of 2 buckets \(\d+%\)", line) for line in waited)
    assert warning.startswith("ingest: warning: no item has a time, ")
    assert log == f"ingest: run in, log: {folder / 'in' / 'job.log'}"
    assert re.fullmatch(r"ingest, parse and merge: 2 of 2 buckets in [\d.]+ s( \([\d.]+ buckets/s\))?", step)
    said = (folder / "in" / "job.log").read_text()
    assert all(line in said for line in (*done.stdout.splitlines(), step))
    assert "own-id" not in said and "own text" not in said


def test_a_job_whose_output_nobody_reads_any_more_goes_on_to_its_end(tmp_path):
    """As in `... | head -1`."""
    words = [sys.executable, "-m", "pipelines", "plan", "--users", "1000"]
    with open(tmp_path / "errors", "w") as errors:
        job = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors)
        assert job.stdout is not None
        job.stdout.close()
        assert job.wait(60) == 0
    assert (tmp_path / "errors").read_text() == ""


@pytest.fixture
def damaged(ingested):
    """Tables in which one file of the histories is not what it should be; whole again afterwards."""
    folder, _ = ingested
    path = max((folder / "tables" / "histories").rglob("*.parquet"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(b"PAR1 not a table PAR1")
    yield folder
    path.write_bytes(content)


def test_a_failed_job_ends_with_one_line_and_with_debug_it_shows_the_traceback(damaged):
    words = ("base-lm", "--tables", str(damaged / "tables"), "--output", str(damaged / "lm"), "--run-id", "lm")
    log = damaged / "lm-run" / "job.log"
    done = pplug(*words, "--run-dir", str(damaged / "lm-run"))
    assert done.returncode == 1 and not done.stdout
    began, step, line = done.stderr.splitlines()
    assert began.endswith(f"log: {log}") and step.startswith("base-lm, read: broke off")
    broken = (
        r"failed: \S+\.parquet: not a readable Parquet file .*; restore it .* \(ValueError at infra/snapshot.py:\d+\)"
    )
    assert re.match(f"base-lm: {broken}; run_id=lm begins anew: it keeps no checkpoint", line) and line.endswith(
        f" {log}"
    )
    assert "Traceback" in log.read_text()

    shown = pplug(*words, "--run-dir", str(damaged / "lm-run"), "--debug")
    assert shown.returncode == 1 and "Traceback" in shown.stderr
    assert shown.stderr.splitlines()[-1].startswith("base-lm: failed: ")


def test_an_error_in_a_worker_ends_the_job_with_one_line_too(damaged, ray_address):
    words = ("--tables", str(damaged / "tables"), "--run-dir", str(damaged / "refresh"))
    done = pplug("refresh", *words, address=ray_address)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout and '  File "' not in done.stderr + done.stdout
    assert re.match(r"refresh: failed: \S+\.parquet: not a readable Parquet file", done.stderr.splitlines()[-1])
    assert "Traceback" in (damaged / "refresh" / "job.log").read_text()
