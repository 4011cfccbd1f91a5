"""Folders among the temporary files: those of killed processes go, and no others."""

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from infra import temporary

MAKES = (
    "import sys, time; from infra import temporary; f = temporary.folder('train'); print(f.__enter__(), flush=True); "
)


@pytest.fixture
def shared(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)  # it is looked up once per process
    return tmp_path


def test_what_a_killed_process_left_goes_with_the_next_of_its_kind(shared):
    at_work = [subprocess.Popen([sys.executable, "-c", MAKES + "time.sleep(60)"], stdout=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    killed, living = (process.stdout.readline().strip() for process in at_work if process.stdout)
    at_work[0].send_signal(signal.SIGKILL)
    at_work[0].wait()
    assert os.path.basename(killed).startswith("pplug-train-")
    of_another_kind = shared / os.path.basename(killed).replace("train", "trainer")
    of_another_kind.mkdir()
    try:
        with temporary.folder("adapt"):
            assert os.path.isdir(killed)
        with temporary.folder("train") as mine:
            assert not os.path.exists(killed) and of_another_kind.is_dir()
            assert os.path.isdir(living) and os.path.isdir(mine)
            with temporary.folder("train"):
                assert os.path.isdir(mine)
        assert not os.path.exists(mine)
    finally:
        at_work[1].kill()
        at_work[1].wait()


def test_the_lock_alone_tells_life_from_death(shared):
    held = temporary.lasting("train", str(shared))
    left = held.with_name(held.name[:-32] + f"{os.getpid():032x}")
    left.mkdir()
    with temporary.folder("train"):
        assert held.is_dir() and not left.exists()
    os.close(temporary._held.pop(held))
    with temporary.folder("train"):
        assert not held.exists()


def test_folders_of_other_hosts_and_those_that_a_user_has_named_stay(shared):
    with temporary.folder("train") as mine:
        name = os.path.basename(mine)
    own = ["pplug-train-results", "pplug-train-2024-data", "pplug-train-my-data", f"{name[:-32]}data", f"{name}.old"]
    own.append(f"pplug-train-00000000-{name[-32:]}")  # another machine's, whose locks a network disk may not show
    for one in own:
        (shared / one).mkdir()
        (shared / one / "model.safetensors").touch()
    with temporary.folder("train"):
        assert sorted(path.parent.name for path in shared.glob("*/model.safetensors")) == sorted(own)


def test_on_a_disk_without_locks_nothing_is_swept(shared, monkeypatch):
    def no_locks(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with temporary.folder("train") as one, temporary.folder("train") as other:
        assert os.path.isdir(one) and os.path.isdir(other)
    assert list(shared.iterdir()) == []


def test_folders_of_another_name_hold_nothing_of_users():
    """They are files of a model on the way to the cache, a meeting place of processes, and a tokenizer."""
    root, makes = Path(temporary.__file__).parents[1], re.compile(r"(TemporaryDirectory|mkdtemp)\(")
    files = [path for part in ("infra", "pipelines") for path in (root / part).rglob("*.py")]
    found = {str(path.relative_to(root)) for path in files if makes.search(path.read_text())}
    others = {"infra/artifacts.py", "pipelines/adapt/group.py", "pipelines/engines/vllm.py"}
    assert found == others
