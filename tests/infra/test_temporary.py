"""Folders among the temporary files: those of killed processes go, and no others."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from infra import temporary

MAKES = "import sys, time; from infra import temporary; f = temporary.folder('train'); print(f.name, flush=True); "


def test_what_a_killed_process_left_goes_with_the_next_of_its_kind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up once per process
    at_work = [subprocess.Popen([sys.executable, "-c", MAKES + "time.sleep(60)"], stdout=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    killed, living = (process.stdout.readline().strip() for process in at_work if process.stdout)
    at_work[0].send_signal(signal.SIGKILL)
    at_work[0].wait()
    name = os.path.basename(killed)
    assert name.startswith(f"pplug-train-{at_work[0].pid}-")
    *start, host, end = name.split("-")
    of_others = [tmp_path / "-".join([*start, "0" * len(host), end]), tmp_path / name.replace("train", "trainer")]
    for folder in of_others:  # of another machine, and of another kind
        folder.mkdir()
    try:
        with temporary.folder("adapt"):
            assert os.path.isdir(killed)
        with temporary.folder("train") as mine:
            assert not os.path.exists(killed) and os.path.isdir(living) and os.path.isdir(mine)
            assert all(folder.is_dir() for folder in of_others)
        assert not os.path.exists(mine)
    finally:
        at_work[1].kill()
        at_work[1].wait()


def test_folders_of_another_name_hold_nothing_of_users():
    """The one is a meeting place of processes, the other holds a tokenizer."""
    root = Path(temporary.__file__).parents[1]
    files = [path for part in ("infra", "pipelines") for path in (root / part).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in files if "TemporaryDirectory(" in path.read_text()}
    assert found == {"infra/temporary.py", "pipelines/adapt/group.py", "pipelines/engines/vllm.py"}
