"""SIGTERM in a block that is asked first: it may end by itself, and is ended where it does not."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ("while not asked: time.sleep(.01)", ["asked", "ended by itself", "Terminated"]),
        ("while True: time.sleep(.01)", ["asked", "Terminated"]),
        ("while not asked: time.sleep(.01)\nraise ValueError", ["asked", "Terminated"]),
        ("ask = None\nraise ValueError", ["ValueError"]),
    ],
)
def test_a_block_is_asked_once_and_the_process_is_then_ended(block, said):
    script = f"""
import time
from infra import stopping
stopping.ASKED_S, asked = 0.5, []
stopping.install()
def ask():
    asked.append(1)
    print("asked", flush=True)
try:
    with stopping.asking(ask):
        print("ready", flush=True)
{textwrap.indent(block, " " * 8)}
        print("ended by itself", flush=True)
except BaseException as error:
    print(type(error).__name__, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    if "asked" in said:
        process.send_signal(signal.SIGTERM)
    out = process.stdout.read()  # not `communicate`, which loses what came together with the first line
    process.wait(timeout=60)
    assert out.split("\n")[:-1] == said


def test_after_sigterm_the_wait_for_the_metrics_leaves_time_for_the_log():
    script = """
import time
from infra import metrics, stopping
stopping.GRACE_S, stopping.REST_S = 6.0, 5.0
metrics.are_exported = lambda: True  # as in a session of a cluster
stopping.install()
asked = []
try:
    with stopping.asking(lambda: asked.append(1)):
        print("ready", flush=True)
        while not asked: time.sleep(.01)
finally:
    began = time.monotonic()
    metrics.let_go()
    print("the log is copied", time.monotonic() - began < 2, flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said = process.stdout.read()
    process.communicate(timeout=60)
    assert said == "the log is copied True\n"


def test_outside_such_a_block_sigterm_ends_the_process_at_once():
    script = (
        "import time; from infra import stopping; stopping.install()\n"
        "with stopping.asking(lambda: print('asked')): pass\n"
        "print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert "Terminated" in error and time.monotonic() - began < 30
