"""The last words of a process that did not start."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import subprocess, sys
from pipelines.engines.last_words import LastWords
with LastWords() as words:
    subprocess.run([sys.executable, "-c", "print('(Engine pid=7) ERROR x.y.OddError: no such head 64', flush=True); "
                    "import sys; sys.stderr.write('x.EngineDeadError: see above\\\\n')"])
    found = words.error()
print("FOUND", found, flush=True)
"""


def test_the_last_error_of_a_child_is_kept_and_all_is_passed_on():
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": root}
    )
    assert "FOUND OddError: no such head 64" in done.stdout, done.stderr
    assert "(Engine pid=7) ERROR x.y.OddError" in done.stdout and "EngineDeadError: see above" in done.stderr
