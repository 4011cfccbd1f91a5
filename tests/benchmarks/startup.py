"""`python -m pipelines --help` against its limit of one second. That it loads nothing heavy: tests/test_imports.py."""

import subprocess
import sys
from pathlib import Path

from tests.benchmarks.measure import Found, Given, Line, in_turn, seconds

LIMIT_S = 1.0
ROOT = Path(__file__).resolve().parents[2]


def run(given: Given) -> Found:
    def started(*words: str) -> float:
        command = [sys.executable, "-m", "pipelines", *words, "--help"]
        return seconds(lambda: subprocess.run(command, cwd=ROOT, check=True, capture_output=True))

    started(), started("refresh")  # the files lie in the system's cache on every later start
    sides = {"--help": started, "refresh --help": lambda: started("refresh")}
    found = in_turn(sides, max(3, given.rounds))
    limit = [LIMIT_S] * len(found["--help"])
    first = Line("python -m pipelines --help", "the limit", "seconds", found["--help"], limit, most=1.0)
    job = Line("python -m pipelines refresh --help", "the same", "seconds", found["refresh --help"], limit)
    return Found([first, job], {"starts a round": 1, "files": "in the system's cache"})
